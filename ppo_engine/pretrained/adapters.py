"""Low-rank adapters (LoRA) on a model, also a quantized one, and merging them into its weights."""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_engine.errors import UserError
from ppo_engine.messages import first_line
from ppo_engine.pretrained.architecture import lower_layers, unwrap
from ppo_engine.pretrained.masters import master
from ppo_engine.settings.schema import LoraConfig


def add_lora(
    model: PreTrainedModel, config: LoraConfig, task: str, trainable_layers: int | None = None
) -> Any:
    """Low-rank adapters around `model` (package `peft`), in its last `trainable_layers` decoder
    layers where that is set; only they, and a head, are trained."""
    try:
        import peft
    except ImportError as error:
        raise UserError(
            "LoRA needs the package peft: pip install 'ppo-engine[lora]', or leave lora unset."
        ) from error
    adapter = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=config.target_modules,
        exclude_modules=_below(model, trainable_layers),
        lora_dropout=0.0,
        task_type=task,
    )
    try:
        with warnings.catch_warnings():
            # What the two libraries tell each other's developers.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
            return peft.get_peft_model(model, adapter)
    except ValueError as error:  # such as modules that the model does not have
        raise UserError(f"lora.target_modules: {first_line(error)}") from error


def _below(model: PreTrainedModel, trainable_layers: int | None) -> str | None:
    """A pattern of the names of the modules below the last `trainable_layers` decoder layers, the
    embeddings included; None where there are none."""
    if trainable_layers is None:
        return None
    if trainable_layers == 0:
        raise UserError(
            "trainable_layers=0 leaves lora no layer: set it to 1 or more, or leave one of them "
            "unset."
        )
    below = {*lower_layers(model, trainable_layers), model.get_input_embeddings()}
    names = [re.escape(name) for name, module in model.named_modules() if module in below]
    return rf"({'|'.join(names)})(\..+)?"


def is_adapted(model: Any) -> bool:
    """Whether a model has adapters around it that are not merged into it."""
    return hasattr(model, "get_base_model")


def train_adapters(model: Any, trainable_layers: int | None) -> None:
    """Let those that a model has be trained, as `add_lora` does, with its head."""
    model.active_peft_config.inference_mode = False
    model.set_adapter(model.active_adapter)
    if trainable_layers is not None:
        for layer in lower_layers(unwrap(model), trainable_layers):
            layer.requires_grad_(False)


def check_saving(model: Any) -> None:
    """Raise a UserError unless `save_adapters` can write what is needed to load `model` again."""
    if not is_adapted(model):
        raise UserError(
            "run.save_adapters is set, but there are no adapters: set lora (such as lora.rank=16), "
            "or leave it unset."
        )
    base = unwrap(model)
    if not base.name_or_path:
        raise UserError(
            "run.save_adapters needs a base that others can load: give the model's folder or name "
            "in place of a model object, or leave it unset."
        )
    if hasattr(base, "has_new_tokens"):
        raise UserError(
            f"The tokenizer has more tokens than {base.name_or_path!r}, whose embeddings got rows "
            "for them, which adapters alone would lack: leave run.save_adapters unset, or save the "
            "resized model first, and adapt that."
        )


def save_adapters(model: Any, folder: str | Path, dtype: torch.dtype) -> None:
    """Write adapters, and a head that is trained with them, as `peft` does, with the absolute path
    or name of their base; in `dtype`, from their masters."""
    settings = model.active_peft_config
    base = unwrap(model).name_or_path
    settings.base_model_name_or_path = str(Path(base).absolute()) if Path(base).is_dir() else base
    state = {
        name: master(x, "cpu").to(dtype) if x.requires_grad else x
        for name, x in model.state_dict(keep_vars=True).items()
    }
    model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)


def is_quantized(model: Any) -> bool:
    return getattr(unwrap(model), "hf_quantizer", None) is not None


def merged(model: Any) -> Any:
    """A copy with its adapters merged into the weights, in fp32 from their masters, or the model
    itself where it has none.

    The weights of a quantized base are those it computed with, in fp32, not those that it was
    quantized from: the result is the model that was trained and measured, except that 8-bit
    products also round their inputs.
    """
    if not is_adapted(model):
        return model
    twin = copy_on_cpu(model)  # the trained model keeps its adapters
    untie_adapted(twin)
    if not is_quantized(model):
        return twin.merge_and_unload()
    # peft would quantize the merged weights again, and the adapters with them.
    deltas = {
        name: module.get_delta_weight(module.active_adapter[0])
        for name, module in unwrap(twin).named_modules()
        if hasattr(module, "get_delta_weight")
    }
    plain = twin.unload()
    plain.hf_quantizer.remove_quantization_config(plain)
    with torch.no_grad():
        for name, delta in deltas.items():
            plain.get_submodule(name).weight += delta
    return plain


def untie(model: Any) -> None:
    """Give the output layer a matrix of its own, if it shares that of the input embedding."""
    model = unwrap(model)
    ins, outs = model.get_input_embeddings(), model.get_output_embeddings()
    if outs is None or outs.weight is not ins.weight:
        return
    layer = getattr(outs, "base_layer", outs)
    layer.weight = nn.Parameter(outs.weight.detach().clone(), outs.weight.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def untie_adapted(model: Any) -> None:
    """`untie` where the embedding or the output layer has adapters, which change one of the two:
    merged into the matrix of both, they would change the other."""
    inner = unwrap(model)
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    if any(hasattr(layer, "base_layer") for layer in ends):
        untie(inner)


def copy_on_cpu(model: nn.Module, dtypes: Mapping[int, torch.dtype] | None = None) -> Any:
    """A copy that takes no GPU memory, all of which a run may need, except for one quantized layer
    at a time, which becomes a plain one in fp32. Its parameters are in fp32, their masters; or in
    what `dtypes` has for them, by their `id`."""
    dtypes = dtypes or {}
    copies: dict[int, Any] = {
        id(layer): _dequantized(layer) for layer in model.modules() if hasattr(layer, "source_cls")
    }
    for x in itertools.chain(model.parameters(), model.buffers()):
        if type(x) not in (nn.Parameter, Tensor):
            continue  # a quantized weight, copied already
        if isinstance(x, nn.Parameter) and x.is_floating_point():
            dtype = dtypes.get(id(x), torch.float32)
            found = x.detach() if x.dtype == dtype else master(x, "cpu")
            copies[id(x)] = nn.Parameter(found.to("cpu", dtype, copy=True), x.requires_grad)
        else:
            copies[id(x)] = x.detach().to("cpu", copy=True)
    return copy.deepcopy(model, copies)


def _dequantized(layer: Any) -> nn.Linear:
    """A quantized layer as a plain one on the CPU, with the rounded weights."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(weight.detach().to("cpu", torch.float32), False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().to("cpu", torch.float32), False)
    return plain
