"""What a run needs to resume as if it had never stopped.

A checkpoint holds the *trained* weights (frozen ones are loaded from the model's folder again), the
optimizers and schedulers, and the states of every source of randomness.
"""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy
import torch

from ppo_engine.errors import UserError

_FILE = "training_state.pt"


def save_training_state(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings and containers of these) into an existing folder."""
    torch.save(state, folder / _FILE)


def load_training_state(folder: Path, device: torch.device) -> dict[str, Any]:
    """The state that `save_training_state` wrote; a missing or damaged file is a UserError."""
    path = folder / _FILE
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"The checkpoint {path} cannot be read ({error}): remove its folder to resume from the "
            "previous one."
        ) from error
    return state


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators."""
    generator: Any = numpy.random.get_state(legacy=False)
    generator["state"]["key"] = generator["state"]["key"].tolist()
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": generator,
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
