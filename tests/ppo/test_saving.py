"""What a loop of one's own keeps: models as the trainer writes them, and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import PROMPTS, make_engine
from tiny import tiny_model, tiny_tokenizer
from trainers import PROMPTS as TRAINED_PROMPTS
from trainers import config, length_reward, same, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ppo_engine import GRPOConfig, LoraConfig, ModelConfig, OptimizerConfig, PPOEngine, PPOTrainer
from ppo_engine.errors import UserError
from ppo_engine.models.optimizer import trainable_state
from ppo_engine.rewards.shaping import ScoreNormalizer
from ppo_engine.run.state_file import save_state


def take(engine: PPOEngine, steps: int) -> list[dict[str, float]]:
    found = []
    for _ in range(steps):
        rollout = engine.generate(PROMPTS)
        found.append(engine.update(engine.estimate_advantages(rollout, engine.score(rollout))))
    return found


def test_an_own_loop_saves_what_others_load(tmp_path: Path) -> None:
    engine = make_engine()
    take(engine, 1)
    engine.save(tmp_path / "run")
    assert sorted(folder.name for folder in (tmp_path / "run").iterdir()) == ["critic", "policy"]
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run/policy")
    ids = torch.arange(5)[None]
    torch.testing.assert_close(policy(ids).logits, engine.policy.model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "run/policy").get_vocab()
    assert GenerationConfig.from_pretrained(tmp_path / "run/policy").temperature == 1.0
    first = weights(tmp_path / "run/policy")
    take(engine, 1)
    engine.save(tmp_path / "run")  # in place of the first
    assert not same(first, weights(tmp_path / "run/policy"))


def test_adapters_are_merged_and_no_critic_is_saved_without_one(tmp_path: Path) -> None:
    optimizer = OptimizerConfig(learning_rate=1e-3)
    policy = ModelConfig(lora=LoraConfig(rank=2), optimizer=optimizer)
    engine = make_engine(policy=policy, ppo={"estimator": "rloo", "group_size": 2})
    take(engine, 1)
    engine.save(tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == ["policy"]
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    ids = torch.arange(5)[None]
    torch.testing.assert_close(policy(ids).logits, engine.policy.model(ids).logits)


@pytest.mark.parametrize("ppo", [{}, {"estimator": "grpo", "group_size": 2, "kl_in": "loss"}])
def test_a_checkpoint_goes_on_to_the_same_bits(ppo: dict[str, Any], tmp_path: Path) -> None:
    engine = make_engine(ppo=ppo)
    take(engine, 2)
    engine.save_checkpoint(tmp_path / "checkpoint")
    expected = take(engine, 2)
    again = make_engine(ppo=ppo)
    torch.manual_seed(123)
    again.load_checkpoint(tmp_path / "checkpoint")
    assert take(again, 2) == expected
    for ours, theirs in zip(again.learners, engine.learners, strict=True):
        assert same(trainable_state(ours.model), trainable_state(theirs.model))


def test_a_checkpoint_replaces_nothing_but_one(tmp_path: Path) -> None:
    engine = make_engine()
    (tmp_path / "mine").mkdir()
    engine.save_checkpoint(tmp_path / "mine")
    engine.save_checkpoint(tmp_path / "mine")
    (tmp_path / "notes.txt").write_text("dear")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match="is no checkpoint to replace"):
            engine.save_checkpoint(path)
    assert (tmp_path / "notes.txt").read_text() == "dear"
    with pytest.raises(UserError, match=r"no checkpoint '.*/min'. Did you mean '.*/mine'"):
        engine.load_checkpoint(tmp_path / "min")
    (tmp_path / "mine/SHA256SUMS").unlink()
    save_state(tmp_path / "mine", {"model": {}})
    with pytest.raises(UserError, match="not of a PPO run"):
        engine.load_checkpoint(tmp_path / "mine")


def test_models_replace_nothing_but_models(tmp_path: Path) -> None:
    engine = make_engine()
    (tmp_path / "critic").mkdir()
    (tmp_path / "critic/notes.txt").write_text("dear")
    with pytest.raises(UserError, match="critic is no model to replace"):
        engine.save(tmp_path)
    with pytest.raises(UserError, match=r"notes\.txt is not a folder to write to"):
        engine.save(tmp_path / "critic/notes.txt")
    assert [str(x.relative_to(tmp_path)) for x in tmp_path.rglob("*")] == [
        "critic",
        "critic/notes.txt",
    ]


def test_folders_may_be_in_the_home_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    engine = make_engine()
    engine.save("~/models")
    engine.save_checkpoint("~/checkpoint")
    assert {x.name for x in tmp_path.iterdir()} == {"models", "checkpoint"}
    engine.load_checkpoint("~/checkpoint")


def test_a_checkpoint_of_other_settings_changes_nothing(tmp_path: Path) -> None:
    engine = make_engine()
    normalized = make_engine()
    normalized.normalizer = ScoreNormalizer()
    others = (make_engine(ppo={"estimator": "grpo", "group_size": 2, "kl_in": "loss"}), normalized)
    engine.save_checkpoint(tmp_path / "first")
    take(engine, 1)
    before = {n: p.clone() for n, p in trainable_state(engine.policy.model).items()}
    for other, part in zip(others, ("critic", "normalizer"), strict=True):
        other.save_checkpoint(tmp_path / part)
        with pytest.raises(UserError, match=f"{part}, and this engine has"):
            engine.load_checkpoint(tmp_path / part)
        with pytest.raises(UserError, match=f"{part}, and this engine has"):
            other.load_checkpoint(tmp_path / "first")
    assert same(before, trainable_state(engine.policy.model))


def test_a_trainers_checkpoint_serves_a_loop_too(tmp_path: Path) -> None:
    settings = config(tmp_path / "run", checkpoint_every=1)
    trainer = PPOTrainer(
        tiny_model(), length_reward, TRAINED_PROMPTS, config=settings, tokenizer=tiny_tokenizer()
    )
    trainer.train()
    engine = PPOEngine(tiny_model(), length_reward, config=settings, tokenizer=tiny_tokenizer())
    engine.load_checkpoint(tmp_path / "run/checkpoints/step-000002")
    assert same(trainable_state(engine.policy.model), trainable_state(trainer.engine.policy.model))
    assert engine.steps_done == 2


def test_grpo_by_its_config(tmp_path: Path) -> None:
    settings = config(tmp_path)
    engine = PPOEngine(
        tiny_model(),
        length_reward,
        config=GRPOConfig(policy=settings.policy, generation=settings.generation),
        tokenizer=tiny_tokenizer(),
    )
    assert engine.critic is None and len(engine.generate(["a"])) == 8
