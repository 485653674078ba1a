"""The decode loop against transformers' `generate`, and against itself: whatever the batch, the
slots and the order, the same tokens."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from decoding import NEW, ROWS, policy_of, some_rows, tokens, write
from families import of_family
from rollouts import EOS, TOKENIZER, sharp_model

from ppo_engine.errors import UserError
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.token_rows import predicting
from ppo_engine.models.windows import Windows
from ppo_engine.pretrained import adapters
from ppo_engine.rollout import by_generate, decoder, sampling
from ppo_engine.rollout.graphs import Graphs
from ppo_engine.rollout.sampling import Sampler
from ppo_engine.rollout.schedule import Request, Response
from ppo_engine.rollout.slots import bytes_per_token
from ppo_engine.settings.schema import GenerationConfig, LoraConfig

FAMILIES = [
    ("llama", {}), ("mistral", {"sliding_window": 8}), ("qwen2", {}), ("qwen3", {}),
    ("gemma2", {"sliding_window": 8}), ("gemma3_text", {"sliding_window": 8}),
    ("phi3", {"sliding_window": 8}), ("gpt2", {}), ("gpt_neox", {}), ("olmo2", {}),
    ("granite", {}), ("smollm3", {}), ("mixtral", {"output_router_logits": True}), ("gpt_oss", {}),
    ("jetmoe", {}),
]  # fmt: skip


def by_library(policy: LanguageModel, rows: Sequence[list[int]] = ROWS) -> list[Response]:
    draw = decoder.Draw(1.0, 0, 1.0, True, tuple(policy.renderer.end_ids), 0)
    return by_generate.write(policy, [Request([*row], 0, 0) for row in rows], NEW, draw)


@pytest.mark.parametrize(("family", "settings"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_greedy_is_that_of_generate(family: str, settings: dict[str, Any]) -> None:
    """In rows of unlike lengths, two of them with the same beginning; windows are exceeded."""
    policy = policy_of(of_family(family, **settings))
    sampler = Sampler(policy)
    assert sampler.notes == []
    rows = [*ROWS, ROWS[1]]
    found, expected = write(sampler, rows, greedy=True), by_library(policy, rows)
    assert tokens(found) == tokens(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.finished, ours.done) == (theirs.finished, True)
        torch.testing.assert_close(
            torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), rtol=1e-4, atol=2e-5
        )


@pytest.mark.parametrize("family", ["bloom", "falcon", "rwkv"])
def test_a_family_that_the_loop_cannot_run_is_sampled_by_generate(family: str) -> None:
    policy = policy_of(of_family(family))
    sampler = Sampler(policy)
    assert "by transformers' own generate" in sampler.notes[0]
    assert tokens(write(sampler, greedy=True)) == tokens(by_library(policy))


def test_adapters_are_part_of_the_policy() -> None:
    model = adapters.add_lora(of_family("llama"), LoraConfig(rank=4), "CAUSAL_LM")
    policy = policy_of(model)
    before = tokens(write(Sampler(policy), greedy=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    sampler = Sampler(policy)
    assert sampler.notes == [] and tokens(write(sampler, greedy=True)) != before
    assert tokens(write(sampler, greedy=True)) == tokens(by_library(policy))
    with policy.without_adapter():
        assert tokens(write(sampler, greedy=True)) == before


def test_a_graph_is_of_the_policy_with_its_adapters_or_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(decoder.STEPS, "cpu", 4)
    model = adapters.add_lora(of_family("llama"), LoraConfig(rank=4), "CAUSAL_LM")
    policy, graphs = policy_of(model), StandIn()
    sampler = Sampler(policy)
    vars(sampler)["_probed"] = decoder.Decoder(policy, graphs), ""
    write(sampler, some_rows(5))
    with policy.without_adapter():
        write(sampler, some_rows(5))
    assert graphs.captured == 2
    write(sampler, some_rows(5))
    assert graphs.captured == 2


def test_a_model_in_training_mode_is_sampled_from_as_any() -> None:
    """With gradient checkpointing, which keeps nothing of what was read then."""
    policy = policy_of(of_family("llama"))
    expected = tokens(by_library(policy))
    policy.model.gradient_checkpointing_enable()
    policy.model.train()
    sampler = Sampler(policy)
    assert sampler.notes == [] and tokens(write(sampler, greedy=True)) == expected
    assert all(module.training for module in policy.model.modules())


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # Gemma's norms add 1 to their weights
def test_weights_that_have_changed_are_seen_and_nothing_is_left_behind(family: str) -> None:
    policy = policy_of(of_family(family))
    sampler = Sampler(policy)
    first = tokens(write(sampler, greedy=True))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    second = tokens(write(sampler, greedy=True))
    assert second == tokens(by_library(policy)) != first
    attention = policy.model.config._attn_implementation
    with pytest.raises(KeyError), sampler.session(GenerationConfig()):
        raise KeyError
    assert policy.model.config._attn_implementation == attention != "ppo_slots"
    assert not any("forward" in vars(module) for module in policy.model.modules())


class StandIn(Graphs):
    """Control flow of CUDA graphs: what is captured once is called, with nothing new."""

    captured = 0

    def capture(self, step: Any) -> Any:
        self.captured += 1
        for _ in range(2):
            step()
        return step


def sampled_otherwise(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[int]]]:
    """Sampled tokens of 40 prompts, some of them alike, in several ways."""
    policy = policy_of(sharp_model())
    policy.renderer.end_ids = [EOS, *range(100, 140)]
    rows = [row for row in some_rows(*range(1, 31)) for _ in range(1 + len(row) % 2)]
    found = {"whole": tokens(write(Sampler(policy), rows))}
    assert len({len(x) for x in found["whole"]}) > 5
    each = 64 * bytes_per_token(Sampler(policy)._probed[0].heads, torch.float32) / 2**30
    for slots in (1, 3, 17):
        sampler = Sampler(policy)
        found[f"{slots} slots"] = tokens(write(sampler, rows, kv_cache_gib=1.01 * slots * each))
    monkeypatch.setitem(decoder.ENOUGH, "cpu", 40)
    found["small prefill passes"] = tokens(write(Sampler(policy), rows))
    for steps in (4, 16):
        monkeypatch.setitem(decoder.STEPS, "cpu", steps)
        for name, budget in (("", None), (", 4 slots", 4.01 * each)):
            sampler, graphs = Sampler(policy), StandIn()
            vars(sampler)["_probed"] = decoder.Decoder(policy, graphs), ""
            found[f"{steps} steps ahead{name}"] = tokens(write(sampler, rows, kv_cache_gib=budget))
            captured = graphs.captured
            assert tokens(write(sampler, rows, kv_cache_gib=budget)) == found["whole"]
            assert graphs.captured == captured  # the same graphs in the next rollout
    return found


def test_tokens_depend_on_nothing_but_the_response(monkeypatch: pytest.MonkeyPatch) -> None:
    found = sampled_otherwise(monkeypatch)
    for name, other in found.items():
        assert other == found["whole"], name


def test_torchs_seed_is_that_of_the_draws() -> None:
    sampler = Sampler(policy_of(sharp_model()))
    config, requests = GenerationConfig(max_new_tokens=NEW), [Request([5], 0, 0)]

    def drawn() -> list[list[int]]:
        with sampler.session(config) as go_on:
            return tokens(go_on(requests))

    torch.manual_seed(3)
    first, second = drawn(), drawn()
    torch.manual_seed(3)
    assert first == drawn() != second


@pytest.mark.parametrize("ahead", [1, 16])
def test_a_later_turn_reads_only_what_is_new(monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    """And writes what it would write behind the whole conversation."""
    monkeypatch.setitem(decoder.STEPS, "cpu", ahead)
    policy = policy_of(sharp_model())
    policy.renderer.end_ids = [EOS, *range(100, 120)]
    rows, answers = some_rows(*range(1, 13)), some_rows(*range(4, 40, 3))
    read: list[int] = []
    for name in ("read", "read_more"):
        method = getattr(decoder.Decoder, name)

        def spy(self: Any, given: Any, method: Any = method) -> None:
            read.extend(len(x[0]) for x in given)
            method(self, given)

        monkeypatch.setattr(decoder.Decoder, name, spy)
    sampler = Sampler(policy)
    assert sampler.notes == []
    config = GenerationConfig(max_new_tokens=NEW)

    def converse(keep: bool) -> tuple[list[list[int]], list[list[int]]]:
        said, told = [], []
        torch.manual_seed(1)
        with sampler.session(config, keep=keep) as go_on:
            conversations = {number: [*row] for number, row in enumerate(rows)}
            for turn in range(3):
                read.clear()
                requests = [
                    Request([*x], n, 3 * NEW * n + NEW * turn) for n, x in conversations.items()
                ]
                written = go_on(requests)
                told.append(sorted(n for n in read if n))
                for response in written:
                    number = response.request.number
                    if (number + turn) % 4 == 0:  # some conversations are over
                        del conversations[number]
                    else:
                        conversations[number] += [*response.tokens, *answers[number]]
                said += tokens(written)
        return said, told

    said, told = converse(keep=True)
    anew, told_anew = converse(keep=False)
    assert said == anew
    assert told[0] == told_anew[0] == sorted(len(row) - 1 for row in rows if len(row) > 1)
    # The answer and the turn's last token, which nothing had read, but for the one that is next.
    still = [n for n in range(12) if n % 4]
    assert told[1] == sorted(len(answers[n]) for n in still) and sum(told_anew[1]) > sum(told[1])


@pytest.mark.parametrize(("family", "ahead"), [("llama", 1), ("llama", 16), ("bloom", 1)])
def test_a_turn_ends_at_a_stop(monkeypatch: pytest.MonkeyPatch, family: str, ahead: int) -> None:
    """A string wherever it begins in the tokens, or a token; it belongs to the response, and what
    ran ahead of the host does not."""
    monkeypatch.setitem(decoder.STEPS, "cpu", ahead)
    sampler = Sampler(policy_of(of_family(family)))
    rows = some_rows(*range(2, 12))
    whole = tokens(write(sampler, rows, greedy=True))
    pairs = (TOKENIZER.decode(ids[i : i + 2]) for ids in whole for i in range(4, len(ids) - 1))
    stop = next(pair for pair in pairs if len(pair) == 2 and pair.isascii() and pair.isprintable())
    token = next(ids[9] for ids in whole if len(ids) == NEW and stop not in TOKENIZER.decode(ids))
    found = write(sampler, rows, greedy=True, stop=(stop, token))
    kinds = set()
    for response, ids in zip(found, whole, strict=True):
        ends: dict[int, Any] = {i + 1: x for i, x in enumerate(ids) if x in (token, EOS)}
        there = [n for n in range(1, len(ids) + 1) if stop in TOKENIZER.decode(ids[:n])]
        ends |= {n: stop for n in there[:1]}
        place = min(ends, default=NEW)
        assert response.tokens == ids[:place]
        assert response.finished == bool(ends) and len(response.logprobs) == len(response.tokens)
        kinds.add(ends.get(place))
    assert {stop, token} <= kinds


def test_a_stop_string_of_the_checkpoint_ends_a_turn_too() -> None:
    model = of_family("llama")
    whole = write(Sampler(policy_of(model)), greedy=True)[0].tokens
    stop = model.generation_config.stop_strings = TOKENIZER.decode(whole)[4:6]
    short = write(Sampler(policy_of(model)), greedy=True)[0]
    assert short.finished and short.tokens == whole[: len(short.tokens)]
    assert stop in TOKENIZER.decode(short.tokens) and stop not in TOKENIZER.decode(
        short.tokens[:-1]
    )


def test_an_end_that_the_model_does_not_know_is_none() -> None:
    policy = policy_of(of_family("llama"))
    size = policy.model.config.vocab_size
    policy.renderer.end_ids = [EOS, size]
    assert {len(response.tokens) for response in write(Sampler(policy), min_new_tokens=NEW)} == {
        NEW
    }
    with pytest.raises(UserError, match=rf"stop has the token {size}, but the model knows {size}"):
        write(Sampler(policy), stop=(size,))


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_no_end_before_the_least_number_of_tokens(family: str) -> None:
    policy = policy_of(of_family(family))
    policy.renderer.end_ids = [EOS, *range(0, 250, 2)]
    found = write(Sampler(policy), min_new_tokens=5)
    assert {len(response.tokens) for response in found} >= {6}
    for response in found:
        assert not set(response.tokens[:5]) & set(policy.renderer.end_ids)
        assert response.finished == (response.tokens[-1] in policy.renderer.end_ids)
    assert min(len(r.tokens) for r in write(Sampler(policy))) < 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_probs_are_those_of_the_policy(dtype: torch.dtype) -> None:
    policy = policy_of(sharp_model(), dtype)
    for response in write(Sampler(policy), temperature=0.8):
        prompt, written = response.request.tokens, response.tokens
        row = predicting([*prompt, *written], [False] * len(prompt) + [True] * len(written))
        with torch.no_grad():
            expected, _ = policy.logprobs(policy.reader.stack([row]), 0.8)
        error = (torch.tensor(response.logprobs) - expected).abs().max().item()
        assert error < (2e-5 if dtype == torch.float32 else 0.15), error


def test_the_ends_of_what_is_possible() -> None:
    """A prompt that leaves one position of the context, every token an end, 1 row and 300."""
    policy = policy_of(of_family("gpt2"))  # whose positions are learned, 256
    sampler = Sampler(policy)
    (longest,) = some_rows(255)
    [last] = write(sampler, [longest], new=1, greedy=True)
    with torch.no_grad():
        expected = policy.model(torch.tensor([longest])).logits[0, -1].argmax()
    assert last.tokens == [expected] and last.done
    rows = some_rows(*(1 + n % 20 for n in range(300)))
    assert [len(r.tokens) for r in write(sampler, rows, new=2)] == [2] * 300
    policy.renderer.end_ids = list(range(259))
    assert [(len(r.tokens), r.finished) for r in write(sampler, rows)] == [(1, True)] * 300


def test_slots_keep_within_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(policy_of(sharp_model()))
    [heads, *_] = sampler._probed[0].heads
    of_token = 2 * heads.count * heads.key_size * 2 * 4  # keys and values of two layers in fp32
    assert bytes_per_token(sampler._probed[0].heads, torch.float32) == of_token
    made: list[int] = []
    reserve = decoder.Decoder.reserve

    def spy(self: decoder.Decoder, rows: int, length: int) -> None:
        reserve(self, rows, length)
        made.append(sum(x.keys.nbytes + x.values.nbytes for x in self.slots.layers))

    monkeypatch.setattr(decoder.Decoder, "reserve", spy)
    write(sampler, some_rows(*[20] * 40), kv_cache_gib=1e6 / 2**30)
    assert 0.5e6 < max(made) <= 1e6
    monkeypatch.setattr(sampling, "free_memory", lambda device: 4e6)
    write(sampler, some_rows(*[20] * 400))
    assert 1e6 < max(made) <= 2e6  # half of what is free
    message = (
        r"one response of 44 tokens, its prompt included, take .* raise generation.kv_cache_gib, "
        "or lower generation.max_new_tokens"
    )
    with pytest.raises(UserError, match=message):
        write(sampler, some_rows(20), kv_cache_gib=1e-6)


@pytest.mark.parametrize("place", ["reserve", "read", "write"])
def test_without_memory_for_all_rows_half_of_them_are_sampled_at_a_time(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """In each of the places where it can run out, twice; the tokens stay the same."""
    policy = policy_of(sharp_model())
    policy.renderer.end_ids = [EOS, *range(100, 140)]
    rows = some_rows(*range(1, 31))
    expected = tokens(write(Sampler(policy), rows))
    sampler, count = Sampler(policy), []
    assert not sampler.notes  # which makes the decoder
    function = getattr(decoder.Decoder, place)

    def short(self: Any, *given: Any) -> Any:
        found = function(self, *given)
        count.append(self.rows)
        if self.rows > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    monkeypatch.setattr(decoder.Decoder, place, short)
    assert tokens(write(sampler, rows)) == expected and max(count) == 30
    told = sampler.take_note() or ""
    assert "while 15 responses were sampled at a time (CUDA out of memory.)" in told
    assert "7 at a time" in told and sampler.take_note() is None
    count.clear()
    assert tokens(write(sampler, rows)) == expected and max(count) == 7  # from here on


def test_a_response_alone_is_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(policy_of(sharp_model()))
    assert not sampler.notes

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(decoder.Decoder, "write", full)
    message = r"a single response was sampled \(CUDA .*\). Lower generation.max_new_tokens"
    with pytest.raises(UserError, match=message):
        write(sampler, some_rows(4, 5, 6))
    vars(sampler)["_probed"] = None, "by generate"
    monkeypatch.setattr(sampling.by_generate, "write", full)
    message = r"generate sampled 3 responses \(CUDA .*\). Lower generation.max_new_tokens"
    with pytest.raises(UserError, match=message):
        write(sampler, some_rows(4, 5, 6))


@pytest.mark.parametrize("ahead", [1, 16])
def test_later_turns_keep_within_the_budget(monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    """Their slots are longer, and so fewer; those that are kept still have what they had."""
    monkeypatch.setitem(decoder.STEPS, "cpu", ahead)
    sampler = Sampler(policy_of(sharp_model()))
    used = sampler._probed[0]
    budget = 16.01 * 64 * bytes_per_token(used.heads, torch.float32)
    config = GenerationConfig(max_new_tokens=NEW, kv_cache_gib=budget / 2**30)
    rows, heard = some_rows(*[20] * 16), some_rows(*[30] * 16)

    def converse(keep: bool) -> tuple[list[list[int]], list[tuple[int, int]], list[int]]:
        torch.manual_seed(1)
        said, sizes, told = [], [], []
        spied = used.read_more
        with monkeypatch.context() as patch, sampler.session(config, keep=keep) as go_on:
            patch.setattr(used, "read_more", lambda x: told.append(len(x)) or spied(x))
            rows_now = [[*row] for row in rows]
            for turn in range(3):
                written = go_on(
                    [Request([*x], i, 99 * i + turn * NEW) for i, x in enumerate(rows_now)]
                )
                rows_now = [
                    [*x, *r.tokens, *h] for x, r, h in zip(rows_now, written, heard, strict=True)
                ]
                said += tokens(written)
                sizes.append((used.rows, used.length))
                assert used.nbytes <= budget
        return said, sizes, told

    said, sizes, told = converse(keep=True)
    fitting = 5 if ahead == 1 else 4  # there is a graph of 4 rows, and none of 5
    assert sizes == [(16, 64), (8, 128), (fitting, 192)]
    assert sum(told) == 8 + fitting  # the others were read anew
    assert said == converse(keep=False)[0]


def test_large_slots_do_not_stay_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decoder.STEPS, "cpu", 4)
    sampler, of_graphs = Sampler(policy := policy_of(sharp_model())), StandIn()
    loop = decoder.Decoder(policy, of_graphs)
    vars(sampler)["_probed"] = loop, ""
    write(sampler)
    size = loop.nbytes
    assert size > 0 and of_graphs.captured == 1
    monkeypatch.setattr(decoder, "STAYING", size - 1)
    write(sampler)
    assert loop.nbytes == 0


def test_nothing_grows_from_rollout_to_rollout() -> None:
    sampler = Sampler(policy_of(sharp_model()))

    def held() -> int:
        write(sampler, some_rows(*range(1, 20)))
        gc.collect()
        return sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor)

    sizes = [held() for _ in range(50)]
    assert sizes[-1] == sizes[3]


def test_a_probe_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a mask, in the places of what was read before, in a step."""
    masks, positions = Windows.masks, decoder.Decoder._inputs
    policy = policy_of(sharp_model())
    assert Sampler(policy).notes == []

    def blind(self: Windows, *given: Any) -> Any:
        return masks(self, *given) & (torch.rand(given[1]) < 0.5)

    def shifted(self: decoder.Decoder, ids: Any, places: Any) -> Any:
        return positions(self, ids, places // 2)

    for owner, name, wrong in ((Windows, "masks", blind), (decoder.Decoder, "_inputs", shifted)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, wrong)
            [note] = Sampler(policy).notes
            assert "in a probe, its logits were off by" in note
