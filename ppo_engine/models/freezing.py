"""Which weights of a model are trained, and which stay as they are and may be shared."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ppo_engine.errors import UserError
from ppo_engine.models.probes import check_repeatable
from ppo_engine.pretrained.adapters import add_lora, is_quantized
from ppo_engine.pretrained.architecture import checkpoint_gradients, lower_layers, unwrap
from ppo_engine.pretrained.masters import computing_in_fp32, to_compute_dtype
from ppo_engine.settings.schema import ModelConfig


def prepare_for_training(
    model: PreTrainedModel, config: ModelConfig, task: str, dtype: torch.dtype
) -> Any:
    """Freeze, wrap and checkpoint as configured, in training mode; a score head is always trained.
    Weights, in fp32 until then or frozen in the compute `dtype`, are afterwards in that
    (`pretrained.masters`). A model that is random in training mode is a UserError.

    `task` is what `peft` calls the kind of model: "CAUSAL_LM" or "SEQ_CLS".
    """
    if config.quantization is not None and not is_quantized(model):
        raise UserError(
            f"quantization: {config.quantization} needs a path: a model is quantized as it is "
            "loaded, so it cannot be a copy or a given model object. For the critic, give the path "
            "of the reward model or the policy."
        )
    if any(getattr(module, "source_cls", nn.Linear) is not nn.Linear for module in model.modules()):
        raise UserError(
            f"{type(model).__name__} cannot be quantized: its layers are not nn.Linear, so the "
            "trained model could not be saved in its format. Leave quantization unset."
        )
    if config.lora is not None:
        model = add_lora(model, config.lora, task, config.trainable_layers)
    else:
        freeze_lower_layers(model, config.trainable_layers)
    if config.gradient_checkpointing is True:
        checkpoint_gradients(unwrap(model))
    with computing_in_fp32(model):
        check_repeatable(model)
    return to_compute_dtype(model, dtype).train()


def freeze_lower_layers(model: PreTrainedModel, trainable_layers: int | None) -> None:
    """Train only the last `trainable_layers` decoder layers, the final norm and an untied head.

    The usual saving of RLHF on small machines (trlX's `num_layers_unfrozen`): no gradient, no
    optimizer state and no backward pass below.
    """
    if trainable_layers is None:
        return
    lower = lower_layers(model, trainable_layers)
    model.get_input_embeddings().requires_grad_(False)
    for module in model.base_model.modules():
        if isinstance(module, nn.Embedding):  # of positions too, where they are learned
            module.requires_grad_(False)
    for layer in lower:
        layer.requires_grad_(False)


def share_frozen_parameters(model: nn.Module, source: nn.Module) -> None:
    """Let `model` share the tensors of `source` where both are frozen and hold equal values."""
    theirs = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        twin = theirs.get(name)
        if twin is None or twin is parameter or twin.requires_grad or parameter.requires_grad:
            continue
        if twin.dtype == parameter.dtype and torch.equal(twin, parameter):
            parameter.data = twin.data
