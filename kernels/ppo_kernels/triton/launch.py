"""What launching a kernel takes on the host. Nothing here waits for the device."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Arguments that nothing is specialised on: a new length compiles nothing anew.
SIZES = [
    "T", "count", "chunks", "sequences", "steps", "counters", "programs", "rewards_row",
    "logprobs_row", "old_row", "ref_row", "advantages_row", "entropy_row", "weights_row",
    "values_row", "returns_row", "mask_row", "out_row",
]  # fmt: skip

# Products and sums become one operation. Said aloud, as triton's default is about to change.
OPTIONS = {"enable_fp_fusion": True}

_INTERPRETED_PROCESSORS = 8


def on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are launched on the current device: the tensors' one, inside this."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs run side by side, in multiprocessors (compute units)."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def side_by_side(x: Tensor | None) -> Tensor | None:
    """`x` with the elements of its last dimension next to each other: a copy where they are not."""
    if x is None or x.stride(-1) == 1 or x.shape[-1] <= 1:
        return x
    return x.contiguous()


def row(x: Tensor | None) -> int:
    """From one row of a `[B, T]` tensor to the next, in elements; 0 of a packed or absent one."""
    return 0 if x is None or x.ndim == 1 else x.stride(0)
