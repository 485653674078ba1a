"""What launching a kernel needs on the host. Nothing here waits for the device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Arguments that nothing is specialized on: a new length compiles nothing anew. Not among them are a
# vocabulary and what is a multiple of it, a model's own: that 16 divides them makes for wide loads.
SIZES = [
    "T", "count", "inner", "seed", "prompts", "candidates",
    "offset", "top_k", "scores_row", "ranks_row", "chunks", "sequences", "steps", "counters",
    "programs", "rewards_row", "logprobs_row", "old_row", "ref_row", "advantages_row",
    "entropy_row", "weights_row", "values_row", "returns_row", "mask_row", "out_row",
]  # fmt: skip

# Pointers whose alignment is not looked at, as rows of any length start anywhere; it would gain
# nothing: what is read from the end, or under a mask, is not read wide. (The losses are not among
# those who use this: they read wide what is in one piece.)
TOKENS = [
    "rewards", "logprobs", "old_logprobs", "ref_logprobs", "values", "returns", "advantages",
    "mask", "scores", "ranks", "bootstrap", "cu_seqlens", "moments", "x",
]  # fmt: skip

# Products and sums become one operation. Explicit, as triton's default is about to change.
OPTIONS = {"enable_fp_fusion": True}

_INTERPRETED_PROCESSORS = 8


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs run side by side, in multiprocessors (compute units)."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def row(x: Tensor | None) -> int:
    """From one row of a `[B, T]` tensor to the next, in elements; 0 of a packed or absent one."""
    return 0 if x is None or x.ndim == 1 else x.stride(0)


def logit_rows(logits: Tensor) -> tuple[Tensor, int, int, int]:
    """The logits, and (inner, outer stride, inner stride) of their rows in at most two dimensions:
    a copy where the strides need more."""
    if logits.ndim > 3:
        logits = logits.flatten(0, -3)
    if logits.ndim == 3:
        return logits, max(logits.shape[1], 1), logits.stride(0), logits.stride(1)
    return logits, 1, logits.stride(0) if logits.ndim == 2 else 0, 0
