"""`decode_attention`: one body over all implementations, against float64."""

from __future__ import annotations

import re
from typing import Any

import ops
import pytest
import torch
from torch import Tensor

from ppo_kernels import decode_attention, reference

KERNELS = pytest.mark.parametrize(
    "impl", ops.implementations_of("decode_attention", but=("reference",))
)
IMPLS = pytest.mark.parametrize("impl", ops.implementations_of("decode_attention"))
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# Of the query, and of keys and values: under autocast, a query in float32 meets slots in bfloat16.
DTYPES = pytest.mark.parametrize(
    "dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32)], ids=str
)
# (query heads, key/value heads, their width, the values' width, the length of a slot)
SHAPES = [
    (3, 3, 32, 32, 40), (9, 3, 64, 64, 131), (2, 1, 80, 80, 300), (8, 1, 128, 96, 33),
    (14, 2, 16, 24, 20), (20, 1, 5, 3, 9), (2, 2, 256, 256, 17), (3, 1, 8, 8, 600),
]  # fmt: skip
# Of the query, of keys and values, and of what is written to them.
WRITTEN = pytest.mark.parametrize(
    "dtypes",
    [
        (F32, F32, F32, F32), (BF16, BF16, BF16, BF16), (F16, F16, F16, F16),
        (F32, BF16, F32, F16), (BF16, F32, BF16, F64), (BF16, BF16, F64, F32),
        (F16, F16, BF16, F64), (F64, BF16, F32, F32), (F32, F64, F64, F16), (BF16, F16, F32, F64),
    ],
    ids=str,
)  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {}, {"softcap": 3.0}, {"window": 6}, {"sinks": True},
    {"softcap": 2.0, "window": 130, "sinks": True},
]  # fmt: skip


