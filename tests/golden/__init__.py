"""Short runs whose metrics are compared to the last bit with what they were: golden runs.

Products round as the CPU's instructions and torch's libraries have it, so there is a record for
each kind of CPU and version of torch, in `records/`. `make golden` writes that of
this machine: where there is none yet, and after a change that is meant to change numbers, whose
commit then shows which.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import re
from collections.abc import Iterator
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tiny import tiny_model_folder
from trainers import untimed, weights

from ppo_engine import PPOTrainer
from ppo_engine.settings.schema import GRPOConfig, PPOConfig

STEPS = 20
RECORDS = Path(__file__).parent / "records"
_CPU = Path("/proc/cpuinfo")  # Linux's
_WIDER = ("avx512_bf16", "amx_tile")  # what `get_cpu_capability` does not tell apart
_KINDS = {"ppo": PPOConfig, "grpo": GRPOConfig}
_SUBJECTS = ("rain", "a chair", "the sea", "clocks", "bread", "a long road", "owls", "tea")

Row = dict[str, Any]


def vowels(prompts: list[str], responses: list[str]) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) - len(text) / 8 for text in responses]


def runs(folder: Path) -> dict[str, list[Row]]:
    """Of `ppo` and `grpo`, in float32 and in bfloat16, the metrics of each step, without times and
    memory, and at the end the SHA-256 of the trained policy's weights."""
    model = tiny_model_folder(folder)
    shared: dict[str, Any] = {
        "steps": STEPS,
        "generation": {"max_new_tokens": 12, "temperature": 0.9},
        "evaluation": {"prompts": 2, "every": 10},
        "policy": {"optimizer": {"learning_rate": 3e-3}},
        "critic": {"optimizer": {"learning_rate": 3e-3}},
    }
    batches = {"rollout_batch_size": 8, "mini_batch_size": 4, "micro_batch_size": 3}
    settings: dict[str, Any] = {
        "ppo": {"epochs": 2, "adaptive_kl": {"target": 1.0}, **batches},
        "grpo": {"group_size": 4, **batches},
    }
    found = {}
    for (name, kind), dtype in product(_KINDS.items(), ("float32", "bfloat16")):
        out = folder / f"{name}-{dtype}"
        run = {"output_dir": str(out), "dtype": dtype, "seed": 3, "deterministic": True}
        config = kind(ppo=settings[name], run=run, **shared)
        prompts = [f"Write about {subject}." for subject in _SUBJECTS]
        quiet = Console(file=io.StringIO())
        PPOTrainer(model, vowels, prompts, config=config, console=quiet).train()
        rows = [*untimed(out / "metrics.jsonl"), {"weights": _digest(out / "policy")}]
        found[f"{name}, {dtype}"] = rows
    return found


def record_of_this_machine() -> Path:
    """Where the record of this kind of CPU is, or would be."""
    text = _CPU.read_text(encoding="utf-8") if _CPU.exists() else ""
    told = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text, re.MULTILINE))
    parts = [told.get("vendor_id", platform.machine())]
    parts += [told[name] for name in ("cpu family", "model") if name in told]
    parts += [torch.backends.cpu.get_cpu_capability()]
    parts += [name for name in _WIDER if name in told.get("flags", "").split()]
    return RECORDS / f"{'-'.join(parts)}-torch-{torch.__version__}.json"


def differences(record: dict[str, list[Row]], found: dict[str, list[Row]]) -> Iterator[str]:
    """What was recorded and is not found so, in words. What is found besides is no difference: a
    metric that is new."""
    for name, rows in record.items():
        for row, now in zip_longest(rows, found[name][: len(rows)], fillvalue={}):
            for key, value in row.items():
                if key not in now or now[key] != value:
                    where = f"{name}, step {row.get('step', 'after the last')}"
                    yield f"{where}: {key} is {now.get(key)!r}, and was {value!r}"


def save(file: Path, found: dict[str, list[Row]]) -> None:
    """One line for each step, so that a change shows where it begins."""
    parts = [f'"{name}": [\n' + ",\n".join(map(json.dumps, x)) + "\n]" for name, x in found.items()]
    file.parent.mkdir(exist_ok=True)
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(weights(folder).items()):
        digest.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
