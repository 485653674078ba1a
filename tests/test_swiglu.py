"""`swiglu`: one body over all implementations, against float64."""

from __future__ import annotations

import math
import re
from typing import Any

import ops
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ppo_kernels import dispatch, reference, swiglu
from ppo_kernels.swiglu import _backward_op, _forward_op

KERNELS = pytest.mark.parametrize("impl", ops.implementations_of("swiglu", but=("reference",)))
IMPLS = pytest.mark.parametrize("impl", ops.implementations_of("swiglu"))
NEEDS_CPP = pytest.mark.skipif(dispatch.cpu is None, reason="the C++ extension is not built")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = [F32, BF16, F16, F64]
WRT = ("gate", "up")
# Around the lanes of vectors and Triton's tiles; rows in several tasks of a CPU's.
SHAPES = [
    (), (0,), (0, 8), (3, 0), (1,), (5, 1), (7, 3), (2, 2, 33), (3, 64), (70, 65), (3, 1, 2, 129),
    (6, 1030), (2, 9000),
]  # fmt: skip


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype = F32, together: bool = False
) -> dict[str, Any]:
    """Gates from where the sigmoid is 0 to where it is 1; `together`, halves of one product."""
    gate = torch.randn(shape) * 10 ** torch.linspace(-3, 2, math.prod(shape)).view(shape)
    both = gate.to(dtype), torch.randn(shape).to(dtype)
    return dict(zip(WRT, torch.cat(both, -1).chunk(2, -1) if together else both, strict=True))


