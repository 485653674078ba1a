"""The models, prompts and sizes of a step, written into a folder that both sides load."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2Tokenizer,
)

from bench.e2e_worker import Work
from ppo_engine.demo.model import model_path
from ppo_engine.demo.prompts import TRAINING_TOPICS, prompt_about
from ppo_engine.errors import UserError
from ppo_engine.models.freezing import prepare_for_training
from ppo_engine.models.value_model import load_value_model
from ppo_engine.pretrained.loading import quiet_transformers, save_model
from ppo_engine.settings.schema import LoraConfig, ModelConfig
from ppo_engine.text.renderer import Renderer
from ppo_engine.text.tokenizer import load_tokenizer

_SMOLLM2 = "smollm2"
_QWEN: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
# As published, but for the weights: random, since they do not matter for speed.
_RANDOM: dict[str, dict[str, Any]] = {
    "qwen2.5-1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
MODELS = (_SMOLLM2, *_RANDOM)
ADAPTED_LAYERS = 8  # the last ones, as in the demo
_PAD, _EOS = "<|endoftext|>", "<|im_end|>"


@dataclass(frozen=True)
class Sizes:
    """Of a step: prompts, tokens in a prompt of a random model, tokens in every response."""

    prompts: int
    new_tokens: int
    micro_batch: int = 8
    prompt_tokens: int = 128
    epochs: int = 2
    group: int = 1  # responses to each prompt


def model_config(name: str) -> Any:
    """The Hugging Face configuration of one of `MODELS`."""
    if name == _SMOLLM2:
        return AutoConfig.from_pretrained(model_path())
    return Qwen2Config(**_RANDOM[name], **_QWEN)


def needed_bytes(
    parameters: int, side: str, dtype: torch.dtype, *, trained: int, frozen: int
) -> int:
    """Of weights, gradients and optimizer states of so many models, before any activation.

    Those that are trained have two moments for each of their parameters. Ours holds frozen weights
    and the gradients of one model at a time in `dtype`, masters and moments in fp32; TRL holds all
    in `dtype`.
    """
    if side == "ours":
        return parameters * (dtype.itemsize * (frozen + 1) + trained * (4 + 2 * 4))
    return dtype.itemsize * parameters * (frozen + trained * (1 + 1 + 2))


def load(name: str, device: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """One of `MODELS` in bf16, with its tokenizer."""
    if name == _SMOLLM2:
        path = model_path()
        with quiet_transformers():
            model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        return model.to(device), load_tokenizer(path)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(model_config(name), dtype=torch.bfloat16)
    return model, _byte_tokenizer()


def prepare(name: str, size: Sizes, folder: Path, *, steps: int, device: str, dtype: str) -> Work:
    """Write policy, reward model and tokenizer into `folder`; the step to be done on them."""
    prompts = _chat_prompts(size.prompts) if name == _SMOLLM2 else _random_prompts(size)
    policy, tokenizer = load(name, device)
    save_models(policy, tokenizer, folder)
    return Work(
        folder=str(folder),
        prompts=prompts,
        prompt_ids=[Renderer(tokenizer).prompt(prompt) for prompt in prompts],
        new_tokens=size.new_tokens,
        epochs=size.epochs,
        micro_batch=size.micro_batch,
        steps=steps,
        device=device,
        dtype=dtype,
        group=size.group,
    )


def save_models(policy: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """`policy/`, and `reward/`: the same transformer with a random head of one score."""
    with quiet_transformers():
        policy.save_pretrained(folder / "policy")
        reward = AutoModelForSequenceClassification.from_pretrained(
            folder / "policy", num_labels=1, dtype=policy.dtype
        )
        reward.save_pretrained(folder / "reward")
        tokenizer.save_pretrained(folder / "policy")
        tokenizer.save_pretrained(folder / "reward")


def save_reward_adapters(folder: Path) -> None:
    """`reward-adapters/`: adapters, which change nothing yet, and a random score head on
    `policy/`."""
    config = ModelConfig(
        path=str(folder / "policy"), lora=LoraConfig(), trainable_layers=ADAPTED_LAYERS
    )
    tokenizer = load_tokenizer(config.path)
    model = load_value_model(config.path, tokenizer, device=torch.device("cpu"))
    adapted = prepare_for_training(model, config, "SEQ_CLS", torch.float32)
    save_model(adapted, tokenizer, folder / "reward-adapters", as_adapters=True)


def _chat_prompts(count: int) -> list[Any]:
    if count > len(TRAINING_TOPICS):
        raise UserError(
            f"There are {len(TRAINING_TOPICS)} prompts, but --prompts asks for {count}."
        )
    return [prompt_about(topic) for topic in TRAINING_TOPICS[:count]]


def _random_prompts(size: Sizes) -> list[str]:
    draw = random.Random(0)
    letters = string.ascii_lowercase
    return ["".join(draw.choices(letters, k=size.prompt_tokens)) for _ in range(size.prompts)]


def _byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token for each byte, so that a prompt has as many tokens as letters."""
    vocabulary = {byte: place for place, byte in enumerate(sorted(ByteLevel.alphabet()))}
    return Qwen2Tokenizer(
        vocab=vocabulary | {_PAD: len(vocabulary), _EOS: len(vocabulary) + 1},
        merges=[],
        unk_token=_PAD,
        pad_token=_PAD,
        eos_token=_EOS,
    )
