"""A recorded step's update, again: to the bit what it was, and with other settings what it would
have been."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import of_family
from rich.console import Console
from tiny import tiny_model_folder, tiny_tokenizer
from trainers import PROMPTS, as_if_killed, config, length_reward, planted_pairs

from ppo_engine import (
    LoraConfig,
    ModelConfig,
    PPOConfig,
    PPOTrainer,
    RewardModelConfig,
    RewardModelTrainer,
    RunConfig,
    cli,
)
from ppo_engine.errors import UserError
from ppo_engine.run.replayable import Plan, plan_replay
from ppo_engine.run.rollout_record import read_record, recorded_steps
from ppo_engine.settings.schema import EnvironmentConfig, GenerationConfig
from ppo_engine.training.recording import trained_fingerprints
from ppo_engine.training.replay import Replayed, _engine_before, _update, replay

pytestmark = pytest.mark.usefixtures("no_pictures")

GRPO = {"estimator": "grpo", "group_size": 2, "kl_in": "loss"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of four layers."""
    folder = tmp_path_factory.mktemp("deep")
    of_family("llama", num_hidden_layers=4).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def reward_of(path: str, folder: Path, model: dict[str, Any], **run: Any) -> str:
    """A reward model, trained for a step."""
    RewardModelTrainer(
        None,
        planted_pairs(8),
        RewardModelConfig(
            model=ModelConfig(path=path, **model),
            run=RunConfig(output_dir=str(folder), dtype="float32", **run),
        ),
        console=Console(file=io.StringIO()),
    ).train()
    return str(folder / "reward_model")


def trained(model: str, reward: Any, settings: PPOConfig) -> Path:
    PPOTrainer(model, reward, PROMPTS, config=settings, console=Console(file=io.StringIO())).train()
    return Path(settings.run.output_dir)


def again(run: Path, step: int, *overrides: str) -> tuple[Plan, Replayed, str]:
    """The plan, the metrics, and what is printed."""
    out = io.StringIO()
    plan = plan_replay(run, step, overrides)
    return plan, replay(plan, console=Console(file=out)), out.getvalue()


def assert_same(run: Path, step: int, between: Sequence[int], checkpoint: int | None) -> None:
    """That a replay of `step` begins there, and is the recorded update: its metrics, and the
    weights that the next step began with."""
    plan, found, told = again(run, step)
    start = plan.start
    assert start.between == list(between)
    assert (start.checkpoint.name if start.checkpoint else None) == (
        None if checkpoint is None else f"step-{checkpoint:06d}"
    )
    assert found.again == found.recorded and len(found.again) > 8
    assert "metrics are the recorded ones, to the bit" in told
    if step + 1 in recorded_steps(run):
        engine = _engine_before(plan)
        _update(plan, engine)
        following = read_record(recorded_steps(run)[step + 1])
        assert trained_fingerprints(engine) == following.update.weights


@pytest.mark.parametrize(
    "ppo",
    [
        {"epochs": 2},
        {**GRPO, "epochs": 2},
        {"old_logprobs": "recompute", "importance_cap": 2.0, "critic_warmup_steps": 1},
        {"adaptive_kl": {"target": 0.01, "horizon": 4}, "whiten_rewards": True},
        {"estimator": "remax", "old_logprobs": "sampler", "objective": "cispo"},
        {"estimator": "rloo", "group_size": 4, "kl_coef": 0.0, "ratio_level": "sequence"},
    ],
    ids=str,
)
def test_to_the_bit_from_the_start_and_from_checkpoints(
    model: str, tmp_path: Path, ppo: dict[str, Any]
) -> None:
    keeping = {"record_rollouts": 1, "checkpoint_every": 3}
    run = trained(model, length_reward, config(tmp_path / "run", steps=5, ppo=ppo, **keeping))
    assert_same(run, 1, between=[], checkpoint=None)
    assert_same(run, 3, between=[1, 2], checkpoint=None)
    assert_same(run, 4, between=[], checkpoint=3)
    assert_same(run, 5, between=[4], checkpoint=3)


