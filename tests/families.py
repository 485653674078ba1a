"""Tiny models of other families than `tiny.py`'s, random and large enough in their weights that
what they read shows in what they say."""

from __future__ import annotations

from typing import Any

import torch
from tiny import tiny_tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

# Those that a family's configuration has are set.
_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "n_embd": 32, "n_layer": 2,
    "n_head": 4, "attention_hidden_size": 32, "lru_width": 32, "num_heads": 4,
    "num_blocks": 2, "chunk_size": 16, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "state_size": 8,
}  # fmt: skip


def of_family(name: str, **settings: Any) -> PreTrainedModel:
    """A causal language model of the family `name`, as transformers calls it, with the vocabulary
    of `tiny_tokenizer`."""
    tokenizer, config_class = tiny_tokenizer(), CONFIG_MAPPING[name]
    sizes = {key: value for key, value in _SIZES.items() if hasattr(config_class(), key)}
    config = config_class(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **sizes | settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.2)
    return model
