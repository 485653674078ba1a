"""What differs between families of Hugging Face models, asked in one place."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_engine.errors import UserError

SCORE_HEADS = ("score", "classifier")  # what families call the head of a sequence classifier


def unwrap(model: Any) -> Any:
    """The Hugging Face model under an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_classifier(config: Any) -> bool:
    """Whether a model's configuration says that its checkpoint has a classification head."""
    return any("ForSequenceClassification" in name for name in config.architectures or ())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in evaluation mode. In training mode one with gradient checkpointing keeps
    nothing of what it reads."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def checkpoint_gradients(model: PreTrainedModel, around: Callable[[], Any] | None = None) -> None:
    """Keep of each layer only what it reads, and run it again for its gradients. `around` gives
    two contexts: of a layer's run, and of its run again."""
    # Renamed in transformers 5.2x; older ones have the second name only.
    enable = getattr(model, "activation_checkpointing_enable", None)
    settings = {"use_reentrant": False} | ({"context_fn": around} if around else {})
    (enable or model.gradient_checkpointing_enable)(settings)


def checkpoints_gradients(model: PreTrainedModel) -> bool:
    # As above.
    name = "is_activation_checkpointing"
    return bool(getattr(model, name if hasattr(model, name) else "is_gradient_checkpointing"))


def keep_activations(model: PreTrainedModel) -> None:
    """The opposite of `checkpoint_gradients`."""
    disable = getattr(model, "activation_checkpointing_disable", None)  # as above
    (disable or model.gradient_checkpointing_disable)()


def find_base(model: PreTrainedModel) -> None:
    """Let `base_model` be the base of a language model where its family names it otherwise than it
    calls it (Llama-4, Mllama): it would be the whole model."""
    if model.base_model is model and isinstance(getattr(model, "model", None), PreTrainedModel):
        model.base_model_prefix = "model"


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers of a Hugging Face model, whatever its family calls it."""
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == _layer_count(model):
            return module
    raise UserError(
        f"{type(model).__name__}: no list of decoder layers was found, so trainable_layers cannot "
        "be used with it; leave it unset."
    )


def lower_layers(model: PreTrainedModel, trainable_layers: int) -> list[nn.Module]:
    """The decoder layers below the last `trainable_layers`; a UserError where there are fewer."""
    layers = [*decoder_layers(model)]
    if trainable_layers > len(layers):
        raise UserError(
            f"trainable_layers is {trainable_layers}, but {type(model).__name__} has "
            f"{len(layers)} decoder layers."
        )
    return layers[: len(layers) - trainable_layers]


def _layer_count(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().num_hidden_layers)


def context_length(model: Any) -> int:
    """The context length of a model, or of the one that a Hugging Face configuration describes;
    `sys.maxsize` where its family has no limit.

    Rotary factors of LongRoPE (arXiv:2402.13753; Phi-3 to Phi-4-mini, MiniCPM) are others beyond a
    length, of all texts of a pass as soon as one is longer: the context ends there, or what a
    text's tokens give would depend on the other texts.
    """
    unwrapped = unwrap(model)
    text = getattr(unwrapped, "config", unwrapped).get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return int(rope["original_max_position_embeddings"])
    return getattr(text, "max_position_embeddings", None) or sys.maxsize


def base_inputs(base: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    """Arguments for one pass of a base model over `[B, L]` tokens padded on either side.

    Positions count real tokens only, so that padding changes nothing. Models with relative
    positions alone (ALiBi) take none, and need none.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask.long(), "use_cache": False}
    if takes_positions(base):
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    return inputs


def states_of(output: Any) -> Tensor:
    """The hidden states of the last layer that a base model has given; its logits, where it gives
    no states."""
    found: Tensor = output.last_hidden_state if "last_hidden_state" in output else output.logits
    return found


def takes_positions(base: nn.Module) -> bool:
    return "position_ids" in inspect.signature(base.forward).parameters


def real_tokens_first(mask: Tensor) -> Tensor:
    """The columns of each row in the order that puts its real tokens first, `[B, L]`.

    Padding behind a row changes nothing in it, as no token sees those after it. Padding before it
    does in some families: RWKV and xLSTM pass over the mask, RecurrentGemma's convolutions too.
    """
    return mask.long().argsort(dim=1, descending=True, stable=True)


def make_repeatable(model: nn.Module) -> None:
    """Switch off what makes two passes over the same tokens differ, and the ratio with them.

    - Dropout, which families keep as modules, as probabilities that their layers pass to
      `F.dropout` under many names, and as the chance to skip a whole layer.
    - Routers of experts that jitter their inputs or draw the experts while they are trained: they
      always route as in evaluation.
    - RWKV's halving of its weights in evaluation, for float16's range: they would be saved so.
    - Quantized layers of bitsandbytes, which on a CPU compute otherwise in evaluation, and change
      their weights to what that reads: they always compute as in training.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)
        if any("jitter" in name for name in vars(module)):
            module.register_forward_pre_hook(_evaluate)
        if type(module).__module__.startswith("bitsandbytes."):
            module.register_forward_pre_hook(_train)
        if hasattr(module, "layers_are_rescaled"):
            _keep_weights(module)


def _evaluate(module: nn.Module, _: Any) -> None:
    module.training = False


def _train(module: nn.Module, _: Any) -> None:
    module.training = True


def _keep_weights(rwkv: Any) -> None:
    if rwkv.layers_are_rescaled:  # it was evaluated before it was given to us
        rwkv.train()
        rwkv._rescale_layers()
    rwkv.config.rescale_every = 0
