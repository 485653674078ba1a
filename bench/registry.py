"""All cases of a device, from the file of each op."""

from __future__ import annotations

from collections.abc import Sequence

from bench import (
    adamw,
    decode_attention,
    gae,
    linear_logprob,
    logprob,
    packed_linear,
    pairwise_loss,
    ppo_loss,
    rms_norm,
    rotary_embedding,
    sample,
    swiglu,
)
from bench.case import Case

_FILES = (
    gae, logprob, linear_logprob, ppo_loss, pairwise_loss, sample, decode_attention,
    rotary_embedding, rms_norm, swiglu, packed_linear, adamw,
)  # fmt: skip


def cases(device: str, ops: Sequence[str] = (), sizes: Sequence[str] = ()) -> list[Case]:
    """Those of the ops and sizes named; without names, all."""
    return [
        case
        for file in _FILES
        for case in file.cases(device)
        if (not ops or case.op in ops) and (not sizes or case.size in sizes)
    ]
