"""AdamW in one pass, on float32 weights, or on bfloat16 ones with the 16 bits that are missing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_kernels import checks, dispatch, reference

OP = "adamw"
GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)

Tensors = Tensor | Sequence[Tensor]


def adamw(
    weights: Tensors,
    grads: Tensors,
    exp_avg: Tensors,
    exp_avg_sq: Tensors,
    *,
    remainder: Tensors | None = None,
    moment_scales: Tensors | None = None,
    step: float | Tensor,
    learning_rate: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float | Tensor = 1.0,
    impl: str = "auto",
) -> None:
    """One step of AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019), in place.

    Takes a tensor, or lists of as many tensors each, for which a GPU has one launch. All is
    computed in float32, with the roundings that `reference.adamw` has: every implementation gives
    the same bits, and so do float32 weights and the master weights of bfloat16 ones. They are those
    of torch.optim.AdamW(fused=True) on a CPU with FMA, but for the last few elements of a tensor,
    fewer than a vector, which torch itself rounds otherwise.

    Args:
        weights: float32, or bfloat16 with `remainder`; all of one dtype and on one device,
            contiguous.
        grads: of the weights' shapes; float32, bfloat16 or float16, all of one. Copied where they
            are not contiguous. Not changed.
        exp_avg, exp_avg_sq: float32 of the weights' shapes, contiguous; zeros before the first
            step. With `moment_scales` int8 and uint8: codes, as `zero_moments` makes them.
        remainder: int16 of the weights' shapes, contiguous: with bfloat16 weights the rest of the
            float32 master weights (`split_master`).
        moment_scales: float32 `[2, ceil(elements / 256)]` for each, contiguous, with moments in 8
            bits, the largest magnitude in each block (`reference.quantize_moments`). A step is
            taken with the new moments in float32, and rounds them to the nearest codes then. A
            number that is not finite makes NaN of its block, from the next step on.
        step: 1 for the first.
        learning_rate: 0 or more.
        betas: each in [0, 1).
        eps: 0 or more; added to the root.
        weight_decay: 0 or more; decoupled: a step first shrinks the weights by the
            learning rate times it.
        grad_scale: what gradients are multiplied by as they are read, in float32: a clip factor.
        impl: "auto", or one of `implementations()["adamw"]`.

    `step`, `learning_rate` and `grad_scale` may be 0-dim tensors. On a GPU they are read there, so
    that a CUDA graph goes on with those of its replay; their values are not checked. A graph can be
    captured once a call outside has seen the same tensors; of some 4,000 the last ones are known.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices, strides or values that do not fit.
        RuntimeError: for an `impl` that cannot run, with the reason.
    """
    lists = _Lists(*map(_listed, (weights, grads, exp_avg, exp_avg_sq, remainder, moment_scales)))
    if not _checked(lists):
        return
    first = ("weights", lists.weights[0])
    lists = lists._replace(grads=[g.contiguous() for g in lists.grads])
    settings: dict[str, Any] = {
        "step": checks.scalar(OP, "step", step, like=first, ge=1.0),
        "learning_rate": checks.scalar(OP, "learning_rate", learning_rate, like=first, ge=0.0),
        "betas": _betas(betas),
        "weight_decay": checks.number(OP, "weight_decay", weight_decay, ge=0.0),
    }
    eps = checks.number(OP, "eps", eps, ge=0.0)
    grad_scale = checks.scalar(OP, "grad_scale", grad_scale, like=first)
    impl = dispatch.resolve(OP, impl, first[1].device)
    if impl == "reference":
        _by_reference(lists, eps=eps, grad_scale=grad_scale, **settings)
    else:
        dispatch.refuse_recording(OP)
        factors = _factors(**settings)
        mixing = _mixing(settings["betas"])
        if impl == "cpp":
            dispatch.cpu.adamw(
                *lists, *factors, *mixing, eps, grad_scale, torch.get_num_threads()
            )  # fmt: skip
        else:
            dispatch.triton_kernels("adamw").adamw(lists, factors, mixing, eps, grad_scale)
    # What a graph has saved of them is no longer what it was: a backward pass is to say so.
    torch.autograd.graph.increment_version(lists.weights)


def zero_moments(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(exp_avg int8, exp_avg_sq uint8, moment_scales) before the first step, in 8 bits."""
    exp_avg, exp_avg_sq = (
        torch.zeros(weights.shape, dtype=dtype, device=weights.device)
        for dtype in (torch.int8, torch.uint8)
    )
    return (
        exp_avg,
        exp_avg_sq,
        torch.zeros(_scales_shape(weights), dtype=torch.float32, device=weights.device),
    )


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 weights as (bfloat16, the rest of their bits as int16): exactly, whatever they are.

    The bfloat16 is the nearest one, of two as near that of the larger magnitude: the bits of the
    master less those of the weight, as integers, then lie in [-0x8000, 0x7fff]. (Of two as near the
    even one would need 0x8000 too; the upper 16 bits as they are would be biased towards 0.) From
    2^127 (2 - 2^-8) on the weight is infinite, its master still exact. Every NaN becomes the same
    one. int16, not uint16: torch has few operations on the latter.
    """
    checks.tensor(OP, "master", master, (torch.float32,))
    master = master.detach()
    bits = master.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    nan = master.isnan()
    high, low = high.masked_fill(nan, 0x7FC0), low.masked_fill(nan, 0)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join_master(weights: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master weights that `split_master` made into these."""
    checks.tensor(OP, "weights", weights, (torch.bfloat16,))
    checks.tensor(
        OP, "remainder", remainder, (torch.int16,), shape=weights.shape, like=("weights", weights)
    )
    high = weights.detach().contiguous().view(torch.int16).to(torch.int32)
    return ((high << 16) + remainder).view(torch.float32)


