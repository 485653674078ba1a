"""Writes the tables of docs/choosing.md that say what fits; run it after a change in what a run is
told to take (`ppo_engine/training/forecast.py`). By arithmetic: nothing is loaded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, Qwen2Config

from ppo_engine.settings.files import load_config
from ppo_engine.settings.schema import COMMANDS
from ppo_engine.training.forecast import Lengths, forecast
from ppo_engine.training.forecast_roles import Place

PAGE = Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- what fits: begin -->\n", "<!-- what fits: end -->\n"


def _qwen(**sizes: Any) -> Qwen2Config:
    return Qwen2Config(dtype="bfloat16", num_key_value_heads=2, **sizes)


# SmolLM2 and Qwen2.5, as published.
_MODELS = {
    "135M": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, dtype="bfloat16",
    ),
    "0.5B": _qwen(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, tie_word_embeddings=True,
    ),
    "1.5B": _qwen(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, tie_word_embeddings=True,
    ),
    "3B": _qwen(
        vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
        num_attention_heads=16, tie_word_embeddings=True,
    ),
    "7B": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
        dtype="bfloat16",
    ),
}  # fmt: skip
# Device, dtype, bytes that are not left free, of these the process's own, tokens of a pass.
_GB = 10**9
_DEVICES: dict[str, tuple[Place, int]] = {
    "CPU, 16 GB, float32": (Place(torch.device("cpu"), torch.float32, 11.5 * _GB, _GB / 2), 512),
    **{
        f"GPU, {size} GB": (Place(torch.device("cuda"), torch.bfloat16, 0.9 * size * _GB), 2048)
        for size in (24, 40, 80, 141)
    },
}
# What is set of each model that is trained, from the least loss to the most.
_WAYS = {
    "full": "{0}.trainable_layers=null",
    "8-bit moments": "{0}.optimizer.moments=8bit",
    "a quarter of the layers": "{0}.trainable_layers={1}",
    "LoRA": "{0}.lora.rank=16",
    "LoRA on 4 bits": "{0}.lora.rank=16 {0}.quantization=4bit",
}
_LENGTHS = Lengths(128, 256)  # of prompts, to which responses of 128 tokens come


def tables() -> str:
    with tempfile.TemporaryDirectory() as folder:
        for name, config in _MODELS.items():
            config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
            config.save_pretrained(Path(folder, name))
        grpo = "\n".join(_table("grpo", "GRPO", Path(folder)))
        ppo = "\n".join(_table("ppo", "PPO", Path(folder)))
    return (
        "`ppo-engine grpo` with a reward function:\n\n" + grpo + "\n\n`ppo-engine ppo` with a "
        "reward model and a critic of the policy's size:\n\n" + ppo + "\n"
    )


def _table(command: str, title: str, folder: Path) -> Iterator[str]:
    yield f"| {title} | " + " | ".join(_MODELS) + " |"
    yield "| --- |" + " --- |" * len(_MODELS)
    for device, (place, tokens) in _DEVICES.items():
        cells = [_first_way(command, folder / name, place, tokens) for name in _MODELS]
        yield f"| {device} | " + " | ".join(cells) + " |"


def _first_way(command: str, model: Path, place: Place, tokens: int) -> str:
    """The first that fits."""
    few = _MODELS[model.name].num_hidden_layers // 4
    given = [f"policy.path={model}", f"ppo.micro_batch_tokens={tokens}"]
    if command == "ppo":
        given += [f"reward.path={model}", f"critic.path={model}"]
    for way, settings in _WAYS.items():
        names = ("policy", "critic") if command == "ppo" else ("policy",)
        changed = [x for name in names for x in settings.format(name, few).split()]
        config = load_config(COMMANDS[command], None, given + changed)
        if forecast(config, _LENGTHS, place).peak.total <= place.room:
            return way
    return "too small"


def page() -> str:
    """The page with its tables as they come out now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + tables() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
