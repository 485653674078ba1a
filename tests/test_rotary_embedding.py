"""`rotary_embedding`: one body over all implementations, against float64 and transformers'."""

from __future__ import annotations

import importlib
import re
from functools import partial
from typing import Any

import ops
import pytest
import torch
import torch._dynamo
from fuzz.check import Guard
from torch import Tensor

from ppo_kernels import dispatch, reference, rotary_embedding

KERNELS = pytest.mark.parametrize(
    "impl", ops.implementations_of("rotary_embedding", but=("reference",))
)
NEEDS_CPP = pytest.mark.skipif(dispatch.cpu is None, reason="the C++ extension is not built")
IMPLS = pytest.mark.parametrize("impl", ops.implementations_of("rotary_embedding"))
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
WRT = ("query", "key")
# (rows, query heads, key heads, tokens, width, how much of it is rotated)
SHAPES = [
    (2, 9, 3, 5, 64, 64), (3, 4, 4, 1, 80, 20), (1, 12, 2, 3, 128, 128), (2, 2, 1, 4, 96, 72),
    (1, 3, 20, 2, 10, 6), (2, 1, 1, 3, 7, 2), (1, 2, 1, 2, 1100, 1040), (2, 3, 2, 4, 6, 0),
]  # fmt: skip


def arguments(
    shape: tuple[int, int, int, int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
    shared: bool = False,
) -> dict[str, Tensor]:
    """Query and key as views of a fused product, whose values are NaN; any cosines and sines, so
    that their halves differ; `shared` by all rows."""
    rows, heads, kv_heads, tokens, width, rotated = shape
    fused = torch.randn(rows, tokens, heads + 2 * kv_heads, width).to(dtypes[0])
    fused[:, :, heads + kv_heads :] = torch.nan
    query, key, _ = fused.transpose(1, 2).split((heads, kv_heads, kv_heads), 1)
    cos, sin = torch.randn(2, 1 if shared else rows, tokens, rotated).to(dtypes[1])
    return {"query": query, "key": key, "cos": cos, "sin": sin}


@KERNELS
@pytest.mark.parametrize(
    "dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (F16, F32)], ids=str
)
def test_error_rule(impl: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for shape in SHAPES:
        for shared in (False, True):
            given = arguments(shape, dtypes, shared)
            ops.assert_error_rule(
                rotary_embedding, reference.rotary_embedding, given, WRT, impl=impl
            )


@KERNELS
@pytest.mark.parametrize("dtypes", [(F64, F64), (F64, BF16), (F32, F64), (BF16, F64)], ids=str)
def test_float64(impl: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Where any tensor has it, it is computed in; and rounded to the query's dtype in the end."""

    def upstream(name: str, x: Tensor) -> Tensor:  # the same numbers in every dtype
        return ops.upstream_of(name, x.to(BF16)).to(x.dtype)

    for shape in SHAPES:
        given = arguments(shape, dtypes)
        found = ops.run(partial(rotary_embedding, impl=impl), given, WRT, upstream)
        exact = ops.run(reference.rotary_embedding, ops.in_dtype(given, F64), WRT, upstream)
        rtol = 1e-14 if dtypes[0] == F64 else torch.finfo(dtypes[0]).eps / 2
        for name, x in found.items():
            assert x.dtype == dtypes[0]
            torch.testing.assert_close(x.double(), exact[name], rtol=rtol, atol=1e-14)


@IMPLS
@pytest.mark.parametrize(
    ("family", "shape"), [("llama", SHAPES[0]), ("gpt_neox", SHAPES[1]), ("phi3", SHAPES[3])]
)
def test_it_is_what_transformers_computes(
    impl: str, family: str, shape: tuple[int, int, int, int, int, int]
) -> None:
    """Values, gradients and the order of memory; the last two rotate a part."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    given = arguments(shape, (F64, F64))

    def theirs(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = module.apply_rotary_pos_emb(query, key, cos, sin)
        return found

    found = ops.run(partial(rotary_embedding, impl=impl), given, WRT)
    torch.testing.assert_close(found, ops.run(theirs, given, WRT))
    for x in rotary_embedding(**given, impl=impl):
        assert x.transpose(1, 2).is_contiguous()


@IMPLS
def test_by_hand(impl: str) -> None:
    """A quarter turn, and a number that stays; the halves' cosines and sines are each their own."""
    query = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).view(1, 1, 1, 5).requires_grad_()
    cos = torch.tensor([0.0, 10.0, 0.0, 100.0]).view(1, 1, 4)
    sin = torch.tensor([1.0, 0.0, 1.0, 1000.0]).view(1, 1, 4)
    found, _ = rotary_embedding(query, query[:, :0], cos, sin, impl=impl)
    assert found.flatten().tolist() == [-3, 20, 1, 2400, 5]
    found.backward(torch.ones_like(found))
    assert query.grad is not None and query.grad.flatten().tolist() == [1, 1010, -1, 100, 1]


@IMPLS
def test_layouts(impl: str) -> None:
    """Any strides, the last one too; expanded; in the order of heads; nothing around is read."""
    given = arguments((2, 4, 4, 3, 10, 6))
    expected = ops.run(partial(rotary_embedding, impl=impl), given, WRT)
    for name, x in given.items():
        for _, view in ops.views(x):
            found = ops.run(partial(rotary_embedding, impl=impl), given | {name: view}, WRT)
            ops.assert_same_bits(expected, found)
    one = {name: x[:1] for name, x in given.items()}
    for of in (one | {"query": one["query"][:, :1, :1]}, one | {"cos": one["cos"][..., :1]}):
        expanded = {name: x.expand_as(one[name]) for name, x in of.items()}
        copies = {name: x.contiguous() for name, x in expanded.items()}
        for a, b in zip(rotary_embedding(**expanded, impl=impl),
                        rotary_embedding(**copies, impl=impl), strict=True):  # fmt: skip
            assert torch.equal(a, b)


@IMPLS
@pytest.mark.parametrize(
    "shape", [(0, 4, 2, 3, 8, 8), (2, 4, 2, 0, 8, 8), (2, 0, 2, 3, 8, 4), (2, 4, 2, 3, 0, 0)]
)
def test_empty(impl: str, shape: tuple[int, int, int, int, int, int]) -> None:
    for shared in (False, True):
        given = arguments(shape, shared=shared)
        for name, x in ops.run(partial(rotary_embedding, impl=impl), given, WRT).items():
            assert x.shape == given[WRT["1" in name or "key" in name]].shape


@IMPLS
def test_nan_stays_where_it_is(impl: str) -> None:
    given = arguments((2, 2, 1, 3, 12, 8))
    given["query"][1, 0, 2, 5] = torch.nan
    given["cos"][0, 1, 3] = torch.inf
    query, key = rotary_embedding(**given, impl=impl)
    assert query.isnan().nonzero().tolist() == [[1, 0, 2, 1], [1, 0, 2, 5]]
    assert query.isinf().nonzero().tolist() == [[0, 0, 1, 3], [0, 1, 1, 3]]
    assert not key.isnan().any() and key.isinf().nonzero().tolist() == [[0, 0, 1, 3]]


@IMPLS
def test_gradients(impl: str) -> None:
    """Twice, and of what is used alone; none of cos and sin."""
    given = [x.requires_grad_() for x in arguments((2, 3, 1, 2, 6, 4), (F64, F64)).values()]
    constants = [x.detach() for x in given[2:]]
    function = partial(rotary_embedding, impl=impl)
    leaves = [x.detach().requires_grad_() for x in given[:2]]
    # Along one direction in Triton's interpreter, which takes a minute for all.
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda q, k: function(q, k, *constants), leaves, fast_mode=impl == "triton")
    for i in range(2):
        gradients = torch.autograd.grad(function(*given)[i].sum(), given, allow_unused=True)
        assert gradients[i] is not None and gradients[i].any()
        assert gradients[1 - i] is None or not gradients[1 - i].any()
        assert gradients[2] is None and gradients[3] is None
    fixed = [x.detach() for x in given[:2]]
    for i in range(2):  # of what is trained alone
        one = [*fixed, *constants]
        one[i] = given[i]
        (gradient,) = torch.autograd.grad(function(*one)[i].sum(), given[i])
        assert gradient.any()
    assert not any(x.requires_grad for x in function(*fixed, *given[2:]))


@KERNELS
def test_only_cos_and_sin_are_kept(impl: str) -> None:
    given = {name: x.requires_grad_() for name, x in arguments(SHAPES[0]).items()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        rotary_embedding(**given, impl=impl)
    assert {x.data_ptr() for x in kept} == {given["cos"].data_ptr(), given["sin"].data_ptr()}


@pytest.mark.parametrize(
    "impl", ops.implementations_of("rotary_embedding", but=("reference", "triton"))
)
def test_query_and_key_are_read_where_they_lie(impl: str) -> None:
    given = arguments((2, 9, 3, 64, 64, 64))
    with ops.Watch() as watch:
        rotary_embedding(**given, impl=impl)
    assert watch.largest == given["query"].numel()


@NEEDS_CPP
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_nothing_beside_the_results_is_written(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        given = arguments(shape, (dtype, dtype))
        with Guard() as guard:
            rotary_embedding(**given)
        assert len(guard.buffers) == 2
        guard.check()


@NEEDS_CPP
def test_threads_change_no_bit() -> None:
    given = arguments((3, 9, 3, 137, 64, 48), (BF16, F32))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.run(rotary_embedding, given, WRT))
    for other in results[1:]:
        ops.assert_same_bits(results[0], other)


@IMPLS
def test_compiles_without_a_graph_break(impl: str) -> None:
    """With gradients of both, of one, and of none."""
    torch._dynamo.reset()
    op = partial(rotary_embedding, impl=impl)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for dtypes in ((F32, F32), (BF16, F64)):
        given = arguments(SHAPES[3], dtypes)
        for wrt in (WRT, ("query",), ()):
            torch.testing.assert_close(ops.run(compiled, given, wrt), ops.run(op, given, wrt))
    query, key, *angles = (x.requires_grad_() for x in arguments(SHAPES[0]).values())
    for i in range(2):
        of_one = [
            torch.autograd.grad(f(query, key, *angles)[i].sum(), (query, key)[i])
            for f in (op, compiled)
        ]
        torch.testing.assert_close(*of_one)


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (BF16, F64)], ids=str)
def test_opcheck(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    given = arguments((2, 3, 2, 4, 10, 6), dtypes)
    tensors = (*(given[name].detach().requires_grad_() for name in WRT), given["cos"], given["sin"])
    for transposed in (False, True):
        torch.library.opcheck(torch.ops.ppo_kernels.rotary_embedding, (*tensors, transposed, "cpp"))


@IMPLS
def test_errors(impl: str) -> None:
    given: dict[str, Any] = arguments((2, 4, 2, 3, 8, 8)) | {"impl": impl}
    both = "query and key must be [B, Hq, T, D] and [B, Hkv, T, D], but are (2, 4, 3, 8) and "
    angles = "cos must be [B, T, R] or [1, T, R], here with B = 2, T = 3 and R even and at most 8, "
    for change, error, message in (
        ({"key": torch.zeros(1, 2, 3, 8)}, ValueError, both + "(1, 2, 3, 8)"),
        ({"key": torch.zeros(2, 2, 4, 8)}, ValueError, both + "(2, 2, 4, 8)"),
        ({"key": torch.zeros(2, 2, 3, 6)}, ValueError, both + "(2, 2, 3, 6)"),
        ({"key": torch.zeros(2, 3, 8)}, ValueError, both + "(2, 3, 8)"),
        ({"cos": torch.zeros(3, 8)}, ValueError, angles + "but has shape (3, 8)"),
        ({"cos": torch.zeros(3, 3, 8)}, ValueError, angles + "but has shape (3, 3, 8)"),
        ({"cos": torch.zeros(2, 1, 8)}, ValueError, angles + "but has shape (2, 1, 8)"),
        ({"cos": torch.zeros(2, 3, 10)}, ValueError, angles + "but has shape (2, 3, 10)"),
        ({"cos": torch.zeros(2, 3, 7)}, ValueError, angles + "but has shape (2, 3, 7)"),
        ({"sin": torch.zeros(1, 3, 8)}, ValueError, "sin must have shape (2, 3, 8), but has (1, "),
        ({"key": torch.zeros(2, 2, 3, 8).half()}, TypeError, "key must be float32, but is float16"),
        ({"query": torch.zeros(2, 4, 3, 8).int()}, TypeError, "query must be bfloat16 or float16"),
        ({"sin": None}, TypeError, "sin must be a tensor, but is NoneType"),
        ({"cos": torch.zeros(2, 3, 8, device="meta")}, ValueError, "cos must be on the device of "),
    ):
        with pytest.raises(error, match=re.escape(f"rotary_embedding: {message}")):
            rotary_embedding(**given | change)
