"""Engines over tiny models, and what tests ask of them."""

from __future__ import annotations

from typing import Any

from reading import by_column
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

from ppo_engine import (
    Experience,
    GenerationConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    PPOEngine,
    PPOSettings,
    Rollout,
    RunConfig,
)
from ppo_engine.models.language_model import LanguageModel

PROMPTS = ["Hello", "A longer prompt", "Hi", "Once upon a time", "a", "Tell me", "x y z", "Why?"]


def vowels(prompts: list[str], responses: list[str]) -> list[float]:
    return [sum(c in "aeiou" for c in response) / 10 for response in responses]


def make_engine(
    reward: Any = vowels, *, lr: float = 1e-3, environment_function: Any = None, **settings: Any
) -> PPOEngine:
    sections = {"ppo": {"rollout_batch_size": 8, "mini_batch_size": 8, "micro_batch_size": 8}}
    sections["ppo"] |= settings.pop("ppo", {})
    optimizer = OptimizerConfig(learning_rate=lr, schedule="constant", warmup_fraction=0.0)
    config = PPOConfig(
        policy=settings.pop("policy", ModelConfig(optimizer=optimizer)),
        critic=settings.pop("critic", ModelConfig(optimizer=optimizer)),
        generation=settings.pop("generation", GenerationConfig(max_new_tokens=12)),
        ppo=PPOSettings(**sections["ppo"]),
        run=RunConfig(**({"dtype": "float32"} | settings.pop("run", {}))),
        **settings,
    )
    return PPOEngine(
        tiny_model(),
        reward,
        config=config,
        tokenizer=tiny_tokenizer(),
        environment=environment_function,
    )


def experience_of(engine: PPOEngine) -> Experience:
    rollout = engine.generate(PROMPTS)
    return engine.estimate_advantages(rollout, engine.score(rollout))


def response_logprobs(
    model: LanguageModel, rollout: Rollout, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the policy's tokens, each [B, T], 0 elsewhere."""
    logprobs, entropy = model.logprobs(model.reader.stack(rollout.rows), temperature)
    return by_column(rollout.mask, logprobs), by_column(rollout.mask, entropy)
