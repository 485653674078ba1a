"""`sample`: the same tokens from every implementation, and from the right distribution."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import ops
import pytest
import torch
from fuzz.cases import make_case
from torch import Tensor

from ppo_kernels import sample
from ppo_kernels.philox import uniform_numbers

IMPLS = pytest.mark.parametrize("impl", ops.implementations_of("sample"))
KERNELS = pytest.mark.parametrize("kernel", ops.implementations_of("sample", but=("reference",)))
# Triton's interpreter takes milliseconds a row.
MANY_ROWS = pytest.mark.parametrize("impl", ops.implementations_of("sample", but=("triton",)))
CPP = pytest.mark.parametrize("cpp", ops.implementations_of("sample", but=("reference", "triton")))
SETTINGS: list[dict[str, Any]] = [
    {}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 7, "top_p": 0.9},
    {"temperature": 2.0, "top_p": 0.95}, {"top_k": 1}, {"top_p": 1e-6}, {"top_k": 10**6},
]  # fmt: skip


def kept(z: Tensor, top_k: int, top_p: float) -> Tensor:
    """Which can be drawn, by the definition, one row at a time: `z` `[N, V]`, float64."""
    found = torch.ones_like(z, dtype=torch.bool)
    for row, keep in zip(z, found, strict=True):
        if 0 < top_k < len(row):
            keep &= row >= row.sort(descending=True).values[top_k - 1]
        if top_p < 1:
            descending, order = row.masked_fill(~keep, -torch.inf).sort(descending=True)
            weight = descending.softmax(0).cumsum(0)
            last = order[int((weight < top_p).sum().clamp(max=len(row) - 1))]
            keep &= row >= row[last]
    return found


def may_be_drawn(
    logits: Tensor, tokens: Tensor, counters: Tensor, near: float, *, seed: int,
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
) -> Tensor:  # fmt: skip
    """Whether each token is the one drawn, by the definition in float64; or where a cumulative
    probability lies so near to the random number, or to `top_p`, that it may be its neighbour."""
    z = logits.double() / temperature
    u, at = uniform_numbers(seed, counters)[:, None], tokens[:, None]
    right = torch.zeros_like(tokens, dtype=torch.bool)
    for p in {top_p} if top_p == 1 else (top_p * (1 - near), top_p, min(top_p + near, 1.0)):
        q = z.masked_fill(~kept(z, top_k, p), -torch.inf).softmax(-1)
        after, of_token = q.cumsum(-1).gather(1, at), q.gather(1, at)
        hit = (of_token > 0) & (after - of_token - near <= u) & (u <= after + near)
        right |= hit.squeeze(1)
    return right


def test_philox_as_published() -> None:
    """The first word for key and counter 0, from the authors' known answers (Random123)."""
    assert int(uniform_numbers(0, torch.zeros((), dtype=torch.int64)) * 2**32) == 0x6627E8D5


