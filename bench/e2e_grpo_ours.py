"""One process of `bench/e2e_grpo.py`: GRPO steps by `PPOEngine`, on the work in a folder."""

from __future__ import annotations

import sys
from pathlib import Path

# A script's own folder comes first on the path; the package `bench` is in the one above.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.e2e_ours import run
from bench.e2e_worker import GRPO_KL_COEF, LEARNING_RATE, Work, cheap_reward
from ppo_engine import PPOEngine
from ppo_engine.memory import keep_freed_memory
from ppo_engine.settings.schema import (
    GenerationConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    PPOSettings,
    RunConfig,
)


def main(work: Work) -> None:
    keep_freed_memory()  # as `ppo-engine` does
    run(PPOEngine(reward=_reward, config=config_of(work)), work)


def config_of(work: Work) -> PPOConfig:
    optimizer = OptimizerConfig(
        learning_rate=LEARNING_RATE, warmup_fraction=0.0, moments=work.moments
    )
    return PPOConfig(
        policy=ModelConfig(path=f"{work.folder}/policy", optimizer=optimizer),
        generation=GenerationConfig(max_new_tokens=work.new_tokens, temperature=1.0),
        ppo=PPOSettings(
            estimator="grpo",
            group_size=work.group,
            rollout_batch_size=work.responses,
            mini_batch_size=work.responses,
            epochs=work.epochs,
            kl_in="loss",
            kl_coef=GRPO_KL_COEF,
        ),
        run=RunConfig(device=work.device, dtype=work.dtype),  # type: ignore[arg-type]
        steps=work.steps,
    )


def _reward(prompts: list[object], responses: list[str]) -> list[float]:
    return [cheap_reward(text) for text in responses]


if __name__ == "__main__":
    main(Work.load(sys.argv[1]))