@KERNELS
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_error_rule(impl: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for together in (False, True) if shape else (False,):
            given = arguments(shape, dtype, together)
            for wrt in (WRT, ("gate",), ("up",)) if shape == (70, 65) else (WRT,):
                ops.assert_error_rule(swiglu, reference.swiglu, given, wrt, impl=impl)


@KERNELS
def test_float64(impl: str) -> None:
    """Torch's own gradient takes sigmoid(-gate) from 1: its error counts here, times the gate."""
    for shape in SHAPES:
        given = arguments(shape, F64)
        expected = ops.run(reference.swiglu, given, WRT)
        found = ops.run(swiglu, given | {"impl": impl}, WRT)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@KERNELS
@pytest.mark.parametrize(("dtype", "furthest"), [(F32, 80), (F64, 700)], ids=str)
def test_digits_where_the_gate_is_far_from_0(
    impl: str, dtype: torch.dtype, furthest: float
) -> None:
    """Some units in the last place of each element, which the error rule allows of the largest."""
    gate = torch.linspace(2, furthest, 500, dtype=dtype)
    gate = torch.cat((-gate, gate)).requires_grad_()
    up = torch.ones_like(gate, requires_grad=True)
    y = swiglu(gate, up, impl=impl)
    da, du = torch.autograd.grad(y.sum(), (gate, up))
    a = gate.detach().double()
    silu, slope = a * a.sigmoid(), a.sigmoid() * (1 + a * (-a).sigmoid())
    options = {"rtol": 16 * torch.finfo(dtype).eps, "atol": 0.0}
    for found, expected in ((y, silu), (da, slope), (du, silu)):
        torch.testing.assert_close(found.double(), expected, **options)


@NEEDS_CPP
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_rounded_once(dtype: torch.dtype) -> None:
    """Triton's interpreter cuts bfloat16 off."""
    given = arguments((40, 70), dtype)
    grad = torch.randn(40, 70).to(dtype)
    found, expected = (
        ops.run(swiglu, x | {"impl": "cpp"}, WRT, lambda _, y: grad.to(y.dtype))
        for x in (given, ops.in_dtype(given, F32))
    )
    for name, x in expected.items():
        assert torch.equal(found[name], x.to(dtype)), name


@IMPLS
def test_by_hand(impl: str) -> None:
    """sigmoid(log 3) = 3/4, of its negative 1/4."""
    log3 = math.log(3)
    gate = torch.tensor([0.0, log3, -log3], dtype=F64, requires_grad=True)
    up = torch.tensor([5.0, 2.0, 4.0], dtype=F64, requires_grad=True)
    y = swiglu(gate, up, impl=impl)
    assert y.tolist() == pytest.approx([0, 1.5 * log3, -log3])
    da, du = torch.autograd.grad(y, (gate, up), torch.tensor([2.0, 1.0, 1.0], dtype=F64))
    assert du.tolist() == pytest.approx([0, 0.75 * log3, -0.25 * log3])
    assert da.tolist() == pytest.approx([5, 1.5 * (1 + log3 / 4), 1 - 0.75 * log3])


@IMPLS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_what_models_have(impl: str, dtype: torch.dtype) -> None:
    """They round silu(gate) on the way."""
    given = arguments((4, 7, 48), dtype)
    rounded_twice = max(3 * torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(
        swiglu(**given, impl=impl), F.silu(given["gate"]) * given["up"],
        rtol=rounded_twice, atol=1e-6,
    )  # fmt: skip


@IMPLS
def test_gradcheck(impl: str) -> None:
    gate, up = (x.requires_grad_() for x in torch.randn(2, 3, 5, dtype=F64))
    torch.autograd.gradcheck(lambda gate, up: swiglu(gate, up, impl=impl), (gate, up))


@IMPLS
def test_what_torch_gives(impl: str) -> None:
    """Infinities, NaN, and what is beyond an exponential, in whole vectors and beside them."""
    values = torch.tensor([math.inf, -math.inf, math.nan, 1e30, -1e30, 200.0, -200.0, 0.0, -0.0])
    gate, up = torch.meshgrid(values, values, indexing="ij")
    for copies in (1, 8):
        given = {"gate": gate.repeat(1, copies), "up": up.repeat(1, copies)}
        expected = ops.run(lambda gate, up: F.silu(gate) * up, given, WRT)
        for name, x in ops.run(swiglu, given | {"impl": impl}, WRT).items():
            torch.testing.assert_close(
                x, expected[name], rtol=1e-5, atol=1e-30, equal_nan=True, msg=name
            )


@KERNELS
def test_strides_do_not_matter(impl: str) -> None:
    given = arguments((6, 37)) | {"impl": impl}
    expected = ops.run(swiglu, given, WRT)
    for name in WRT:
        for _, view in ops.views(given[name]):
            ops.assert_same_bits(expected, ops.run(swiglu, given | {name: view}, WRT))
    deep = torch.randn(2, 2, 3, 4, 5, 37).transpose(1, 4)[:, :, :, 1:]
    views = {"gate": deep[0], "up": deep[1].transpose(0, 2).contiguous().transpose(0, 2)}
    copies = {name: x.contiguous() for name, x in views.items()}
    ops.assert_same_bits(
        ops.run(swiglu, copies | {"impl": impl}, WRT), ops.run(swiglu, views | {"impl": impl}, WRT)
    )
    assert swiglu(**views, impl=impl).is_contiguous()

    def of_gradient(gradient: Tensor) -> dict[str, Tensor]:
        return ops.run(swiglu, given, WRT, lambda *_: gradient)

    one = torch.ones(()).expand(6, 37)
    for gradient in (one, *(view for _, view in ops.views(torch.randn(6, 37)))):
        ops.assert_same_bits(of_gradient(gradient.contiguous()), of_gradient(gradient))


@KERNELS
def test_halves_of_a_product_are_read_where_they_lie(
    impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments((3, 64), together=True) | {"impl": impl}
    monkeypatch.setattr(Tensor, "contiguous", lambda x: pytest.fail("a copy"))
    ops.run(swiglu, given, WRT)


@NEEDS_CPP
@pytest.mark.parametrize("together", [False, True])
def test_threads_do_not_change_a_bit(together: bool) -> None:
    given = arguments((700, 100), together=together) | {"impl": "cpp"}
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ops.run(swiglu, given, WRT))
    for result in results[1:]:
        ops.assert_same_bits(results[0], result)


@KERNELS
def test_only_gate_and_up_are_kept(impl: str) -> None:
    given = arguments((3, 8), BF16, together=True)
    given["gate"].requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        swiglu(**given, impl=impl)
    assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in given.values()]


@KERNELS
@pytest.mark.parametrize("together", [False, True])
def test_opcheck(impl: str, together: bool) -> None:
    given = tuple(arguments((3, 8), BF16, together).values())
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(_backward_op, (torch.randn(3, 8).to(BF16), *given, impl, *wanted))
    torch.library.opcheck(_forward_op, (*(x.detach().requires_grad_() for x in given), impl))


@IMPLS
@pytest.mark.parametrize("wrt", [WRT, ("gate",), ("up",)], ids=str)
def test_compiles_without_a_break(impl: str, wrt: tuple[str, ...]) -> None:
    given = arguments((3, 8), BF16) | {"impl": impl}
    torch._dynamo.reset()
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(ops.run(compiled, given, wrt), ops.run(swiglu, given, wrt))


@IMPLS
def test_errors(impl: str) -> None:
    given = arguments((3, 8)) | {"impl": impl}
    for change, message in (
        ({"up": torch.zeros(8)}, "up must have shape (3, 8), but has (8,)"),
        ({"up": torch.zeros(3, 8, device="meta")}, "up must be on the device of gate, cpu"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"swiglu: {message}")):
            swiglu(**given | change)
    for change, message in (
        ({"gate": torch.zeros(3, 8, dtype=torch.int32)}, "gate must be bfloat16 or"),
        ({"up": torch.zeros(3, 8, dtype=BF16)}, "up must be float32, but is bfloat16"),
        ({"up": [1.0]}, "up must be a tensor, but is list"),
    ):
        with pytest.raises(TypeError, match=re.escape(f"swiglu: {message}")):
            swiglu(**given | change)
