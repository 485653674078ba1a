"""Prints by how many bytes this process's memory rose at most while the engine of `share_base` was
made of the model in the given folder: `python tests/loaded_memory.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from rollouts import length

from ppo_engine import LoraConfig, ModelConfig, PPOConfig, PPOEngine, RunConfig


def resident(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


if __name__ == "__main__":
    config = PPOConfig(
        policy=ModelConfig(path=sys.argv[1], lora=LoraConfig(rank=4)),
        run=RunConfig(dtype="bfloat16", device="cpu"),
        share_base=True,
    )
    before = resident("VmRSS")
    PPOEngine("", length, config=config)
    print("\n", resident("VmHWM") - before)
