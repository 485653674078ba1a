"""The memory of this process: its peak, what is free, and the reuse of what is freed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
# Linux's, of this process. "5" lowers its peak to what it has now (proc(5)).
_STATUS, _CLEAR, _LOWER_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs"), "5"

_why_no_heap = "keep_freed_memory was not called"
_before: dict[str, float] = {}  # by device: the peak of all times before `begin_peak`


def keep_freed_memory() -> bool:
    """Have this process keep, on a CPU, the memory that torch frees, and use it again; for the
    whole process, from now on.

    By default, glibc gives every block of 32 MiB or more back to the system. The next tensor of
    that size comes page by page, each with a fault that takes several times as long as writing the
    page. And what glibc keeps comes to lie in pieces that fit no tensor: so those of 128 KiB and
    more get a heap of their own, where the kernels are compiled (csrc/memory/torch_memory.h). On a
    GPU, torch keeps freed memory itself. Returns False, and changes nothing, with another C
    library.
    """
    global _why_no_heap
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    kept = bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
    _why_no_heap = _give_heap()
    return kept


def _give_heap() -> str:
    """Why large tensors do not come from a heap of their own; or they do, from now on."""
    import torch  # imported here, as `--help` needs no torch

    from ppo_kernels import dispatch

    if dispatch.cpu is None:
        return "the kernels are not compiled"
    why_not = str(dispatch.cpu.keep_large_tensors())
    if not why_not and not dispatch.cpu.is_in_heap(torch.empty(2**20).data_ptr()):
        return "torch takes them from elsewhere (THP_MEM_ALLOC_ENABLE, or an allocator of its own)"
    return why_not


def why_no_heap() -> str:
    """Why large tensors have no heap of their own; nothing where `keep_freed_memory` gave them
    one."""
    return _why_no_heap


def release_freed_memory() -> None:
    """Give the system what has been kept of freed memory, wherever it lies, as after models have
    been loaded in float32; nothing where glibc does not keep it."""
    if not _why_no_heap:
        from ppo_kernels import dispatch

        dispatch.cpu.release_large_tensors()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(device: torch.device) -> float:
    """The most memory in use so far, in GiB: of the GPU, or of this process on a CPU."""
    return max(_before.get(str(device), 0.0), peak_since_begun(device))


def begin_peak(device: torch.device) -> bool:
    """Let `peak_since_begun` begin at what is in use now. False where the system cannot: on a CPU
    only Linux can, where programs that look at this one from outside then see the later peak."""
    before = peak_memory(device)
    if device.type == "cuda":
        import torch  # imported here, as `--help` needs no torch

        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            _CLEAR.write_text(_LOWER_PEAK)
        except OSError:
            return False
    _before[str(device)] = before
    return True


def peak_since_begun(device: torch.device) -> float:
    """The most memory in use since the last `begin_peak`, in GiB: of the GPU, or of this process
    on a CPU; since the start, where there was none."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "linux":
        return _peak_of_status()
    import resource  # imported here, as not every system has it

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _peak_of_status() -> float:
    """What Linux says of this process, in GiB. Its `ru_maxrss` begins at the parent's size."""
    [line] = [x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:")]
    return int(line.split()[1]) / 2**20


def free_memory(device: torch.device) -> float:
    """Bytes that could be allocated: of the GPU, or of the machine."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return float(psutil.virtual_memory().available)


def used_memory(device: torch.device) -> float:
    """Bytes that this process has: of the GPU, or of the machine."""
    if device.type == "cuda":
        import torch

        return float(torch.cuda.memory_allocated(device))
    import psutil

    return float(psutil.Process().memory_info().rss)


# In errors of no type of their own: of torch's allocator for CPUs, of cuBLAS, and of oneDNN, which
# says no more where there is no memory for a product's code.
_RAN_OUT = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "could not create a primitive",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch's error of a GPU, those of libraries, or Python's own."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    ran_out = any(known in text for known in _RAN_OUT) and "primitive descriptor" not in text
    return isinstance(error, RuntimeError) and ran_out


def give_back_freed_memory() -> None:
    """Free what only cycles hold, and give the device and the system what torch has kept of freed
    memory: another size of tensors finds room."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    release_freed_memory()
