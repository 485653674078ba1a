"""Fused kernels for what RLHF adds to a transformer. Needs torch only."""

from ppo_kernels.dispatch import implementations
from ppo_kernels.gae import ShapedGAE, gae, kl_shaped_gae
from ppo_kernels.logprob import token_logprobs

__all__ = [
    "ShapedGAE",
    "gae",
    "implementations",
    "kl_shaped_gae",
    "token_logprobs",
]
