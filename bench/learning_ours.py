"""One training of `bench/learning.py` by `PPOEngine`, as the JSON file says that it is given.

Nothing of `bench` is imported, and the repository is not on its path: what `ppo_engine` is, of this
commit or of another one, is the parent's to say (PYTHONPATH). Settings are plain, as their classes
had other homes before.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ppo_engine
from ppo_engine import PPOConfig, PPOEngine


def main(work: dict[str, Any]) -> None:
    print("ppo_engine of", Path(ppo_engine.__file__).parent, flush=True)
    engine = PPOEngine(config=PPOConfig(**settings(work)))
    for step, prompts in enumerate(work["prompts"], start=1):
        rollout = engine.generate(prompts)
        experience = engine.estimate_advantages(rollout, engine.score(rollout))
        engine.update(experience)
        if step % work["hold_every"] == 0:
            engine.policy.save(Path(work["folder"], f"step-{step}"))


def settings(work: dict[str, Any]) -> dict[str, Any]:
    """Of a PPOConfig; what is not here is its default, at both commits."""
    optimizer = {
        "learning_rate": work["learning_rate"],
        "schedule": "constant",
        "warmup_fraction": 0.0,
    }
    return {
        "policy": {"path": work["policy"], "optimizer": optimizer},
        "critic": {"optimizer": optimizer},  # starts from the reward model
        "reward": {"path": work["reward"]},
        "generation": {"max_new_tokens": work["new_tokens"]},
        "ppo": {
            "rollout_batch_size": work["responses"],
            "mini_batch_size": work["mini_batch"],
            "kl_coef": work["kl_coef"],
            "lam": work["lam"],
        },
        "run": {"seed": work["seed"], "device": "cpu", "dtype": "float32"},
        "steps": len(work["prompts"]),
    }


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
