"""Parts of a transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ppo_kernels.reference.common import accumulated, real


# Attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1) of one query per row and head:
#   z_j = scale q k_j, capped: z <- c tanh(z / c) (Gemma 2, arXiv:2408.00118)
#   o   = sum_j e^{z_j} v_j / (sum_j e^{z_j} + e^{sink})
# over the row's keys, or the last `window` of them (Mistral 7B, arXiv:2310.06825). A key/value head
# serves several query heads (Ainslie et al. 2023, arXiv:2305.13245). The sink, one for each query
# head, is absent (-inf) or learned (gpt-oss, arXiv:2508.10925).
def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    new_keys: Tensor | None = None,
    new_values: Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`[B, Hq, Dv]`, in the query's dtype, from `[B, Hq, D]`, keys `[B, Hkv, S, D]`, values
    `[B, Hkv, S, Dv]` and lengths `[B]`; 0 where a row has no key. New keys `[B, Hkv, D]` and values
    `[B, Hkv, Dv]` are written to the rows' last places first."""
    if new_keys is not None and new_values is not None:
        write_last(keys, lengths, new_keys)
        write_last(values, lengths, new_values)
    dtype = query.dtype
    query, keys, values, sinks = accumulated(query, keys, values, sinks)
    rows, kv_heads, longest = keys.shape[:3]
    j = torch.arange(longest, device=keys.device)
    kept = j < lengths[:, None]
    if window is not None:
        kept = kept & (j >= lengths[:, None] - window)
    kept = kept[:, None, :, None]
    group = query.shape[1] // max(kv_heads, 1)
    query = query.reshape(rows, kv_heads, group, query.shape[-1])
    z = scale * query @ real(keys, kept).mT
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z.masked_fill(~kept.mT, -torch.inf)
    sink = z.new_full(z.shape[:3], -torch.inf)
    if sinks is not None:
        sink = sinks.reshape(kv_heads, group).expand_as(sink)
    p = torch.cat((z, sink[..., None]), -1).softmax(-1)[..., :-1]
    return (real(p, kept.mT) @ real(values, kept)).flatten(1, 2).to(dtype)


def write_last(slots: Tensor, lengths: Tensor, new: Tensor) -> None:
    """Write `new` `[B, Hkv, D]` to the last places of the rows that have one."""
    rows = (lengths > 0).nonzero()[:, 0]
    slots[rows, :, lengths[rows] - 1] = new[rows].to(slots.dtype)


# Root mean square norm (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4):
#   y_j = x_j / sqrt(mean x^2 + eps) (w_j + added)
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    added: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`[..., D]` in `dtype`, by default that of x, from `[..., D]` and `[D]`."""
    dtype = x.dtype if dtype is None else dtype
    x, weight = accumulated(x, weight)
    return (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (weight + added)).to(dtype)


# Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34) in GPT-NeoX's order: of the R
# numbers that are rotated, R as many as cosines, number i goes with number i + R/2.
#   o_i       = x_i cos_i - x_{i+R/2} sin_i                    for i < R/2
#   o_{i+R/2} = x_{i+R/2} cos_{i+R/2} + x_i sin_{i+R/2}
#   o_i       = x_i                                            for i >= R
def rotary_embedding(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """query `[B, Hq, T, D]` and key `[B, Hkv, T, D]`, in their dtype, over memory ordered
    `[B, T, H, D]`; from cos and sin `[B or 1, T, R]`, which are constants."""
    return _rotated(query, cos.detach(), sin.detach()), _rotated(key, cos.detach(), sin.detach())


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dtype = x.dtype
    x, cos, sin = accumulated(x, cos[:, None], sin[:, None])
    half = cos.shape[-1] // 2
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    of_a = a * cos[..., :half] - b * sin[..., :half]
    of_b = b * cos[..., half:] + a * sin[..., half:]
    rotated = torch.cat((of_a, of_b, rest), -1).to(dtype)
    return rotated.transpose(1, 2).contiguous().transpose(1, 2)


# SwiGLU (Shazeer 2020, arXiv:2002.05202, eq. 6), of the two products of its input:
#   y = gate sigmoid(gate) up
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`[...]` in the dtype of gate and up, both `[...]`."""
    dtype = gate.dtype
    gate, up = accumulated(gate, up)
    return (F.silu(gate) * up).to(dtype)


#   y = x W^T + b
def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`[..., out]` in `dtype`, from `[..., in]`, `[out, in]` and `[out]`."""
    x, weight, bias = accumulated(x, weight, bias)
    return F.linear(x, weight, bias).to(dtype)
