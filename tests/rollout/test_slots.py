"""What one token of each row writes into slots, and when: by the kernel that attends to it where a
model hands on what its cache gave, else before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from decoding import policy_of, write
from families import of_family
from torch import Tensor

from ppo_engine.models.windows import Unsupported, Windows
from ppo_engine.rollout.attention import CURRENT, How, attend_masked
from ppo_engine.rollout.sampling import Sampler
from ppo_engine.rollout.slots import Heads, OneToken, Slots

POSITIONS = torch.tensor([3, 0])
NEW = torch.full((2, 2, 1, 4), 5.0), torch.full((2, 2, 1, 6), 7.0)


def two_layers(hand_on: bool = True) -> Slots:
    """Of three rows, of which two write."""
    kind = {"device": torch.device("cpu"), "dtype": torch.bfloat16}
    slots = Slots([Heads(2, 4, 6)] * 2, Windows(None, ()), 3, 5, **kind)
    for layer in slots.layers:
        layer.hands_on = hand_on
        layer.keys.normal_()
        layer.values.normal_()
    return slots


def attend(keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    query = torch.ones(2, 4, 1, 4, dtype=torch.bfloat16)
    return CURRENT.get()(query, keys, values, How(mask, 0.5, None, None))


@pytest.mark.parametrize("of_the_model", [False, True])
@pytest.mark.parametrize("hand_on", [False, True])
def test_one_token_is_written_where_it_belongs_once(hand_on: bool, of_the_model: bool) -> None:
    """With our mask, and with one that a model has made of it."""
    slots = two_layers(hand_on)
    expected = [x.clone() for x in (slots.layers[1].keys, slots.layers[1].values)]
    for x, new in zip(expected, NEW, strict=True):
        x[[0, 1], :, POSITIONS] = new[:, :, 0].bfloat16()
    with slots.reading(OneToken(POSITIONS, 5)) as arguments:
        mask = arguments["attention_mask"]
        given = slots.update(*NEW, 1)
        found = attend(*given, mask.clone() if of_the_model else mask)
        for ours, x in zip((slots.layers[1].keys, slots.layers[1].values), expected, strict=True):
            assert torch.equal(ours, x)
        again = attend(*given, mask)  # as a layer that shares those of another
    query = torch.ones(2, 4, 1, 4, dtype=torch.bfloat16)
    rule = attend_masked(query, expected[0][:2], expected[1][:2], How(mask, 0.5, None, None))
    assert found.shape == (2, 1, 4, 6) and found.is_contiguous()
    torch.testing.assert_close(found, rule)
    torch.testing.assert_close(again, rule)
    assert [layer.hands_on for layer in slots.layers] == [hand_on, True]


def others(slots: Slots, mask: Tensor) -> None:
    given = slots.update(*NEW, 0)
    attend(*(x.clone() for x in given), mask)


def next_layer(slots: Slots, mask: Tensor) -> None:
    slots.update(*NEW, 0)
    slots.update(*NEW, 1)


def nothing(slots: Slots, mask: Tensor) -> None:
    slots.update(*NEW, 1)


@pytest.mark.parametrize("instead", [others, next_layer, nothing])
def test_a_token_that_would_be_lost_is_an_error(instead: Callable[[Slots, Tensor], None]) -> None:
    slots = two_layers()
    with (
        pytest.raises(Unsupported, match="does not attend to what its cache gave"),
        slots.reading(OneToken(POSITIONS, 5)) as arguments,
    ):
        instead(slots, arguments["attention_mask"])
    slots = two_layers(hand_on=False)
    with slots.reading(OneToken(POSITIONS, 5)) as arguments:
        instead(slots, arguments["attention_mask"])  # it is written already
    assert not any(layer.hands_on for layer in slots.layers)


@pytest.mark.parametrize(("family", "hands_on"), [("llama", True), ("jetmoe", False)])
def test_layers_that_hand_on_are_seen(
    monkeypatch: pytest.MonkeyPatch, family: str, hands_on: bool
) -> None:
    """JetMoE's attention repeats the keys that its cache gave."""
    sampler, seen = Sampler(policy_of(of_family(family))), []
    used = sampler._probed[0]
    monkeypatch.setattr(used, "release", lambda: seen.append(used.slots))
    write(sampler, greedy=True)
    assert [layer.hands_on for layer in seen[-1].layers] == [hands_on] * 2