class _Lists(NamedTuple):
    """The tensors, of each kind as many; no `remainder` with float32 weights, and no
    `moment_scales` with float32 moments."""

    weights: list[Tensor]
    grads: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    remainder: list[Tensor]
    moment_scales: list[Tensor]


def _listed(tensors: Tensors | None) -> list[Tensor]:
    if tensors is None:
        return []
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _checked(lists: _Lists) -> bool:
    """Whether there is anything to do; types, shapes, devices and strides."""
    weights = lists.weights
    if not weights and not any(lists):
        return False
    checks.tensor(OP, "weights", weights[0] if weights else None, (torch.float32, torch.bfloat16))
    first = weights[0]
    halves = first.dtype == torch.bfloat16
    if halves != bool(lists.remainder):
        raise TypeError(
            f"{OP}: remainder must be given with bfloat16 weights, and only with them, but they "
            f"are {str(first.dtype).removeprefix('torch.')}"
        )
    for name, tensors in zip(lists._fields, lists, strict=True):
        optional = name in ("remainder", "moment_scales")
        if len(tensors) != len(weights) and (tensors or not optional):
            raise ValueError(
                f"{OP}: {name} must be as many tensors as weights, {len(weights)}, but are "
                f"{len(tensors)}"
            )
    checks.tensor(OP, "grads", lists.grads[0], GRAD_DTYPES)
    of_grads = lists.grads[0].dtype
    moments = (torch.int8, torch.uint8) if lists.moment_scales else (torch.float32, torch.float32)
    dtypes = (first.dtype, of_grads, *moments, torch.int16, torch.float32)
    device, like = first.device, ("weights[0]", first)
    for name, tensors, dtype in zip(lists._fields, lists, dtypes, strict=True):
        shape_of = _scales_shape if name == "moment_scales" else _shape
        for i, x in enumerate(tensors):
            # `checks` says what is wrong, but takes several times as long: there may be hundreds.
            if not (
                type(x) in _PLAIN
                and x.dtype is dtype
                and x.shape == shape_of(weights[i])
                and x.device == device
            ):
                at = f"{name}[{i}]"
                shape = None if x is weights[i] else shape_of(weights[i])
                checks.tensor(OP, at, x, (dtype,), shape=shape, like=like)
                checks.plain(OP, **{at: x})
            if name != "grads" and not x.is_contiguous():
                raise ValueError(
                    f"{OP}: {name}[{i}] must be contiguous, as it is changed in place, but has "
                    f"strides {x.stride()} for shape {tuple(x.shape)}"
                )
    return True


def _shape(weights: Tensor) -> tuple[int, ...]:
    return tuple(weights.shape)


def _scales_shape(weights: Tensor) -> tuple[int, ...]:
    return 2, -(-weights.numel() // reference.MOMENT_BLOCK)


def _betas(betas: object) -> tuple[float, float]:
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"{OP}: betas must be two numbers, but is {betas!r}")
    beta1, beta2 = (checks.number(OP, "betas", x, ge=0.0, lt=1.0) for x in betas)
    return beta1, beta2


def _factors(
    step: Any, learning_rate: Any, betas: tuple[float, float], weight_decay: float
) -> tuple[Any, Any, Any]:
    """What depends on the step: (what weights are multiplied by, minus the step's size, the root of
    the second moments' bias correction) in float64; tensors where `step` or `learning_rate` is."""
    step, learning_rate = (
        x.to(torch.float64) if isinstance(x, Tensor) else x for x in (step, learning_rate)
    )
    return (
        1 - learning_rate * weight_decay,
        -learning_rate / (1 - betas[0] ** step),
        (1 - betas[1] ** step) ** 0.5,
    )


@functools.cache
def _mixing(betas: tuple[float, float]) -> tuple[float, bool, float, float]:
    """(c, whether b is the old mean or else the gradient, beta2, 1 - beta2): the new mean is
    c (g - m) + b. All are numbers of float32."""
    numbers = (1 - betas[0], betas[1], 1 - betas[1])
    mix, beta2, rest = torch.tensor(numbers, dtype=torch.float32, device="cpu").tolist()
    return (mix, True, beta2, rest) if mix < 0.5 else (mix - 1, False, beta2, rest)


@torch.no_grad()
def _by_reference(lists: _Lists, **settings: Any) -> None:
    for i, x in enumerate(lists.weights):
        master = join_master(x, lists.remainder[i]) if lists.remainder else x
        moments = (lists.exp_avg[i], lists.exp_avg_sq[i])
        kept = [x, *moments]
        if lists.moment_scales:
            kept.append(lists.moment_scales[i])
            moments = reference.dequantize_moments(*moments, lists.moment_scales[i])
        master, *found = reference.adamw(master, lists.grads[i], *moments, **settings)
        if lists.moment_scales:
            found = [*reference.quantize_moments(*found)]
        if lists.remainder:
            kept.append(lists.remainder[i])
            master, remainder = split_master(master)
            found.append(remainder)
        for old, new in zip(kept, (master, *found), strict=True):
            old.copy_(new)
