"""A model object that has adapters of `peft` already: which are trained, which refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_adapters import experience_of, vowels
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ppo_engine import (
    GenerationConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    PPOEngine,
    PPOSettings,
    PreferenceDataConfig,
    RewardModelConfig,
    RewardModelTrainer,
    RunConfig,
)
from ppo_engine.errors import UserError


def given(settings: Any = None) -> Any:
    lora = peft.LoraConfig(r=2, task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny_model(), settings or lora)


def engine_of(model: Any, **policy: Any) -> PPOEngine:
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant")
    config = PPOConfig(
        policy=ModelConfig(optimizer=optimizer, **policy),
        generation=GenerationConfig(max_new_tokens=6),
        ppo=PPOSettings(estimator="reinforce_pp", rollout_batch_size=4, mini_batch_size=4),
        run=RunConfig(dtype="float32"),
    )
    return PPOEngine(model, vowels, config=config, tokenizer=tiny_tokenizer())


def test_adapters_below_the_trained_layers_stay_frozen_and_a_run_goes_on(tmp_path: Path) -> None:
    """`peft` lets all be trained again when it puts them back after the reference's pass."""
    engine = engine_of(given(), trainable_layers=1)
    trained = {name for name, x in engine.policy.model.named_parameters() if x.requires_grad}
    engine.update(experience_of(engine))
    after = {name for name, x in engine.policy.model.named_parameters() if x.requires_grad}
    assert after == trained and trained and all(".0." not in name for name in trained)
    engine.save_checkpoint(tmp_path / "checkpoint")
    other = engine_of(given(), trainable_layers=1)
    other.load_checkpoint(tmp_path / "checkpoint")
    ours, theirs = (x.policy.model.state_dict() for x in (engine, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in trained)


def test_single_trained_tokens(tmp_path: Path) -> None:
    settings = peft.LoraConfig(r=2, task_type="CAUSAL_LM", trainable_token_indices=[5, 6])
    engine = engine_of(given(settings))
    engine.update(experience_of(engine))
    engine.save(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "policy")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        found, expected = (model(ids).logits for model in (saved, engine.policy.model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "policy", "message"),
    [
        (None, {"lora": LoraConfig(rank=2)}, "has adapters, and lora would add others"),
        (
            peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            {},
            "type PROMPT_TUNING, which cannot be merged",
        ),
    ],
    ids=["lora on them", "prompt tuning"],
)
def test_what_cannot_be_trained_is_refused(settings: Any, policy: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        engine_of(given(settings), **policy)


def test_a_reward_model_is_the_given_one(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1)
    model = peft.get_peft_model(whole, peft.LoraConfig(r=2, task_type="SEQ_CLS"))
    data = PreferenceDataConfig(eval_fraction=0.0)
    settings = RewardModelConfig(data=data)
    pairs = [{"prompt": "a", "chosen": "good", "rejected": "bad" * n} for n in (1, 2, 3, 4)]
    trainer = RewardModelTrainer(model, pairs, settings, tiny_tokenizer())
    assert trainer.model is model
    refused = RewardModelConfig(model=ModelConfig(lora=LoraConfig(rank=2)), data=data)
    with pytest.raises(UserError, match="has adapters, and lora would add others"):
        RewardModelTrainer(model, pairs, refused, tiny_tokenizer())
