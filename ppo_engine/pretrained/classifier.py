"""The class of a model that scores text, for every family that has a causal language model."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

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
    own: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if own is None and (brought := _brought(config)):
        own = get_class_from_dynamic_module(brought, config.name_or_path)
    if own is None and type(config) not in _made:
        _made[type(config)] = _make_class(config)
    return cast(type[PreTrainedModel], own or _made[type(config)])


def _brought(config: Any) -> str | None:
    """The classifier that comes with a model whose configuration is its own code, which only runs
    where it is trusted."""
    is_own = type(config).__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")
    return config.auto_map.get("AutoModelForSequenceClassification") if is_own else None


class _ScoredModel(GenericForSequenceClassification):
    """The library's generic classifier with a `forward` for every kind of base model: it hands the
    base nothing that some do not take, no padding before a text, and finds its end by the mask."""

    base_model: Any

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """`logits`: the score of each sequence, at its last real token, `[B, labels]`."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        order = architecture.real_tokens_first(mask)
        ids, real = input_ids.gather(1, order), mask.gather(1, order)
        hidden = self.base_model(
            **architecture.base_inputs(self.base_model, ids, real)
        ).last_hidden_state
        last = hidden[torch.arange(len(hidden), device=hidden.device), real.long().sum(1) - 1]
        return SequenceClassifierOutput(logits=self.score(last))


_made: dict[type, type[PreTrainedModel]] = {}  # by the class of the configuration


def _make_class(config: Any) -> type[PreTrainedModel]:
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if causal is not None and causal.config_class is not type(config):
        config = config.get_text_config()  # the language model of a larger one, as it is loaded
    base: Any = MODEL_MAPPING.get(type(config), None)
    prefix = None
    if causal is not None and isinstance(base, type):
        with torch.device("meta"):
            parts = causal._from_config(copy.deepcopy(config)).named_children()
        prefix = next((name for name, part in parts if isinstance(part, base)), None)
    if prefix is None:
        raise UserError(
            f"A reward model or critic cannot be made from a {config.model_type}: it has no score "
            "head in transformers, and is no causal language model over a base model of its own."
        )
    family = next(parent for parent in base.__mro__[1:] if issubclass(parent, PreTrainedModel))
    name = base.__name__.removesuffix("Model").removesuffix("Text") + "ForSequenceClassification"
    names = {
        # As in the language model, whose checkpoints are read; its own prefix is not always it.
        "base_model_prefix": prefix,
        "config_class": type(config),
        "__module__": base.__module__,  # whose source the library looks into
    }
    return type(name, (_ScoredModel, family), names)
