"""Fused kernels for what RLHF adds to a transformer. Needs torch only."""

from ppo_kernels.adamw import adamw, join_master, split_master, zero_moments
from ppo_kernels.decode_attention import decode_attention
from ppo_kernels.dispatch import implementations
from ppo_kernels.gae import ShapedGAE, gae, kl_shaped_gae
from ppo_kernels.linear_logprob import linear_logprobs
from ppo_kernels.linear_ppo_loss import linear_ppo_loss
from ppo_kernels.logprob import token_logprobs
from ppo_kernels.packed_linear import PackedWeight, can_pack, pack_weight, packed_linear
from ppo_kernels.pairwise_loss import PairwiseStats, pairwise_loss, ranking_loss
from ppo_kernels.ppo_loss import PolicyStats, ValueStats, ppo_policy_loss, ppo_value_loss
from ppo_kernels.rms_norm import rms_norm
from ppo_kernels.rotary_embedding import rotary_embedding
from ppo_kernels.sample import sample
from ppo_kernels.swiglu import swiglu

__all__ = [
    "PackedWeight",
    "PairwiseStats",
    "PolicyStats",
    "ShapedGAE",
    "ValueStats",
    "adamw",
    "can_pack",
    "decode_attention",
    "gae",
    "implementations",
    "join_master",
    "kl_shaped_gae",
    "linear_logprobs",
    "linear_ppo_loss",
    "pack_weight",
    "packed_linear",
    "pairwise_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "ranking_loss",
    "rms_norm",
    "rotary_embedding",
    "sample",
    "split_master",
    "swiglu",
    "token_logprobs",
    "zero_moments",
]
