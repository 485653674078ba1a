"""Attention over packed texts: that of each text alone, in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from transformers import AttentionInterface

from ppo_engine.models import attention
from ppo_engine.models.attention import ATTENTION, using
from ppo_engine.models.segments import Segments
from ppo_engine.models.windows import Unsupported

CPU = torch.device("cpu")
SHORT, LONG = [12, 11, 11, 3, 1], [300, 290, 20]


class Case(NamedTuple):
    key_heads: int = 4
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


CASES = {
    "plain": Case(),
    "grouped": Case(2),
    "window": Case(2, window=4),
    "softcap": Case(2, softcap=2.0),
    "sinks": Case(2, sinks=True),
    "all": Case(1, window=4, softcap=2.0, sinks=True),
}
# Relative to the largest: products of bf16 round by 2^-9, weights once more.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def alone(q: Tensor, k: Tensor, v: Tensor, case: Case, sinks: Tensor | None) -> Tensor:
    """One text: `[heads, T, size]`."""
    groups = len(q) // len(k)
    k, v = (x.repeat_interleave(groups, 0) for x in (k, v))
    z = 0.3 * q @ k.transpose(1, 2)
    if case.softcap:
        z = case.softcap * (z / case.softcap).tanh()
    place = torch.arange(q.shape[1])
    back = place[:, None] - place
    z = z.masked_fill((back < 0) | (back >= (case.window or 999)), -torch.inf)
    if sinks is not None:
        z = torch.cat((z, sinks[:, None, None].expand(-1, z.shape[1], 1)), -1)
    return z.softmax(-1)[..., : len(place)] @ v


def drawn(lengths: list[int], case: Case, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(1, heads, sum(lengths), 8) for heads in (4, case.key_heads, case.key_heads)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in [*shapes, (4,)]]


def assert_each_alone(lengths: list[int], case: Case, dtype: torch.dtype) -> None:
    q, k, v, sinks = inputs = drawn(lengths, case, dtype)
    found, weights = AttentionInterface._global_mapping[ATTENTION](
        None, q, k, v, None, scaling=0.3, softcap=case.softcap, sliding_window=case.window,
        s_aux=sinks if case.sinks else None, segments=Segments(lengths, CPU),
    )  # fmt: skip
    assert weights is None and found.dtype == dtype and found.shape == (1, sum(lengths), 4, 8)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    parts = zip(*(x[0].split(lengths, 1) for x in exact[:3]), strict=True)
    expected = torch.cat(
        [alone(*part, case, exact[3] if case.sinks else None) for part in parts], 1
    ).transpose(0, 1)[None]
    grad = torch.randn(found.shape).to(dtype)
    found.backward(grad)
    expected.backward(grad.double())
    pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(inputs, exact, strict=True))]
    for ours, theirs in pairs[: None if case.sinks else 4]:
        error = (ours.double() - theirs).abs().max() / theirs.abs().max()
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_text_attends_to_itself_alone(case, lengths, dtype):
    assert_each_alone(lengths, case, dtype)


@pytest.mark.parametrize("says_grouped", [False, True])
@pytest.mark.parametrize("name", ["plain", "grouped", "window"])
def test_the_attention_of_gpus_is_told_where_texts_begin(monkeypatch, name, says_grouped):
    """By a stand-in for `varlen_attn`, which takes the argument or does not know it."""
    case, calls = CASES[name], []

    def by_text(q, k, v, starts, other, longest, also, *, scale, window_size, **more):  # noqa: ANN
        assert starts is other and starts.tolist() == [0, 12, 23, 34, 37, 38]
        assert starts.dtype == torch.int32 and longest == also == 12
        assert window_size == (-1 if case.window is None else case.window - 1, 0)
        assert more == ({"enable_gqa": case.key_heads != 4} if says_grouped else {})
        assert (
            scale == 0.3 and q.shape == (38, 4, 8) and k.shape == v.shape == (38, case.key_heads, 8)
        )
        calls.append(more)
        parts = zip(*(x.transpose(0, 1).split(SHORT, 1) for x in (q, k, v)), strict=True)
        wide = ([x.double() for x in part] for part in parts)
        found = torch.cat([alone(*part, case, None) for part in wide], 1)
        return found.transpose(0, 1).to(q.dtype)

    monkeypatch.setattr(attention, "varlen_attn", by_text)
    monkeypatch.setattr(attention, "_SAYS_GROUPED", says_grouped)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert_each_alone(SHORT, case, torch.bfloat16)
    assert_each_alone(SHORT, case, torch.float32)  # which it does not know
    assert len(calls) == 1


@pytest.mark.parametrize("more", [{"attention_mask": 1}, {"position_bias": 1}, {"segments": None}])
def test_what_is_not_said_of_texts_is_not_guessed(more):
    q, k, v, _ = drawn(SHORT, Case(), torch.float32)
    given: dict[str, Any] = {"attention_mask": None, "segments": Segments(SHORT, CPU), **more}
    with pytest.raises(Unsupported):
        attention._attend(None, q, k, v, **given)


def test_a_model_has_its_attention_back_after_a_mistake():
    config = tiny_model().config
    before = config._attn_implementation
    with pytest.raises(KeyError), using(config, ATTENTION):
        assert config._attn_implementation == ATTENTION
        raise KeyError
    assert config._attn_implementation == before != ATTENTION
