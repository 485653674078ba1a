"""Models from a folder or a name, and into a folder, in Hugging Face format."""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ppo_engine.errors import UserError
from ppo_engine.messages import nearest_path, reason, shown, untrusted
from ppo_engine.pretrained.adapter_folder import tokenizer_source, unstack
from ppo_engine.pretrained.adapters import is_adapted, merged, save_adapters
from ppo_engine.pretrained.folder import check_folder
from ppo_engine.pretrained.hub import check_name
from ppo_engine.pretrained.quiet import quiet_transformers
from ppo_engine.pretrained.storage import as_stored, storage_dtype
from ppo_engine.pretrained.weights import some, weights_not_finite
from ppo_engine.sealed import check
from ppo_engine.settings.schema import ModelConfig
from ppo_engine.text.tokenizer import load_tokenizer, separate_pad_from_eos


def resolve(path: str) -> str:
    """`path` with a leading `~` expanded, which no library does."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


def load_model_config(path: str, *, trust: bool = False) -> Any:
    """The Hugging Face configuration at `path`, a folder or name; a UserError says why not. With
    `trust`, by code that comes with it."""
    if not path:
        raise UserError("No model was given: set its path to a Hugging Face name or folder.")
    check_folder(path)
    here = Path(path).is_dir()
    if here:
        check(path)
    else:
        check_name(path)
    failure: Exception | None = None
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    except Exception as error:  # what is in the file may fail anywhere within the library
        failure = error
    base, adapters = unstack(path)
    if failure is None and not adapters:
        _refuse_quantized(config, path)
    if adapters:
        config = _config_of_base(base, path, trust)
        for adapter in adapters:
            adapter.describe(config)
    elif failure is not None:
        nowhere = "" if here else f" (and there is no folder {path!r} here)"
        near = "" if here else nearest_path(path)
        raise UserError(
            f"Could not load a model from {path!r}{nowhere}: {reason(failure)}{near}"
            f"{untrusted(failure)}"
        ) from failure
    return config


def _refuse_quantized(config: Any, path: str) -> None:
    """A UserError where a checkpoint's weights are quantized; transformers makes those of MXFP4
    whole again where it has no kernels for them."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    if (method := settings.get("quant_method")) != "mxfp4":
        raise UserError(
            f"The weights at {path!r} are quantized already ({method}), so they can neither be "
            "trained nor get adapters that could be merged: give the checkpoint that they were "
            "made from; quantization=4bit with lora quantizes that as it is loaded."
        )


def _config_of_base(base: str, path: str, trust: bool) -> Any:
    try:
        return load_model_config(base, trust=trust)
    except UserError as error:
        raise UserError(
            f"The base of the adapters in {path!r} cannot be had: {error} Its place is "
            "base_model_name_or_path in adapter_config.json."
        ) from error


def given_model(model: Any) -> Any:
    """A model as it is given in Python: a name or folder as text, an object as it is."""
    if isinstance(model, os.PathLike):
        return os.fspath(model)
    if model is None or isinstance(model, str | nn.Module):
        return model
    raise UserError(
        f"A model is a Hugging Face name, a folder or a loaded model, not {shown(model)}."
    )


def check_given(model: Any, config: ModelConfig) -> None:
    """Raise a UserError where a model object has adapters that cannot be trained as `config`
    says, or not merged."""
    if not is_adapted(model):
        return
    if config.lora is not None:
        raise UserError(
            "The given model has adapters, and lora would add others: leave lora unset to train "
            "those that it has, or give it merged (`merge_and_unload`)."
        )
    settings = model.active_peft_config
    if settings.is_prompt_learning or settings.is_adaption_prompt:
        raise UserError(
            f"The adapters of the given model are of the type {settings.peft_type.value}, which "
            "cannot be merged into its weights: give adapters such as LoRA."
        )


def open_tokenizer(
    model: str | PreTrainedModel | None,
    config: ModelConfig,
    given: PreTrainedTokenizerBase | None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of `model`: the one that was `given`, as a model object needs, or the one at
    `config.path`; ready for use, before any weights are loaded."""
    if given is None:
        if model is not None and not isinstance(model, str):
            raise UserError("A model object was given without its tokenizer: pass tokenizer=….")
        return tokenizer_at(config.path, trust=config.trust_remote_code)
    separate_pad_from_eos(given)
    return given


def tokenizer_at(path: str, *, trust: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of the model at `path`, a folder or name; a UserError where there is none."""
    path = resolve(path)
    load_model_config(path, trust=trust)
    return load_tokenizer(tokenizer_source(path), trust=trust)


def load_options(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`: weights in fp32, the base quantized where configured.

    4 bits as in QLoRA: NF4 with double quantization (Dettmers et al. 2023, arXiv:2305.14314).
    8 bits as in LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), without its outliers in fp16:
    which features these are depends on the whole batch, so that a token's log-prob would change
    with the padding beside it. Heads and embeddings stay as they are.

    Nothing that `peft.prepare_model_for_kbit_training` does is needed: what is not quantized is
    in fp32, adapters freeze the rest, and checkpointing here does without reentrant backward.
    """
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "trust_remote_code": config.trust_remote_code,
    }
    if config.quantization is None:
        return options
    if config.lora is None:
        raise UserError(
            f"quantization: {config.quantization} needs lora: a quantized model cannot be trained "
            "itself, only adapters on it. Set lora (such as lora.rank=16), or leave quantization "
            "unset."
        )
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"quantization needs the package {package}: pip install 'ppo-engine[quant]', or "
                "leave quantization unset."
            )
    # It warns at each product that it multiplies in fp16.
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


def resize_embeddings(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make room for tokens that were added to the tokenizer; set the ids the model pads with."""
    embedding = model.get_input_embeddings()
    # peft's wrapper of single trained tokens passes nothing else on.
    if len(tokenizer) > len(getattr(embedding, "original_module", embedding).weight):
        model.resize_token_embeddings(len(tokenizer))
        model.has_new_tokens = True
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id


def save_model(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    dtype: str = "auto",
    *,
    as_adapters: bool = False,
) -> None:
    """Write weights (adapters merged) and tokenizer, for `from_pretrained` here or elsewhere; or,
    where the model has any, its adapters `as_adapters`, without their base.

    In the dtype that the model came in, or in `dtype` (`run.save_dtype`); what was the merged base
    of quantized layers, and adapters, are in fp32.
    """
    tokenizer = copy.copy(tokenizer)
    tokenizer.padding_side = "left"  # as the engine generates, whatever a given one does
    adapters = as_adapters and is_adapted(model)
    stored = model if adapters else as_stored(merged(model), dtype)
    if bad := weights_not_finite(stored):
        raise UserError(
            f"The weights {some(set(bad))} are not finite in {stored.dtype}, so the model is not "
            "saved: give run.save_dtype a wider range, such as bfloat16."
        )
    with quiet_transformers():
        if adapters:
            save_adapters(model, folder, storage_dtype(dtype, torch.float32))
        else:
            stored.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
