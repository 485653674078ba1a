"""Files of checkpoints and of models with one bit flipped, or cut short: none may be loaded."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tiny import tiny_model_folder

from faults import REFUSED, Try
from faults._runs import reward_model
from ppo_engine.errors import UserError
from ppo_engine.pretrained.loading import load_model_config
from ppo_engine.run.state_file import load_state
from ppo_engine.sealed import check

FLIPS, CUTS = 1000, 100


def tries(flips: int = FLIPS, cuts: int = CUTS) -> Iterator[Try]:
    draw = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        run = Path(name) / "run"
        reward_model(tiny_model_folder(Path(name) / "base"), run).train()
        [checkpoint] = (run / "checkpoints").iterdir()
        for folder, load in (
            (checkpoint, lambda: load_state(checkpoint, torch.device("cpu"))),
            (run / "reward_model", lambda: load_model_config(str(run / "reward_model"))),
        ):
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            for kind, count in (("flipped bit", flips // 2), ("cut", cuts // 2)):
                for _ in range(count):
                    file = draw.choice(files)
                    content = file.read_bytes()
                    at = draw.randrange(len(content))
                    flipped = bytearray(content)
                    flipped[at] ^= 1 << draw.randrange(8)
                    file.write_bytes(flipped if kind == "flipped bit" else content[:at])
                    fault = f"{kind} in a {'checkpoint' if folder is checkpoint else 'model'}"
                    try:
                        load()
                        ending = f"{file.name} at {at}: loaded"
                    except UserError:
                        ending = REFUSED
                    yield Try(fault, ending)
                    file.write_bytes(content)
            check(folder)
