"""Memory of a CPU that is taken again, rather than anew from the system each time."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Have malloc keep what torch frees, for the whole process.

    By default, glibc gives every block of 32 MiB or more back to the system. The next tensor of
    that size comes page by page, each with a fault that takes several times as long as writing the
    page. On a GPU, torch keeps freed memory itself. Returns False, and changes nothing, where the
    C library is another.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
