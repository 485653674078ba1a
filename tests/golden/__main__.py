"""Run the golden runs, and write what they give: as the record of this kind of CPU, or into a file.

PYTHONPATH=tests python -m golden [FILE]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import golden

with tempfile.TemporaryDirectory() as folder:
    found = golden.runs(Path(folder))
file = Path(sys.argv[1]) if sys.argv[1:] else golden.record_of_this_machine()
golden.save(file, found)
print(file)
