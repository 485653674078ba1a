"""Rewards by name, one or several: what names them, their weights, and who reads tokens."""

from __future__ import annotations

import datetime
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reading import sequence_scores
from templates import qwen3
from tiny import tiny_model, tiny_model_folder, tiny_tokenizer

from ppo_engine.data.prompts import PromptExample
from ppo_engine.errors import UserError
from ppo_engine.models import value_model
from ppo_engine.models.value_model import load_value_model
from ppo_engine.ppo.engine import PPOEngine
from ppo_engine.pretrained.loading import save_model
from ppo_engine.rewards.function import RewardFunction
from ppo_engine.rewards.http import HTTPReward
from ppo_engine.rewards.model import RewardModel, load_reward_model
from ppo_engine.rewards.sources import configured_sources, parse_source, with_rewards
from ppo_engine.rewards.weighted import Rewards, load_rewards, reward_metrics
from ppo_engine.settings.schema import (
    GenerationConfig,
    PPOConfig,
    PPOSettings,
    RewardConfig,
    RewardEndpointConfig,
    RewardSource,
    RunConfig,
)
from ppo_engine.text.renderer import Renderer

CPU, FP32 = torch.device("cpu"), torch.float32
PROMPTS = ["Hello", "A longer prompt", "Hi"]


def vowels(prompts, responses):
    return [sum(c in "aeiou" for c in response) for response in responses]


def length(prompts, responses):
    return [len(response) for response in responses]


@pytest.fixture(scope="module")
def reward_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two reward models in folders of the same name: of the policy's tokenizer, and of another."""
    found = []
    for seed, chat_template in enumerate((True, False), start=1):  # 0 is the policy's
        folder = tmp_path_factory.mktemp("reward")
        tokenizer = tiny_tokenizer(chat_template)
        start = tiny_model_folder(folder, chat_template, seed)
        model = load_value_model(start, tokenizer, device=CPU, seed=seed)
        save_model(model, tokenizer, folder / "reward_model")
        found.append(str(folder / "reward_model"))
    return found[0], found[1]


def load(given: Any = None, **settings: Any) -> Rewards:
    return load_rewards(
        given, RewardConfig(**settings), Renderer(tiny_tokenizer()), device=CPU, dtype=FP32
    )


def make_engine(reward: Any, **settings: Any) -> PPOEngine:
    config = PPOConfig(
        reward=RewardConfig(**settings),
        generation=GenerationConfig(max_new_tokens=6),
        ppo=PPOSettings(rollout_batch_size=3, mini_batch_size=3),
        run=RunConfig(dtype="float32"),
    )
    return PPOEngine(tiny_model(), reward, config=config, tokenizer=tiny_tokenizer())


# What names a reward ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("http://localhost:8000/score", "url"),
        ("https://judge.example.com", "url"),
        ("rewards.py:score", "function"),
        ("package.module:name", "function"),
        ("organization/model-7b", "path"),
        ("runs/reward/reward_model", "path"),
    ],
)
def test_a_text_names_a_model_a_function_or_an_endpoint(text, kind):
    assert parse_source(text) == RewardSource(**{kind: text})


def test_a_folder_with_a_colon_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run:1").mkdir()
    assert parse_source("run:1").path == "run:1"


def test_a_python_file_alone_is_no_reward():
    with pytest.raises(UserError, match=r"'rew\.py' names a file; .* rew\.py:FUNCTION"):
        parse_source("rew.py")


def test_each_kind_is_loaded(tmp_path, reward_folders, monkeypatch):
    source = "def judge(prompts, responses):\n    return [0.5] * len(responses)\n"
    (tmp_path / "here.py").write_text(source)
    (tmp_path / "my_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)  # relative paths are taken from the current folder
    for given, kind, name in (
        ("here.py:judge", RewardFunction, "judge"),
        ("my_module:judge", RewardFunction, "judge"),
        (length, RewardFunction, "length"),
        (lambda prompts, responses: [0.5], RewardFunction, "lambda"),
        ("https://judge.example.com/score", HTTPReward, "judge.example.com"),
        ("http://localhost:8000", HTTPReward, "localhost_8000"),
        (reward_folders[0], RewardModel, "reward_model"),
    ):
        [(found, reward)] = load(given).by_name.items()
        assert found == name and type(reward) is kind
    assert load(function="here.py:judge").by_name["judge"](["x"], ["y"], [True], {}).item() == 0.5
    endpoint = load(url="http://localhost/", http={"timeout": 5}).by_name["localhost"]
    assert isinstance(endpoint, HTTPReward) and endpoint.settings.timeout == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "No reward was given"),
        ({"path": "a", "function": "b:c"}, r"reward\.path and reward\.function are set"),
        ({"url": "http://a", "sources": [{"path": "b"}]}, r"reward\.url and reward\.sources are"),
        ({"sources": [{"path": "a"}, {}]}, r"sources\[1\] must set one .* sets none of them"),
        ({"sources": [{"path": "a", "url": "http://b"}]}, r"sources\[0\] .* sets path and url"),
        ({"sources": [{"path": "a", "name": "x"}] * 2}, "Two rewards are named 'x'"),
        ({"sources": [{"path": "a", "name": "x/y"}]}, "'x/y' cannot be used"),
        ({"sources": [{"path": "a", "name": "x_se"}]}, "'x_se' ends in '_se', as the metrics of"),
        ({"url": "http://a", "weights": [1, 2]}, "2 numbers for 1 reward;"),
    ],
)
def test_settings_that_are_ambiguous(settings, message):
    with pytest.raises(UserError, match=message):
        load(**settings)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, r"must be a function or a name, but is 3 \(int\)"),
        ([length, None], r"but is None \(NoneType\)"),
        ([], "No reward was given"),
        ({"a b": length}, "'a b' cannot be used"),
        ({3: length}, "3 cannot be used"),
    ],
)
def test_python_rewards_that_are_none(given, message):
    with pytest.raises(UserError, match=message):
        load(given)