def test_log_probs_that_the_update_has_measured(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ppo_engine.ppo.old_logprobs.SAMPLERS_BOUND", 0.0)
    settings = config(tmp_path / "run", steps=3, record_rollouts=1)
    ppo = replace(settings.ppo, **GRPO, epochs=1, mini_batch_size=4)
    run = trained(model, length_reward, replace(settings, ppo=ppo))
    assert "sampler_logprobs" in read_record(recorded_steps(run)[2]).arrays
    assert_same(run, 2, between=[1], checkpoint=None)
    assert_same(run, 3, between=[1, 2], checkpoint=None)


def test_passes_are_as_they_were(model: str, tmp_path: Path) -> None:
    """Also those of which memory had made smaller ones."""
    settings = config(tmp_path / "run", steps=2, record_rollouts=1)
    batches = {"micro_batch_size": None, "mini_batch_size": 4}
    trainer = PPOTrainer(
        model,
        length_reward,
        PROMPTS,
        config=replace(settings, ppo=replace(settings.ppo, **batches)),
        console=Console(file=io.StringIO()),
    )
    trainer.engine.budget.limit = trainer.engine.budget.limit._replace(tokens=40)
    trainer.train()
    assert_same(tmp_path / "run", 2, between=[1], checkpoint=None)


def test_a_resumed_run(model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {"checkpoint_every": 2, "record_rollouts": 1, "keep_checkpoints": 0}
    trained(model, length_reward, config(run, steps=3, **settings))
    as_if_killed(run)
    trained(model, length_reward, config(run, steps=5, resume=True, **settings))
    assert_same(run, 3, between=[], checkpoint=2)
    assert_same(run, 4, between=[3], checkpoint=2)
    assert_same(run, 2, between=[1], checkpoint=None)  # by the schedule of the shorter run
    for folder in (run / "checkpoints").iterdir():
        shutil.rmtree(folder)
    assert_same(run, 4, between=[1, 2, 3], checkpoint=None)  # across the change


@pytest.mark.parametrize("ppo", [{}, GRPO], ids=["ppo", "grpo"])
def test_frozen_layers_that_are_read_once(deep: str, tmp_path: Path, ppo: dict[str, Any]) -> None:
    reward = reward_of(deep, tmp_path / "reward", model={"trainable_layers": 1})
    settings = config(
        tmp_path / "run", steps=3, ppo={**ppo, "epochs": 2}, checkpoint_every=2, record_rollouts=1
    )
    settings = replace(
        settings,
        policy=replace(settings.policy, trainable_layers=1),
        critic=replace(settings.critic, trainable_layers=2),
    )
    run = trained(deep, reward, settings)
    assert_same(run, 2, between=[1], checkpoint=None)
    assert_same(run, 3, between=[], checkpoint=2)


def test_adapters(deep: str, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the optional package peft is not installed")
    settings = config(tmp_path / "run", steps=2, checkpoint_every=1, record_rollouts=1)
    settings = replace(settings, policy=replace(settings.policy, lora=LoraConfig(rank=2)))
    run = trained(deep, length_reward, settings)
    assert_same(run, 1, between=[], checkpoint=None)
    assert_same(run, 2, between=[], checkpoint=1)


def test_adapters_on_one_base(deep: str, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the optional package peft is not installed")
    lora = LoraConfig(rank=2)
    reward = reward_of(deep, tmp_path / "reward", model={"lora": lora}, save_adapters=True)
    settings = config(tmp_path / "run", steps=2, checkpoint_every=1, record_rollouts=1)
    settings = replace(settings, policy=replace(settings.policy, lora=lora), share_base=True)
    run = trained(deep, reward, settings)
    assert_same(run, 1, between=[], checkpoint=None)
    assert_same(run, 2, between=[], checkpoint=1)


def test_several_turns(model: str, tmp_path: Path) -> None:
    functions = tmp_path / "functions.py"
    functions.write_text(
        "def go_on(prompts, turns):\n"
        "    return [{'role': 'tool', 'content': 'go on'} if len(x) < 3 else None for x in turns]\n"
    )
    settings = replace(
        config(tmp_path / "run", steps=2, record_rollouts=1),
        environment=EnvironmentConfig(function=f"{functions}:go_on", max_turns=2),
        generation=GenerationConfig(max_new_tokens=5, stop=tuple(range(100))),
    )
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    PPOTrainer(
        model, length_reward, chats, config=settings, console=Console(file=io.StringIO())
    ).train()
    functions.unlink()  # nobody is asked
    record = read_record(recorded_steps(tmp_path / "run")[1])
    assert not record.arrays["mask"].all()
    assert_same(tmp_path / "run", 2, between=[1], checkpoint=None)


@pytest.fixture(scope="module")
def run(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 and 3, the latter behind a checkpoint; 5, which cannot be replayed."""
    folder = tmp_path_factory.mktemp("runs")
    source = folder / "reward.py"
    source.write_text("def reward(prompts, responses):\n    return [len(x) for x in responses]\n")
    settings = config(
        folder / "run", steps=5, checkpoint_every=2, record_rollouts=2, keep_checkpoints=0
    )
    found = trained(model, f"{source}:reward", settings)
    source.unlink()  # a replay asks no reward
    shutil.rmtree(found / "checkpoints" / "step-000004")
    return found


def files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {
        file: (file.stat().st_mtime_ns, file.read_bytes())
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_nothing_is_written_where_the_run_is(run: Path) -> None:
    before = files(run)
    again(run, 3, "ppo.clip_range=0.1")
    assert files(run) == before


@pytest.mark.parametrize(
    ("override", "moved", "stays"),
    [
        ("ppo.clip_range=0.001", "policy/clip_fraction", "value/loss"),
        ("policy.optimizer.learning_rate=1e-2", "policy/learning_rate", "value/loss"),
        ("policy.optimizer.beta1=0.1", "after/approx_kl", "value/loss"),
        ("critic.optimizer.learning_rate=1e-2", "value/loss", "policy/loss"),
        ("ppo.value_clip_range=1e-4", "value/clip_fraction", "policy/loss"),
        ("ppo.lam=0.1", "value/explained_variance", "objective/kl"),
        ("ppo.kl_coef=3", "objective/kl_coef", "objective/kl"),
        ("ppo.entropy_coef=1", "policy/loss", "objective/kl"),
        ("ppo.epochs=3", "after/approx_kl", "policy/learning_rate"),
        ("ppo.mini_batch_size=4", "policy/grad_norm", "policy/learning_rate"),
        ("steps=50", "policy/learning_rate", "objective/scores"),
    ],
)
def test_other_settings(run: Path, override: str, moved: str, stays: str) -> None:
    plan, found, told = again(run, 3, override)
    assert found.recorded[stays] == found.again[stays]
    assert found.recorded.get(moved) != found.again.get(moved)
    [line] = plan.changes
    assert line.startswith(f"{override.partition('=')[0]}: ") and f"Changed: {line}" in told
    assert "differ." in told and " = " in told


def test_what_follows_from_other_settings_follows(run: Path) -> None:
    """It is not left at what it was in the run, though config.yaml has that."""
    plan, *_ = again(run, 3, "ppo.kl_in=loss")
    assert plan.now.ppo.kl_estimator != "k1"
    assert [line.partition(":")[0] for line in plan.changes] == ["ppo.kl_estimator", "ppo.kl_in"]
    plan, *_ = again(run, 3, "policy.optimizer.beta1=0.1", "ppo.reduction=sum")
    assert [line.partition(":")[0] for line in plan.changes] == [
        "policy.optimizer.beta1", "ppo.reduction",
    ]  # fmt: skip


def test_it_is_the_update_of_a_run_with_these_settings(model: str, tmp_path: Path) -> None:
    """The first step of one, whose responses do not depend on them."""
    other = {"clip_range": 0.01, "lam": 0.3, "epochs": 2, "kl_coef": 0.7}
    one, two = tmp_path / "one", tmp_path / "two"
    trained(model, length_reward, config(one, steps=2))
    trained(model, length_reward, config(two, steps=2, ppo=other))
    _, found, _ = again(one, 1, *(f"ppo.{name}={value}" for name, value in other.items()))
    _, expected, _ = again(two, 1)
    assert found.again == expected.recorded == expected.again


def test_steps_before_are_replayed_as_they_were(model: str, tmp_path: Path) -> None:
    """With the other settings from the step on that is asked for."""
    folder = tmp_path / "run"
    keeping = {"record_rollouts": 1, "checkpoint_every": 1, "keep_checkpoints": 0}
    run = trained(model, length_reward, config(folder, steps=3, **keeping))
    overrides = "ppo.clip_range=0.01", "policy.optimizer.learning_rate=5e-3", "ppo.epochs=2"
    plan, found, _ = again(run, 3, *overrides)
    assert plan.start.between == []
    shutil.rmtree(folder / "checkpoints")
    plan, of_chain, _ = again(run, 3, *overrides)
    assert plan.start.between == [1, 2]
    assert found.again == of_chain.again != found.recorded


@pytest.mark.parametrize(
    ("step", "overrides", "message"),
    [
        (None, (), r"Which step\? --step N\. Recorded: 1, 3, 5; of these can be replayed: 1, 3\."),
        (2, (), r"Step 2 of .* is not recorded\. Recorded: 1, 3, 5"),
        (5, (), r"no checkpoint, and not all steps .* run\.record_rollouts=10 run\.checkpoint_eve"),
        (1, ("ppo.group_size=2",), r"cannot be others:\n  - ppo\.group_size: 1 then, 2 now"),
        (1, ("generation.temperature=0.5", "ppo.lam=1"), r"  - generation\.temperature: 1\.0 then"),
        (1, ("policy.optimizer.moments=8bit",), r"policy\.optimizer\.moments: 'float32' then"),
        (1, ("ppo.clip_rang=0.1",), "ppo.clip_range"),
        (1, ("ppo.clip_range=2",), "ppo.clip_range"),
        (1, ("ppo.estimator=reinforce_pp",), "learns from something else than gae"),
        (1, ("ppo.kl_in=loss", "ppo.kl_estimator=k1"), "kl_estimator=k1 in the loss is no penal"),
        (1, ("ppo.old_logprobs=recompute", "ppo.importance_cap=2"), "ppo.old_logprobs: 'auto'"),
    ],
)
def test_what_cannot_be(
    run: Path, step: int | None, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan_replay(run, step, overrides)


def test_what_the_record_lacks(model: str, tmp_path: Path) -> None:
    ppo = {"estimator": "remax", "kl_coef": 0.0, "old_logprobs": "sampler"}
    run = trained(model, length_reward, config(tmp_path / "run", steps=2, ppo=ppo))
    with pytest.raises(UserError, match=r"ppo\.kl_estimator: advantages of remax cannot be est"):
        plan_replay(run, 1, ["ppo.kl_estimator=k2"])
    ppo["estimator"] = "reinforce_pp"
    run = trained(model, length_reward, config(tmp_path / "other", steps=2, ppo=ppo))
    with pytest.raises(UserError, match=r"ppo\.kl_coef=0\.1 needs the log-probs of the reference"):
        plan_replay(run, 1, ["ppo.kl_coef=0.1"])
    assert_same(run, 1, between=[], checkpoint=None)


def test_no_run(tmp_path: Path, model: str) -> None:
    with pytest.raises(UserError, match=r"is not a run's folder: it has no config\.yaml"):
        plan_replay(tmp_path, 1, [])
    run = trained(model, length_reward, config(tmp_path / "run", steps=1, record_rollouts=0))
    with pytest.raises(UserError, match=r"has recorded no step: .*run\.record_rollouts=0"):
        plan_replay(run, 1, [])


def test_a_policy_that_was_an_object(tmp_path: Path) -> None:
    trained_from = of_family("llama")
    PPOTrainer(
        trained_from,
        length_reward,
        PROMPTS,
        config=config(tmp_path / "run", steps=1),
        tokenizer=tiny_tokenizer(),
        console=Console(file=io.StringIO()),
    ).train()
    with pytest.raises(UserError, match="was given to Python as an object"):
        plan_replay(tmp_path / "run", 1, [])


def test_a_model_that_has_changed(model: str, tmp_path: Path) -> None:
    own = shutil.copytree(model, tmp_path / "model")
    run = trained(str(own), length_reward, config(tmp_path / "run", steps=1))
    shutil.copytree(tiny_model_folder(tmp_path, seed=5), own, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"weights of the policy and critic are not those that ste"):
        again(run, 1)


def test_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", str(run), "--step", "3", "ppo.clip_range=0.001"]) == 0
    out = capsys.readouterr().out
    assert "checkpoints/step-000002" in out and "Changed: ppo.clip_range: 0.2 then" in out
    lines = [line for line in out.splitlines() if "policy/clip_fraction" in line]
    assert len(lines) == 1 and lines[0].count("0") > 1
    assert cli.main(["replay", str(run), "--step", "5"]) == 2
    assert "cannot be replayed" in capsys.readouterr().err


def test_metrics_that_are_not_finite(run: Path, tmp_path: Path) -> None:
    own = shutil.copytree(run, tmp_path / "run")
    file = recorded_steps(own)[1] / "rollout.json"
    held = json.loads(file.read_text())
    held["metrics"]["value/loss"] = None
    file.write_text(json.dumps(held))
    (file.parent / "SHA256SUMS").unlink()
    _, found, told = again(own, 1)
    assert found.recorded["value/loss"] is None and found.again["value/loss"] is not None
    assert "not finite" in told and "≠" in told and "1 metric of" in told
