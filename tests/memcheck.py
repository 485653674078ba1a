"""`make valgrind`: some small random cases of every op under valgrind's memcheck.

Python and torch have many reports of their own. One counts if a frame of its stack lies in the
extension, above Python's. A planted fault, a kernel that writes past the end of an output, must be
among them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

from fuzz.cases import CASES
from fuzz.shrink import failures
from sanitize import plant

from ppo_kernels import dispatch

CASES_OF_EACH = 8
EXTENSION = "ppo_kernels/_cpu."


def main() -> None:
    if shutil.which("valgrind") is None:
        print("valgrind: skipped, it is not installed")
        return
    if dispatch.cpu is None:
        raise SystemExit("valgrind: the compiled extension is not built")
    isas = [isa for isa in dispatch.cpu.supported_isas() if isa != "avx512"]  # unknown to memcheck
    tasks = [("plant", isas[-1]), *(("cases", isa) for isa in isas)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        planted, *found = pool.map(errors_of, *zip(*tasks, strict=True))
    if not any(error.startswith("InvalidWrite") for error in planted):
        raise SystemExit("valgrind: a planted write past the end of an output was not reported")
    print("valgrind: a planted write past the end of an output is reported")
    for isa, errors in zip(isas, found, strict=True):
        print(f"valgrind: {CASES_OF_EACH} cases of each op on {isa}, {len(errors)} errors")
    if any(found):
        raise SystemExit("\n".join(error for errors in found for error in errors))


def errors_of(task: str, isa: str) -> list[str]:
    """What memcheck has to say of the extension while this file does `task`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        result = subprocess.run(
            ["valgrind", "--quiet", "--error-limit=no", "--num-callers=40", "--xml=yes",
             f"--xml-file={report}", sys.executable, __file__, task],
            # Python's own small blocks would hide what lies beside them.
            env={**os.environ, "PPO_KERNELS_ISA": isa, "PYTHONMALLOC": "malloc"},
        )  # fmt: skip
        if result.returncode:
            raise SystemExit(f"valgrind: exit status {result.returncode}")
        errors = [_text(error) for error in ElementTree.parse(report).getroot().iter("error")]
        # Leaks are not looked for: a module is never unloaded, nor what it holds.
        return [e for e in errors if EXTENSION in e and not e.startswith("Leak_")]


def _text(error: ElementTree.Element) -> str:
    """Its kind, and the frames of its stack down to Python."""
    lines = [str(error.findtext("kind"))]
    for frame in error.iter("frame"):
        library = frame.findtext("obj", "")
        if "libpython" in library:
            break
        place = f"{frame.findtext('file')}:{frame.findtext('line')}"
        lines.append(f"  {frame.findtext('fn')} {place} {library}"[:200])
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "plant":
        plant("write")
    else:
        messages = [m for op in CASES for m in failures(op, range(CASES_OF_EACH), True)]
        raise SystemExit("\n".join(messages) or 0)
