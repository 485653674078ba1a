"""`rms_norm`: one body over all implementations, against float64."""

from __future__ import annotations

import math
import re
from typing import Any

import ops
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ppo_kernels import dispatch, reference, rms_norm
from ppo_kernels.rms_norm import _backward_op, _forward_op

KERNELS = pytest.mark.parametrize("impl", ops.implementations_of("rms_norm", but=("reference",)))
IMPLS = pytest.mark.parametrize("impl", ops.implementations_of("rms_norm"))
NEEDS_CPP = pytest.mark.skipif(dispatch.cpu is None, reason="the C++ extension is not built")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
WRT = ("x", "weight")
# Of x, of the weight and of the result.
DTYPES = [
    (F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16), (F64, F64, F64), (F32, F32, BF16),
    (BF16, F32, BF16), (F16, F32, F32), (BF16, F16, F16), (F32, BF16, BF16),
]  # fmt: skip
# Around the lanes of vectors, and Triton's tiles; rows of several parts; rows in several tiles.
SHAPES = [
    (0, 8), (3, 0), (1, 1), (5, 1), (7, 3), (2, 2, 33), (3, 64), (70, 65), (130, 31), (2, 576),
    (3, 1, 2, 129), (0, 2, 5), (6,), (3, 1030),
    (10, 17_000),
]  # fmt: skip


def arguments(
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (F32, F32, F32),
    added: float = 0.0,
) -> dict[str, Any]:
    """Rows of very different sizes, one of zeros."""
    x = torch.randn(shape) * 10 ** torch.linspace(-3, 2, math.prod(shape[:-1])).view(*shape[:-1], 1)
    x.view(-1)[: shape[-1]] *= math.prod(shape[:-1]) < 2
    weight = torch.randn(shape[-1]) + 1 - added
    given = {"x": x.to(dtypes[0]), "weight": weight.to(dtypes[1]), "eps": 1e-5, "added": added}
    return given | {"dtype": dtypes[2]}


@KERNELS
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_error_rule(impl: str, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    for shape in SHAPES:
        for wrt in (WRT, ("x",), ("weight",)) if shape == (70, 65) else (WRT,):
            given = arguments(shape, dtypes, added=float(len(shape) == 3))
            ops.assert_error_rule(rms_norm, reference.rms_norm, given, wrt, impl=impl)


@NEEDS_CPP
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_rounded_once(dtype: torch.dtype) -> None:
    """Triton's interpreter cuts bfloat16 off."""
    x, weight = torch.randn(40, 70), torch.randn(70)
    exactly = rms_norm(x, weight, eps=1e-5, impl="cpp")
    found = rms_norm(x, weight, eps=1e-5, dtype=dtype, impl="cpp")
    assert torch.equal(found, exactly.to(dtype))


@KERNELS
@pytest.mark.parametrize(
    "dtypes", [(F64, F32, BF16), (F32, F64, F64), (BF16, F64, BF16), (F32, F32, F64)], ids=str
)
def test_float64(impl: str, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    """Where x or the weight has it, it is computed in."""
    given = arguments((5, 40), dtypes)
    found = ops.run(rms_norm, given | {"impl": impl}, WRT)
    expected = ops.run(reference.rms_norm, given, WRT)
    for name, x in expected.items():
        assert found[name].dtype == x.dtype
        rtol = 1e-13 if x.dtype == F64 and F64 in dtypes[:2] else torch.finfo(x.dtype).eps
        rtol = max(rtol, 1e-6) if F64 not in dtypes[:2] else rtol
        torch.testing.assert_close(found[name], x, rtol=rtol, atol=rtol)


@IMPLS
def test_by_hand(impl: str) -> None:
    """Mean square (9 + 16 + 0 + 0) / 4 + 2.75 = 9: each third of x, times its weight."""
    x = torch.tensor([3.0, 4.0, 0.0, 0.0], requires_grad=True)
    weight = torch.tensor([0.0, 1.0, 2.0, 3.0], requires_grad=True)
    y = rms_norm(x, weight, eps=2.75, added=1.0, impl=impl)
    assert y.tolist() == pytest.approx([1, 8 / 3, 0, 0])
    dx, dw = torch.autograd.grad(y, (x, weight), torch.tensor([1.0, 0, 1, 0]))
    assert dw.tolist() == pytest.approx([1, 0, 0, 0])
    # c = mean of (1, 2, 3, 4) g x / 3 = 1/4: (g w - x / 3 c) / 3
    assert dx.tolist() == pytest.approx([3 / 12, -4 / 36, 1, 0])


@IMPLS
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_it_is_what_models_have(impl: str, dtype: torch.dtype) -> None:
    given = arguments((4, 7, 48), (dtype, dtype, dtype))
    x, weight = given["x"], given["weight"]
    rounded_twice = 3 * torch.finfo(dtype).eps  # Llama's in bfloat16, before the weight too
    tolerance = {"rtol": rounded_twice, "atol": 1e-6}
    torchs = F.rms_norm(x, [48], weight, 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, eps=1e-5, impl=impl), torchs, **tolerance)
    for kind, added in ((LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0)):
        norm = kind(48, eps=1e-5).to(dtype)
        norm.weight.data.copy_(weight)
        found = rms_norm(x, norm.weight, eps=1e-5, added=added, impl=impl)
        torch.testing.assert_close(found, norm(x), **tolerance)


@IMPLS
def test_gradcheck(impl: str) -> None:
    x, weight = torch.randn(3, 5, dtype=F64), torch.randn(5, dtype=F64)
    torch.autograd.gradcheck(
        lambda x, w: rms_norm(x, w, eps=0.1, added=1.0, impl=impl),
        (x.requires_grad_(), weight.requires_grad_()),
    )


@IMPLS
def test_what_torch_gives(impl: str) -> None:
    """Squares beyond the dtype, infinities, NaN; and 0 / 0 where eps is 0."""
    for size in (4, 40):
        x = torch.zeros(7, size)
        x[:6, 1] = torch.tensor([1e30, -1e30, math.inf, -math.inf, math.nan, 1e-30])
        x[:6, 2] = 1.0
        for eps in (1e-6, 0.0):
            given = {"x": x, "weight": torch.ones(size), "eps": eps, "impl": impl}
            expected = F.rms_norm(x.requires_grad_(), [size], given["weight"], eps)
            gradient = torch.autograd.grad(
                expected, x, ops.upstream_of("output", expected.detach())
            )[0]
            found = ops.run(rms_norm, given, ("x",))
            options = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}
            torch.testing.assert_close(found["output"], expected, **options)
            torch.testing.assert_close(found["gradient of x"], gradient, **options)


