"""What every model here needs: tokenizer with a pad token of its own, device, dtype, freezing.

`policy.py` and `value_model.py` build on this.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import itertools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ppo_engine.config import LoraConfig, ModelConfig
from ppo_engine.errors import UserError

# Special tokens that models ship for padding or leave unused, tried when pad is missing or is EOS.
_PAD_CANDIDATES = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|fim_pad|>")


def resolve(path: str) -> str:
    """A folder below the home folder written with `~`, which no library expands; others as are."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


def load_model_config(path: str) -> Any:
    """The Hugging Face configuration at `path`, a folder or name; a UserError says why not."""
    if not path:
        raise UserError("No model was given: set its path to a Hugging Face name or folder.")
    if (path.startswith((".", "/")) or Path(path).exists()) and not Path(path).is_dir():
        raise UserError(f"Model folder {path!r} does not exist or is not a folder.")
    inside = [name for name in ("policy", "reward_model") if Path(path, name).is_dir()]
    if inside and not Path(path, "config.json").exists():
        raise UserError(
            f"{path!r} is a run's folder; its model is in {path.rstrip('/')}/{inside[0]}."
        )
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        nowhere = "" if Path(path).is_dir() else f" (and there is no folder {path!r} here)"
        raise UserError(
            f"Could not load a model from {path!r}{nowhere}: {first_line(error)}"
        ) from error


def is_classifier(config: Any) -> bool:
    """Whether a model's configuration says that its checkpoint has a classification head."""
    return any("ForSequenceClassification" in name for name in config.architectures or ())


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, padding on the left and with a pad token apart from EOS.

    A pad token equal to EOS makes the end of a response invisible to every model that finds the
    last token by its id, so another special token takes its place. Where a model has none, one is
    added: `resize_embeddings` makes room for it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"Could not load a tokenizer from {path!r}: {first_line(error)}") from error
    separate_pad_from_eos(tokenizer)
    tokenizer.padding_side = "left"
    return tokenizer


def separate_pad_from_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a pad token apart from EOS and BOS; one without EOS is a UserError."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no EOS token, so a response could "
            "never end; set one in its tokenizer_config.json."
        )
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in taken:
        return
    vocabulary = tokenizer.get_vocab()
    known = [token for token in _PAD_CANDIDATES if token in vocabulary]
    unknown = [tokenizer.unk_token] if tokenizer.unk_token_id not in taken | {None} else []
    tokenizer.add_special_tokens({"pad_token": (known + unknown + ["<|pad|>"])[0]})


