"""Models from a folder or a name, and into a folder, in Hugging Face format."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ppo_engine.errors import UserError
from ppo_engine.messages import first_line, nearest_path
from ppo_engine.pretrained.adapter_folder import tokenizer_source, unstack
from ppo_engine.pretrained.adapters import is_adapted, merged, save_adapters
from ppo_engine.pretrained.folder import check_folder
from ppo_engine.pretrained.hub import check_name
from ppo_engine.pretrained.storage import as_stored, storage_dtype
from ppo_engine.sealed import check
from ppo_engine.settings.schema import ModelConfig
from ppo_engine.text.tokenizer import load_tokenizer, separate_pad_from_eos


def resolve(path: str) -> str:
    """`path` with a leading `~` expanded, which no library does."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


def load_model_config(path: str) -> Any:
    """The Hugging Face configuration at `path`, a folder or name; a UserError says why not."""
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
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        failure = error
    base, adapters = unstack(path)
    if adapters:
        config = _config_of_base(base, path)
        for adapter in adapters:
            adapter.describe(config)
    elif failure is not None:
        nowhere = "" if here else f" (and there is no folder {path!r} here)"
        near = "" if here else nearest_path(path)
        raise UserError(
            f"Could not load a model from {path!r}{nowhere}: {first_line(failure)}{near}"
        ) from failure
    return config


def _config_of_base(base: str, path: str) -> Any:
    try:
        return load_model_config(base)
    except UserError as error:
        raise UserError(
            f"The base of the adapters in {path!r} cannot be had: {error} Its place is "
            "base_model_name_or_path in adapter_config.json."
        ) from error


def open_tokenizer(
    model: str | PreTrainedModel | None, path: str, given: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """The tokenizer of `model`: the one that was `given`, as a model object needs, or the one at
    `path`; ready for use, before any weights are loaded."""
    if given is None:
        if model is not None and not isinstance(model, str):
            raise UserError("A model object was given without its tokenizer: pass tokenizer=….")
        return tokenizer_at(path)
    separate_pad_from_eos(given)
    return given


def tokenizer_at(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the model at `path`, a folder or name; a UserError where there is none."""
    path = resolve(path)
    load_model_config(path)
    return load_tokenizer(tokenizer_source(path))


def load_options(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`: weights in fp32, the base quantized where configured.

    4 bits as in QLoRA: NF4 with double quantization (Dettmers et al. 2023, arXiv:2305.14314).
    8 bits as in LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), without its outliers in fp16:
    which features these are depends on the whole batch, so that a token's log-prob would change
    with the padding beside it. Heads and embeddings stay as they are.

    Nothing that `peft.prepare_model_for_kbit_training` does is needed: what is not quantized is
    in fp32, adapters freeze the rest, and checkpointing here does without reentrant backward.
    """
    options: dict[str, Any] = {"dtype": torch.float32}
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
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
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
    with quiet_transformers():
        if as_adapters and is_adapted(model):
            save_adapters(model, folder, storage_dtype(dtype, torch.float32))
        else:
            as_stored(merged(model), dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def hide_loading_bars() -> None:
    """Hide progress bars of loading weights (seconds), but not those of downloads (minutes)."""
    hidden = are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # hides both
    if not hidden:
        enable_progress_bars()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the library's progress bars, and its report of weights that are new or not used,
    which `weights` judges; both are as they were afterwards."""
    verbosity = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled()
    hidden = are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    hide_loading_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()  # shows the hub's, too
        if hidden:
            disable_progress_bars()
