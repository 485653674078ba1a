"""A training run in a process of its own, as a command makes it: what was told of its memory before
it, and what it took. `python tests/memory_run.py COMMAND key=value …` prints both as JSON, in GiB.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ppo_engine.memory import keep_freed_memory


def main(command: str, overrides: list[str]) -> None:
    keep_freed_memory()
    from ppo_engine.memory import peak_memory
    from ppo_engine.settings.files import load_config
    from ppo_engine.settings.schema import COMMANDS
    from ppo_engine.training import fit, forecast
    from ppo_engine.training.ppo import PPOTrainer
    from ppo_engine.training.reward import RewardModelTrainer
    from ppo_engine.training.sft import SFTTrainer

    config = load_config(COMMANDS[command], None, overrides)
    told: list[forecast.Forecast] = []
    original = forecast.forecast

    def seen(*args: Any) -> forecast.Forecast:
        told.append(original(*args))
        return told[-1]

    fit.forecast = seen  # what the run itself asks
    trainer: Any = {"sft": SFTTrainer, "reward": RewardModelTrainer}.get(command, PPOTrainer)
    run = trainer(config=config)
    metrics = run.train()
    phases = {phase.name: phase.total / 2**30 for phase in told[0].phases}
    measured = {name: x for name, x in metrics.items() if name.startswith("memory/")}
    whole = peak_memory(run.device if hasattr(run, "device") else run.engine.device)
    print(json.dumps({"told": phases, "measured": measured, "whole": whole}))


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])
    main(sys.argv[1], sys.argv[2:])
