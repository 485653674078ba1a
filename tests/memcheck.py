"""`make valgrind`: some small random cases of every op under valgrind's memcheck.

Python and torch have many reports of their own. One counts if a frame of its stack lies in the
extension. A planted fault, a kernel that writes past the end of an output, must be among them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
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
    if not any("InvalidWrite" in error for error in errors_of("plant", {})):
        raise SystemExit("valgrind: a planted write past the end of an output was not reported")
    print("valgrind: a planted write past the end of an output is reported", flush=True)
    for isa in dispatch.cpu.supported_isas():
        if isa == "avx512":
            print("valgrind: avx512 skipped, memcheck does not know its instructions")
            continue
        errors = errors_of("cases", {"PPO_KERNELS_ISA": isa})
        print(f"valgrind: {CASES_OF_EACH} cases of each op on {isa}, {len(errors)} errors")
        if errors:
            raise SystemExit("\n".join(errors))


def errors_of(task: str, environment: dict[str, str]) -> list[str]:
    """What memcheck has to say of the extension while this file does `task`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        result = subprocess.run(
            ["valgrind", "--quiet", "--error-limit=no", "--num-callers=40", "--xml=yes",
             f"--xml-file={report}", sys.executable, __file__, task],
            # Python's own small blocks would hide what lies beside them.
            env={**os.environ, **environment, "PYTHONMALLOC": "malloc"},
        )  # fmt: skip
        if result.returncode:
            raise SystemExit(f"valgrind: exit status {result.returncode}")
        errors = ElementTree.parse(report).getroot().iter("error")
        return [_text(error) for error in errors if EXTENSION in _text(error)]


def _text(error: ElementTree.Element) -> str:
    frames = [
        f"  {frame.findtext('fn')} {frame.findtext('file')}:{frame.findtext('line')} "
        f"{frame.findtext('obj')}"
        for frame in error.iter("frame")
    ]
    return "\n".join([str(error.findtext("kind")), *frames])


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "plant":
        plant("write")
    else:
        messages = [m for op in CASES for m in failures(op, range(CASES_OF_EACH), True)]
        raise SystemExit("\n".join(messages) or 0)