def test_what_is_given_goes_before_the_settings():
    assert list(load(length, function="no.such:reward").by_name) == ["length"]


def test_names_are_as_given_or_numbered():
    assert list(load({"short": length, "b": vowels}).by_name) == ["short", "b"]
    assert list(load([length, length, vowels]).by_name) == ["length", "length_2", "vowels"]
    sources = [
        {"url": "http://a"},
        {"url": "http://a/2", "name": "a_2"},
        {"url": "http://b", "name": "a"},
    ]
    assert list(load(sources=sources).by_name) == ["a_3", "a_2", "a"]


def test_a_default_name_is_not_that_of_a_standard_error():
    def mean_se(prompts, responses):
        return [0.0] * len(responses)

    assert list(load([mean_se, length]).by_name) == ["mean", "length"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a/b", [RewardSource(path="a/b")]),
        (["a/b", "c:d"], [RewardSource(path="a/b"), RewardSource(function="c:d")]),
        ({"x": "http://a"}, [RewardSource(url="http://a", name="x")]),
        (length, []),
        (["a/b", length], []),
    ],
)
def test_settings_tell_of_rewards_given_in_python(given, expected):
    weights = [2.0] * max(1, len(expected))
    before = RewardConfig(function="old:one", weights=weights, normalize=True)
    config = with_rewards(before, given)
    assert configured_sources(config) == expected
    assert (config.weights, config.normalize) == (weights, True)


# Several rewards ----------------------------------------------------------------------------------


def test_the_total_is_the_weighted_sum():
    engine = make_engine([vowels, length], weights=[2, -0.5])
    rollout = engine.generate(PROMPTS)
    each = engine.score_each(rollout)
    assert each["vowels"].tolist() == vowels(None, rollout.responses)
    assert each["length"].tolist() == length(None, rollout.responses)
    expected = 2 * each["vowels"] - 0.5 * each["length"]
    torch.testing.assert_close(engine.score(rollout), expected)
    plain = make_engine([vowels, length])
    torch.testing.assert_close(plain.score(rollout), each["vowels"] + each["length"])


def test_rewards_that_add_up_to_no_number_are_named():
    rewards = {"a": RewardFunction(length), "b": RewardFunction(vowels)}
    weighted = Rewards(rewards, [1e30, -1.0], tiny_tokenizer())
    each = {"a": torch.tensor([1.0, 1e30]), "b": torch.tensor([2.0, 3.0])}
    with pytest.raises(UserError, match=r"of response 1 .*: inf \(a\) \+ -3 \(b\), with reward\.w"):
        weighted.total(each)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 4e-6), (torch.bfloat16, 0.0156)])
def test_rounding_is_that_of_each_reward_with_its_weight(reward_folders, dtype, share):
    model = load_reward_model(reward_folders[0], device=CPU, dtype=dtype)
    rewards = Rewards({"m": model, "f": RewardFunction(length)}, [0.5, -2.0], tiny_tokenizer())
    each = {"m": torch.tensor([1.0, -4.0]), "f": torch.tensor([1000.0, 0.0])}
    expected = [0.5 * share * 4 + 2 * 4e-6 * 1000, 0.5 * share * 4]
    assert rewards.rounding(each).tolist() == pytest.approx(expected, rel=0.03)
    each["m"] = torch.tensor([math.nan, -4.0])  # in evaluation it may be
    assert rewards.rounding(each).tolist() == pytest.approx(expected, rel=0.03)


def test_a_reward_is_told_all_that_is_known_of_the_responses():
    seen: list[Any] = []

    def spy(*told: Any) -> torch.Tensor:
        seen.append(told)
        return torch.arange(3.0)

    rollout = make_engine(length).generate(PROMPTS, {"n": [1, 2, 3]})
    rollout = replace(rollout, finished=torch.tensor([True, False, True]))
    each = Rewards({"spy": spy}, None, tiny_tokenizer()).score_each(rollout)  # type: ignore[dict-item]
    assert seen == [(PROMPTS, rollout.responses, [True, False, True], {"n": [1, 2, 3]})]
    assert each["spy"].tolist() == [0, 1, 2]


