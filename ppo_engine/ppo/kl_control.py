"""The weight of the KL penalty: fixed, or driven towards a target."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_engine.settings.schema import AdaptiveKLConfig

_MAX_ERROR = 0.2


class KLController:
    """Holds the KL coefficient as a 0-dim tensor, so that changing it recompiles nothing.

    Adaptive (Ziegler et al. 2019, arXiv:1909.08593, section 2.2):
        e = clip(KL / target - 1, -0.2, 0.2);  coef <- coef (1 + e n / horizon)
    with n the number of responses since the last update, at most the horizon.
    """

    def __init__(self, kl_coef: float, adaptive: AdaptiveKLConfig | None, device: torch.device):
        self.coef: Tensor = torch.tensor(kl_coef, dtype=torch.float32, device=device)
        self.adaptive = adaptive

    def update(self, kl: Tensor, responses: int) -> None:
        """Update with the mean KL per response (0-dim, nats) of `responses` responses."""
        if self.adaptive is None:
            return
        error = (kl / self.adaptive.target - 1).clamp(-_MAX_ERROR, _MAX_ERROR)
        # Of more responses than the horizon it would change by more, and even its sign.
        self.coef *= 1 + error * min(responses / self.adaptive.horizon, 1)
