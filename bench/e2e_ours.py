"""One process of `bench/e2e.py`: PPO steps by `PPOEngine`, on the work in the given folder."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

# A script's own folder comes first on the path; the package `bench` is in the one above.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.e2e_models import ADAPTED_LAYERS
from bench.e2e_worker import LEARNING_RATE, PhaseClock, Work, report_step
from ppo_engine import PPOConfig, PPOEngine
from ppo_engine.memory import keep_freed_memory
from ppo_engine.settings.schema import (
    GenerationConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PPOSettings,
    RewardConfig,
    RunConfig,
)


def main(work: Work) -> None:
    keep_freed_memory()  # as `ppo-engine` does
    run(PPOEngine(config=config_of(work)), work)


def run(engine: PPOEngine, work: Work) -> None:
    """The steps of any algorithm, each reported."""
    # No token is EOS, so that all responses have the same length.
    engine.policy.renderer.end_ids = []
    clock = PhaseClock(engine.device)
    for _ in range(work.steps):
        clock.start("generate")
        rollout = engine.generate(work.prompts)
        clock.switch("score")
        scores = engine.score(rollout)
        clock.switch("advantages")
        experience = engine.estimate_advantages(rollout, scores)
        clock.switch("update")
        engine.update(experience)
        report_step(
            clock,
            prompt_tokens=int(rollout.prompt_mask.sum()),
            response_tokens=int(rollout.mask.sum()),
        )


def config_of(work: Work) -> PPOConfig:
    optimizer = OptimizerConfig(
        learning_rate=LEARNING_RATE, warmup_fraction=0.0, moments=work.moments
    )
    policy = ModelConfig(path=f"{work.folder}/policy", optimizer=optimizer)
    if work.share_base:
        policy = replace(policy, lora=LoraConfig(), trainable_layers=ADAPTED_LAYERS)
    reward = "reward-adapters" if work.share_base else "reward"
    return PPOConfig(
        policy=policy,
        critic=ModelConfig(optimizer=optimizer),  # starts from the reward model
        reward=RewardConfig(path=f"{work.folder}/{reward}"),
        generation=GenerationConfig(max_new_tokens=work.new_tokens, temperature=1.0),
        ppo=PPOSettings(
            rollout_batch_size=len(work.prompts),
            mini_batch_size=len(work.prompts),
            epochs=work.epochs,
        ),
        run=RunConfig(
            device=work.device,
            dtype=work.dtype,  # type: ignore[arg-type]
            offload=["reference", "reward"] if work.offload else [],
        ),
        steps=work.steps,
        share_base=work.share_base,
    )


if __name__ == "__main__":
    main(Work.load(sys.argv[1]))
