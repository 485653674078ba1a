"""What the op tests share: masks, layouts, views, and the error rules.

The error rule (design section 5): a kernel may err no more than plain PyTorch in the same dtype
does against float64, plus a few units in the last place, in outputs and in gradients.
`assert_products_rule` is that rule for what comes out of matrix products.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from roundings import Rounded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_kernels import dispatch, implementations

MASKS = ("none", "full", "empty", "left", "right", "interior")


def implementations_of(op: str, but: tuple[str, ...] = ()) -> list[Any]:
    """Parameters for `impl`: all `but` some; skipped, with the reason, where they cannot run on CPU
    tensors. CUDA's: tests/test_cuda_on_cpu.py, tests/test_gpu.py."""
    return [
        pytest.param(impl, marks=[] if reason is None else pytest.mark.skip(reason=reason))
        for impl, a in implementations()[op].items()
        if impl not in (*but, "cuda")
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


def in_dtype(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments, with all floating-point tensors in that dtype."""
    return {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }


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
    **options: Any,
) -> None:
    """`op` (with `options`) errs no more than `reference` does in the same dtype, plus a few units
    in the last place: element by element."""
    kernel = run(op, arguments | options, wrt)
    naive = run(reference, arguments, wrt)
    exact = run(reference, in_dtype(arguments, torch.float64), wrt)
    assert_alike(kernel, naive)
    for name, x in exact.items():
        error = (naive[name].double() - x).abs()
        assert_close(name, kernel[name], naive[name], x, error + ulps(x, kernel[name].dtype))


# How many random roundings are drawn, and how many times their root mean square a kernel may err.
# 4 is sqrt(16): what a single draw decides otherwise, a kernel may decide so too.
DRAWS, TIMES = 16, 4.0


def assert_products_rule(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: dict[str, Any],
    wrt: tuple[str, ...] = (),
    dtype: torch.dtype | None = None,
    **options: Any,
) -> None:
    """The error rule for what comes out of matrix products in `dtype`, by default that of `hidden`.

    A product in bfloat16 or float16 is rounded to a few digits. Which way each element goes depends
    on the order in which a CPU and its library add, so what plain PyTorch errs by is one draw out
    of many that are as right, near 0 for some elements: no bound for the kernel's draw.

    The bound here is the size of such errors. In float64, all that a product rounds (logits, their
    gradient, the gradients made of it) is changed at random by up to a unit in the last place of
    `dtype`, twice as far as rounding to the nearest goes (`roundings.py`). What that changes in a
    result has gone through exponentials, clips and means as a rounding does. A kernel may err
    `TIMES` the root mean square of `DRAWS` such changes (right ones reached 2.2 times), element by
    element, in losses, statistics and gradients alike. Added is what the passes over rows may err:
    as much as plain PyTorch in float32 (of gradients, whose terms may cancel, its worst element),
    and a few of its units.

    Decisions are covered too: where a rounding may take a ratio across a clip's bound, some draws
    do, and the token may count as clipped or not. Any other must be clipped as in float64.

    tests/test_error_rule.py plants wrong kernels, which this has to see.
    """
    dtype = arguments["hidden"].dtype if dtype is None else dtype
    exactly = in_dtype(arguments, torch.float64)
    kernel = run(op, arguments | options, wrt)
    naive = run(reference, arguments, wrt)
    assert_alike(kernel, naive)
    with torch.autocast("cpu", enabled=False):
        exact = run(reference, exactly, wrt)
        single = run(reference, in_dtype(arguments, torch.float32), wrt)
        squares = {name: torch.zeros_like(x) for name, x in exact.items()}
        for seed in range(DRAWS):
            with Rounded(dtype, seed):
                for name, x in run(reference, exactly, wrt).items():
                    squares[name] += (x - exact[name]).square() / DRAWS
    for name, x in exact.items():
        between = (single[name].double() - x).abs()
        if name.startswith("gradient") and x.numel():
            between = between.max()
        allowed = TIMES * squares[name].sqrt() + between + ulps(x, torch.float32)
        assert_close(name, kernel[name], naive[name], x, allowed)


def assert_alike(kernel: dict[str, Tensor], naive: dict[str, Tensor]) -> None:
    """The same results, of the same dtypes and shapes."""
    assert kernel.keys() == naive.keys()
    for name, x in naive.items():
        assert kernel[name].dtype == x.dtype, name
        assert kernel[name].shape == x.shape, name


def ulps(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """A few units in the last place of `dtype`, of each element and of the largest."""
    size = exact.abs().nan_to_num(0.0, posinf=0.0)
    largest = size.max() if size.numel() else 0.0
    return torch.finfo(dtype).eps * (8 * size + largest)


def assert_close(name: str, kernel: Tensor, naive: Tensor, exact: Tensor, allowed: Tensor) -> None:
    """Element by element: |kernel - exact| <= allowed; NaN and infinities as `naive` has them."""
    kernel, naive = kernel.double(), naive.double()
    finite = naive.isfinite() & exact.isfinite()
    assert torch.equal(kernel[~finite].nan_to_num(7.0), naive[~finite].nan_to_num(7.0)), (
        f"{name}: not the same NaN and infinities"
    )
    kernel, naive, exact, allowed = (x[finite] for x in (kernel, naive, exact, allowed))
    if not exact.numel():
        return
    error = (kernel - exact).abs()
    excess = error - allowed
    worst = int(excess.nan_to_num(float("inf")).argmax())
    assert excess[worst] <= 0, (
        f"{name}: {int((~(excess <= 0)).sum())} of {excess.numel()} elements err too much; "
        f"at {worst} kernel {kernel[worst]:.9g}, plain PyTorch {naive[worst]:.9g}, "
        f"float64 {exact[worst]:.9g}, error {error[worst]:.3g}, allowed {allowed[worst]:.3g}"
    )


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Two results of `run` agree in every bit."""
    for name, x in a.items():
        assert torch.equal(x.nan_to_num(7.0), b[name].nan_to_num(7.0)), name


def shapes() -> Iterator[tuple[int, int]]:
    """Empty, single, prime and around powers of two."""
    yield from itertools.product((0, 1, 3), (0, 1, 2))
    yield from ((2, 7), (5, 31), (3, 64), (1, 129), (17, 33), (7, 1025))


def _flatten(name: str, x: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(x, Tensor):
        yield name, x
    else:
        for field, y in zip(getattr(x, "_fields", range(len(x))), x, strict=True):
            yield from _flatten(f"{name}.{field}", y)
