"""What the definitions share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp(20) is about 5e8: the loss stays finite when policies have diverged


def accumulated(*tensors: Tensor | None) -> Any:
    """All of them (a tuple) in float64 if any is, else in float32."""
    given = [x for x in tensors if x is not None]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32
    return tuple(None if x is None else x.to(dtype) for x in tensors)


def real(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where `mask`, else exactly 0 (in value and in gradient)."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


# Estimators of KL(pi, ref) from log pi - log ref (Schulman 2020, joschu.net/blog/kl-approx.html).
def kl_estimate(log_ratio: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kl_estimator must be 'k1', 'k2' or 'k3', but is {estimator!r}")


def token_mean(x: Tensor, mask: Tensor) -> Tensor:
    return real(x, mask).sum() / mask.sum().clamp(min=1)
