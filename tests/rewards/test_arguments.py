"""Rewards by a ready function's name, and the arguments that settings give to functions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_model_folder, tiny_tokenizer

from ppo_engine.cli import main
from ppo_engine.errors import UserError
from ppo_engine.ppo.engine import PPOEngine
from ppo_engine.rewards import last_number
from ppo_engine.rewards.function import RewardFunction
from ppo_engine.rewards.sources import configured_sources, parse_source
from ppo_engine.rewards.weighted import load_rewards
from ppo_engine.settings.schema import GenerationConfig, PPOConfig, RewardConfig, RewardSource
from ppo_engine.text.renderer import Renderer
from ppo_engine.training.ppo import PPOTrainer

SHORT = PPOConfig(generation=GenerationConfig(max_new_tokens=2))


def scaled(responses, scale, *, base=0.0):
    return [base + scale * len(response) for response in responses]


def load(given=None, **settings):
    config = RewardConfig(**settings)
    cpu, dtype = torch.device("cpu"), torch.float32
    return load_rewards(given, config, Renderer(tiny_tokenizer()), device=cpu, dtype=dtype)


def score(given=None, **settings):
    [reward] = load(given, **settings).by_name.values()
    return reward(["p"], ["abc"], [True], {"answer": ["abc"]}).item()


# Names --------------------------------------------------------------------------------------------


def test_a_ready_functions_name_is_a_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_source("exact_match") == RewardSource(function="exact_match")
    assert list(load("exact_match").by_name) == ["exact_match"]
    assert score("exact_match") == score(function="exact_match") == 1
    Path("exact_match").mkdir()
    with pytest.raises(UserError, match=r"reward\.function=exact_match .* or \./exact_match for"):
        parse_source("exact_match")
    assert parse_source("./exact_match").path == "./exact_match"
    assert score(function="exact_match") == 1


def test_a_name_that_is_almost_a_ready_functions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'exct_match' names no reward; did you mean 'exact_match'"):
        parse_source("exct_match")
    with pytest.raises(UserError, match=r"names no function\. Did you mean 'exact_match'"):
        load(function="exct_match")
    with pytest.raises(UserError, match=r"names no function\. .* ready functions: exact_match, "):
        load(function="judge")
    assert parse_source("me/last_number").path == "me/last_number"  # a repository's name
    Path("exct_match").mkdir()
    assert parse_source("exct_match").path == "exct_match"


def test_a_column_that_a_ready_function_needs_is_missing():
    rewards = load(["exact_match", "last_number"])
    message = "'exact_match' asks for 'answer', but the prompts have 'solution'"
    with pytest.raises(UserError, match=message) as caught:
        rewards.check_columns(["solution"])
    assert "data.columns={answer: …}" in str(caught.value)


def test_a_column_is_no_argument_of_a_ready_function():
    [reward] = load("last_number").by_name.values()
    assert reward(["p"], ["5"], [True], {"answer": ["5"], "tolerance": ["x"]}).item() == 1


# Arguments ----------------------------------------------------------------------------------------


def test_arguments_reach_functions_however_they_are_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "scales.py").write_text("def scaled(responses, scale):\n    return [scale]\n")
    source = {"function": "scales:scaled", "arguments": {"scale": 3}}
    assert score(**source) == score(sources=[source]) == 3
    assert score("scales:scaled", arguments={"scale": 4}) == 4
    assert score(scaled, arguments={"scale": 2, "base": 1}) == 7
    assert score("format_match", arguments={"pattern": "ab."}) == 1
    assert score({"named": "format_match"}, arguments={"pattern": "ab"}) == 0


def test_any_argument_goes_to_a_function_that_takes_all():
    def reward(responses, **rest):
        return [rest["scale"]]

    assert score(reward, arguments={"scale": 2}) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"function": "format_match"}, r"'format_match' needs .* set reward\.arguments\.pattern=…"),
        (
            {"function": "format_match", "arguments": {"patern": "x", "pattern": "x"}},
            r"no parameter 'patern', .* Did you mean 'pattern'\? Its parameters are responses, pat",
        ),
        ({"function": "format_match", "arguments": {"pattern": "("}}, "not a valid regular"),
        (
            {"function": "last_number", "arguments": {"answer": ["3"]}},
            "'last_number' takes 'answer' from the data",
        ),
        ({"path": "a/b", "arguments": {"x": 1}}, "of a function, and a reward model takes none"),
        ({"url": "http://a", "arguments": {"x": 1}}, "of a function, and an endpoint takes none"),
        ({"sources": [{"path": "a"}] * 2, "arguments": {"x": 1}}, "there are several rewards"),
    ],
)
def test_arguments_that_cannot_be_are_found_before_anything_is_loaded(settings, message):
    with pytest.raises(UserError, match=message):
        configured_sources(RewardConfig(**settings))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (scaled, "'scaled' has no parameter 'x', which .* are responses, scale, base"),
        ([scaled, scaled], "there are several rewards"),
        (RewardFunction(scaled), "a RewardFunction has its own"),
    ],
)
def test_arguments_that_a_python_reward_does_not_take(given, message):
    with pytest.raises(UserError, match=message):
        load(given, arguments={"x": 1})


def test_an_argument_that_is_missing_is_said_with_the_setting():
    with pytest.raises(UserError, match=r"asks for 'scale', .* from reward\.arguments\.scale"):
        load(scaled).check_columns(["answer"])


def test_what_a_ready_function_says_of_the_data_stands_alone():
    engine = PPOEngine(tiny_model(), "last_number", config=SHORT, tokenizer=tiny_tokenizer())
    rollout = engine.generate(["Say 1."], {"answer": ["one"]})
    with pytest.raises(UserError, match="The reward function 'last_number': the answer 'one'"):
        engine.score(rollout)


@pytest.mark.parametrize("reward", ["last_number", last_number])
def test_a_row_that_a_ready_function_refuses_is_found_before_it_is_sampled(reward, monkeypatch):
    monkeypatch.setattr(PPOEngine, "generate", None)
    prompts = [{"prompt": "Say 1.", "answer": answer} for answer in (1, "2", None, "three")]
    with pytest.raises(UserError, match=r"^prompts\[3\]: .*: the answer 'three' .* has no number"):
        PPOTrainer(tiny_model(), reward, prompts, config=SHORT, tokenizer=tiny_tokenizer())


# From end to end ----------------------------------------------------------------------------------


def test_the_command_line_names_and_records_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"prompt": "Say a."}\n' * 2)
    Path("s.yaml").write_text("reward: {function: my.py:f, arguments: {old: 1}}\n")
    model = tiny_model_folder(tmp_path / "model")
    command = ["ppo", "--config", "s.yaml", "--model", model, "--data", "p.jsonl", "steps=1"]
    command += ["--reward", "format_match", "--output-dir", "out", "generation.max_new_tokens=2"]
    command += ["ppo.rollout_batch_size=2", "ppo.mini_batch_size=2", "run.dtype=float32"]
    assert main(command) == 2
    assert "needs an argument: set reward.arguments.pattern=…" in capsys.readouterr().err
    assert not Path("out").exists()
    assert main([*command, "reward.arguments.pattern=(?s:.*)"]) == 0
    recorded = Path("out/config.yaml").read_text()
    assert "function: format_match\n  arguments:\n    pattern: (?s:.*)\n" in recorded
    assert '"objective/scores": 1.0' in Path("out/metrics.jsonl").read_text()


def test_generate_finds_a_wrong_reward_before_it_looks_for_the_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["generate", "--model", "no/such", "--prompt", "x", "--reward", "format_match"]
    assert main(command) == 2
    assert "needs an argument: set reward.arguments.pattern=…" in capsys.readouterr().err
    assert main([*command, "reward.arguments.pattern=[0-9]+"]) == 2
    assert "quote it for YAML too: reward.arguments.pattern='\"…\"'" in capsys.readouterr().err


def test_arguments_of_a_python_reward_are_recorded():
    settings = RewardConfig(arguments={"pattern": "a"})
    config = PPOConfig(reward=settings, generation=SHORT.generation)
    trainer = PPOTrainer(
        tiny_model(), "format_match", ["Say a."], config=config, tokenizer=tiny_tokenizer()
    )
    expected = [RewardSource(function="format_match", arguments={"pattern": "a"})]
    assert configured_sources(trainer.config.reward) == expected


def test_help_lists_the_ready_functions(capsys):
    with pytest.raises(SystemExit):
        main(["ppo", "--help"])
    words = capsys.readouterr().out.replace("\n", " ").split()
    assert "(exact_match," in words and "unit_tests;" in words
