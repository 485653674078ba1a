"""Reward functions good and bad, reward models by text and by token ids, score normalization."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model_folder, tiny_tokenizer

from ppo_engine.config import RewardConfig
from ppo_engine.errors import UserError
from ppo_engine.rewards import (
    RewardFunction,
    RewardModel,
    ScoreNormalizer,
    apply_missing_eos,
    load_reward,
    same_tokenizer,
)
from ppo_engine.text import encode_dialogue, pad_left
from ppo_engine.value_model import load_value_model, save_value_model

CPU, FP32 = torch.device("cpu"), torch.float32
PROMPTS = ["Say a.", [{"role": "user", "content": "Say b, at some length."}], "Say c."]
RESPONSES = ["a", "bbbbbbbb", "ccc"]
FINISHED = [True, False, True]


def score(function, columns=None):
    return RewardFunction(function)(PROMPTS, RESPONSES, FINISHED, columns or {})


# Functions ----------------------------------------------------------------------------------------


def test_a_function_sees_what_the_user_gave_and_its_scores_come_back():
    seen = []

    def length(prompts, responses):
        seen.extend(prompts)
        return [len(response) for response in responses]

    scores = score(length)
    assert seen == PROMPTS
    assert scores.dtype == torch.float32 and scores.tolist() == [1, 8, 3]


def test_only_the_columns_that_the_signature_names_are_passed():
    columns = {"answer": ["x", "y", "z"], "other": [1, 2, 3], "prompts": ["", "", ""]}

    def named(prompts, responses, answer):
        assert answer == ["x", "y", "z"]
        return [0.0, 0.0, 0.0]

    def every(prompts, responses, **found):
        assert set(found) == {"answer", "other"}
        return [0.0, 0.0, 0.0]

    score(named, columns)
    score(every, columns)


def test_a_column_that_is_missing_is_named():
    def needy(prompts, responses, answer, hint=None):
        return [0.0] * len(responses)

    with pytest.raises(UserError, match="'needy' asks for 'answer', but the prompts have 'other'"):
        score(needy, {"other": [1, 2, 3]})


@pytest.mark.parametrize(
    "result",
    [(1, 2, 3), [True, False, 1.5], np.array([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]),
     [np.float32(1), np.int64(2), torch.tensor(3.0)]],
    ids=["tuple", "bools", "numpy", "tensor", "scalars"],
)  # fmt: skip
def test_every_usual_kind_of_number_is_taken(result):
    assert score(lambda prompts, responses: result).tolist() == [float(x) for x in result]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, 2.0], "2 scores for 3 responses"),
        ([1.0, 2.0, 3.0, 4.0], "4 scores for 3 responses"),
        (None, r"returned None \(NoneType\); it must return a list of 3 numbers"),
        (1.5, r"returned 1.5 \(float\)"),
        ({"a": 1}, r"\(dict\)"),
        (torch.tensor(1.0), r"\(Tensor\)"),
        ([1.0, None, 3.0], r"None \(NoneType\) for response 1"),
        ([1.0, 2.0, math.nan], r"nan \(float\) for response 2"),
        ([-math.inf, 2.0, 3.0], r"-inf \(float\) for response 0"),
        ([1.0, "2.0", 3.0], r"'2.0' \(str\) for response 1"),
        ([1e300, 2.0, 3.0], r"1e\+300 \(float\) for response 0"),
        ([[1.0], [2.0], [3.0]], r"\[1.0\] \(list\) for response 0"),
        (torch.ones(3, 1), r"\[1.0\] \(list\) for response 0"),
    ],
)
def test_a_bad_result_is_described(result, message):
    def judge(prompts, responses):
        return result

    with pytest.raises(UserError, match=message) as caught:
        score(judge)
    assert "'judge'" in str(caught.value)


def test_an_exception_names_function_and_line_and_keeps_its_cause(tmp_path):
    (tmp_path / "broken.py").write_text(
        "import json\n\ndef judge(prompts, responses):\n    return json.loads('nonsense')\n"
    )
    reward = load_reward(f"{tmp_path}/broken.py:judge", device=CPU, dtype=FP32)
    with pytest.raises(UserError, match=r"broken\.py, line 4: JSONDecodeError") as caught:
        reward(PROMPTS, RESPONSES, FINISHED, {})
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_function_without_the_two_parameters_is_an_error():
    with pytest.raises(UserError, match="failed: TypeError"):
        score(lambda prompts: [0.0])


# Loading ------------------------------------------------------------------------------------------


def test_functions_load_from_files_and_modules(tmp_path, monkeypatch):
    source = "def judge(prompts, responses):\n    return [0.5] * len(responses)\nLIMIT = 3\n"
    (tmp_path / "my_rewards.py").write_text(source)
    (tmp_path / "my_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for spec in (f"{tmp_path / 'my_rewards.py'}:judge", "my_module:judge"):
        reward = load_reward(RewardConfig(function=spec), device=CPU, dtype=FP32)
        assert reward(PROMPTS, RESPONSES, FINISHED, {}).tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{folder}/absent.py:judge", "absent.py' does not exist"),
        ("{folder}/rewards.py:jugde", "no function 'jugde'. Did you mean 'judge'"),
        ("{folder}/rewards.py:LIMIT", r"'LIMIT' in .* is not a function, but 3 \(int\)"),
        ("{folder}/rewards.py:", "names no function"),
        ("{folder}/syntax.py:judge", "could not be imported: SyntaxError"),
        ("no_such_package.rewards:judge", "could not be imported: ModuleNotFoundError"),
    ],
)
def test_a_function_that_cannot_be_loaded(tmp_path, spec, message):
    (tmp_path / "rewards.py").write_text("def judge(prompts, responses): return []\nLIMIT = 3\n")
    (tmp_path / "syntax.py").write_text("def judge(:\n")
    with pytest.raises(UserError, match=message):
        load_reward(spec.format(folder=tmp_path), device=CPU, dtype=FP32)


def test_exactly_one_reward_must_be_configured():
    for config in (RewardConfig(), RewardConfig(path="a", function="b:c")):
        with pytest.raises(UserError, match="Set either"):
            load_reward(config, device=CPU, dtype=FP32)


# Reward models ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = tiny_tokenizer()
    model = load_value_model(tiny_model_folder(folder), tokenizer, device=CPU)
    save_value_model(model, tokenizer, folder / "model")
    return str(folder / "model")


@pytest.fixture(scope="module")
def reward_model(reward_folder) -> RewardModel:
    reward = load_reward(reward_folder, device=CPU, dtype=FP32, micro_batch_size=2)
    assert isinstance(reward, RewardModel)
    return reward


def test_text_and_tokens_get_the_same_score_whatever_the_micro_batch(reward_model, reward_folder):
    by_text = reward_model(PROMPTS, RESPONSES, FINISHED)
    tokenizer = tiny_tokenizer()
    rows = [
        encode_dialogue(tokenizer, prompt, response, 1000, finished)
        for prompt, response, finished in zip(PROMPTS, RESPONSES, FINISHED, strict=True)
    ]
    ids, mask = (torch.tensor(x) for x in pad_left(rows, tokenizer.pad_token_id))
    torch.testing.assert_close(reward_model.score_tokens(ids, mask), by_text)
    # One row at a time, in the order given.
    single = load_reward(reward_folder, device=CPU, dtype=FP32, micro_batch_size=1)
    torch.testing.assert_close(single(PROMPTS, RESPONSES, FINISHED, {}), by_text)
    assert len(set(by_text.tolist())) == 3 and not by_text.requires_grad


def test_an_unfinished_response_is_scored_without_eos(reward_model):
    done, cut = reward_model(["Say a.", "Say a."], ["aa", "aa"], [True, False])
    assert done != cut


def test_a_reward_model_keeps_to_its_token_limit(reward_model):
    short = RewardModel(
        reward_model.model, reward_model.tokenizer, device=CPU, dtype=FP32, max_tokens=4
    )
    scores = short(["left out " * 9, "xx"], ["abc", "abc"], [True, True])
    assert scores[0] == pytest.approx(scores[1].item())
    assert scores[0] != pytest.approx(reward_model(["xx"], ["abc"], [True]).item())


def test_a_language_model_is_no_reward_model(tmp_path):
    with pytest.raises(UserError, match="no score head"):
        load_reward(tiny_model_folder(tmp_path), device=CPU, dtype=FP32)


def test_same_tokenizer_looks_at_vocabulary_and_template():
    assert same_tokenizer(tiny_tokenizer(), tiny_tokenizer())
    assert not same_tokenizer(tiny_tokenizer(), tiny_tokenizer(chat_template=False))
    larger = tiny_tokenizer()
    larger.add_tokens(["<new>"])
    assert not same_tokenizer(tiny_tokenizer(), larger)


# Normalization and missing EOS --------------------------------------------------------------------


def test_normalized_scores_have_mean_0_and_deviation_1():
    scores = 5 + 3 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    normalized = ScoreNormalizer(responses=64)(scores)
    assert normalized.mean().item() == pytest.approx(0, abs=1e-5)
    assert normalized.std(unbiased=False).item() == pytest.approx(1, abs=1e-5)


def test_statistics_merge_over_rollouts_then_stay_and_survive_a_checkpoint():
    parts = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)) * 2 - 7
    normalizer = ScoreNormalizer(responses=16)
    normalizer(parts[0])
    normalizer(parts[1])
    first = parts[:2].double()
    third = normalizer(parts[2] + 100)  # comes too late to count
    expected = (parts[2] + 100 - first.mean()) / first.std(unbiased=False)
    torch.testing.assert_close(third, expected.float(), rtol=1e-5, atol=1e-5)

    restored = ScoreNormalizer(responses=16)
    restored.load_state_dict(normalizer.state_dict())
    assert torch.equal(restored(parts[2] + 100), third)


def test_equal_scores_stay_finite():
    assert ScoreNormalizer()(torch.full((4,), 2.0)).tolist() == [0.0] * 4


def test_missing_eos_replaces_or_lowers_the_score():
    scores, finished = torch.tensor([1.0, 2.0]), torch.tensor([True, False])
    for config, expected in (
        (RewardConfig(), [1.0, 2.0]),
        (RewardConfig(missing_eos_penalty=0.5), [1.0, 1.5]),
        (RewardConfig(missing_eos_score=-1.0), [1.0, -1.0]),
    ):
        assert apply_missing_eos(scores, finished, config).tolist() == expected


def test_relative_paths_are_taken_from_the_current_folder(tmp_path, monkeypatch):
    Path(tmp_path / "here.py").write_text("def judge(prompts, responses):\n    return [1, 2, 3]\n")
    monkeypatch.chdir(tmp_path)
    reward = load_reward("here.py:judge", device=CPU, dtype=FP32)
    assert reward(PROMPTS, RESPONSES, FINISHED, {}).tolist() == [1, 2, 3]
