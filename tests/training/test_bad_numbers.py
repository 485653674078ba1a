"""Numbers that are not finite reach neither weights nor a file; a step is skipped whole or not."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import PROMPTS as SHORT
from engines import make_engine
from rich.console import Console
from tiny import tiny_model_folder
from trainers import PROMPTS, config, length_reward, planted_pairs, rows

from ppo_engine import (
    AdaptiveKLConfig,
    DemonstrationDataConfig,
    ModelConfig,
    OptimizerConfig,
    PPOTrainer,
    PreferenceDataConfig,
    RewardModelConfig,
    RewardModelSettings,
    RewardModelTrainer,
    RunConfig,
    SFTConfig,
    SFTSettings,
    SFTTrainer,
)
from ppo_engine.errors import UserError
from ppo_engine.models.finite import SKIPPED_IN_A_ROW, NotFiniteError, Skips
from ppo_engine.run.checkpoint import random_states

pytestmark = pytest.mark.usefixtures("no_pictures")

NAN = math.nan


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def quiet() -> Console:
    return Console(file=io.StringIO(), width=500)


def optimizer(rate: float = 1e-3) -> ModelConfig:
    return ModelConfig(optimizer=OptimizerConfig(learning_rate=rate))


def sft(model: str, folder: Path, rate: float = 1e-3, size: int = 2, **run: Any) -> SFTTrainer:
    settings = SFTConfig(
        model=optimizer(rate),
        data=DemonstrationDataConfig(eval_fraction=0.0),
        sft=SFTSettings(batch_size=size),
        run=RunConfig(output_dir=str(folder), dtype="float32", **run),
    )
    data = [{"prompt": f"Q{n}", "response": "yes" * n} for n in range(1, 9)]
    return SFTTrainer(model, data, settings, console=quiet())


def reward(model: str, folder: Path, **run: Any) -> RewardModelTrainer:
    settings = RewardModelConfig(
        model=optimizer(),
        data=PreferenceDataConfig(eval_fraction=0.0),
        reward=RewardModelSettings(batch_size=2),
        run=RunConfig(output_dir=str(folder), dtype="float32", **run),
    )
    return RewardModelTrainer(model, planted_pairs(8), settings, console=quiet())


def ppo(model: str, folder: Path, **run: Any) -> PPOTrainer:
    settings = config(folder, steps=4, **run)
    return PPOTrainer(model, length_reward, PROMPTS, config=settings, console=quiet())


def spoiled(function: Callable[..., Any], calls: set[int]) -> Callable[..., Any]:
    """`function`, whose tensors are NaN in these calls, from 1."""
    count = iter(range(1, 1000))

    def poison(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x * NAN
        return {k: poison(v) for k, v in x.items()} if isinstance(x, dict) else [*map(poison, x)]

    def called(*given: Any, **named: Any) -> Any:
        result = function(*given, **named)
        return poison(result) if next(count) in calls else result

    return called


def spoil(trainer: Any, path: str, *calls: int) -> None:
    *owners, name = path.split(".")
    for owner in owners:
        trainer = getattr(trainer, owner)
    setattr(trainer, name, spoiled(getattr(trainer, name), set(calls)))


def without_update(learner: Any, at: int) -> None:
    """Update number `at` never happens."""
    step, count = learner.step, iter(range(1, 1000))

    def called(losses: Any) -> Any:
        if next(count) != at:
            return step(losses)
        learner.optimizer.zero_grad(set_to_none=True)
        return torch.zeros(())

    learner.step = called


def spoil_losses(learner: Any, at: int) -> None:
    """Those of update number `at` are NaN."""
    step, count = learner.step, iter(range(1, 1000))

    def called(losses: Any) -> Any:
        bad = next(count) == at
        return step([(samples, loss * (NAN if bad else 1)) for samples, loss in losses])

    learner.step = called


def stored(state: Any) -> bytes:
    """All bits of a state."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@pytest.mark.parametrize(("make", "path"), [(sft, "policy.nll_loss"), (reward, "_forward")])