def test_metrics_are_of_the_scores_before_weights():
    each = {"a": torch.tensor([1.0, 3.0]), "b.c": torch.tensor([5.0, 5.0])}
    assert reward_metrics(each) == {
        "rewards/a/mean": 2.0,
        "rewards/a/std": 1.0,
        "rewards/b.c/mean": 5.0,
        "rewards/b.c/std": 0.0,
    }
    assert reward_metrics({"a": torch.tensor([1.0])}) == {}


def test_each_model_of_the_policys_tokenizer_reads_tokens(reward_folders, monkeypatch):
    """A response may decode and encode to other tokens than were sampled: text is a detour."""
    own, other = (load_reward_model(f, device=CPU, dtype=FP32) for f in reward_folders)
    given = {"other": other, "function": length, "own": own, "again": own}
    engine = make_engine(given)
    by_text = []
    original = RewardModel.__call__

    def spy(self: RewardModel, *args: Any) -> torch.Tensor:
        if args[4] is None:  # without the tokens that the policy wrote
            by_text.append(self)
        return original(self, *args)

    monkeypatch.setattr(RewardModel, "__call__", spy)
    rollout = engine.generate(PROMPTS)
    each = engine.score_each(rollout)
    assert by_text == [other]
    assert list(each) == list(given)
    ids, real = rollout.sequences()
    alone = [
        sequence_scores(own.model, row[None], mask[None])
        for row, mask in zip(ids, real, strict=True)
    ]
    torch.testing.assert_close(each["own"], torch.cat(alone))
    assert torch.equal(each["again"], each["own"])
    # The critic starts from the first of them, though it is neither the first model nor reward.
    head = own.model.state_dict()["score.weight"]
    assert engine.critic is not None
    assert torch.equal(engine.critic.model.state_dict()["score.weight"], head)
    assert not torch.equal(other.model.state_dict()["score.weight"], head)


def test_a_data_column_is_not_taken_for_the_turns(reward_folders):
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    own = load_reward_model(reward_folders[0], device=CPU, dtype=FP32)
    own.tokenizer.add_tokens(["never written"])  # so that it reads text
    engine = make_engine({"model": own, "function": lambda responses, turns: turns})
    rollout = engine.generate(prompts, {"turns": [3, 1, 2]})
    found = engine.score_each(rollout)
    assert found["function"].tolist() == [3, 1, 2]
    assert torch.equal(found["model"], own(prompts, rollout.responses, rollout.finished.tolist()))


def test_a_reward_model_from_python_renders_with_the_runs_arguments(reward_folders) -> None:
    own = load_reward_model(reward_folders[0], device=CPU, dtype=FP32)
    day = datetime.date(2025, 2, 9)
    run = Renderer(qwen3(), arguments={"enable_thinking": False}, date=day)
    load_rewards(own, RewardConfig(), run, device=CPU, dtype=FP32)
    assert own.renderer.template.arguments == {"enable_thinking": False}
    assert own.renderer.template.date == day and own.renderer.tokenizer is own.tokenizer


def test_a_model_without_its_tokenizer_is_no_reward() -> None:
    with pytest.raises(UserError, match=r"LlamaForCausalLM alone cannot be one: pass its folder"):
        load(tiny_model())


def test_a_reward_model_is_probed_once(
    reward_folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    probes: list[Any] = []
    monkeypatch.setattr(value_model, "check_value_head", lambda *_: probes.append(1))
    load(reward_folders[0])
    assert len(probes) == 1


def test_functions_are_called_on_trial() -> None:
    asked: list[dict[str, Any]] = []

    def spy(prompts, responses, finished, completion_ids, answer, turns=None):
        asked.append({**locals()})
        return [0.0] * len(prompts)

    chat = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Two"}]
    examples = [
        PromptExample("One", {"answer": 1}), PromptExample(chat), PromptExample("Three"),
    ]  # fmt: skip
    endpoint = HTTPReward("http://localhost:1/", RewardEndpointConfig())
    functions = {"spy": RewardFunction(spy), "endpoint": endpoint}
    rewards = Rewards(functions, None, tiny_tokenizer())
    rewards.try_functions(examples, 2)
    rewards.try_functions(examples[:1], 1, several_turns=True)
    first, second = asked
    assert first["prompts"] == ["One", "One", chat, chat] and first["answer"] == [1, 1, None, None]
    assert first["responses"] == ["One", "One", "Two", "Two"] and first["turns"] is None
    assert first["finished"] == [True] * 4 and list(map(len, first["completion_ids"])) == [3] * 4
    assert second["turns"] == [[{"role": "assistant", "content": "One"}]]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda prompts, responses: [0.0], "returned 1 score for 2 responses"),
        (lambda prompts, responses: ["a"] * len(prompts), r"returned 'a' \(str\)"),
        (lambda prompts, responses: [1 / 0], "ZeroDivisionError"),
    ],
)
def test_a_function_that_fails_on_trial(function: Any, message: str) -> None:
    rewards = Rewards({"f": RewardFunction(function)}, None, tiny_tokenizer())
    with pytest.raises(UserError, match=f"{message}.* This was a trial call before anything is"):
        rewards.try_functions([PromptExample("One"), PromptExample("Two")], 1)
