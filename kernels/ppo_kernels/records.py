"""What a policy loss is called with, from the checks of the public ops to a kernel's launch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PolicyTensors(NamedTuple):
    """The tensors that a policy loss reads: per token, then per batch."""

    logprobs: Tensor
    entropy: Tensor | None
    old_logprobs: Tensor
    advantages: Tensor
    ref_logprobs: Tensor | None
    is_weights: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None
    moments: Tensor | None


class PolicySettings(NamedTuple):
    """The settings of a policy loss, checked, and as the kernels take them."""

    low: float
    high: float
    dual_clip: float  # infinite means none
    entropy_coef: float
    kl_coef: float
    normalizer: float | Tensor | None
    reduction: str
    kl_estimator: str
    objective: str
    ratio_level: str
