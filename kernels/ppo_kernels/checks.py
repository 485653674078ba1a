"""Every check of an op's arguments, with messages that say what was expected and what came.

Two kinds, called from two places:

- `tokens`, `per_sequence`, `tensor`, `choice` look at metadata only (type, shape, dtype, device).
  Call them in the public op: `torch.compile` traces through them.
- `number`, `scalar`, `counter`, `clip_bounds`, `boundaries` look at values. Call them where an op
  runs eagerly (in the body that `autograd.Function` and `custom_op` share), so that a compiled
  graph does not specialize on a coefficient. Values of tensors are checked only on the CPU: no
  check waits for an accelerator.

Each takes the op's name first: `checks.tokens("gae", mask, cu_seqlens, rewards=r, values=v)`.
Nothing is broadcast: shapes must be equal.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ppo_kernels import dispatch

FLOAT_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
INDEX_DTYPES = frozenset((torch.int32, torch.int64))


def tokens(
    op: str,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    needs_sequences: bool = True,
    optional: Mapping[str, Tensor | None] | None = None,
    **named: Tensor | None,
) -> None:
    """Floating-point per-token tensors in one layout: `[B, T]`, or `[N]` with `cu_seqlens`.

    The first of `named` sets shape and device for the others; of the `optional` ones None is
    skipped. An op that does not need the boundaries of sequences (`needs_sequences=False`) also
    takes `[N]` alone.
    """
    for name, x in named.items():
        if x is None:
            tensor(op, name, x)  # raises
    given = named if optional is None else {**named, **optional}
    # A fast check that all is right; the rest finds what is wrong.
    looks = dispatch.cpu is not None and not torch.compiler.is_compiling()
    if looks and dispatch.cpu.tokens_fit(mask, cu_seqlens, needs_sequences, *given.values()):
        return
    first_name, first = next(iter(named.items()))
    tensor(op, first_name, first)
    assert first is not None
    shape, device = first.shape, first.device
    if cu_seqlens is not None:
        if len(shape) != 1:
            raise ValueError(
                f"{op}: {first_name} must be [N] where cu_seqlens is given, but has shape "
                f"{tuple(shape)}"
            )
        _cu_seqlens(op, cu_seqlens, device, first_name)
    elif len(shape) != 2 and (needs_sequences or len(shape) != 1):
        raise ValueError(
            f"{op}: {first_name} must be [B, T], or [N] with cu_seqlens, but has shape "
            f"{tuple(shape)}"
        )
    for name, x in given.items():
        if x is None or x is first:
            continue
        tensor(op, name, x)
        _like(op, name, x, shape, device, first_name)
    if mask is not None:
        tensor(op, "mask", mask, (torch.bool,))
        _like(op, "mask", mask, shape, device, first_name)


def per_sequence(
    op: str, name: str, x: Tensor | None, cu_seqlens: Tensor | None, like_name: str, like: Tensor
) -> None:
    """A floating-point `[B]` tensor, one number for each sequence of the token tensor `like`."""
    tensor(op, name, x)
    assert x is not None
    sequences = like.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if x.shape != (sequences,):
        raise ValueError(
            f"{op}: {name} must have one number per sequence, shape ({sequences},), but has "
            f"{tuple(x.shape)}"
        )
    _same_device(op, name, x, like.device, like_name)


def tensor(
    op: str,
    name: str,
    x: Tensor | None,
    dtypes: Sequence[torch.dtype] | frozenset[torch.dtype] = FLOAT_DTYPES,
    *,
    shape: tuple[int, ...] | None = None,
    like: tuple[str, Tensor] | None = None,
) -> None:
    """A tensor of one of `dtypes`; of exactly `shape`, and on the device of `like`, where given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, but is {type(x).__name__}")
    if x.dtype not in dtypes:
        expected = " or ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        raise TypeError(
            f"{op}: {name} must be {expected}, but is {str(x.dtype).removeprefix('torch.')}"
        )
    if shape is not None and x.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, but has {tuple(x.shape)}")
    if like is not None:
        _same_device(op, name, x, like[1].device, like[0])


def plain(op: str, **named: Tensor | None) -> None:
    """Tensors with memory of their own, for an op whose kernels read it without asking torch."""
    for name, x in named.items():
        if x is not None and not dispatch.is_plain(x):
            raise TypeError(
                f"{op}: {name} must be a plain tensor, but is {type(x).__name__}; of a DTensor "
                "give its part, to_local()"
            )


def choice(op: str, name: str, value: object, choices: Sequence[str]) -> None:
    """One of a few names."""
    if value not in choices:
        allowed = ", ".join(repr(c) for c in choices[:-1]) + f" or {choices[-1]!r}"
        raise ValueError(f"{op}: {name} must be {allowed}, but is {value!r}")


def number(
    op: str,
    name: str,
    value: object,
    *,
    gt: float = -math.inf,
    ge: float = -math.inf,
    lt: float = math.inf,
    le: float = math.inf,
) -> float:
    """A finite real number inside the bounds; returned as a float."""
    if type(value) is float and gt < value < lt and ge <= value <= le:
        return value
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{op}: {name} must be a number, but is {_described(value)}")
        value = float(value)
    if not (gt < value < lt and ge <= value <= le):
        raise ValueError(
            f"{op}: {name} must be a finite number{_bounds(gt, ge, lt, le)}, but is {value!r}"
        )
    return value


