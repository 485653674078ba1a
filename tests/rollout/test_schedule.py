"""What is read and written in how many steps: nothing twice, and no slot waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding import NEW, policy_of, some_rows, tokens, write
from rollouts import EOS, sharp_model

from ppo_engine.rollout import decoder
from ppo_engine.rollout.sampling import Sampler
from ppo_engine.rollout.schedule import Request
from ppo_engine.rollout.slots import bytes_per_token
from ppo_engine.settings.schema import GenerationConfig


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What decoders are told to `read`, and of how many rows and steps they `write`."""
    found: dict[str, list[Any]] = {"read": [], "write": []}
    read, write = decoder.Decoder.read, decoder.Decoder.write

    def spy_read(self: Any, rows: Any) -> None:
        found["read"] += [beginning for beginning, _ in rows]
        read(self, rows)

    def spy_write(self: Any, rows: int, steps: int, draw: Any) -> Any:
        found["write"].append((rows, steps))
        return write(self, rows, steps, draw)

    monkeypatch.setattr(decoder.Decoder, "read", spy_read)
    monkeypatch.setattr(decoder.Decoder, "write", spy_write)
    return found


def sampler_with_slots(ends: range = range(0)) -> tuple[Sampler, float]:
    """And the GiB that a slot of its takes."""
    policy = policy_of(sharp_model())
    policy.renderer.end_ids = [EOS, *ends]
    sampler = Sampler(policy)
    decoding, note = sampler._probed
    assert decoding is not None and not note
    return sampler, 64 * bytes_per_token(decoding.heads, torch.float32) / 2**30


def test_copies_of_a_prompt_are_read_once(seen: dict[str, list[Any]]) -> None:
    sampler, _ = sampler_with_slots()
    seen["read"].clear()
    rows = some_rows(*range(2, 12))
    write(sampler, [row for row in rows for _ in range(4)])
    assert sorted(seen["read"]) == sorted(tuple(row[:-1]) for row in rows)


def test_slots_that_are_free_are_used_and_rows_that_are_left_come_together(
    seen: dict[str, list[Any]],
) -> None:
    """No more steps than any list schedule takes (Graham 1969), and less than a row in seven of a
    step does nothing where there is nothing to refill with."""
    sampler, each = sampler_with_slots(ends=range(100, 140))
    rows = some_rows(*[20] * 64)
    seen["write"].clear()
    lengths = [len(x) for x in tokens(write(sampler, rows, kv_cache_gib=8.01 * each))]
    assert min(lengths) < 4 and max(lengths) == NEW
    assert max(count for count, _ in seen["write"]) == 8
    assert sum(steps for _, steps in seen["write"]) <= sum(lengths) / 8 + NEW
    seen["write"].clear()
    assert [len(x) for x in tokens(write(sampler, rows))] == lengths
    assert sum(count * steps for count, steps in seen["write"]) <= sum(lengths) * 8 / 7


@pytest.mark.parametrize("ahead", [1, 5])
def test_no_step_is_launched_beyond_the_limit(
    monkeypatch: pytest.MonkeyPatch, seen: dict[str, list[Any]], ahead: int
) -> None:
    monkeypatch.setitem(decoder.STEPS, "cpu", ahead)
    sampler, each = sampler_with_slots()
    sampler.policy.renderer.end_ids = []
    seen["write"].clear()
    written = write(sampler, some_rows(*[20] * 8), kv_cache_gib=4.01 * each)
    assert {len(x) for x in tokens(written)} == {NEW}
    assert sum(steps for _, steps in seen["write"]) == 2 * NEW


def test_what_is_kept_is_of_the_same_conversation() -> None:
    """A row that does not continue what its number has written is read anew."""
    sampler, _ = sampler_with_slots()
    first, other = some_rows(9, 14)
    config = GenerationConfig(max_new_tokens=NEW)
    with sampler.session(config, greedy=True, keep=True) as go_on:
        go_on([Request(first, 0, 0)])
        found = go_on([Request(other, 0, 0)])
    assert tokens(found) == tokens(write(sampler, [other], greedy=True))