def arguments(
    shape: tuple[int, int, int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
    rows: int = 5,
    **options: Any,
) -> dict[str, Any]:
    """Ragged rows, slices of larger slots; NaN wherever nothing may be read. The values lie around
    2: units in the last place of an average are theirs, not those of what cancels to almost 0."""
    heads, kv_heads, width, value_width, longest = shape
    lengths = torch.tensor([0, longest, 1, longest // 2, longest - 1])[:rows]
    beyond = torch.arange(longest + 6) >= lengths[:, None]

    def slots(columns: int, around: float) -> Tensor:
        slot = (torch.randn(rows + 1, kv_heads, longest + 6, columns) + around).to(dtypes[1])
        slot[:rows].masked_fill_(beyond[:, None, :, None], torch.nan)
        return slot[:rows, :, :longest]

    if options.get("sinks"):
        options["sinks"] = torch.randn(heads)
    query = torch.randn(rows, heads, width).to(dtypes[0])
    given = {"query": query, "keys": slots(width, 0), "values": slots(value_width, 2)}
    return given | {"lengths": lengths, "scale": 2 * width**-0.5} | options


@KERNELS
@DTYPES
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_error_rule(
    impl: str, dtypes: tuple[torch.dtype, torch.dtype], options: dict[str, Any]
) -> None:
    """Every group size, width and length, some of the keys and the values in parts."""
    for shape in SHAPES:
        given = arguments(shape, dtypes, **options)
        ops.assert_error_rule(decode_attention, reference.decode_attention, given, impl=impl)


@KERNELS
@pytest.mark.parametrize("dtypes", [(F64, F64), (F64, BF16), (F32, F64)], ids=str)
def test_float64(impl: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Where any tensor has it, it is computed in."""
    given = arguments((4, 2, 24, 16, 40), dtypes, softcap=3.0, sinks=True)
    found = decode_attention(**given, impl=impl)
    exact = reference.decode_attention(**ops.in_dtype(given, F64))
    assert found.dtype == dtypes[0]
    rtol = 1e-14 if dtypes[0] == F64 else torch.finfo(F32).eps / 2
    torch.testing.assert_close(found.double(), exact, rtol=rtol, atol=1e-14)


def test_the_reference_is_torchs_attention() -> None:
    given = arguments((6, 2, 16, 8, 11), (F64, F64))
    real = (torch.arange(11) < given["lengths"][:, None])[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        given["query"][:, :, None], given["keys"].nan_to_num(), given["values"].nan_to_num(),
        real, scale=given["scale"], enable_gqa=True,
    )  # fmt: skip
    found = reference.decode_attention(**given)
    torch.testing.assert_close(found[1:], expected[1:, :, 0])
    assert not found[0].any()


@IMPLS
def test_options_by_hand(impl: str) -> None:
    """Values 1, 2, 3 for keys of logits log 1, log 2, log 3, which cap, window and sink change."""
    keys = torch.tensor([1.0, 2.0, 3.0]).log().view(1, 1, 3, 1)
    values = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3, 1)

    def of(length: int = 3, **options: Any) -> float:
        given = options | {"lengths": torch.tensor([length]), "impl": impl}
        return decode_attention(torch.full((1, 1, 1), 0.5), keys, values, scale=2.0, **given).item()

    assert of() == pytest.approx(14 / 6)
    assert of(2) == pytest.approx(5 / 3)
    assert of(window=2) == pytest.approx(13 / 5)
    assert of(window=1) == pytest.approx(3)
    assert of(window=2**62) == of()
    assert of(sinks=torch.tensor([6.0]).log()) == pytest.approx(14 / 12)
    capped = (keys.flatten() / 0.5).tanh().mul(0.5).exp()
    assert of(softcap=0.5) == pytest.approx(
        ((capped * values.flatten()).sum() / capped.sum()).item()
    )
    assert of(0) == of(0, sinks=torch.zeros(1)) == 0


def with_new(given: dict[str, Any], dtypes: tuple[torch.dtype, torch.dtype]) -> dict[str, Any]:
    """With keys and values for the last places, which are NaN so far: views of one product. The
    slots are copies, with strides of their own; the row of length 0 has NaN to write."""
    product = torch.randn(*given["query"].shape[:1], given["keys"].shape[1], 999) + 1
    product.masked_fill_((given["lengths"] == 0)[:, None, None], torch.nan)
    found = dict(given)
    for name, dtype, begin in (("keys", dtypes[0], 1), ("values", dtypes[1], 500)):
        slots = given[name].transpose(0, 2).clone(memory_format=torch.contiguous_format)
        found[name] = slots.transpose(0, 2)
        for b, length in enumerate(given["lengths"].tolist()):
            found[name][b, :, max(length - 1, 0) : length] = torch.nan
        found[f"new_{name}"] = product.to(dtype)[..., begin : begin + slots.shape[-1]]
    return found


def assert_written_first(given: dict[str, Any], impl: str) -> Tensor:
    """What comes with new keys and values is, to the bit, what comes after they were written, and
    that is done where they belong and nowhere else. Returns it."""
    expected = {name: given[name].clone() for name in ("keys", "values")}
    for b, length in enumerate(given["lengths"].tolist()):
        if length:
            for name, slots in expected.items():
                slots[b, :, length - 1] = given[f"new_{name}"][b].to(slots.dtype)
    found = decode_attention(**given, impl=impl)
    # Triton's interpreter cuts off what does not fit bfloat16, where a GPU rounds.
    cut = torch.finfo(BF16).eps if impl == "triton" and not torch.cuda.is_available() else 0.0
    for name, slots in expected.items():
        rtol = cut if slots.dtype == BF16 else 0.0
        torch.testing.assert_close(given[name], slots, rtol=rtol, atol=0.0, equal_nan=True)
    before = {name: x for name, x in given.items() if not name.startswith("new_")}
    assert torch.equal(found, decode_attention(**before, impl=impl))
    return found


@IMPLS
@WRITTEN
def test_new_keys_are_written_first_error_rule(impl: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Whole slots and parts of them, rows of no length and of all of it."""
    for number, options in zip((4, 1, 4, 4, 7), OPTIONS, strict=True):
        given = arguments(SHAPES[number], (dtypes[0], dtypes[1]), **options)
        found = assert_written_first(with_new(given, (dtypes[2], dtypes[3])), impl)
        assert found.isfinite().all()


@IMPLS
def test_new_keys_for_any_layout_batch_and_group(impl: str) -> None:
    """Into slices, a group that takes several tiles of heads, empty rows, values and heads."""
    for shape in SHAPES:
        given = arguments(shape)
        new = with_new(given, (F32, F32))
        in_place = new | {name: given[name] for name in ("keys", "values")}
        around = given["keys"]._base.clone()
        assert_written_first(in_place, impl)
        outside = torch.ones_like(around, dtype=torch.bool)
        outside[:5, :, : shape[4]] = False
        torch.testing.assert_close(given["keys"]._base[outside], around[outside], equal_nan=True)
    new["new_keys"] = new["new_keys"].mT.contiguous().mT
    assert_written_first(new, impl)
    for shape in ((4, 2, 8, 0, 10), (0, 2, 8, 8, 10)):
        assert_written_first(with_new(arguments(shape), (F32, F32)), impl)
    assert_written_first(with_new(arguments(SHAPES[0], rows=0), (F32, F32)), impl)
    only = {"lengths": torch.zeros(5, dtype=torch.int64)}
    assert not assert_written_first(with_new(arguments(SHAPES[4]) | only, (F32, F32)), impl).any()


@IMPLS
def test_torch_knows_that_slots_were_written(impl: str) -> None:
    given = with_new(arguments(SHAPES[4]), (F32, F32))
    weight = torch.ones((), requires_grad=True)
    loss = (weight * given["keys"]).sum()
    decode_attention(**given, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@KERNELS
def test_logits_of_any_size(impl: str) -> None:
    """One key takes all, in any of many parts; the weights of all others are 0."""
    for at in (0, 299, 1300):
        keys = torch.zeros(1, 1, 1301, 4)
        keys[..., at, :] = 1e4
        values = torch.arange(1301.0).view(1, 1, 1301, 1).expand(-1, -1, -1, 3)
        for sign in (1.0, -1.0):
            query = torch.full((1, 2, 4), 1e4 * sign)
            found = decode_attention(
                query, keys, values, torch.tensor([1301]), scale=1.0, impl=impl
            )
            expected = at if sign > 0 else (1300 * 1301 / 2 - at) / 1300
            torch.testing.assert_close(found, torch.full_like(found, expected))


@KERNELS
def test_nan_in_a_key_stays(impl: str) -> None:
    given = arguments((4, 2, 8, 8, 10))
    given["keys"][1, 0, 3, 2] = torch.nan
    found = decode_attention(**given, impl=impl)
    assert found[1, :2].isnan().all() and not found[1, 2:].isnan().any()


@KERNELS
def test_layouts(impl: str) -> None:
    """Any strides, the last one too; empty batches, slots and widths."""
    given = arguments((4, 2, 8, 8, 10))
    expected = decode_attention(**given, impl=impl)
    for name in ("query", "keys", "values"):
        x = given[name]
        for other in (x.mT.contiguous().mT, x.transpose(0, 1).contiguous().transpose(0, 1)):
            assert torch.equal(decode_attention(**given | {name: other}, impl=impl), expected)
    every_second = torch.stack((given["lengths"], given["lengths"] - 99), 1)[:, 0]
    assert torch.equal(decode_attention(**given | {"lengths": every_second}, impl=impl), expected)
    for rows, longest in ((0, 10), (5, 0)):
        given = arguments((4, 2, 8, 8, 10), rows=rows)
        cut = {name: given[name][:, :, :longest] for name in ("keys", "values")}
        lengths = given["lengths"].clamp(max=longest)
        empty = decode_attention(**given | cut | {"lengths": lengths}, impl=impl)
        assert empty.shape == (rows, 4, 8) and not (longest == 0 and empty.any())


@pytest.mark.parametrize(
    "impl", ops.implementations_of("decode_attention", but=("reference", "triton"))
)
def test_same_bits_for_any_threads_and_batch(impl: str) -> None:
    """On a CPU the parts of a row depend on its own length alone."""
    given = arguments((6, 2, 32, 32, 700))
    together = decode_attention(**given, impl=impl)
    torch.set_num_threads(3)
    assert torch.equal(decode_attention(**given, impl=impl), together)
    assert_written_first(with_new(given, (F32, F32)), impl)
    for b in range(5):
        names = ("query", "keys", "values", "lengths")
        alone = decode_attention(**given | {n: given[n][b : b + 1] for n in names}, impl=impl)
        assert torch.equal(alone[0], together[b])


@IMPLS
def test_heads_beyond_32_bits(impl: str) -> None:
    """As in a view of the last token of a long prompt's keys. Untouched memory is free."""
    heads, width, apart = 3, 16, 2**30
    memory = torch.empty((heads - 1) * apart + width, dtype=torch.float16)
    far = memory.as_strided((1, heads, width), (len(memory), apart, 1))
    far.copy_(torch.randn(1, heads, width))
    near, query = far.contiguous(), torch.randn(1, heads, width).half()
    slots, lengths = torch.randn(2, 1, heads, 4, width).half(), torch.tensor([4])

    def attended(query: Tensor, new: Tensor) -> Tensor:
        given = {"scale": 0.25, "new_keys": new, "new_values": new, "impl": impl}
        return decode_attention(query, *slots.clone(), lengths, **given)

    assert torch.equal(attended(far, near), attended(near, near))
    assert torch.equal(attended(query, far), attended(query, near))


@IMPLS
def test_errors(impl: str) -> None:
    given = arguments((4, 2, 8, 8, 10)) | {"impl": impl}
    new = {name: torch.zeros(5, 2, 8) for name in ("new_keys", "new_values")}
    for change, message in (
        (
            {"query": torch.zeros(5, 3, 8)},
            "the query must have a multiple of the keys' 2 heads, but has 3",
        ),
        ({"query": torch.zeros(4, 4, 8)}, "query, keys and values must be [B, Hq, D], [B, Hkv, S"),
        ({"values": torch.zeros(5, 2, 9, 8)}, "query, keys and values must be [B, Hq, D], [B, Hkv"),
        ({"lengths": torch.tensor([0, 1, 11, -1, 2])}, "lengths[2] is 11, but must be within 0 to"),
        ({"lengths": torch.tensor([0, 1, 2, -1, 2])}, "lengths[3] is -1, but must be within 0 to"),
        ({"lengths": torch.zeros(4, dtype=torch.int64)}, "lengths must have shape (5,)"),
        ({"sinks": torch.zeros(2)}, "sinks must have shape (4,)"),
        ({"window": 0}, "window must be a finite number >= 1"),
        ({"softcap": 0.0}, "softcap must be a finite number > 0"),
        ({"new_keys": new["new_keys"]}, "new_keys and new_values are given together, or neither"),
        (new | {"new_keys": torch.zeros(5, 2, 7)}, "new_keys must have shape (5, 2, 8)"),
        (new | {"new_values": torch.zeros(5, 4, 8)}, "new_values must have shape (5, 2, 8)"),
        (
            new | {"values": given["values"].mT.contiguous().mT},
            "values must have a contiguous last dimension and no memory twice where new_values are",
        ),
        (new | {"keys": given["keys"][:1].expand(5, -1, -1, -1)}, "keys must have a contiguous"),
        (new | {"keys": torch.zeros(999).as_strided((5, 2, 10, 8), (80, 75, 8, 1))}, "keys must"),
        (new | {"lengths": torch.tensor([0, 1, 11, -1, 2])}, "lengths[2] is 11, but must be"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"decode_attention: {message}")):
            decode_attention(**given | change)
    for change, message in (
        ({"window": 2.5}, "window must be an int"),
        ({"values": torch.zeros(5, 2, 10, 8, dtype=F16)}, "values must be float32"),
        ({"lengths": torch.zeros(5, dtype=torch.int32)}, "lengths must be int64"),
        ({"scale": None}, "scale must be a number"),
        (new | {"new_values": torch.zeros(5, 2, 8, dtype=torch.int64)}, "new_values must be"),
        (new | {"new_keys": [0.0]}, "new_keys must be a tensor"),
    ):
        with pytest.raises(TypeError, match=re.escape(f"decode_attention: {message}")):
            decode_attention(**given | change)
