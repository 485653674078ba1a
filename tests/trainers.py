"""Runs of trainers over tiny models: settings, data, and what they wrote."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ppo_engine import (
    GenerationConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    PPOSettings,
    RewardConfig,
    RunConfig,
)

GOOD, BAD = ("fine", "nice", "good", "kind"), ("vile", "poor", "sour", "grim")
PROMPTS = [f"Prompt {i}" for i in range(6)]


def length_reward(prompts, responses):
    return [len(response) / 10 for response in responses]


def good_on_trial() -> Callable[..., list[float]]:
    """A reward function that returns one score, whatever it is asked, but in its first call."""
    calls: list[int] = []

    def reward(prompts, responses):
        calls.append(len(responses))
        return [1.0] * (len(responses) if len(calls) == 1 else 1)

    return reward


def config(
    output: Path, *, steps: int = 2, resume: bool = False, ppo: dict | None = None, **run
) -> PPOConfig:
    optimizer = OptimizerConfig(learning_rate=1e-3)
    batches = {"rollout_batch_size": 4, "mini_batch_size": 2, "micro_batch_size": 2}
    return PPOConfig(
        policy=ModelConfig(optimizer=optimizer),
        critic=ModelConfig(optimizer=optimizer),
        reward=RewardConfig(normalize=True),
        generation=GenerationConfig(max_new_tokens=6),
        ppo=PPOSettings(**batches, **(ppo or {})),
        run=RunConfig(output_dir=str(output), resume=resume, dtype="float32", **run),
        steps=steps,
    )


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def untimed(file: Path) -> list[dict[str, Any]]:
    timing = ("time/", "tokens_per_second", "memory/", "mfu/", "overhead/")
    return [{k: v for k, v in row.items() if not k.startswith(timing)} for row in rows(file)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def as_if_killed(run: Path) -> None:
    """Without the checkpoint that a run writes when it fails: a kill leaves no time for one."""
    shutil.rmtree(max((run / "checkpoints").iterdir()))


def planted_pairs(count: int) -> list[dict[str, str]]:
    """Responses of random letters around one good or one bad word: only the word tells."""
    rng = random.Random(0)
    pairs = []
    for index in range(count):
        filler = ["".join(rng.choices("abcdefgh ", k=rng.randrange(1, 6))) for _ in range(2)]
        pairs.append(
            {
                "prompt": f"How is it, case {index}?",
                "chosen": f"{filler[0]} {rng.choice(GOOD)}",
                "rejected": f"{filler[1]} {rng.choice(BAD)}",
            }
        )
    return pairs