def scalar(
    op: str,
    name: str,
    value: object,
    *,
    like: tuple[str, Tensor],
    gt: float = -math.inf,
    ge: float = -math.inf,
) -> float | Tensor:
    """A `number`, also from a 0-dim tensor on the CPU; a 0-dim tensor on the accelerator of `like`
    is returned as it is, without waiting for it."""
    if not isinstance(value, Tensor):
        return number(op, name, value, gt=gt, ge=ge)
    if value.ndim != 0:
        raise ValueError(
            f"{op}: {name} must be a number or a 0-dim tensor, but has shape {tuple(value.shape)}"
        )
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{op}: {name} must be a real number, but is a tensor of {value.dtype}")
    if value.device.type == "cpu":
        return number(op, name, value.item(), gt=gt, ge=ge)
    _same_device(op, name, value, like[1].device, like[0])
    return value


def counter(
    op: str,
    name: str,
    value: object,
    *,
    like: tuple[str, Tensor],
    shape: tuple[int, ...] = (),
) -> int | Tensor:
    """0 to 2^63 - 1: an int, or an int64 tensor, 0-dim or of `shape`. A 0-dim tensor on the CPU
    becomes an int; what is on the accelerator of `like` is returned without waiting for it."""
    if not isinstance(value, Tensor):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be an int or an int64 tensor, but is {value!r}")
        if not 0 <= value < 2**63:
            raise ValueError(f"{op}: {name} must be >= 0 and < 2^63, but is {value}")
        return value
    tensor(op, name, value, (torch.int64,))
    if value.ndim and value.shape != shape:
        shapes = f"be 0-dim or have shape {tuple(shape)}" if shape else "be 0-dim"
        raise ValueError(f"{op}: {name} must {shapes}, but has shape {tuple(value.shape)}")
    if value.device.type != "cpu" or value.ndim:
        _same_device(op, name, value, like[1].device, like[0])
    if value.device.type == "cpu" and value.numel() and (least := int(value.min())) < 0:
        raise ValueError(f"{op}: {name} must be >= 0, but has {least}")
    return int(value) if value.device.type == "cpu" and not value.ndim else value


def clip_bounds(op: str, value: object) -> tuple[float, float]:
    """`clip_range`, a number or `(low, high)`, as `(low, high)`: 0 <= low <= 1, 0 <= high."""
    low, high = value if isinstance(value, tuple | list) and len(value) == 2 else (value, value)
    if isinstance(low, tuple | list):
        raise TypeError(
            f"{op}: clip_range must be a number or a pair (low, high), but is {value!r}"
        )
    return number(op, "clip_range", low, ge=0.0, le=1.0), number(op, "clip_range", high, ge=0.0)


def boundaries(op: str, cu_seqlens: Tensor | None, tokens: int) -> None:
    """Values of `cu_seqlens`: from 0 to N, non-decreasing. Trusted where not on the CPU."""
    if cu_seqlens is None or cu_seqlens.device.type != "cpu":
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != tokens:
        raise ValueError(
            f"{op}: cu_seqlens must run from 0 to the number of tokens, {tokens}, but runs from "
            f"{first} to {last}"
        )
    falls = cu_seqlens[1:] < cu_seqlens[:-1]
    if falls.any():
        at = int(falls.int().argmax())
        raise ValueError(
            f"{op}: cu_seqlens must not fall, but cu_seqlens[{at + 1}] = {int(cu_seqlens[at + 1])} "
            f"follows {int(cu_seqlens[at])}"
        )


def _cu_seqlens(op: str, cu_seqlens: Tensor, device: torch.device, like_name: str) -> None:
    tensor(op, "cu_seqlens", cu_seqlens, INDEX_DTYPES)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{op}: cu_seqlens must have shape [B + 1], but has {tuple(cu_seqlens.shape)}"
        )
    _same_device(op, "cu_seqlens", cu_seqlens, device, like_name)


def _like(
    op: str, name: str, x: Tensor, shape: torch.Size, device: torch.device, like_name: str
) -> None:
    if x.shape != shape:
        raise ValueError(
            f"{op}: {name} must have the shape of {like_name}, {tuple(shape)}, but has "
            f"{tuple(x.shape)}"
        )
    _same_device(op, name, x, device, like_name)


def _same_device(op: str, name: str, x: Tensor, device: torch.device, like_name: str) -> None:
    if x.device != device:
        raise ValueError(
            f"{op}: {name} must be on the device of {like_name}, {device}, but is on {x.device}"
        )


def _bounds(gt: float, ge: float, lt: float, le: float) -> str:
    texts = [
        f"{sign} {bound:g}"
        for sign, bound in ((">", gt), (">=", ge), ("<", lt), ("<=", le))
        if math.isfinite(bound)
    ]
    return " " + " and ".join(texts) if texts else ""


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{value!r}, of type {type(value).__name__}"
