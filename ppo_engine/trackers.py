"""Metrics to TensorBoard and Weights & Biases, where the run asks for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_engine.errors import UserError


def check_trackers(names: Sequence[str]) -> None:
    """Raise a `UserError` for a tracker whose package is missing; call it before training."""
    for name in names:
        spec = importlib.util.find_spec(name)
        # A folder of that name in the working directory (wandb leaves one) is no package.
        if spec is None or spec.origin is None:
            raise UserError(
                f"run.trackers names {name!r}, but its package is not installed: "
                f"pip install 'ppo-engine[{name}]', or leave it out."
            )


class Trackers:
    """Writes each step's metrics to every tracker in `names`; nothing where there is none."""

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> None:
        check_trackers(names)
        self._tensorboard: Any = None
        self._wandb: Any = None
        if "tensorboard" in names:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"))
        if "wandb" in names:
            import wandb

            self._wandb = wandb.init(
                project="ppo-engine", name=folder.name, dir=str(folder), config=dict(settings)
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
