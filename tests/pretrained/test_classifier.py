"""Reward models and critics of families without a sequence classifier in transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import PROMPTS, vowels
from families import of_family
from reading import sequence_scores
from tiny import tiny_tokenizer
from trainers import planted_pairs
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, CLIPConfig, MarianConfig

from ppo_engine import (
    GenerationConfig,
    LoraConfig,
    ModelConfig,
    PPOConfig,
    PPOEngine,
    PPOSettings,
    RewardModelConfig,
    RewardModelTrainer,
    RunConfig,
    UserError,
    value_model_class,
)
from ppo_engine.models.freezing import prepare_for_training
from ppo_engine.models.value_model import load_value_model, read_value_model, score_head
from ppo_engine.pretrained.loading import save_model
from ppo_engine.rewards.model import load_reward_model

CPU = torch.device("cpu")
# The last keeps its base model under another name than its `base_model_prefix` says.
FAMILIES = ["granite", "lfm2", "cohere", "olmoe", "rwkv", "llama4_text"]


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path) -> str:
    model = of_family(request.param)
    assert type(model.config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    save_model(model, tiny_tokenizer(), tmp_path / "model")
    return str(tmp_path / "model")


def ids_and_mask() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    ids, mask = torch.randint(0, 256, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    return ids, mask


def scores(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return sequence_scores(model, *ids_and_mask())


def test_a_saved_model_loads_with_one_line(folder, tmp_path):
    model = load_value_model(folder, tiny_tokenizer(), device=CPU, seed=3)
    with torch.no_grad():
        score_head(model).weight.add_(1.0)
    saved = str(tmp_path / "saved")
    save_model(model, tiny_tokenizer(), saved)
    plain = value_model_class(saved).from_pretrained(saved)
    again = load_value_model(saved, tiny_tokenizer(), device=CPU, seed=9)
    with torch.no_grad():
        own = plain(*ids_and_mask()).logits[:, 0]
    for found in (own, scores(again)):
        torch.testing.assert_close(found, scores(model), rtol=1e-4, atol=1e-4)


def test_a_language_model_does_not_score(folder):
    with pytest.raises(UserError, match="no score head"):
        read_value_model(folder, require_head=True)


@pytest.mark.parametrize("source", ["policy", "path"])
def test_a_critic_is_trained_and_loads_again(folder, tmp_path, source):
    engine = PPOEngine(
        folder,
        vowels,
        config=PPOConfig(
            critic=ModelConfig(path=folder if source == "path" else ""),
            generation=GenerationConfig(max_new_tokens=4),
            ppo=PPOSettings(rollout_batch_size=8, mini_batch_size=8, micro_batch_size=4),
            run=RunConfig(dtype="float32"),
        ),
    )
    before = scores(engine.critic.model)
    rollout = engine.generate(PROMPTS)
    metrics = engine.update(engine.estimate_advantages(rollout, engine.score(rollout)))
    assert metrics["value/grad_norm"] > 0
    after = scores(engine.critic.model)
    assert not torch.allclose(after, before)
    save_model(engine.critic.model, tiny_tokenizer(), tmp_path / "critic")
    again = load_value_model(str(tmp_path / "critic"), tiny_tokenizer(), device=CPU)
    torch.testing.assert_close(scores(again), after, rtol=1e-4, atol=1e-4)


def test_a_trained_reward_model_scores_and_becomes_the_critic(tmp_path):
    save_model(of_family("granite"), tiny_tokenizer(), tmp_path / "model")
    run = RunConfig(output_dir=str(tmp_path / "run"), dtype="float32")
    trainer = RewardModelTrainer(
        str(tmp_path / "model"), planted_pairs(20), RewardModelConfig(run=run)
    )
    trainer.train()
    trained = str(tmp_path / "run" / "reward_model")
    reward = load_reward_model(trained, device=CPU, dtype=torch.float32)
    torch.testing.assert_close(scores(reward.model), scores(trainer.model), rtol=1e-4, atol=1e-4)
    engine = PPOEngine(
        str(tmp_path / "model"), trained, config=PPOConfig(run=RunConfig(dtype="float32"))
    )
    assert torch.equal(score_head(engine.critic.model).weight, score_head(reward.model).weight)


@pytest.mark.parametrize("family", ["granite", "cohere"])
def test_adapters_are_trained_and_merged(family, tmp_path):
    pytest.importorskip("peft", reason="the optional package peft is not installed")
    save_model(of_family(family), tiny_tokenizer(), tmp_path / "model")
    model = load_value_model(str(tmp_path / "model"), tiny_tokenizer(), device=CPU)
    model = prepare_for_training(
        model, ModelConfig(lora=LoraConfig(rank=2)), "SEQ_CLS", torch.float32
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 if "lora" in name else 1.0)
    save_model(model, tiny_tokenizer(), tmp_path / "saved")
    again = load_value_model(str(tmp_path / "saved"), tiny_tokenizer(), device=CPU)
    torch.testing.assert_close(scores(again), scores(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [CLIPConfig(), MarianConfig()], ids=lambda c: c.model_type)
def test_what_is_no_decoder_has_no_score_head(config):
    with pytest.raises(UserError, match=f"cannot be made from a {config.model_type}"):
        value_model_class(config)


@pytest.mark.parametrize("family", ["bart", "bert"])
def test_a_critic_that_lacks_weights_is_refused(family):
    with pytest.raises(UserError, match=r"No critic can be made from B.*an estimator without"):
        model = of_family(family, is_decoder=True)
        PPOEngine(model, vowels, config=PPOConfig(), tokenizer=tiny_tokenizer())
