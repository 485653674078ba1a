"""The optimizer's step, and its moments in 8 bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


# Adam (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1) with decoupled weight decay (Loshchilov &
# Hutter 2019, arXiv:1711.05101, algorithm 2), for a gradient g scaled by s:
#   m <- b1 m + (1 - b1) s g
#   v <- b2 v + (1 - b2) (s g)^2
#   w <- (1 - lr wd) w - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
# The roundings belong to the meaning: every implementation makes these, in this order. They are
# those of torch.optim.AdamW(fused=True) on a CPU with fused multiply-add, in all of a tensor but
# the last few elements, fewer than a vector.
def adamw(
    weights: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: float | Tensor,
    learning_rate: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """New (weights, exp_avg, exp_avg_sq) in the weights' dtype, float32 or float64; nothing is
    changed in place. Coefficients are computed in float64, then rounded to that dtype."""

    def rounded(x: float | Tensor) -> Tensor:
        return torch.as_tensor(x, dtype=torch.float64, device=weights.device).to(weights.dtype)

    step, learning_rate = (torch.as_tensor(x, dtype=torch.float64) for x in (step, learning_rate))
    beta1, beta2 = betas
    g = grads.to(weights.dtype) * rounded(grad_scale)
    mix = rounded(1 - beta1)
    # The second form gives exactly g for a beta1 of 0.
    c, start = (mix, exp_avg) if mix < 0.5 else (mix - 1, g)
    exp_avg = _fused(c, g - exp_avg, start)
    exp_avg_sq = _fused(rounded(1 - beta2) * g, g, rounded(beta2) * exp_avg_sq)
    root = rounded((1 - beta2**step) ** 0.5)
    size = rounded(-learning_rate / (1 - beta1**step))
    # To the nearest by way of float64; torch's own in float32 is MKL's, which rounds otherwise.
    deviation = exp_avg_sq.double().sqrt().to(weights.dtype)
    change = size * exp_avg / (deviation / root + rounded(eps))
    weights = rounded(1 - learning_rate * weight_decay) * weights + change
    return weights, exp_avg, exp_avg_sq


# Moments in 8 bits: blocks of 256 elements that lie side by side, the last may be shorter, with one
# float32 number each, the largest magnitude M in it (after Dettmers et al. 2022, arXiv:2110.02861,
# section 2). A magnitude a is kept as its code
#   round(n f(a / M)),   f(x) about x^(1/4), f(0) = 0, f(1) = 1
# n is 127 for exp_avg, with a sign, and 255 for the root of exp_avg_sq, of which none becomes 0
# that was not. f goes through float32's bits as if they were a logarithm, which they nearly are,
# and so takes no root; its inverse is exact. Near the largest, numbers change by up to 3.1 % and
# 1.6 %, at a 1e-4th of it by 20 % and 11 %. (Codes of less range, as in arXiv:2602.23349, lose
# more: bench/notes/cpu.md.)
MOMENT_BLOCK = 256
_LARGEST_MOMENT = 2.0**126  # what is beyond, or NaN, makes its block NaN
_ONE = 0x3F800000  # the bits of 1
_SHIFT = _ONE - (_ONE >> 2)


def quantize_moments(exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(int8, uint8, scales float32 `[2, blocks]`) of float32 moments of one shape."""
    mean, of_mean = _quantized(exp_avg, 127)
    root, of_root = _quantized(exp_avg_sq.double().sqrt().float(), 255)  # to the nearest, as above
    root = torch.where(exp_avg_sq > 0, root.clamp(min=1), root)
    return mean.to(torch.int8), root.to(torch.uint8), torch.stack((of_mean, of_root))


def dequantize_moments(
    exp_avg: Tensor, exp_avg_sq: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """The float32 moments that are kept so."""
    root = _dequantized(exp_avg_sq, scales[1], 255)
    return _dequantized(exp_avg, scales[0], 127), root * root


def _quantized(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    count = x.numel()
    blocks = F.pad(x.flatten(), (0, -count % MOMENT_BLOCK)).view(-1, MOMENT_BLOCK)
    # Of no block there is no largest.
    scales = blocks.abs().amax(1) if count else blocks.new_empty(0)
    scales = torch.where(scales <= _LARGEST_MOMENT, scales, torch.nan)
    # The inverse of a subnormal number may be infinite: such a block is as good as 0.
    inverse = torch.where(scales >= 2.0**-126, 1 / scales, 0.0)
    bits = (blocks.abs() * inverse[:, None]).view(torch.int32).clamp(max=_ONE)  # NaN too
    part = ((bits >> 2) + _SHIFT).view(torch.float32)
    codes = (part * most).round()
    codes = torch.where(blocks < 0, -codes, codes)
    return codes.flatten()[:count].view(x.shape), scales


def _dequantized(codes: Tensor, scales: Tensor, most: int) -> Tensor:
    part = codes.float().abs() * torch.tensor(1 / most, dtype=torch.float32, device=codes.device)
    bits = (part.view(torch.int32).clamp(min=_SHIFT) - _SHIFT) << 2
    scale = scales.repeat_interleave(MOMENT_BLOCK)[: codes.numel()].view(codes.shape)
    return bits.view(torch.float32).copysign(codes) * scale


def _fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a b + c, in float32 rounded once: in float64 the product is exact, and a sum rounded to an
    odd last bit rounds to float32 as the exact one does (Boldo & Melquiond 2008,
    doi:10.1109/TC.2007.70819). In float64 rounded twice."""
    if c.dtype == torch.float64:
        return a * b + c
    product, c = a.double() * b.double(), c.double()
    total = product + c
    of_c = total - product
    error = (product - (total - of_c)) + (c - of_c)  # of that sum, exactly (Knuth)
    even = (total.view(torch.int64) & 1) == 0
    towards = torch.where(error > 0, torch.inf, -torch.inf).double()
    odd = torch.where((error.abs() > 0) & even, torch.nextafter(total, towards), total)
    return odd.float()