def resize_embeddings(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make room for tokens that were added to the tokenizer; set the ids the model pads with."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"Device {name!r} cannot be used: {first_line(error)}") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of compute. `auto` is bf16 where the hardware multiplies it faster than fp32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def compute(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Autocast to `dtype` over fp32 weights; nothing where compute is fp32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def load_options(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`: weights in fp32, the base quantised where configured.

    4 bits as in QLoRA: NF4 with double quantisation (Dettmers et al. 2023, arXiv:2305.14314).
    8 bits as in LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), without its outliers in fp16:
    which features these are depends on the whole batch, so that a token's log-prob would change
    with the padding beside it. Heads and embeddings stay as they are.

    Of what `peft.prepare_model_for_kbit_training` does, nothing is needed: what is not quantised is
    in fp32, adapters freeze the rest, and checkpointing here does without reentrant backward.
    """
    options: dict[str, Any] = {"dtype": torch.float32}
    if config.quantization is None:
        return options
    if config.lora is None:
        raise UserError(
            f"quantization: {config.quantization} needs lora: a quantised model cannot be trained "
            "itself, only adapters on it. Set lora (such as lora.rank=16), or leave quantization "
            "unset."
        )
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"quantization needs the package {package}: pip install 'ppo-engine[quant]', or "
                "leave quantization unset."
            )
    # It says at each product that fp16 is what it multiplies in.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel("ERROR")
    settings = (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        if config.quantization == "8bit"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    )
    return options | {"quantization_config": settings, "device_map": {"": device}}


def disable_dropout(model: nn.Module) -> None:
    """Dropout makes two passes over the same tokens differ, and the ratio with them.

    Families keep it as modules, as probabilities that their layers hand to `F.dropout` under many
    names, and as the chance to skip a whole layer.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers of a Hugging Face model, whatever its family calls it."""
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == _layer_count(model):
            return module
    raise UserError(
        f"{type(model).__name__}: no list of decoder layers was found, so trainable_layers cannot "
        "be used with it; leave it unset."
    )


def freeze_lower_layers(model: PreTrainedModel, trainable_layers: int | None) -> None:
    """Train only the last `trainable_layers` decoder layers, the final norm and an untied head.

    The usual economy of RLHF on small machines (trlX's `num_layers_unfrozen`): no gradient, no
    optimizer state and no backward pass below.
    """
    if trainable_layers is None:
        return
    layers = decoder_layers(model)
    if trainable_layers > len(layers):
        raise UserError(
            f"trainable_layers is {trainable_layers}, but {type(model).__name__} has "
            f"{len(layers)} decoder layers."
        )
    model.get_input_embeddings().requires_grad_(False)
    for module in model.base_model.modules():
        if isinstance(module, nn.Embedding):  # of positions too, where they are learned
            module.requires_grad_(False)
    for layer in layers[: len(layers) - trainable_layers]:
        layer.requires_grad_(False)


def share_frozen_parameters(model: nn.Module, source: nn.Module) -> None:
    """Let `model` use the very tensors of `source` where both are frozen and hold equal values."""
    theirs = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        twin = theirs.get(name)
        if twin is None or twin.requires_grad or parameter.requires_grad:
            continue
        if twin.dtype == parameter.dtype and torch.equal(twin, parameter):
            parameter.data = twin.data


def prepare_for_training(model: PreTrainedModel, config: ModelConfig, task: str) -> Any:
    """Freeze, wrap and checkpoint as configured, in training mode; a score head is always trained.

    `task` is what `peft` calls the kind of model: "CAUSAL_LM" or "SEQ_CLS".
    """
    if config.quantization is not None and not is_quantized(model):
        raise UserError(
            f"quantization: {config.quantization} needs a path: a quantised model is loaded so, it "
            "is no copy of another and none that is handed in. For the critic, give the reward "
            "model's path or the policy's."
        )
    if any(getattr(module, "source_cls", nn.Linear) is not nn.Linear for module in model.modules()):
        raise UserError(
            f"{type(model).__name__} cannot be quantised: its layers are no nn.Linear, so what is "
            "trained could not be saved in its format. Leave quantization unset."
        )
    if config.lora is not None:
        if config.trainable_layers is not None:
            raise UserError("Set either lora or trainable_layers: adapters need a frozen model.")
        model = _add_lora(model, config.lora, task)
    else:
        freeze_lower_layers(model, config.trainable_layers)
    if config.gradient_checkpointing:
        inner = unwrap(model)
        # Renamed in transformers 5.2x; older ones have the second name only.
        enable = getattr(inner, "activation_checkpointing_enable", None)
        (enable or inner.gradient_checkpointing_enable)({"use_reentrant": False})
    return model.train()


def _add_lora(model: PreTrainedModel, config: LoraConfig, task: str) -> Any:
    """Low-rank adapters around `model` (package `peft`); only they, and a head, are trained."""
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
        lora_dropout=0.0,
        task_type=task,
    )
    try:
        return peft.get_peft_model(model, adapter)
    except ValueError as error:  # such as modules that the model does not have
        raise UserError(f"lora.target_modules: {first_line(error)}") from error


def unwrap(model: Any) -> Any:
    """The Hugging Face model under an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def positions(model: Any) -> int:
    """How many tokens a model reads in all; `sys.maxsize` where its family has no limit."""
    text = unwrap(model).config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or sys.maxsize


def is_quantized(model: Any) -> bool:
    return getattr(unwrap(model), "hf_quantizer", None) is not None


def _copy_on_cpu(model: nn.Module) -> Any:
    """A copy that takes nothing of a GPU's memory, which a run may need to the last byte: but for
    one quantised layer at a time, which becomes a plain one in fp32."""
    copies: dict[int, Any] = {
        id(layer): _dequantized(layer) for layer in model.modules() if hasattr(layer, "source_cls")
    }
    for x in itertools.chain(model.parameters(), model.buffers()):
        if type(x) not in (nn.Parameter, Tensor):
            continue  # a quantised weight, of which there is a copy
        on_cpu = x.detach().to("cpu", copy=True)
        copies[id(x)] = (
            nn.Parameter(on_cpu, x.requires_grad) if isinstance(x, nn.Parameter) else on_cpu
        )
    return copy.deepcopy(model, copies)


def _dequantized(layer: Any) -> nn.Linear:
    """A quantised layer as the plain one that it was made from, rounded as it is, on the CPU."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(weight.detach().to("cpu", torch.float32), False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().to("cpu", torch.float32), False)
    return plain


def merged(model: Any) -> Any:
    """A copy with its adapters in the weights, or the model itself where it has none.

    Of a quantised base the weights are those it computed with, in fp32, and not those that it was
    once made from: the result is then the model that was trained and measured, but for what 8-bit
    products round of their inputs.
    """
    if not hasattr(model, "merge_and_unload"):
        return model
    twin = _copy_on_cpu(model)  # the trained model keeps its adapters
    if not is_quantized(model):
        return twin.merge_and_unload()
    # Merged by peft they would be quantised again, and the adapters with them.
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


def base_inputs(base: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    """Arguments for one pass of a base model over `[B, L]` tokens padded on either side.

    Positions count real tokens only, so that padding changes nothing. Models with relative
    positions alone (ALiBi) take none, and need none.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask.long(), "use_cache": False}
    if takes_positions(base):
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    return inputs


def takes_positions(base: nn.Module) -> bool:
    return "position_ids" in inspect.signature(base.forward).parameters


def _layer_count(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().num_hidden_layers)


def hide_loading_bars() -> None:
    """No bars of loading weights, which takes seconds; downloads keep theirs: they take minutes."""
    hidden = are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # hides both
    if not hidden:
        enable_progress_bars()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the library's progress bars, and its report that the head is new (it is meant to)."""
    verbosity = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    hide_loading_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