@KERNELS
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_tokens_of_the_reference(
    kernel: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    for vocab in (1, 50, 2500):
        logits = (3 * torch.randn(3, vocab)).to(dtype)
        logits[:, vocab // 2 :: 5] = -torch.inf
        logits[:, 0] = 1.0
        given = settings | {"seed": 2**40 + 7, "offset": 2**33 + 5}
        tokens, logprobs = sample(logits, **given, impl=kernel)
        expected, of_expected = sample(logits, **given, impl="reference")
        assert torch.equal(tokens, expected)
        assert logprobs.dtype == of_expected.dtype
        torch.testing.assert_close(logprobs, of_expected, rtol=3e-6, atol=3e-6)


@CPP
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_tokens_of_the_reference_in_long_rows(cpp: str, settings: dict[str, Any]) -> None:
    """In several blocks, and with a guess of what is kept: right, or wrong where a part of the row
    does not tell of the rest (the first rows)."""
    for vocab in (8192, 20_011, 300_001):
        logits = 3 * torch.randn(6, vocab)
        logits[0] = torch.linspace(-90, 0, vocab)
        logits[1, 100:130], logits[1, 0:16] = 12.0, 15.0  # the latter are in the part
        logits[2] = -torch.inf
        logits[2, vocab // 2 :: 999] = 0.0
        given = settings | {"seed": 5}
        tokens, logprobs = sample(logits, **given, offset=9, impl=cpp)
        counters = 9 + torch.arange(6)
        assert may_be_drawn(logits, tokens, counters, 1e-6, **given).all()
        z = logits.double() / settings.get("temperature", 1.0)
        allowed = kept(z, settings.get("top_k", 0), settings.get("top_p", 1.0))
        log_p = z.masked_fill(~allowed, -torch.inf).log_softmax(-1).gather(1, tokens[:, None])
        torch.testing.assert_close(logprobs.double(), log_p[:, 0], rtol=3e-6, atol=3e-6)


@CPP
def test_the_tokens_of_the_reference_on_random_cases(cpp: str) -> None:
    """The logits of the fuzz: flat, peaked, far from 0, impossible ones, all dtypes and layouts,
    NaN around them and in them."""
    broken = 0
    for number in range(150):
        arguments = make_case("token_logprobs", number).arguments
        logits = arguments["logits"]
        logits = logits[..., :3, :] if logits.ndim > 1 and logits.shape[-1] > 9000 else logits
        given = {"temperature": arguments["temperature"], "top_k": (0, 0, 5, 300)[number % 4],
                 "top_p": (1.0, 0.9, 0.999, 0.3, 1.0)[number % 5], "seed": number}  # fmt: skip
        counters = torch.randint(2**62, logits.shape[:-1])
        tokens, logprobs = sample(logits, **given, offset=counters, impl=cpp)
        rows = logits.reshape(-1, logits.shape[-1]).double()
        good = rows.isfinite().any(-1) & (rows < torch.inf).all(-1)
        broken += int((~good).sum())
        assert torch.equal(logprobs.reshape(-1).isfinite(), good), number
        assert (tokens.reshape(-1)[~good] == 0).all(), number
        near = 1e-12 if logits.dtype == torch.float64 else 2e-6
        found = may_be_drawn(
            rows[good], tokens.reshape(-1)[good], counters.reshape(-1)[good], near, **given
        )
        assert found.all(), number
    assert broken > 20


@IMPLS
def test_layouts_and_counters(impl: str) -> None:
    """Rows in any leading shape and strides; row i draws with counter offset + i."""
    logits = torch.randn(4, 3, 11)
    tokens, logprobs = sample(logits, seed=1, offset=10, impl=impl)
    assert tokens.shape == logprobs.shape == (4, 3) and tokens.dtype == torch.int64
    strided = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for same in (strided, torch.cat((logits, logits), 1)[:, :3]):
        assert torch.equal(sample(same, seed=1, offset=10, impl=impl)[0], tokens)
    row = sample(logits[2, 1], seed=1, offset=torch.tensor(10 + 2 * 3 + 1), impl=impl)
    assert row[0] == tokens[2, 1] and row[1] == logprobs[2, 1]
    assert not torch.equal(sample(logits, seed=2, offset=10, impl=impl)[0], tokens)
    assert sample(logits[:0], seed=1, offset=0, impl=impl)[0].shape == (0, 3)


@IMPLS
def test_counters_of_each_row(impl: str) -> None:
    """A row draws the same wherever it stands, and the seed may be a tensor."""
    logits, key, offsets = torch.randn(12, 300), 2**45 + 1, torch.randint(2**62, (12,))
    tokens, logprobs = sample(logits, seed=key, offset=offsets, impl=impl)
    for i in range(12):
        alone = sample(logits[i], seed=key, offset=int(offsets[i]), impl=impl)
        assert alone[0] == tokens[i] and alone[1] == logprobs[i]
    order = torch.randperm(12)
    square = (x[order].reshape(4, 3, -1) for x in (logits, offsets))
    mixed, counters = (x.transpose(0, 1) for x in square)
    found = sample(
        mixed, seed=torch.tensor(key), offset=counters.squeeze(-1), top_p=0.999999, impl=impl
    )[0]
    assert torch.equal(found, tokens[order].reshape(4, 3).T)
    in_order = sample(logits, seed=key, offset=7 + torch.arange(12), impl=impl)[0]
    assert torch.equal(in_order, sample(logits, seed=key, offset=7, impl=impl)[0])


@MANY_ROWS
@pytest.mark.parametrize("settings", [
    {}, {"temperature": 0.7, "top_k": 6}, {"top_p": 0.8}, {"top_k": 7, "top_p": 0.9},
], ids=str)  # fmt: skip
def test_frequencies_are_those_of_the_distribution(impl: str, settings: dict[str, Any]) -> None:
    """A chi-squared test; with these counters it is the same in every run."""
    logits, draws = torch.randn(9), 20_000
    tokens, logprobs = sample(logits.expand(draws, 9), seed=3, offset=0, impl=impl, **settings)
    z = logits.double() / settings.get("temperature", 1.0)
    allowed = kept(z[None], settings.get("top_k", 0), settings.get("top_p", 1.0))[0]
    p = z.masked_fill(~allowed, -torch.inf).softmax(0)
    counts = tokens.bincount(minlength=9).double()
    assert torch.equal(counts > 0, allowed)  # of what can be drawn, all was
    torch.testing.assert_close(logprobs.double(), p.log()[tokens], rtol=1e-6, atol=1e-6)
    chi_squared = ((counts - draws * p).square() / (draws * p))[allowed].sum()
    assert chi_squared < 26  # 8 degrees of freedom: 1 in 1,000


@IMPLS
def test_what_is_kept(impl: str) -> None:
    """0.5, 0.3, 0.2: top-p keeps the fewest that reach it; ties stay together."""
    rows = 20 if impl == "triton" else 60
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(rows, 3)

    def drawn(x: Tensor = logits, **settings: Any) -> set[int]:
        return set(sample(x, **settings, seed=0, offset=0, impl=impl)[0].tolist())

    assert drawn(top_p=0.45) == {1}
    assert drawn(top_p=0.7) == {1, 2}
    assert drawn(top_p=0.9) == {0, 1, 2}
    assert drawn(top_k=2) == {1, 2}
    assert drawn(top_k=2, top_p=0.6) == {1}  # 0.5 of the 0.8 that top-k leaves
    assert drawn(torch.tensor([0.0, 1.0, 1.0, 1.0]).expand(rows, 4), top_k=1) == {1, 2, 3}
    zeros = torch.tensor([-0.0, 0.0, -1.0]).expand(rows, 3)
    assert drawn(zeros, top_k=1) == drawn(zeros, top_p=0.5) == {0, 1}


@IMPLS
@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.9}], ids=str)
def test_impossible_tokens_and_rows_that_are_no_distribution(
    impl: str, settings: dict[str, Any]
) -> None:
    inf, nan = torch.inf, torch.nan
    for vocab in (1, 7, 40, 1100):
        logits = torch.full((6, vocab), -inf)
        logits[0, -1], logits[1, vocab // 2], logits[2, 0] = 3.0, nan, inf
        logits[3, vocab // 3] = -1e30
        logits[5] = 0.0
        logits[5, vocab // 2] = torch.tensor(nan).copysign(torch.tensor(-1.0))
        tokens, logprobs = sample(logits, seed=0, offset=3, impl=impl, **settings)
        assert tokens.tolist() == [vocab - 1, 0, 0, vocab // 3, 0, 0]
        assert logprobs[[0, 3]].tolist() == [0.0, 0.0] and logprobs[[1, 2, 4, 5]].isnan().all()


@CPP
@pytest.mark.parametrize("settings", [{}, {"top_k": 30, "top_p": 0.9}], ids=str)
def test_any_number_of_threads_gives_the_same_bits(cpp: str, settings: dict[str, Any]) -> None:
    logits = torch.randn(64, 20_000)
    expected = sample(logits, seed=1, offset=0, impl=cpp, **settings)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for x, y in zip(sample(logits, seed=1, offset=0, impl=cpp, **settings), expected,
                        strict=True):  # fmt: skip
            assert torch.equal(x, y)


@CPP
def test_under_torch_compile(cpp: str) -> None:
    torch._dynamo.reset()  # of all partial functions together only so many are compiled
    logits, offset = torch.randn(4, 50), torch.arange(4)
    compiled = torch.compile(partial(sample, impl=cpp), fullgraph=True, backend="aot_eager")
    for seed in (3, 4, torch.tensor(5)):
        given = {"temperature": 0.7, "top_p": 0.9, "seed": seed, "offset": offset}
        for x, y in zip(compiled(logits, **given), sample(logits, **given), strict=True):
            assert torch.equal(x, y)


@IMPLS
def test_errors(impl: str) -> None:
    logits = torch.randn(2, 3)
    given: dict[str, Any] = {"seed": 0, "offset": 0, "impl": impl}
    wrong: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number > 0"),
        ({"top_p": 0.0}, ValueError, "top_p must be a finite number > 0 and <= 1"),
        ({"top_k": -1}, ValueError, "top_k must be a finite number >= 0"),
        ({"top_k": 2.5}, TypeError, "top_k must be an int, but is 2.5"),
        ({"seed": -1}, ValueError, "seed must be >= 0 and < 2^63, but is -1"),
        ({"seed": 2**63}, ValueError, "seed must be >= 0 and < 2^63, but is 9"),
        ({"seed": torch.tensor(-2)}, ValueError, "seed must be >= 0, but has -2"),
        ({"seed": torch.zeros(2).long()}, ValueError, "seed must be 0-dim, but has shape (2,)"),
        ({"offset": -1}, ValueError, "offset must be >= 0 and < 2^63, but is -1"),
        ({"offset": 1.5}, TypeError, "offset must be an int or an int64 tensor, but is 1.5"),
        ({"offset": torch.tensor([3, -4])}, ValueError, "offset must be >= 0, but has -4"),
        ({"offset": torch.arange(3)}, ValueError,
         "offset must be 0-dim or have shape (2,), but has shape (3,)"),
        ({"offset": torch.zeros(2)}, TypeError, "offset must be int64, but is float32"),
        ({"offset": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError,
         "offset must be on the device of logits, cpu, but is on meta"),
    )  # fmt: skip
    for change, error, message in wrong:
        with pytest.raises(error, match=re.escape(f"sample: {message}")):
            sample(logits, **given | change)
    with pytest.raises(ValueError, match=r"logits must be \[\.\.\., V\], V > 0"):
        sample(torch.zeros(2, 0), **given)
