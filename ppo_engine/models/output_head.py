"""How the last hidden states of a language model become its logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_engine.pretrained import architecture

_PROBE_TEXT = "The quick brown fox jumps over the lazy dog, twice."


@dataclass(frozen=True)
class OutputHead:
    """How a model's output layer becomes its logits."""

    scale: float
    softcap: float | None

    def logits(self, output_layer: Any, hidden: Tensor) -> Tensor:
        logits: Tensor = output_layer(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits


def find_output_head(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> OutputHead | None:
    """How last hidden states become logits, or None where only the model itself knows.

    Families scale or cap their logits under different names; rather than trust a name, a probe
    text must give the model's own logits.
    """
    if model.get_output_embeddings() is None:
        return None
    text = model.config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1.0 / (getattr(text, "logits_scaling", None) or 1)
    head = OutputHead(scale, getattr(text, "final_logit_softcapping", None) or None)
    ids = tokenizer(_PROBE_TEXT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = ids[:, : architecture.context_length(model)].to(device)
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits
        output = model.base_model(input_ids=ids, use_cache=False)
        made = (
            head.logits(model.get_output_embeddings(), output.last_hidden_state)
            if hasattr(output, "last_hidden_state")
            else own[:, :0]
        )
    same = made.shape == own.shape and torch.allclose(made, own, rtol=1e-4, atol=1e-4)
    return head if same and scale > 0 else None
