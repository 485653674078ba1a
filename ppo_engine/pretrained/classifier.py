"""The class of a model that scores text, for every family that has a causal language model."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from ppo_engine.errors import UserError
from ppo_engine.pretrained import architecture, loading


def value_model_class(model: Any) -> type[PreTrainedModel]:
    """The `…ForSequenceClassification` of a model's family, from its folder, name or configuration.

    Half of the families have none in transformers (Granite, Cohere, LFM2, Mamba, …). For these it
    is made here: the family's base model under a linear layer `score`, as the library's own are. A
    reward model or critic of theirs is loaded anywhere by

        ppo_engine.value_model_class(folder).from_pretrained(folder)
    """
    config = loading.load_model_config(loading.resolve(model)) if isinstance(model, str) else model
    family: Any = type(config)
    own: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(family, None)
    return cast(type[PreTrainedModel], own or _made_class(family))


class _ScoredModel(GenericForSequenceClassification):
    """The library's generic classifier with a `forward` for every kind of base model: it hands the
    base nothing that some do not take, and finds the last token by the mask."""

    base_model: Any

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """`logits`: the score of each sequence, at its last real token, `[B, labels]`."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs = architecture.base_inputs(self.base_model, input_ids, mask)
        hidden = self.base_model(**inputs).last_hidden_state
        last = mask.shape[1] - 1 - mask.long().flip(1).argmax(1)
        picked = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return SequenceClassifierOutput(logits=self.score(picked))


@functools.cache
def _made_class(config_class: Any) -> type[PreTrainedModel]:
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(config_class, None)
    base = MODEL_MAPPING.get(config_class, None)
    if causal is None or not isinstance(base, type):
        raise UserError(
            f"{config_class.__name__} describes no causal language model, which a reward model or "
            "critic is made from."
        )
    family = next(parent for parent in base.__mro__[1:] if issubclass(parent, PreTrainedModel))
    name = base.__name__.removesuffix("Model").removesuffix("Text") + "ForSequenceClassification"
    names = {
        "base_model_prefix": causal.base_model_prefix,  # so that its checkpoints can be read
        "config_class": config_class,
        "__module__": base.__module__,  # whose source the library looks into
    }
    return type(name, (_ScoredModel, family), names)
