"""`packed_linear`: one body over all implementations, against float64."""

from __future__ import annotations

import itertools
import re
from typing import Any

import ops
import pytest
import torch
from torch import Tensor

from ppo_kernels import PackedWeight, can_pack, dispatch, pack_weight, packed_linear, reference

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
pytestmark = pytest.mark.skipif(not can_pack(F32), reason="weights are not packed here")
IMPLS = pytest.mark.parametrize("impl", ops.implementations_of("packed_linear", but=("triton",)))
DTYPES = pytest.mark.parametrize(
    "dtype",
    [F32, pytest.param(BF16, marks=pytest.mark.skipif(not can_pack(BF16), reason="needs bf16"))],
    ids=str,
)
ROWS = (0, 1, 5, 6, 7, 15, 16, 17, 64)
# (in, the outputs of each part): within a panel, at its end, across it, in a block and beyond
SHAPES = [
    (1, [1]), (2, [16]), (3, [5, 20, 7]), (63, [16, 16]), (64, [17]), (65, [15, 1, 0, 33]),
    (130, [3, 45]), (0, [5]), (7, [0]),
]  # fmt: skip


def exactly(
    x: Tensor, parts: list[Tensor], dtype: torch.dtype, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """In float64, of operands rounded to `dtype`; and the sum of the terms' magnitudes."""
    x, weight = x.to(dtype).double(), torch.cat(parts).to(dtype).double()
    wide = None if bias is None else bias.double()
    size = reference.packed_linear(x.abs(), weight.abs(), None if wide is None else wide.abs(), F64)
    return reference.packed_linear(x, weight, wide, F64), size


def assert_right(found: Tensor, exact: Tensor, size: Tensor, width: int) -> None:
    """As far off as float32 sums of so many terms may be, and one rounding."""
    allowed = torch.finfo(F32).eps * (width + 2) * size
    allowed = allowed + torch.finfo(found.dtype).eps / 2 * (exact.abs() + allowed)
    # The smallest numbers of float16 have fewer digits.
    allowed = allowed + torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps
    assert ((found.double() - exact).abs() <= allowed).all()


@pytest.fixture
def nan_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory that nothing has been written to."""
    monkeypatch.setattr(torch, "empty", lambda shape, dtype: torch.full(shape, torch.nan).to(dtype))


@pytest.mark.usefixtures("nan_at_first")
@IMPLS
@DTYPES
@pytest.mark.parametrize("given", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_error_rule(impl: str, dtype: torch.dtype, given: torch.dtype, transposed: bool) -> None:
    """Every dtype in and out, with and without bias."""
    outs = itertools.cycle((F32, BF16, F16, None))
    for (width, counts), rows in itertools.product(SHAPES, ROWS):
        parts = [torch.randn(n, width).to(given) for n in counts]
        if transposed:
            parts = [part.t().contiguous().t() for part in parts]
        x = torch.randn(rows, width).to(given)
        bias = torch.randn(sum(counts)).to(given) if rows % 2 else None
        weight = pack_weight(*parts, dtype=dtype)
        assert (weight.out_features, weight.in_features) == (sum(counts), width)
        out = next(outs)
        found = packed_linear(x, weight, bias, dtype=out, impl=impl)
        assert found.dtype == (out or dtype) and found.shape == (rows, sum(counts))
        assert_right(found, *exactly(x, parts, dtype, bias), width)


@pytest.mark.usefixtures("nan_at_first")
@DTYPES
def test_what_is_packed_is_the_weight_rounded(dtype: torch.dtype) -> None:
    """The identity gives every weight back, by a product and unpacked; the rest is 0."""
    parts = [torch.randn(n, 67) for n in (9, 40, 1)]
    weight = pack_weight(*parts, dtype=dtype)
    for impl in ("cpp", "reference"):
        found = packed_linear(torch.eye(67), weight, impl=impl)
        assert torch.equal(found, torch.cat(parts).to(dtype).t())
    assert weight.dtype == dtype
    assert weight.panels.count_nonzero() == 50 * 67


@IMPLS
def test_layouts(impl: str) -> None:
    """Any dimensions and strides of the input and the bias; no gradient."""
    x, part, bias = torch.randn(4, 6, 20), torch.nn.Parameter(torch.randn(19, 20)), torch.randn(19)
    weight = pack_weight(part, dtype=F32)
    expected = packed_linear(x.flatten(0, 1), weight, bias, impl=impl).view(4, 6, 19)

    def of(x: Tensor, bias: Tensor = bias) -> Tensor:
        return packed_linear(x, weight, bias, impl=impl)

    for other in (x, x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
        assert torch.equal(of(other.requires_grad_()), expected)
        assert not of(other).requires_grad
        torch.testing.assert_close(of(other[:, -1:]), expected[:, -1:], rtol=1e-5, atol=1e-5)
    for name, view in ops.views(x[0].detach()):
        torch.testing.assert_close(of(view), expected[0], rtol=1e-5, atol=1e-5, msg=name)
    assert torch.equal(of(x, torch.stack((bias, bias), 1)[:, 0]), expected)
    torch.testing.assert_close(of(x[0, 0]), expected[0, 0], rtol=1e-5, atol=1e-5)
    assert of(x[:, :0]).shape == (4, 0, 19)


@DTYPES
def test_same_bits_for_any_threads_and_rows(dtype: torch.dtype) -> None:
    """A weight that several threads pack and multiply; a row alone, or among others."""
    parts, x = [torch.randn(n, 400) for n in (500, 707)], torch.randn(200, 400)

    def packed_and_multiplied() -> tuple[PackedWeight, Tensor]:
        weight = pack_weight(*parts, dtype=dtype)
        return weight, packed_linear(x, weight)

    weight, expected = packed_and_multiplied()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        other, found = packed_and_multiplied()
        assert torch.equal(other.panels, weight.panels) and torch.equal(found, expected)
    for rows in (1, 2, 7, 33):
        assert torch.equal(packed_linear(x[:rows], weight), expected[:rows])


def test_bf16_is_packed_where_it_is_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_pack(BF16) == dispatch.cpu.multiplies_bf16()
    assert not can_pack(F16) and not can_pack(F64)

    class Without:
        isa = staticmethod(lambda: "avx2")
        multiplies_bf16 = staticmethod(lambda: False)

    monkeypatch.setattr(dispatch, "cpu", Without)
    with pytest.raises(ValueError, match="CPU does not multiply bfloat16"):
        pack_weight(torch.zeros(3, 4), dtype=BF16)


def test_errors() -> None:
    part, x = torch.zeros(3, 4), torch.zeros(2, 4)
    weight = pack_weight(part, dtype=F32)
    failures: list[tuple[Any, type[Exception], str]] = [
        (lambda: pack_weight(dtype=F32), ValueError, "pack_weight needs a matrix or more"),
        (lambda: pack_weight(part, dtype=F16), ValueError, "packed in torch.float16: float32 and"),
        (lambda: pack_weight(part, part.t(), dtype=F32), ValueError, "but parts[1] has shape (4, "),
        (lambda: pack_weight(part[0], dtype=F32), ValueError, "but parts[0] has shape (4,)"),
        (lambda: pack_weight(part.int(), dtype=F32), TypeError, "parts[0] must be bfloat16 or"),
        (lambda: pack_weight(part.to("meta"), dtype=F32), ValueError, "must be on the CPU, but is"),
        (lambda: packed_linear(x[:, :3], weight), ValueError, "x must be [..., 4], but has shape"),
        (lambda: packed_linear(x.long(), weight), TypeError, "x must be bfloat16 or"),
        (lambda: packed_linear(x.to("meta"), weight), ValueError, "x must be on the device of we"),
        (lambda: packed_linear(x, weight, x[0]), ValueError, "bias must have shape (3,)"),
        (lambda: packed_linear(x, weight, dtype=F64), TypeError, "dtype must be float32, bfloat"),
        (lambda: packed_linear(x, weight, impl="triton"), RuntimeError, "cannot run: for CPUs on"),
    ]
    for call, kind, message in failures:
        with pytest.raises(kind, match=re.escape(message)) as raised:
            call()
        assert str(raised.value).startswith("packed_linear: ")
