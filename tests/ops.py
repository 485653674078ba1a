"""What the op tests share: masks, layouts, views, and the error rule.

The error rule (design section 5): a kernel may err no more than plain PyTorch in the same dtype
does against float64, plus a few units in the last place, in outputs and in gradients.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_kernels import dispatch, implementations

MASKS = ("none", "full", "empty", "left", "right", "interior")


def implementations_of(op: str, but: tuple[str, ...] = ()) -> list[Any]:
    """Parameters for `impl`: those that are written, `but` some; skipped, with the reason, where
    they cannot run on CPU tensors. CUDA's: tests/test_cuda_on_cpu.py, tests/test_gpu.py."""
    return [
        pytest.param(impl, marks=[] if reason is None else pytest.mark.skip(reason=reason))
        for impl, a in implementations()[op].items()
        if impl not in (*but, "cuda") and a != dispatch.NOT_WRITTEN
        for reason in [_why_not(impl, a)]
    ]


def _why_not(impl: str, availability: dispatch.Availability) -> str | None:
    if not availability.available:
        return availability.reason
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return "tests/test_gpu.py has it" if impl == "triton" and not interpreted else None


def make_mask(kind: str, shape: tuple[int, int], seed: int = 0) -> Tensor | None:
    """A mask of `shape` `[B, T]`; ragged ones include all-masked rows where B is large enough."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    if kind == "none":
        return None
    if kind in ("full", "empty"):
        return torch.full(shape, kind == "full")
    if kind == "interior":
        mask = torch.rand(shape, generator=generator) < 0.6
        mask[1::3] = False
        return mask
    lengths = torch.randint(0, columns + 1, (rows, 1), generator=generator)
    right = torch.arange(columns) < lengths
    return right if kind == "right" else right.flip(1)


def poison(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x` with NaN and infinities wherever `mask` is False."""
    if mask is None:
        return x
    bad = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=x.dtype)
    return torch.where(mask, x, bad[torch.arange(x.numel()).reshape(x.shape) % 3])


def pack(x: Tensor, mask: Tensor) -> Tensor:
    """The real tokens of the padded `x`, in order."""
    return x[mask]


