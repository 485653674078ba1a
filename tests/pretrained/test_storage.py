"""In which dtype models are saved: the one that they came in, whatever they are trained in."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from trainers import PROMPTS, config, length_reward, planted_pairs
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from ppo_engine import (
    DemonstrationDataConfig,
    EvaluationConfig,
    ModelConfig,
    PPOEngine,
    PPOTrainer,
    PreferenceDataConfig,
    RewardModelConfig,
    RewardModelTrainer,
    RunConfig,
    SFTConfig,
    SFTTrainer,
)
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.value_model import load_value_model, value_model_from_policy
from ppo_engine.pretrained.loading import save_model
from ppo_engine.rewards.model import RewardModel
from ppo_engine.run.state_file import load_state

CPU = torch.device("cpu")
QUIET = Console(file=io.StringIO())
HALVES = [torch.bfloat16, torch.float16]


def checkpoint(folder: Path, dtype: torch.dtype) -> str:
    tiny_model().to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def open_policy(model: Any, **settings: Any) -> LanguageModel:
    tokenizer = None if isinstance(model, str) else tiny_tokenizer()
    return LanguageModel.open(
        model, ModelConfig(**settings), device=CPU, dtype=torch.float32, tokenizer=tokenizer
    )


def saved_dtypes(folder: str | Path) -> set[torch.dtype]:
    """Those of the weights in a folder, and the one that its configuration names."""
    weights = load_file(Path(folder) / "model.safetensors")
    return {x.dtype for x in weights.values()} | {AutoConfig.from_pretrained(folder).dtype}


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_policy_is_saved_in_the_dtype_it_came_in(tmp_path: Path, dtype: torch.dtype) -> None:
    policy = open_policy(checkpoint(tmp_path / "came", dtype))
    with torch.no_grad():
        policy.model.model.norm.weight.add_(1e-4)
    weights = {name: x.clone() for name, x in policy.model.state_dict().items()}
    policy.save(tmp_path / "saved")
    assert saved_dtypes(tmp_path / "saved") == {dtype}
    # Tied weights once, and nothing rounded in the model that goes on training.
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("came", "saved")]
    assert sizes[0] == sizes[1]
    for name, x in policy.model.state_dict().items():
        assert x.dtype == torch.float32 and torch.equal(x, weights[name])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, x in again.state_dict().items():
        assert torch.equal(x, weights[name].to(dtype))
    # Saved once more, it is the same.
    open_policy(str(tmp_path / "saved")).save(tmp_path / "twice")
    one, two = (tmp_path / name / "model.safetensors" for name in ("saved", "twice"))
    assert one.read_bytes() == two.read_bytes()


def test_a_configuration_without_a_dtype_leaves_it_to_the_weights(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "came", torch.bfloat16)
    file = Path(folder) / "config.json"
    settings = json.loads(file.read_text())
    del settings["dtype"]
    file.write_text(json.dumps(settings))
    policy = open_policy(folder)
    assert {x.dtype for x in policy.model.parameters()} == {torch.float32}
    policy.save(tmp_path / "saved")
    assert saved_dtypes(tmp_path / "saved") == {torch.bfloat16}


@pytest.mark.parametrize("dtype", HALVES)
def test_a_given_model_is_saved_in_the_dtype_it_had(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    for _ in range(2):  # the engine turned it into fp32 the first time
        open_policy(model).save(tmp_path / "saved")
        assert saved_dtypes(tmp_path / "saved") == {dtype}


def test_merged_adapters_and_value_models_follow_the_policys_dtype(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from ppo_engine.settings.schema import LoraConfig

    folder = checkpoint(tmp_path / "came", torch.bfloat16)
    policy = open_policy(folder, lora=LoraConfig(rank=2))
    policy.save(tmp_path / "policy")
    critics = {
        "copy": value_model_from_policy(policy.model, policy.tokenizer, seed=0),
        "own": load_value_model(folder, policy.tokenizer, device=CPU),
    }
    for name, critic in critics.items():
        save_model(critic, policy.tokenizer, tmp_path / name)
    for name in ("policy", *critics):
        assert saved_dtypes(tmp_path / name) == {torch.bfloat16}


def test_what_a_family_keeps_in_fp32_stays_so(tmp_path: Path) -> None:
    for dtype, kept in zip(HALVES, ({"strict"}, {"strict", "half"}), strict=True):
        policy = open_policy(tiny_model().to(dtype))
        policy.model._keep_in_fp32_modules_strict = {"model.norm"}
        policy.model._keep_in_fp32_modules = {"layers.*.mlp"}
        policy.save(tmp_path / "saved")
        names = {"model.norm": "strict", "model.layers.1.mlp": "half"}
        for name, x in load_file(tmp_path / "saved" / "model.safetensors").items():
            group = next((names[part] for part in names if name.startswith(part)), None)
            if ".layers.0" not in name:
                assert x.dtype == (torch.float32 if group in kept else dtype)


@pytest.mark.parametrize("wanted", ["auto", "float32", "float16"])
def test_every_folder_of_a_run_has_the_dtype_that_is_set(tmp_path: Path, wanted: str) -> None:
    folder = checkpoint(tmp_path / "came", torch.bfloat16)
    dtype = {"auto": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}[wanted]
    runs = {
        name: RunConfig(output_dir=str(tmp_path / name), dtype="float32", save_dtype=wanted)
        for name in ("sft", "reward")
    }
    rows = [{"prompt": prompt, "response": "Yes."} for prompt in PROMPTS]
    sft = SFTConfig(data=DemonstrationDataConfig(eval_fraction=0), run=runs["sft"])
    SFTTrainer(folder, rows, sft, console=QUIET).train()
    reward = RewardModelConfig(data=PreferenceDataConfig(eval_fraction=0), run=runs["reward"])
    RewardModelTrainer(folder, planted_pairs(4), reward, console=QUIET).train()
    settings = config(tmp_path / "ppo", steps=1, save_dtype=wanted, checkpoint_every=1)
    PPOTrainer(folder, length_reward, PROMPTS, config=settings, console=QUIET).train()
    saved = [tmp_path / "sft" / "policy", tmp_path / "reward" / "reward_model"]
    saved += [tmp_path / "ppo" / "policy", tmp_path / "ppo" / "critic"]
    assert [saved_dtypes(folder) for folder in saved] == [{dtype}] * 4
    states = load_state(next((tmp_path / "ppo/checkpoints").iterdir()), torch.device("cpu"))
    assert torch.float32 in dtypes_in(states) and not dtypes_in(states) & set(HALVES)


def dtypes_in(state: Any) -> set[torch.dtype]:
    if isinstance(state, torch.Tensor):
        return {state.dtype}
    inner = state.values() if isinstance(state, dict) else state
    return set().union(*map(dtypes_in, inner)) if isinstance(state, dict | list | tuple) else set()


def test_the_best_policy_and_the_critic_of_a_given_reward_model_too(tmp_path: Path) -> None:
    folder, tokenizer = checkpoint(tmp_path / "came", torch.bfloat16), tiny_tokenizer()
    calls = itertools.count()

    def rising(prompts: list[str], responses: list[str]) -> list[float]:
        return [float(next(calls)) for _ in responses]

    settings = replace(
        config(tmp_path / "run", steps=1), evaluation=EvaluationConfig(prompts=2, every=1)
    )
    PPOTrainer(folder, rising, PROMPTS, config=settings, console=QUIET).train()
    assert saved_dtypes(tmp_path / "run" / "best") == {torch.bfloat16}

    given = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).bfloat16()
    reward = RewardModel(given, tokenizer, device=CPU, dtype=torch.float32)
    engine = PPOEngine(folder, reward, config=settings)
    assert engine.critic is not None
    assert {x.dtype for x in engine.critic.model.parameters()} == {torch.float32}
    save_model(engine.critic.model, tokenizer, tmp_path / "critic")
    assert saved_dtypes(tmp_path / "critic") == {torch.bfloat16}