def test_a_skipped_step_is_one_that_never_happened(model, tmp_path, make, path):
    skipping = make(model, tmp_path / "skipping", on_bad_numbers="skip")
    spoil(skipping, path, 2)
    without = make(model, tmp_path / "without", on_bad_numbers="skip")
    without_update(without.learner, 2)
    for trainer in (skipping, without):
        torch.manual_seed(5)
        trainer.train()
        trainer.random = random_states()
    assert stored(skipping.learner.state_dict()) == stored(without.learner.state_dict())
    assert stored(skipping.random) == stored(without.random)
    assert skipping.learner.updates == 3
    logged = rows(tmp_path / "skipping" / "metrics.jsonl")
    assert [row["skipped_updates"] for row in logged] == [0, 1, 0, 0]
    assert f"{make.__name__}/loss" not in logged[1]
    told = skipping.console.file.getvalue()
    assert "Step 2: the loss of the model (update 2) is not finite, in " in told
    assert "It was left out." in told


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("score_each", "rewards' scores"),
        ("passes.of_both", "policy's log-probs"),
        ("passes.of_critic", "critic's values"),
        ("shaped_scores", "shaped scores"),
    ],
)
def test_an_estimate_from_bad_numbers_changes_nothing(model, tmp_path, path, what):
    """Neither statistics of scores, the KL's weight, whose log-probs are the old ones, nor what is
    random."""
    engine = ppo(model, tmp_path, ppo={"adaptive_kl": AdaptiveKLConfig()}).engine
    engine.estimate_advantages(engine.generate(PROMPTS), [0.1 * n for n in range(6)])
    engine.old_logprobs.are_samplers = None
    rollout = engine.generate(PROMPTS)
    before = stored([engine.state_dict(), random_states()])
    spoil(engine, path, 1)
    message = rf"^Step 1: the {what} are not finite, in response 1 of 6, to 'Prompt 0' \(str\); "
    with pytest.raises(NotFiniteError, match=message):
        engine.estimate_advantages(rollout, engine.score(rollout))
    assert stored([engine.state_dict(), random_states()]) == before
    engine.estimate_advantages(rollout, engine.score(rollout))
    assert stored([engine.state_dict(), random_states()]) != before


def test_one_response_of_many_is_named():
    engine = make_engine()
    rollout = engine.generate(SHORT)
    scores = [0.5, 0.5, 0.5, 1e38 * 10, 0.5, 0.5, 0.5, NAN]
    with pytest.raises(NotFiniteError, match=r"4 of 8, to 'Once .*; response 8 of 8, ") as caught:
        engine.estimate_advantages(rollout, scores)
    assert caught.value.samples == (3, 7)


@pytest.mark.parametrize("whitened", [True, False])
def test_scores_whose_squares_are_beyond_float32(whitened):
    """Their advantages are whitened by an infinite deviation; as they are, they are finite."""
    engine = make_engine(ppo={"whiten_advantages": whitened})
    rollout = engine.generate(SHORT)
    refused = pytest.raises(NotFiniteError, match="the advantages' squares are not finite, in ")
    with refused if whitened else nullcontext():
        engine.estimate_advantages(rollout, [1e38] * len(rollout))


@pytest.mark.parametrize("of", ["policy", "critic"])
def test_an_update_is_skipped_for_one_model_alone(model, tmp_path, of):
    """The other learns, and nothing else that training changes tells the two apart."""
    states, metrics = [], []
    for spoils in (True, False):
        engine = ppo(model, tmp_path, on_bad_numbers="skip").engine
        learner = engine.actor.learner if of == "policy" else engine.critic.learner
        if spoils:
            spoil_losses(learner, 2)
        else:
            without_update(learner, 2)
        torch.manual_seed(3)
        rollout = engine.generate(PROMPTS[:4])
        experience = engine.estimate_advantages(rollout, [0.1, 0.2, 0.3, 0.9])
        metrics.append(engine.update(experience))
        assert learner.updates == 1
        states.append(engine.state_dict() | {"policy_version": 0})
    assert stored(states[0]) == stored(states[1])
    assert [found["skipped_updates"] for found in metrics] == [1, 0]
    assert all(math.isfinite(value) for value in metrics[0].values())