def cu_seqlens_of(mask: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """The boundaries that go with `pack`."""
    return torch.cat((torch.zeros(1, dtype=torch.long), mask.sum(1).cumsum(0))).to(dtype)


def views(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The values of `x` behind other strides and offsets, with NaN all around them."""
    yield "contiguous", x.contiguous()
    wide = x.new_full([n + 3 for n in x.shape], float("nan"))
    inner = wide[tuple(slice(2, 2 + n) for n in x.shape)]
    yield "offset", inner.copy_(x)
    gaps = x.new_full([2 * n for n in x.shape], float("nan"))[
        tuple(slice(None, None, 2) for _ in x.shape)
    ]
    yield "every second", gaps.copy_(x)
    if x.ndim == 2:
        yield "transposed", x.t().contiguous().t()


def upstream_of(name: str, x: Tensor) -> Tensor:
    """A gradient coming in at an output, other for each element and for each of two outputs."""
    return torch.cos(torch.arange(x.numel(), dtype=x.dtype)).reshape(x.shape) + 0.1 * (
        name == "output.1"
    )


def run(
    function: Callable[..., Any],
    arguments: dict[str, Any],
    wrt: tuple[str, ...] = (),
    upstream: Callable[[str, Tensor], Tensor | None] = upstream_of,
) -> dict[str, Tensor]:
    """Call an op; name its outputs, and the gradients of a mix of those that have one.

    `upstream(name, output)` is the gradient that comes in at an output, or None.
    """
    arguments = dict(arguments)
    for name in wrt:
        arguments[name] = arguments[name].detach().requires_grad_()
    outputs = dict(_flatten("output", function(**arguments)))
    incoming = [
        (x, g) for name, x in outputs.items() if x.requires_grad and
        (g := upstream(name, x)) is not None
    ]  # fmt: skip
    if wrt:
        gradients: Sequence[Tensor | None] = [None] * len(wrt)
        if incoming:
            gradients = torch.autograd.grad(
                [x for x, _ in incoming], [arguments[name] for name in wrt],
                [g for _, g in incoming], allow_unused=True,
            )  # fmt: skip
        outputs |= {
            f"gradient of {name}": torch.zeros_like(arguments[name]) if g is None else g
            for name, g in zip(wrt, gradients, strict=True)
        }
    return {name: x.detach() for name, x in outputs.items()}


class Watch(TorchDispatchMode):
    """What torch's operations make while it is on: the most numbers in one result (whose last
    dimension is `width`, where given), how many of the operations are matrix products, and how many
    gather a tensor from other processes."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        self.width, self.largest, self.products, self.gathers = width, 0, 0, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **kwargs or {})
        aten = torch.ops.aten
        self.products += function.overloadpacket in (aten.mm, aten.addmm, aten.addmm_)
        self.gathers += "all_gather" in str(function)
        for x in found if isinstance(found, tuple | list) else (found,):
            if isinstance(x, Tensor) and (self.width is None or self.width in x.shape[-1:]):
                held = x.untyped_storage().nbytes() // x.itemsize  # of a view, what it looks at
                self.largest = max(self.largest, held)
        return found


def assert_error_rule(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: dict[str, Any],
    wrt: tuple[str, ...] = (),
    *,
    products: bool = False,
    **options: Any,
) -> None:
    """`op` (with `options`) errs no more than `reference` does in the same dtype.

    `products`: the gradients are matrix products, whose elements may cancel: they err no more than
    the worst element of `reference`.
    """
    kernel = run(op, arguments | options, wrt)
    naive = run(reference, arguments, wrt)
    exact = run(reference, {name: _double(x) for name, x in arguments.items()}, wrt)
    assert kernel.keys() == naive.keys()
    for name in kernel:
        assert kernel[name].dtype == naive[name].dtype, name
        assert kernel[name].shape == naive[name].shape, name
        if products and name.startswith("gradient") and exact[name].numel():
            worst = (naive[name] - exact[name]).abs().max()
            naive[name] = exact[name] + worst
        assert_close(name, kernel[name], naive[name], exact[name])


def assert_close(name: str, kernel: Tensor, naive: Tensor, exact: Tensor) -> None:
    """Element by element: |kernel - exact| <= |naive - exact| + a few units in the last place."""
    eps = torch.finfo(kernel.dtype).eps
    kernel, naive = kernel.double(), naive.double()
    finite = naive.isfinite() & exact.isfinite()
    assert torch.equal(kernel[~finite].nan_to_num(7.0), naive[~finite].nan_to_num(7.0)), (
        f"{name}: not the same NaN and infinities"
    )
    kernel, naive, exact = kernel[finite], naive[finite], exact[finite]
    if not exact.numel():
        return
    allowed = (naive - exact).abs() + eps * (8 * exact.abs() + exact.abs().max())
    excess = (kernel - exact).abs() - allowed
    worst = int(excess.nan_to_num(float("inf")).argmax())
    assert excess[worst] <= 0, (
        f"{name}: {int((~(excess <= 0)).sum())} of {excess.numel()} elements err too much; "
        f"at {worst} kernel {kernel[worst]:.9g}, plain PyTorch {naive[worst]:.9g}, "
        f"float64 {exact[worst]:.9g}"
    )


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Two results of `run` agree in every bit."""
    for name, x in a.items():
        assert torch.equal(x.nan_to_num(7.0), b[name].nan_to_num(7.0)), name


def shapes() -> Iterator[tuple[int, int]]:
    """Empty, single, prime and around powers of two."""
    yield from itertools.product((0, 1, 3), (0, 1, 2))
    yield from ((2, 7), (5, 31), (3, 64), (1, 129), (17, 33), (7, 1025))


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _flatten(name: str, x: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(x, Tensor):
        yield name, x
    else:
        for field, y in zip(getattr(x, "_fields", range(len(x))), x, strict=True):
            yield from _flatten(f"{name}.{field}", y)
