"""What is sampled, and where it ends: the distribution by hand from the model's own logits, the
tokens that end a response, and the rows and columns of groups."""

from __future__ import annotations

import math
import string
from typing import Any

import pytest
import torch
from rollouts import EOS, PAD, TEMPERATURE, TOKENIZER, alone, moved_engine, sharp_model
from torch import Tensor
from transformers import GenerationConfig

from ppo_engine.ppo.engine import PPOEngine
from ppo_engine.rollout import sampling
from ppo_engine.settings.schema import EnvironmentConfig

PROMPTS = ["Hi", "A longer prompt", "Why?"]


@pytest.fixture(params=["decode loop", "generate"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the decode loop, and by transformers' `generate`, as models that it cannot run."""
    if request.param == "generate":
        monkeypatch.setattr(sampling, "probed_decoder", lambda policy: (None, ""))


def next_logits(engine: PPOEngine, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return engine.policy.model(input_ids=torch.tensor([ids])).logits[0, -1].double()


def assert_drawn_from(tokens: Tensor, probabilities: Tensor) -> None:
    """`tokens` are as frequent as `probabilities` say, within 5 standard errors: each of those
    that are expected ten times or more, and the others together."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert not counts[probabilities == 0].any()
    often = probabilities * len(tokens) >= 10
    assert often.any()
    p = torch.cat((probabilities[often], probabilities[~often].sum(0, keepdim=True)))
    found = torch.cat((counts[often], counts[~often].sum(0, keepdim=True))) / len(tokens)
    error = (p * (1 - p) / len(tokens)).sqrt().clamp_min(1e-9)
    assert ((found - p).abs() / error).max() < 5


def kept(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """softmax(logits / temperature), of the `top_k` likeliest tokens, and of these the fewest that
    have `top_p` together."""
    order = (logits / temperature).sort(descending=True)
    likeliest = order.indices.tolist()[: top_k or None]
    p = (logits[likeliest] / temperature).softmax(-1)
    count = next(n for n in range(1, len(p) + 1) if p[:n].sum() >= min(top_p, 1 - 1e-12))
    found = torch.zeros_like(logits)
    found[likeliest[:count]] = p[:count] / p[:count].sum()
    return found


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_generate_gives_no_logprob_of_logits_that_are_no_distribution(
    number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token 0 and NaN, as the decode loop's; the engine says where. Other rows are as ever."""
    monkeypatch.setattr(sampling, "probed_decoder", lambda policy: (None, ""))
    engine = moved_engine()

    def spoil(_: Any, __: Any, logits: Tensor) -> Tensor:
        return torch.where(torch.arange(len(logits)).view(-1, 1, 1) == 1, number, logits)

    engine.policy.model.lm_head.register_forward_hook(spoil)
    rollout = engine.generate(PROMPTS)
    own = [rollout.logprobs[b][rollout.mask[b]] for b in range(3)]
    assert own[1].isnan().all() and own[0].isfinite().all() and own[2].isfinite().all()
    assert not rollout.response_ids[1][rollout.mask[1]].any()


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(
    ("generation", "at_most"),
    [({}, 259), ({"top_p": 0.3}, 40), ({"top_k": 5}, 5), ({"top_k": 20, "top_p": 0.5}, 12)],
    ids=str,
)
def test_tokens_are_drawn_from_the_distribution_that_is_set(generation, at_most):
    """Cut after the temperature, and the log-probs that are recorded are of what is left."""
    engine = moved_engine(
        generation={"max_new_tokens": 1, **generation}, ppo={"importance_cap": 2.0}
    )
    settings = engine.config.generation
    prompt = TOKENIZER("Hi")["input_ids"]
    expected = kept(next_logits(engine, prompt), TEMPERATURE, settings.top_k, settings.top_p)
    assert int((expected > 0).sum()) <= at_most
    rollout = engine.generate(["Hi"] * 2048)
    tokens = rollout.response_ids[:, 0]
    assert_drawn_from(tokens, expected)
    logprobs = expected[tokens].log().float()
    torch.testing.assert_close(rollout.logprobs[:, 0], logprobs, rtol=1e-4, atol=1e-4)


def habits(**more: object) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True, temperature=0.1, top_k=3, top_p=0.2, repetition_penalty=50.0,
        no_repeat_ngram_size=1, eos_token_id=EOS, pad_token_id=PAD, **more,
    )  # fmt: skip


@pytest.mark.usefixtures("either_way")
def test_the_checkpoints_own_settings_are_not_in_force():
    """Nor its penalties of what has been said, in sampling and in greedy answers."""
    model = sharp_model()
    model.generation_config = habits(min_new_tokens=2, suppress_tokens=[EOS])
    engine = moved_engine(model=model, generation={"max_new_tokens": 1}, ppo={"estimator": "remax"})
    # A prompt after which the likeliest token is one that stands in it.
    for start in range(64):
        text = string.printable[start : start + 36]
        prompt = TOKENIZER(text)["input_ids"]
        likeliest = int(next_logits(engine, prompt).argmax())
        if likeliest in prompt:
            break
    assert likeliest in prompt
    rollout = engine.generate([text], group_size=2048)
    expected = (next_logits(engine, prompt) / TEMPERATURE).softmax(-1)
    assert expected[EOS] > 0 and expected[likeliest] > 0.01
    assert_drawn_from(rollout.response_ids[:, 0], expected)
    assert rollout.greedy.response_ids.tolist() == [[likeliest]]
    assert model.generation_config.repetition_penalty == 50.0


def greedy_by_hand(engine: PPOEngine, prompt: str, ends: set[int], most: int) -> list[int]:
    ids = TOKENIZER(prompt)["input_ids"]
    written: list[int] = []
    while len(written) < most and not (written and written[-1] in ends):
        written.append(int(next_logits(engine, ids + written).argmax()))
    return written


@pytest.mark.usefixtures("either_way")
def test_greedy_responses_are_of_each_prompt_once_and_padding_changes_nothing():
    ppo = {"estimator": "remax", "group_size": 2}
    model = sharp_model()
    ends = set(range(60, 259)) - {PAD}
    model.generation_config.eos_token_id = sorted(ends)
    seen = []

    def reward(prompts, responses, hint):
        seen.append((list(prompts), list(hint)))
        return [0.0] * len(prompts)

    engine = moved_engine(reward, model=model, ppo=ppo)
    rollout = engine.generate(PROMPTS, {"hint": ["a", "b", "c"]})
    greedy = rollout.greedy
    assert list(greedy.prompts) == PROMPTS
    for row, prompt in enumerate(PROMPTS):
        expected = greedy_by_hand(engine, prompt, ends, 12)
        assert greedy.response_ids[row][greedy.mask[row]].tolist() == expected
        assert greedy.finished[row] == (expected[-1] in ends)
    engine.estimate_advantages(rollout, engine.score(rollout))
    twice = [prompt for prompt in PROMPTS for _ in range(2)]
    assert seen == [(twice, list("aabbcc")), (PROMPTS, list("abc"))]


def test_greedy_responses_have_the_environments_turns_too():
    """Each of the policy's tokens is the likeliest after everything before it, whoever wrote it."""
    model = sharp_model()
    model.generation_config.eos_token_id = sorted(set(range(60, 259)) - {PAD})
    engine = moved_engine(
        model=model,
        ppo={"estimator": "remax", "group_size": 2},
        environment_function=lambda prompts, turns, hint: [
            None if h == "a" else f" {h}!" for h in hint
        ],
        environment=EnvironmentConfig(max_turns=3),
    )
    rollout = engine.generate(PROMPTS, {"hint": ["a", "b", "c"]})
    for of_whom, size in ((rollout, 2), (rollout.greedy, 1)):
        heard = [
            TOKENIZER.decode(ids[there])
            for ids, there in zip(of_whom.response_ids, of_whom.environment_mask, strict=True)
        ]
        # The first prompt's conversations are over when the others still go on.
        answers = [answer for answer in ("", " b!", " c!") for _ in range(size)]
        assert all(h in ("", a, 2 * a) for h, a in zip(heard, answers, strict=True))
        assert any(heard[size:])
    greedy = rollout.greedy
    for row in range(len(PROMPTS)):
        text, own = alone(greedy, row)
        with torch.no_grad():
            likeliest = engine.policy.model(input_ids=text[None]).logits[0].argmax(-1)
        assert torch.equal(text[1:][own[1:]], likeliest[:-1][own[1:]])


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("named", [[EOS, *range(240, 256)], 200, None])
def test_every_token_that_the_checkpoint_names_ends_a_response(named):
    """Besides the tokenizer's own: the response stops at the first, which belongs to it."""
    model = sharp_model()
    model.generation_config.eos_token_id = named
    engine = moved_engine(model=model)
    ends = {EOS, *(named if isinstance(named, list) else [] if named is None else [named])}
    rollout = engine.generate(["Hi"] * 256)
    assert rollout.finished.any() and not rollout.finished.all()
    last = set()
    for row in range(len(rollout)):
        n = int(rollout.mask[row].sum())
        tokens = rollout.response_ids[row].tolist()
        assert rollout.mask[row].tolist() == [True] * n + [False] * (len(tokens) - n)
        assert not ends & set(tokens[: n - 1]) and set(tokens[n:]) <= {PAD}
        assert bool(rollout.finished[row]) == (tokens[n - 1] in ends)
        assert rollout.finished[row] or n == 12
        last.add(tokens[n - 1])
    if named is not None:
        assert (last & ends) - {EOS}


def test_no_token_is_sampled_after_the_last_end():
    """One pass of the model where every token ends a response."""
    model = sharp_model()
    model.generation_config.eos_token_id = [token for token in range(259) if token != PAD]
    engine = moved_engine(model=model)
    assert engine.sampler.notes == []  # by passes of its own
    passes = []
    hook = engine.policy.model.register_forward_hook(lambda *_: passes.append(1))
    rollout = engine.generate(["Hi"])
    hook.remove()
    assert rollout.finished.all() and len(passes) == 1


def test_a_pad_token_that_is_declared_an_end_ends_a_response():
    """Padding is known by its place, so the token itself may end one."""
    model = sharp_model()
    model.generation_config.eos_token_id = [EOS, PAD]
    assert moved_engine(model=model).policy.renderer.end_ids == sorted([EOS, PAD])


def test_groups_stand_in_a_row_and_each_has_its_own_columns():
    """The reward of a response is told of its own prompt's target."""

    def reward(prompts, responses, target):
        assert all(p.startswith(t) for p, t in zip(prompts, target, strict=True))
        return [float(ord(t)) for t in target]

    engine = moved_engine(reward, ppo={"estimator": "rloo", "group_size": 3})
    targets = [prompt[0] for prompt in PROMPTS]
    for size, given in ((3, None), (2, 2), (1, 1)):
        rollout = engine.generate(PROMPTS, {"target": targets}, group_size=given)
        expected = [prompt for prompt in PROMPTS for _ in range(size)]
        assert list(rollout.prompts) == expected
        assert rollout.columns["target"] == [prompt[0] for prompt in expected]
        assert engine.score(rollout).tolist() == [float(ord(prompt[0])) for prompt in expected]
        for row, prompt in enumerate(expected):
            ids = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
            assert ids == TOKENIZER(prompt)["input_ids"]
            text = rollout.response_ids[row][rollout.mask[row]]
            said = [token for token in text.tolist() if token not in (EOS, PAD)]
            assert rollout.responses[row] == TOKENIZER.decode(said)


def test_log_probs_of_the_sampler_are_always_recorded():
    rollout = moved_engine().generate(PROMPTS)
    assert rollout.logprobs.shape == rollout.mask.shape
    assert (rollout.logprobs[rollout.mask] < 0).all() and not rollout.logprobs[~rollout.mask].any()
    assert math.isfinite(rollout.logprobs.sum())