def test_a_run_skips_steps_and_says_so(model, tmp_path):
    trainer = ppo(model, tmp_path / "run", on_bad_numbers="skip")
    spoil(trainer, "engine.score_each", 2, 4)
    trainer.train()
    logged = rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["skipped_updates"] for row in logged] == [0, 1, 0, 1]
    assert trainer.engine.actor.learner.updates == trainer.engine.critic.learner.updates == 4
    assert trainer.engine.steps_done == 4
    told = trainer.console.file.getvalue()
    for step in (2, 4):
        assert f"Step {step}: the rewards' scores are not finite, in response 1 of 4, to " in told


def test_too_many_in_a_row_end_the_run(model, tmp_path):
    trainer = ppo(model, tmp_path / "run", on_bad_numbers="skip")
    spoil(trainer, "engine.score_each", *range(1, SKIPPED_IN_A_ROW + 2))
    with pytest.raises(UserError, match="3 steps were left out before this one"):
        trainer.train()
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == SKIPPED_IN_A_ROW


def test_steps_in_a_row_are_counted_and_no_others():
    skips = Skips("skip")

    def end_step(bad: bool) -> dict[str, float]:
        with skips.left_out():
            if bad:
                raise NotFiniteError("a number is")
        return skips.end_step()

    for bad in (*[True] * SKIPPED_IN_A_ROW, False, *[True] * SKIPPED_IN_A_ROW):
        assert end_step(bad) == {"skipped_updates": bad}
    with pytest.raises(UserError, match="3 steps were left out before this one"):
        end_step(True)


@pytest.mark.parametrize(("make", "path"), [(sft, "policy.nll_loss"), (reward, "_forward")])
def test_without_asking_for_it_the_run_ends(model, tmp_path, make, path):
    trainer = make(model, tmp_path / "run", checkpoint_every=1)
    spoil(trainer, path, 3)
    with pytest.raises(
        NotFiniteError,
        match=r"^Step 3: the loss of the model .* in (demonstrations|preferences)\[\d\]; ",
    ):
        trainer.train()
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 2
    assert not (tmp_path / "run" / trainer.result).exists()


def test_weights_that_are_not_finite_are_not_saved(model, tmp_path):
    trainer = sft(model, tmp_path / "run", rate=1e38, size=64)
    with pytest.raises(UserError, match=r"Step 1 has made weights of the model that are not"):
        trainer.train()
    assert not (tmp_path / "run" / "policy").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()
    engine = ppo(model, tmp_path / "ppo").engine
    rollout = engine.generate(PROMPTS[:4])
    experience = engine.estimate_advantages(rollout, [0.1, 0.2, 0.3, 0.9])
    engine.critic.learner.optimizer.param_groups[0]["lr"] = 1e38
    with pytest.raises(UserError, match="Step 1 has made weights of the critic"):
        engine.update(experience)


def test_weights_beyond_the_dtype_they_are_saved_in(model, tmp_path):
    trainer = sft(model, tmp_path / "run", save_dtype="float16")
    with torch.no_grad():
        trainer.model.model.norm.weight[3] = 1e5
    with pytest.raises(UserError, match=r"model\.norm\.weight .* torch\.float16.*run\.save_dtype"):
        trainer.train()
    assert not (tmp_path / "run" / "policy").exists()


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"stop_at_entropy": 5.6}, r"Step 1: the policy's entropy is 5\.\d+ .* less than .*5\.6"),
        ({"stop_at_kl": 1e-9}, r"Step 2: the policy is .* more than ppo\.stop_at_kl=1e-09"),
    ],
)
def test_a_run_stops_where_the_policy_comes_apart(model, tmp_path, limit, message):
    trainer = ppo(model, tmp_path / "run", ppo=limit)
    with pytest.raises(UserError, match=message) as caught:
        trainer.train()
    [note] = caught.value.__notes__
    assert "is kept in" in note
    assert not (tmp_path / "run" / "policy").exists()
