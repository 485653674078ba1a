"""The vector exponentials: their error over the whole range, on every instruction set."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from ppo_kernels import dispatch

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX", "c++")
X86 = platform.machine() in ("x86_64", "AMD64")
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"],
}
# As csrc/cpu/exp.h has them, in units in the last place. Without fused multiply-add, 2^(c x) also
# suffers from the rounding of c x: up to 2^6 (float) or 2^9 (double) times 1/2 ulp of 1.
BOUNDS = {"exp": 1.1, "expm1": 2.0, "exp2": 3.0}
UNFUSED = {"exp2 float": 3.0 + 64, "exp2 float, hot": 3.0 + 64, "exp2 double": 3.0 + 512}


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")
@pytest.mark.parametrize("isa", FLAGS)
def test_the_error_over_the_whole_range(isa: str, tmp_path: Path) -> None:
    if dispatch.cpu is None or isa not in dispatch.cpu.supported_isas():
        pytest.skip("not an instruction set of this machine")
    program = tmp_path / "exp_error"
    subprocess.run(
        [COMPILER, "-std=c++17", "-O2", f"-DPPO_ISA={isa}", *FLAGS[isa], "-Wno-psabi",
         "-ffp-contract=fast", "-fno-math-errno", f"-I{ROOT / 'csrc' / 'cpu'}",
         str(ROOT / "tests" / "exp_error.cpp"), "-o", str(program)],
        check=True,
    )  # fmt: skip
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    errors = {
        name: float(error) for name, error in (line.rsplit(" ", 1) for line in output.splitlines())
    }
    assert len(errors) >= 7
    for name, error in errors.items():
        bound = BOUNDS[name.split()[0]]
        if isa == "baseline" and X86:
            bound = UNFUSED.get(name, bound)
        assert error <= bound, f"{name}: {error} ulp"
        assert error > 0.4, f"{name}: {error} ulp is better than rounding: nothing was measured"
