"""What each op means: plain PyTorch, one function per op, written for reading.

These functions are the specification. They take float64, are differentiable, and every kernel is
tested against them. They compute in float32 (float64 for float64 inputs), trust their arguments
(`checks` guards the public ops), and select real tokens with `torch.where` *before* any
arithmetic, so that NaN under a mask reaches neither a value nor a gradient.

Shapes: B sequences, T padded tokens, N packed tokens, P pairs, V vocabulary. Token tensors are
`[B, T]` with an optional boolean `mask` (True is a real token), or `[N]` with `cu_seqlens`
`[B+1]` and, again, an optional mask.
"""

from ppo_kernels.reference.advantages import ShapedGAE, gae, kl_shaped_gae
from ppo_kernels.reference.common import MAX_LOG_RATIO
from ppo_kernels.reference.layers import (
    decode_attention,
    packed_linear,
    rms_norm,
    rotary_embedding,
    swiglu,
    write_last,
)
from ppo_kernels.reference.logits import IGNORED_TARGET, linear_logprobs, sample, token_logprobs
from ppo_kernels.reference.losses import (
    WHITEN_EPS,
    PolicyStats,
    ValueStats,
    linear_ppo_loss,
    ppo_policy_loss,
    ppo_value_loss,
)
from ppo_kernels.reference.optimizer import (
    MOMENT_BLOCK,
    adamw,
    dequantize_moments,
    quantize_moments,
)
from ppo_kernels.reference.preferences import PairwiseStats, pairwise_loss, ranking_loss

__all__ = [
    "IGNORED_TARGET",
    "MAX_LOG_RATIO",
    "MOMENT_BLOCK",
    "WHITEN_EPS",
    "PairwiseStats",
    "PolicyStats",
    "ShapedGAE",
    "ValueStats",
    "adamw",
    "decode_attention",
    "dequantize_moments",
    "gae",
    "kl_shaped_gae",
    "linear_logprobs",
    "linear_ppo_loss",
    "packed_linear",
    "pairwise_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "quantize_moments",
    "ranking_loss",
    "rms_norm",
    "rotary_embedding",
    "sample",
    "swiglu",
    "token_logprobs",
    "write_last",
]
