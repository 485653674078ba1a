"""Products of a few rows with weights in the order in which a CPU reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppo_kernels import checks, dispatch, reference

OP = "packed_linear"
_OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PackedWeight:
    """What `pack_weight` made, for `packed_linear` of the same machine.

    `panels` is `[ceil(out_features / 16), ceil(in_features / n), 16, n]`, where n is 1 in float32
    and 2 in bfloat16; beyond `out_features` and `in_features` it is 0.
    """

    panels: Tensor
    out_features: int
    in_features: int

    @property
    def dtype(self) -> torch.dtype:
        return self.panels.dtype


def can_pack(dtype: torch.dtype) -> bool:
    """Whether weights can be packed in `dtype` here: float32 on a CPU with AVX2 or AVX-512,
    bfloat16 where it multiplies that itself (AVX512_BF16)."""
    return not _why_not(dtype)


def _why_not(dtype: torch.dtype) -> str:
    can_run, reason = dispatch.implementations()[OP]["cpp"]
    if not can_run:
        return reason
    if dtype is torch.bfloat16 and not dispatch.cpu.multiplies_bf16():
        return f"this CPU does not multiply bfloat16 (needs AVX512_BF16, has {reason})"
    if dtype not in (torch.float32, torch.bfloat16):
        return "float32 and bfloat16 can be packed"
    return ""


def pack_weight(*parts: Tensor, dtype: torch.dtype) -> PackedWeight:
    """Copies of matrices as one weight, their outputs one after the other.

    Args:
        parts: `[out_i, in]`, on the CPU; any floating dtypes and strides, transposed views too.
        dtype: what they are rounded to, and multiplied in.

    Raises:
        ValueError, TypeError: for parts that do not fit, and where `can_pack(dtype)` is False, with
            the reason.
    """
    if not parts:
        raise ValueError(f"{OP}: pack_weight needs a matrix or more")
    if why_not := _why_not(dtype):
        raise ValueError(f"{OP}: weights cannot be packed in {dtype}: {why_not}")
    for i, part in enumerate(parts):
        checks.tensor(OP, f"parts[{i}]", part)
        if part.ndim != 2 or part.shape[1] != parts[0].shape[-1]:
            raise ValueError(
                f"{OP}: parts must be [out_i, in] of one `in`, but parts[{i}] has shape "
                f"{tuple(part.shape)}, and parts[0] {tuple(parts[0].shape)}"
            )
        if part.device.type != "cpu":
            raise ValueError(f"{OP}: parts[{i}] must be on the CPU, but is on {part.device}")
    outs, width = sum(len(part) for part in parts), parts[0].shape[1]
    lanes, together = dispatch.cpu.panel, 2 if dtype is torch.bfloat16 else 1
    panels = torch.empty((-(-outs // lanes), -(-width // together), lanes, together), dtype=dtype)
    first = 0
    for part in parts:
        dispatch.cpu.pack_weight(part.detach(), first, outs, panels, torch.get_num_threads())
        first += len(part)
    return PackedWeight(panels, outs, width)


def packed_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """`x W^T + b` with a weight of `pack_weight`, which is read once for up to 16 rows of `x` with
    AVX-512 (6 with AVX2), and from memory once for all of them.

    Args:
        x: `[..., in]`, any floating dtype, rounded to the weight's. No gradient flows.
        weight: `[out, in]`.
        bias: `[out]`, any floating dtype; added in float32.
        dtype: of the result: float32, bfloat16 or float16; by default the weight's.
        impl: "auto", or one of `implementations()["packed_linear"]`; "reference" unpacks.

    Returns:
        `[..., out]`, summed in float32 and rounded once. A row depends on no other, nor on threads.

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit.
        RuntimeError: for an `impl` that cannot run, with the reason.
    """
    _check(x, weight, bias)
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in _OUT_DTYPES:
        raise TypeError(f"{OP}: dtype must be float32, bfloat16 or float16, but is {dtype}")
    impl = dispatch.resolve(OP, impl, x.device)
    if impl == "reference":
        with torch.no_grad():
            return reference.packed_linear(x.to(weight.dtype), _unpacked(weight), bias, dtype)
    dispatch.refuse_recording(OP)
    out = torch.empty((*x.shape[:-1], weight.out_features), dtype=dtype)
    x = dispatch.side_by_side(x) if x.ndim == 2 else x.contiguous()
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    dispatch.cpu.packed_linear(x, weight.panels, bias, out, torch.get_num_threads())
    return out


def _check(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> None:
    if not isinstance(weight, PackedWeight):
        raise TypeError(
            f"{OP}: weight must be a PackedWeight, of pack_weight, but is {type(weight).__name__}"
        )
    checks.tensor(OP, "x", x, like=("weight", weight.panels))
    checks.plain(OP, x=x, bias=bias)
    if x.ndim == 0 or x.shape[-1] != weight.in_features:
        raise ValueError(
            f"{OP}: x must be [..., {weight.in_features}], but has shape {tuple(x.shape)}"
        )
    if bias is not None:
        checks.tensor(OP, "bias", bias, shape=(weight.out_features,), like=("x", x))


def _unpacked(weight: PackedWeight) -> Tensor:
    """`[out, in]`."""
    panels = weight.panels.transpose(1, 2).flatten(2).flatten(0, 1)
    return panels[: weight.out_features, : weight.in_features]
