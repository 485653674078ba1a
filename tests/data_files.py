"""Data files for tests, and messages to put in them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

USER = {"role": "user", "content": "Name a color."}
BLUE = {"role": "assistant", "content": "Blue."}
RED = {"role": "assistant", "content": "Red."}


def write(tmp_path: Path, *lines: str | bytes | dict[str, Any], name: str = "data.jsonl") -> Path:
    file = tmp_path / name
    raw = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line))
        for line in lines
    ]
    content = b"\n".join(line.encode() if isinstance(line, str) else line for line in raw) + b"\n"
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return file
