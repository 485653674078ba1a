"""`make sanitize`: the op tests and some of the fuzz on kernels built with AddressSanitizer and
UBSan, on each instruction set, and the thread pool and the heap under ThreadSanitizer.

The sanitized build has a folder of its own, build/sanitize. Before its silence is believed, faults
are planted that must be reported: a kernel writes past the end of an output, reads a number at an
address that no number of its dtype may have, and two threads count in one number.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.resolve()
BUILD = ROOT / "build" / "sanitize"
PACKAGES = BUILD / "packages"
COMPILER = os.environ.get("CXX", "c++")
TESTS = (
    "gae", "logprob", "linear_logprob", "ppo_loss", "policy_objectives", "pairwise_loss",
    "decode_attention", "rotary_embedding", "sample", "rms_norm", "packed_linear", "adamw",
    "swiglu",
)  # fmt: skip
FUZZ_CASES = 200


def main() -> None:
    build()
    environment = sanitized()
    for fault, report in (("write", "heap-buffer-overflow"), ("misaligned", "misaligned address")):
        must_report((report, "pairwise_loss.cpp"), [sys.executable, __file__, fault], environment)
    races()
    isas = run([sys.executable, __file__, "isas"], environment, capture=True).split()
    for isa in isas:
        say(f"the op tests on {isa}")
        files = [str(ROOT / "tests" / f"test_{name}.py") for name in TESTS]
        pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        # Triton's interpreter is none of ours, and slow; so are billions of logits here.
        run(
            [*pytest, "-k", "not triton and not beyond_32_bits", *files],
            environment | {"PPO_KERNELS_ISA": isa},
        )
    say(f"{FUZZ_CASES} random cases of each op on {', '.join(isas)}")
    run([sys.executable, "-m", "fuzz", "--exact-memory", "--cases", str(FUZZ_CASES)], environment)
    say("no errors")


def build() -> None:
    say("build")
    shutil.rmtree(PACKAGES, ignore_errors=True)
    run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(BUILD),
         "--build-lib", str(PACKAGES)],
        {**os.environ, "PPO_KERNELS_SANITIZE": "1"},
    )  # fmt: skip
    if not list(PACKAGES.glob("ppo_kernels/_cpu*.so")):
        raise SystemExit("sanitize: the sanitized extension was not built; the reason is above")


def sanitized() -> dict[str, str]:
    """The environment of a Python that has the sanitized kernels."""
    return {
        **os.environ,
        "PYTHONPATH": f"{PACKAGES}{os.pathsep}{ROOT / 'tests'}",
        # Python is not instrumented, so that the runtime of ASan has to be loaded before it, and
        # libstdc++ with it: or else the first C++ exception fails a check of ASan's own.
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so.6')}",
        # Python and torch leave memory to the end of the process: leaks of ours would not be seen.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Python's own small blocks would hide what lies beside them.
        "PYTHONMALLOC": "malloc",
    }


def library(name: str) -> str:
    command = [COMPILER, f"-print-file-name={name}"]
    path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    if not path.is_absolute():
        raise SystemExit(f"sanitize: {COMPILER} has no {name}; install its sanitizer libraries")
    return str(path)


def races() -> None:
    """The thread pool and the heap alone: torch is not instrumented for ThreadSanitizer."""
    say("the thread pool and the heap under ThreadSanitizer")
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread"]
    for name, source in (("races", "cpu/threads.cpp"), ("heap_check", "memory/heap.cpp")):
        program, tested = str(BUILD / name), ROOT / "csrc" / source
        sources = [f"-I{tested.parent}", str(ROOT / "tests" / f"{name}.cpp"), str(tested)]
        run([COMPILER, *flags, *sources, "-o", program], dict(os.environ))
        if name == "races":
            must_report(("data race", "races.cpp"), [program, "plant"], dict(os.environ))
        run([program], dict(os.environ))


def must_report(words: tuple[str, str], command: list[str], environment: dict[str, str]) -> None:
    """Run what plants a fault: it must fail, and say what and where."""
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    text = ", ".join(words)
    if result.returncode == 0 or not all(word in result.stderr for word in words):
        print(result.stdout, result.stderr)
        raise SystemExit(f"sanitize: a planted fault was not reported ({text})")
    say(f"a planted fault is reported: {text}")


def run(command: list[str], environment: dict[str, str], capture: bool = False) -> str:
    stdout = subprocess.PIPE if capture else None
    result = subprocess.run(command, env=environment, cwd=ROOT, stdout=stdout, text=True)
    if result.returncode:
        raise SystemExit(f"sanitize: failed with exit status {result.returncode}: {command}")
    return result.stdout or ""


def say(text: str) -> None:
    print(f"--- sanitize: {text}", flush=True)


# --- In a process that has the sanitized kernels --------------------------------------------------


def plant(fault: str) -> None:
    """Hand the kernel of `pairwise_loss` memory that is not what it says."""
    import numpy
    import torch
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode

    from ppo_kernels import pairwise_loss

    memory = torch.zeros(9)

    def floats(count: int, address: int) -> Tensor:
        return torch.from_numpy(
            numpy.ctypeslib.as_array((ctypes.c_float * count).from_address(address))
        )

    class OneTooFew(TorchDispatchMode):
        """An output of ten numbers gets the memory of nine."""

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.empty_like.default and list(args[0].shape) == [10]:
                return floats(10, memory.data_ptr())
            return func(*args, **(kwargs or {}))

    if fault == "write":
        with OneTooFew():
            pairwise_loss(torch.zeros(10, requires_grad=True), torch.zeros(10), impl="cpp")
    else:
        # Seven: whole vectors are loaded as bytes, which may lie anywhere.
        pairwise_loss(floats(7, memory.data_ptr() + 1), torch.zeros(7), impl="cpp")


def show_isas() -> None:
    from ppo_kernels import _cpu

    if not Path(_cpu.__file__).is_relative_to(PACKAGES):
        raise SystemExit(f"sanitize: the kernels that would be tested are {_cpu.__file__}")
    print(*_cpu.supported_isas())


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "isas":
        show_isas()
    else:
        plant(sys.argv[1])
