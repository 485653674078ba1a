"""`sample`: the same tokens from every implementation, and from the right distribution."""

from __future__ import annotations

import re
from typing import Any

import ops
import pytest
import torch
from torch import Tensor

from ppo_kernels import sample
from ppo_kernels.philox import uniform_numbers

IMPLS = pytest.mark.parametrize("impl", ops.implementations_of("sample"))
KERNELS = pytest.mark.parametrize("kernel", ops.implementations_of("sample", but=("reference",)))
SETTINGS: list[dict[str, Any]] = [
    {}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 7, "top_p": 0.9},
    {"temperature": 2.0, "top_p": 0.95}, {"top_k": 1}, {"top_p": 1e-6}, {"top_k": 10**6},
]  # fmt: skip


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


def test_frequencies_are_those_of_the_distribution() -> None:
    """A chi-squared test; with these counters it is the same in every run."""
    logits, draws = torch.randn(9), 40_000
    for settings in ({}, {"temperature": 0.7, "top_k": 6}, {"top_p": 0.8}):
        tokens, logprobs = sample(logits.expand(draws, 9), seed=3, offset=0, **settings)
        counts = tokens.bincount(minlength=9).double()
        p = torch.zeros(9, dtype=torch.float64)
        p[tokens] = logprobs.double().exp()
        assert p.sum().item() == pytest.approx(1, abs=1e-6)  # of what can be drawn, all was
        drawn = p > 0
        chi_squared = ((counts - draws * p).square() / (draws * p))[drawn].sum()
        assert chi_squared < 26  # 8 degrees of freedom: 1 in 1,000


def test_what_is_kept() -> None:
    """0.5, 0.3, 0.2: top-p keeps the fewest that reach it; ties stay together."""
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(60, 3)
    wide = {"seed": 0, "offset": 0}

    def drawn(x: Tensor = logits, **settings: Any) -> set[int]:
        return set(sample(x, **settings, **wide)[0].tolist())

    assert drawn(top_p=0.45) == {1}
    assert drawn(top_p=0.7) == {1, 2}
    assert drawn(top_p=0.9) == {0, 1, 2}
    assert drawn(top_k=2) == {1, 2}
    assert drawn(top_k=2, top_p=0.6) == {1}  # 0.5 of the 0.8 that top-k leaves
    assert drawn(torch.tensor([0.0, 1.0, 1.0, 1.0]).expand(60, 4), top_k=1) == {1, 2, 3}


@IMPLS
def test_errors(impl: str) -> None:
    logits = torch.randn(2, 3)
    given: dict[str, Any] = {"seed": 0, "offset": 0, "impl": impl}
    for change, message in (
        ({"temperature": 0.0}, "temperature must be a finite number > 0"),
        ({"top_p": 0.0}, "top_p must be a finite number > 0 and <= 1"),
        ({"top_k": -1}, "top_k must be a finite number >= 0"),
        ({"seed": -1}, "seed must be a finite number >= 0"),
        ({"offset": -1}, "offset must be a finite number >= 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"sample: {message}")):
            sample(logits, **given | change)
    with pytest.raises(TypeError, match="top_k must be an int, but is 2"):
        sample(logits, **given | {"top_k": 2.5})
    with pytest.raises(ValueError, match=r"logits must be \[\.\.\., V\], V > 0"):
        sample(torch.zeros(2, 0), **given)
