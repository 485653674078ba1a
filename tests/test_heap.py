"""The heap of large tensors on a CPU, in processes of their own: it stays once it is there."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ppo_kernels import dispatch

ROOT = Path(__file__).parent.parent
HEAP = ROOT / "csrc" / "memory" / "heap.cpp"
COMPILER = os.environ.get("CXX", "c++")
compiles = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")
pytestmark = [
    pytest.mark.skipif(dispatch.cpu is None, reason="the extension is not built"),
    pytest.mark.skipif(sys.platform != "linux", reason="for Linux only"),
    pytest.mark.skipif(
        platform.machine() == "aarch64",
        reason="torch's wheels for it have an allocator of their own",
    ),
]


def run(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@compiles
def test_random_blocks(tmp_path: Path) -> None:
    program = str(tmp_path / "heap_check")
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", "-g", "-fsanitize=undefined", "-fno-sanitize-recover=all",
         "-pthread", f"-I{HEAP.parent}", str(ROOT / "tests" / "heap_check.cpp"), str(HEAP),
         "-o", program],
        check=True,
    )  # fmt: skip
    found = subprocess.run([program], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    planted = subprocess.run([program, "wrong"], capture_output=True, text=True, check=False)
    assert planted.returncode == 1 and "a block was overwritten" in planted.stdout


# As a pass does: each layer keeps some tensors, large and small, and makes others in between.
# Prints what the process has taken, by what was in use at most.
_PASSES = """
import torch
from ppo_engine import memory

torch.set_num_threads(1)
CPU = torch.device("cpu")
assert memory.keep_freed_memory() and not memory.why_no_heap()
before = memory.used_memory(CPU)
weights = []
for _ in range(3):
    kept, bytes_kept = [], 0
    for layer in range(60):
        for size in (288, 768, 8, 480, 768):
            between = [torch.ones(1000 * x) for x in (size, 96, 768)]
            small = [torch.ones(20) for _ in range(10)]
            kept += [torch.ones(1000 * size), *small]
            bytes_kept += 4000 * size
    del between
    weights += [torch.ones(50_000) for _ in kept[::50]]  # gradients, say
    del kept
taken = memory.peak_memory(CPU) * 2**30 - before
print(taken / bytes_kept)
"""


def test_what_is_freed_is_found_again() -> None:
    assert 1 < float(run(_PASSES)) < 1.2  # 1.6 by glibc 2.36's malloc


# Several threads and forks at once; and what other libraries hold stays theirs.
_AT_ONCE = """
import os, threading
import numpy, torch
from ppo_engine import memory

torch.set_num_threads(1)
early = torch.ones(10**6)  # from malloc, to which it returns
assert memory.keep_freed_memory() and not memory.why_no_heap()
wrong = []

def use(seed):
    for i in range(1000):
        held = [torch.full(((i * 7919 + seed) % 90_000 + 30_000,), float(i)) for _ in range(4)]
        wrong.extend(x for x in held if x[0] != i or x[-1] != i)

threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
for thread in threads:
    thread.start()
for _ in range(20):
    child = os.fork()
    if not child:
        os._exit(int(torch.ones(10**6).sum()) != 10**6)
    assert os.waitpid(child, 0)[1] == 0
for thread in threads:
    thread.join()
del early
of_numpy = torch.from_numpy(numpy.ones(10**6))
of_torch = torch.ones(10**6).numpy()
memory.release_freed_memory()
assert not wrong and of_numpy.sum() == of_torch.sum() == 10**6
print("done")
"""


def test_threads_and_forks() -> None:
    assert run(_AT_ONCE) == "done"


# A reward that runs programs, say. Prints how the child ended.
_LIMITED_CHILD = """
import os, resource
import torch
from ppo_engine import memory

assert memory.keep_freed_memory() and not memory.why_no_heap()
kept = torch.ones(10**6)
child = os.fork()
if not child:
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    del kept
    bytearray(50 << 20), torch.empty(50 << 20, dtype=torch.uint8)
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""


def test_a_fork_may_limit_its_addresses() -> None:
    assert run(_LIMITED_CHILD) == "0"


_WHY_NOT = """
import sys
import torch
from ppo_engine import memory

if sys.argv[1] == "few addresses":
    import resource
    import psutil
    most = psutil.Process().memory_info().vms + psutil.virtual_memory().total
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
assert memory.keep_freed_memory() and memory.why_no_heap()
assert torch.ones(10**6).sum() == 10**6
memory.release_freed_memory()
print(memory.why_no_heap())
"""


def test_where_addresses_are_limited_malloc_stays() -> None:
    assert run(_WHY_NOT, "few addresses") == "the system refuses the addresses (ulimit -v)"


def test_a_torch_that_takes_whole_pages_says_so() -> None:
    assert "THP_MEM_ALLOC_ENABLE" in run(_WHY_NOT, "", THP_MEM_ALLOC_ENABLE="1")


@compiles
def test_another_allocator_stays(tmp_path: Path) -> None:
    """As jemalloc, and tools that watch memory."""
    (tmp_path / "other.c").write_text(
        "#define _GNU_SOURCE\n#include <stdlib.h>\n"
        "int posix_memalign(void **out, size_t alignment, size_t bytes) {\n"
        "  *out = aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);\n"
        "  return *out == NULL;\n}\n"
    )
    other = str(tmp_path / "other.so")
    subprocess.run(
        [COMPILER, "-x", "c", "-shared", "-fPIC", str(tmp_path / "other.c"), "-o", other],
        check=True,
    )  # fmt: skip
    assert "another allocator" in run(_WHY_NOT, "", LD_PRELOAD=other)
