"""The weights of a checkpoint: all of them, and no others, or a `UserError`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ppo_engine.errors import UserError
from ppo_engine.messages import first_line
from ppo_engine.pretrained.adapter_folder import unstack
from ppo_engine.pretrained.architecture import SCORE_HEADS
from ppo_engine.pretrained.loading import quiet_transformers
from ppo_engine.pretrained.masters import to_compute_dtype
from ppo_engine.pretrained.storage import in_fp32, named_dtype, remember_dtype


@dataclass(frozen=True)
class Checkpoint:
    """A model as it was loaded, and how its checkpoint differs from it."""

    model: PreTrainedModel
    missing: set[str]  # parameters that the checkpoint lacks: they have random values
    unused: set[str]  # weights of the checkpoint that the model has no place for


def read_checkpoint(model_class: Any, path: str, options: Mapping[str, Any]) -> Checkpoint:
    """`model_class.from_pretrained` for `path` (folder or name; adapters are merged into their
    base), in fp32 or as `options` say; a UserError says why not. In another dtype it is frozen.

    Weights of another shape, and weights that belong to the model's own modules but have no place
    there (a layer more than its configuration counts, biases that this does not mention), are such
    a reason: without them it would be another model. Those of other modules (the head of another
    kind of model, a vision tower) are left out.
    """
    base, adapters = unstack(path)
    quantized = "quantization_config" in options
    if quantized and adapters:
        raise UserError(
            f"{path!r} holds adapters, which cannot be merged into a quantized base: leave "
            "quantization unset, or merge them first (peft: `merge_and_unload`)."
        )
    wanted = options["dtype"]
    if adapters:
        options = {**options, "dtype": torch.float32}  # until they are merged
    try:
        dtype = named_dtype(AutoConfig.from_pretrained(base))
        if dtype is None and not quantized:
            options = {**options, "dtype": "auto"}  # that of the weights
        with quiet_transformers():
            model, info = model_class.from_pretrained(
                base, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"Could not load a model from {base!r}: {first_line(error)}") from error
    for name, saved, own in sorted(info["mismatched_keys"]):
        raise UserError(
            f"The checkpoint {path!r} has {name} in the shape {list(saved)}, but its config.json "
            f"describes {list(own)}: they do not belong together."
        )
    unused = set(info["unexpected_keys"])
    if inside := {name for name in unused if _is_part_of(model, name)}:
        raise UserError(
            f"The checkpoint {path!r} has weights that its config.json does not describe: "
            f"{some(inside)}. They do not belong together."
        )
    if broken := {name for name, x in model.named_parameters() if not _is_finite(x)}:
        raise UserError(
            f"The checkpoint {path!r} has weights that are not finite: {some(broken)}. It was "
            "saved after its training had failed, or in a dtype of too small a range."
        )
    missing = {name for name, _ in model.named_parameters()} & set(info["missing_keys"])
    if not quantized and (adapters or wanted == torch.float32):
        model = in_fp32(model, dtype)
    for adapter in adapters:
        missing -= adapter.merge_into(model)
        model.name_or_path = path
    if not quantized and wanted != torch.float32:
        remember_dtype(model, dtype)
        model = to_compute_dtype(model.requires_grad_(False), wanted)
    return Checkpoint(model, missing, unused)


def _is_finite(x: Tensor) -> bool:
    if not x.is_floating_point() or not x.numel():
        return True
    ends = torch.stack(x.detach().aminmax())  # NaN where there is one; without a copy of `x`
    return bool(ends.isfinite().all())


def _is_part_of(model: PreTrainedModel, weight: str) -> bool:
    """Whether a `weight` that a model has no place for would change what it computes: it stands in
    one of its modules, and is no buffer of an older version, such as a mask."""
    parts = [part for part in (model, model.base_model) if hasattr(part, weight.split(".")[0])]
    owner, _, name = weight.rpartition(".")
    for part in parts:
        with contextlib.suppress(AttributeError):
            return name in part.get_submodule(owner)._parameters  # None where it is left out
    return bool(parts)


def refuse_missing(path: str, names: set[str], unused: set[str]) -> None:
    """Raise a UserError where a checkpoint lacks the weights `names`. Those that are `unused` may
    be the same under names that a wrapper gave them."""
    if names:
        others = f" It has others: {some(unused)}." if unused else ""
        raise UserError(
            f"The checkpoint {path!r} lacks the weights {some(names)}: they would be random. Give "
            f"the whole checkpoint.{others}"
        )


def some(names: set[str]) -> str:
    """A few of them, for a message."""
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def read_language_model(path: str, options: Mapping[str, Any]) -> PreTrainedModel:
    """A causal language model from `path` (folder or name), every weight from there; a UserError
    says why not."""
    checkpoint = read_checkpoint(AutoModelForCausalLM, path, options)
    if any(name.split(".")[0] in SCORE_HEADS for name in checkpoint.unused):
        raise UserError(
            f"{path!r} has a score head: it is a reward model or a critic. Give a causal language "
            "model."
        )
    refuse_missing(path, checkpoint.missing, checkpoint.unused)
    return checkpoint.model