@KERNELS
def test_rows_that_are_not_there_count_for_nothing(impl: str) -> None:
    """Triton takes several at a time, and without eps an absent one would be 0 times infinity."""
    given = {"x": torch.randn(5, 33), "weight": torch.randn(33), "eps": 0.0}
    ops.assert_error_rule(rms_norm, reference.rms_norm, given, WRT, impl=impl)


@KERNELS
def test_strides_do_not_matter(impl: str) -> None:
    given = arguments((6, 37)) | {"impl": impl}
    expected = ops.run(rms_norm, given, WRT)
    for name in WRT:
        for _, view in ops.views(given[name]):
            ops.assert_same_bits(expected, ops.run(rms_norm, given | {name: view}, WRT))
    deep = torch.randn(2, 3, 4, 5, 37).transpose(0, 3)[:, :, 1:]
    of_copy = ops.run(rms_norm, given | {"x": deep.contiguous()}, WRT)
    ops.assert_same_bits(of_copy, ops.run(rms_norm, given | {"x": deep}, WRT))
    assert rms_norm(deep, given["weight"], eps=0.0, impl=impl).is_contiguous()

    def of_gradient(gradient: Tensor) -> dict[str, Tensor]:
        return ops.run(rms_norm, given, WRT, lambda *_: gradient)

    for _, gradient in ops.views(torch.randn(6, 37)):
        ops.assert_same_bits(of_gradient(gradient.contiguous()), of_gradient(gradient))
    one = torch.ones(()).expand(6, 37)
    ops.assert_same_bits(of_gradient(one.contiguous()), of_gradient(one))


@NEEDS_CPP
def test_threads_do_not_change_a_bit() -> None:
    given = arguments((700, 100)) | {"impl": "cpp"}
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ops.run(rms_norm, given, WRT))
    for result in results[1:]:
        ops.assert_same_bits(results[0], result)


@KERNELS
def test_only_x_and_the_weight_are_kept(impl: str) -> None:
    given = arguments((3, 8), (BF16, F32, BF16)) | {"impl": impl}
    given["x"].requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        rms_norm(**given)
    assert {x.data_ptr() for x in kept} == {given["x"].data_ptr(), given["weight"].data_ptr()}


@KERNELS
@pytest.mark.parametrize("dtypes", [(F32, F32, BF16), (BF16, F64, BF16)], ids=str)
def test_opcheck(impl: str, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    given = arguments((3, 8), dtypes)
    x, weight = given["x"], given["weight"]
    grad = torch.randn(3, 8).to(BF16)
    torch.library.opcheck(_backward_op, (grad, x, weight, 1e-5, 1.0, impl, True, False))
    x.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(_forward_op, (x, weight, 1e-5, 1.0, BF16, impl))


@IMPLS
@pytest.mark.parametrize("wrt", [WRT, ("x",), ("weight",)], ids=str)
def test_compiles_without_a_break(impl: str, wrt: tuple[str, ...]) -> None:
    given = arguments((3, 8), (BF16, F32, F32)) | {"impl": impl}
    torch._dynamo.reset()
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(ops.run(compiled, given, wrt), ops.run(rms_norm, given, wrt))


@IMPLS
def test_errors(impl: str) -> None:
    given = arguments((3, 8)) | {"impl": impl}
    for change, message in (
        ({"x": torch.zeros(())}, "x must be [..., D], but has no dimension"),
        ({"weight": torch.zeros(7)}, "weight must have shape (8,), but has (7,)"),
        ({"weight": torch.zeros(8, device="meta")}, "weight must be on the device of x, cpu"),
        ({"eps": -1e-6}, "eps must be a finite number >= 0, but is -1e-06"),
        ({"added": math.nan}, "added must be a finite number, but is nan"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"rms_norm: {message}")):
            rms_norm(**given | change)
    for change, message in (
        ({"x": torch.zeros(3, 8, dtype=torch.int32)}, "x must be bfloat16 or"),
        ({"weight": [1.0]}, "weight must be a tensor, but is list"),
        ({"eps": None}, "eps must be a number, but is None"),
        ({"dtype": torch.int8}, "dtype must be a floating-point torch.dtype, but is torch.int8"),
    ):
        with pytest.raises(TypeError, match=re.escape(f"rms_norm: {message}")):
            rms_norm(**given | change)
