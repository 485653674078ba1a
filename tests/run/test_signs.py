"""What makes a run pointless is said once, when it first shows, and at the end; never without."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import tiny_model_folder
from trainers import PROMPTS, config

from ppo_engine import (
    GenerationConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    PPOSettings,
    RewardConfig,
    RewardModelConfig,
    RewardModelSettings,
    RewardModelTrainer,
    RunConfig,
    SFTConfig,
    SFTTrainer,
)
from ppo_engine.run.signs import Watch, findings, ppo_signs, signs_of, supervised_signs
from ppo_engine.training.ppo import PPOTrainer

pytestmark = pytest.mark.usefixtures("no_pictures")

GRPO = {"estimator": "grpo", "group_size": 2}
SAME = "all 4 responses have the same score"
EQUAL = "no group of 2 responses to a prompt has a spread of scores"
CUT = "all 16 responses are cut at generation.max_new_tokens=2"
UNMOVED = "the policy is still where it began"
IDLE = "updates change no token's probability"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def constant(prompts: list[str], responses: list[str]) -> list[float]:
    return [0.1] * len(responses)


def of_prompt(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(prompt[-1]) for prompt in prompts]


def all_different(prompts: list[str], responses: list[str]) -> list[float]:
    return [index / 3 for index in range(len(responses))]


def said(
    model: str,
    folder: Path,
    reward: Callable[..., Any],
    ends: bool = True,
    rate: float = 1e-3,
    steps: int = 4,
    **ppo: Any,
) -> list[str]:
    """What a GRPO run says about itself, beginnings alone."""
    out = io.StringIO()
    made = config(folder / "run", steps=steps, ppo=GRPO)
    made = replace(
        made,
        ppo=replace(made.ppo, **ppo),
        policy=ModelConfig(optimizer=OptimizerConfig(learning_rate=rate)),
        reward=RewardConfig(),
        # Every token ends a response, or next to none does.
        generation=GenerationConfig(max_new_tokens=2, stop=tuple(range(256)) if ends else ()),
    )
    PPOTrainer(model, reward, PROMPTS, config=made, console=Console(file=out)).train()
    lines = out.getvalue().splitlines()
    return [line for line in lines if line.startswith(("Step", "In "))]


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({"reward": all_different}, []),
        ({"reward": constant}, [("Step 1", SAME), ("In 4 of 4 steps", SAME)]),
        ({"reward": of_prompt}, [("Step 1", EQUAL), ("In 4 of 4 steps", EQUAL)]),
        (
            {"reward": all_different, "ends": False, "rollout_batch_size": 16},
            [("Steps 1 to 2", CUT), ("In 4 of 4 steps", CUT)],
        ),
        ({"reward": all_different, "ends": False}, []),  # 16 responses, and all by chance
        # What the last step shows for the first time is not said again.
        ({"reward": constant, "steps": 1}, [("Step 1", SAME)]),
        ({"reward": all_different, "rate": 1e-30}, [("Step 4", UNMOVED)]),
        (
            {"reward": all_different, "rate": 1e-30, "steps": 5},
            [("Step 4", UNMOVED), ("In 2 of 5 steps", UNMOVED)],
        ),
        (
            {"reward": all_different, "rate": 1e-30, "kl_coef": 0.0},
            [("Steps 1 to 3", IDLE), ("In 3 of 4 steps", IDLE)],
        ),
        ({"reward": all_different, "kl_coef": 0.0}, []),
        # One update a step: the ratio is 1 whatever happens.
        ({"reward": all_different, "rate": 1e-30, "kl_coef": 0.0, "mini_batch_size": 4}, []),
    ],
    ids=[
        "nothing", "constant", "equal groups", "cut", "cut by chance", "constant at the end",
        "unmoved at the end", "unmoved", "idle", "without a KL", "one update a step",
    ],
)  # fmt: skip
def test_a_run_of_ppo(
    model: str, tmp_path: Path, run: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    found = said(model, tmp_path, **run)
    assert len(found) == len(expected)
    for line, (when, what) in zip(found, expected, strict=True):
        assert line.startswith(f"{when}: {what}" if when[0] == "S" else f"{when} {what}")
        assert line.endswith(".") and line.count(". ") >= 1  # with what to try


def test_what_a_row_of_ppo_shows() -> None:
    def found(row: dict[str, float], **settings: Any) -> list[str]:
        signs = ppo_signs(PPOConfig(ppo=PPOSettings(**settings)))
        return Watch(signs).look({"step": 4, "objective/response_length": 10.0, **row})

    def idle(row: dict[str, float]) -> list[str]:
        """What is said of three equal steps without a KL."""
        watch = Watch(ppo_signs(PPOConfig(ppo=PPOSettings(kl_coef=0))))
        still = {"policy/approx_kl": 1e-15, "policy/learning_rate": 1e-6, **row}
        return [line for step in (2, 3, 4) for line in watch.look({"step": step, **still})][-1:]

    [line] = found({"policy/grad_norm": 0.0, "objective/kl": 0.0})
    assert "no gradient reached the policy" in line  # and not also that it did not move
    [line] = found({"objective/kl": 1e-6})
    assert UNMOVED in line
    assert found({"objective/kl": 1e-6}, critic_warmup_steps=1) == []
    assert found({"objective/kl": 1e-4}) == []
    [line] = found({"objective/scores": 0.0, "objective/scores_std": 0.0}, rollout_batch_size=2)
    assert "all 2 responses have the same score" in line
    [line] = found(
        {"objective/scores": 0.1, "objective/scores_std": 1e-9}
    )  # of the mean's rounding
    assert "all 64 responses have the same score" in line
    [line] = idle({})
    assert IDLE in line and line.startswith("Steps 2 to 4")
    assert idle({"policy/learning_rate": 1e-8}) == []  # at the end of a schedule
    assert idle({"policy/approx_kl": 1e-10}) == []
    assert idle({"policy/grad_norm": 0.0})[0].startswith("Step 2: no gradient")
    one = {"rollout_batch_size": 1, "mini_batch_size": 1}
    assert found({"objective/scores": 0.0, "objective/scores_std": 0.0}, **one) == []


def test_what_is_set_is_not_advised() -> None:
    for reward, advised in (
        ({}, True),
        ({"missing_eos_penalty": 1.0}, False),
        ({"missing_eos_score": 0.0}, False),
    ):
        [told] = Watch(ppo_signs(PPOConfig(reward=reward))).look(
            {"step": 1, "objective/finished": 0.0}
        )
        assert ("set reward.missing_eos_penalty." in told) == advised


def test_a_negative_kl_is_explained_once_and_not_held_against_the_run() -> None:
    watch = Watch(ppo_signs(PPOConfig()))
    below = (-0.1, -0.1, 0.1, -0.1, -0.1, -0.1, -0.1)  # two in a row may be chance
    length = {"objective/response_length": 1.0}
    rows = [{"step": step, "objective/kl": kl, **length} for step, kl in enumerate(below, 1)]
    told = [watch.look(row) for row in rows]
    [line] = told.pop(5)
    assert line.startswith("Steps 4 to 6: the KL is shown below 0") and not any(told)
    assert watch.summary(rows) == []


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (1e-3, []),
        (1e-30, ["Step 2: the held-out loss is what it was"]),
    ],
)
def test_a_run_of_sft(model: str, tmp_path: Path, rate: float, expected: list[str]) -> None:
    out = io.StringIO()
    made = SFTConfig(
        model=ModelConfig(optimizer=OptimizerConfig(learning_rate=rate)),
        run=RunConfig(output_dir=str(tmp_path / "run"), dtype="float32"),
    )
    rows = [{"prompt": f"Case {n}", "response": "abc"} for n in range(20)]
    SFTTrainer(model, rows, made, console=Console(file=out)).train()
    found = [x for x in out.getvalue().splitlines() if x.startswith(("Step ", "In "))]
    assert [line[: len(start)] for line, start in zip(found, expected, strict=True)] == expected


def test_a_reward_model_with_nothing_left_to_learn(model: str, tmp_path: Path) -> None:
    out = io.StringIO()
    made = RewardModelConfig(
        model=ModelConfig(optimizer=OptimizerConfig(learning_rate=0.1, schedule="constant")),
        reward=RewardModelSettings(batch_size=4, epochs=6),
        run=RunConfig(output_dir=str(tmp_path / "run"), dtype="float32"),
    )
    pairs = [{"prompt": f"Case {n}", "chosen": "a", "rejected": "b"} for n in range(9)]
    RewardModelTrainer(model, pairs, made, console=Console(file=out)).train()
    found = [x for x in out.getvalue().splitlines() if x.startswith(("Step ", "In "))]
    assert len(found) == 2 and all("the loss is 0. There is nothing left" in x for x in found)


def test_what_a_row_of_a_supervised_run_shows() -> None:
    def found(row: dict[str, float]) -> list[str]:
        return Watch(supervised_signs("sft", 1e-5, {"eval/loss": 2.0})).look({"step": 1, **row})

    [line] = found({"sft/loss": 1.0, "sft/grad_norm": 0.0})
    assert "no gradient reached the model" in line
    assert len(found({"sft/loss": 0.0, "sft/grad_norm": 0.0})) == 1
    assert found({"sft/loss": 1.0, "sft/grad_norm": 0.5, "eval/loss": 1.9}) == []


def steps(**columns: list[float]) -> list[dict[str, float]]:
    """Rows of steps 1, 2, …; `__` in a name stands for `/`."""
    names = [name.replace("__", "/") for name in columns]
    values = zip(*columns.values(), strict=True)
    return [
        {"step": step, **dict(zip(names, row, strict=True))} for step, row in enumerate(values, 1)
    ]


def told(rows: list[dict[str, float]], **settings: Any) -> list[str]:
    """What is said of a run with these rows, and that nothing of it is held against it."""
    watch = Watch(ppo_signs(PPOConfig(ppo=PPOSettings(**settings))))
    lines = [line for row in rows for line in watch.look(row)]
    assert watch.summary(rows) == []
    return lines


def test_an_entropy_near_0_is_told_once_it_stays() -> None:
    assert told(steps(objective__entropy=[2.0, 0.01, 0.04, 0.06, 0.01])) == []
    [line] = told(steps(objective__entropy=[2.0, 0.01, 0.04, 0.0, 0.0]))
    assert line.startswith("Steps 2 to 4: the policy's entropy is near 0") and "kl_coef" in line


def test_a_critic_that_stays_worse_than_none_is_told() -> None:
    assert told(steps(value__explained_variance=[-1.0] * 9 + [0.1])) == []
    [line] = told(steps(value__explained_variance=[-1.0] * 12))
    assert line.startswith("Steps 1 to 10: the critic is worse than a constant")


def test_a_sampler_that_differs_is_told_at_once() -> None:
    assert told([{"step": 1, "rollout/logprob_diff": 0.02}]) == []
    [line] = told([{"step": 1, "rollout/logprob_diff": 0.2}])
    assert line.startswith("Step 1: the ratio is off 1 before the first update")


@pytest.mark.parametrize("ratio", [0.7, 1.3])
def test_updates_that_go_too_far_are_told(ratio: float) -> None:
    assert told(steps(policy__ratio_mean=[ratio, 1.05, ratio, ratio])) == []
    [line] = told(steps(policy__ratio_mean=[1.0, ratio, ratio, ratio]))
    assert line.startswith("Steps 2 to 4: the mean ratio of new to old probability is off 1")


def test_a_kl_above_its_target_is_told() -> None:
    rows = steps(objective__kl=[13.0] * 3)
    assert told(rows) == []  # there is no target
    assert told(rows, adaptive_kl={"target": 7.0}) == []
    [line] = told(rows, adaptive_kl={"target": 6.0})
    assert line.startswith("Steps 1 to 3: the KL to the reference is above twice its target")


def test_scores_that_rise_with_length_alone_are_told() -> None:
    longer = [10.0 + step for step in range(20)]
    noise = [(-1.0) ** step for step in range(20)]

    def found(lengths: list[float], scores: list[float]) -> list[str]:
        return told(steps(objective__response_length=lengths, objective__scores=scores))

    [line] = found(longer, [length / 5 for length in longer])
    assert line.startswith("Steps 1 to 20: score and response length rise together")
    assert found(longer[:19], longer[:19]) == []
    assert found(longer, noise) == [] == found(longer, [1.0] * 20)
    assert found(longer, longer[::-1]) == []
    assert found([100.0 + step for step in range(20)], longer) == []  # not much longer
    assert found(longer, [*longer[:19], float("nan")]) == []


def test_findings_tell_how_often_and_whether_it_lasts() -> None:
    signs = ppo_signs(PPOConfig())
    rows = steps(objective__entropy=[0.0] * 4 + [1.0, 0.0])
    [found] = findings(signs, rows)
    assert (found.when, found.shown, found.lasts) == ("Steps 1 to 3", 5, True)
    assert not findings(signs, rows[:5])[0].lasts
    assert findings(signs, rows[:2]) == [] == findings(signs, [])


def test_the_signs_are_those_of_the_command() -> None:
    def whats(config: Any, before: dict[str, float]) -> list[str]:
        return [sign.what for sign in signs_of(config, before)]

    assert "all 64 responses have the same score" in whats(PPOConfig(), {})
    assert "no gradient reached the model (sft/grad_norm is 0)" in whats(SFTConfig(), {})
    assert "no gradient reached the model (reward/grad_norm is 0)" in whats(RewardModelConfig(), {})
    assert findings(signs_of(SFTConfig(), {"eval/loss": 2.0}), [{"step": 1, "eval/loss": 2.0}])
    assert signs_of(None, {}) == []
