"""The dtype that a model's weights are stored in: saved as they came, whatever they compute in."""

from __future__ import annotations

from typing import Any

import torch

from ppo_engine.pretrained.adapters import copy_on_cpu
from ppo_engine.pretrained.masters import kept_in_fp32, to_compute_dtype

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def named_dtype(config: Any) -> torch.dtype | None:
    """The dtype that a checkpoint's configuration names; None where it names none."""
    named = config.dtype or config.get_text_config().dtype
    return _DTYPES.get(str(named).removeprefix("torch."), torch.float32) if named else None


def in_fp32(model: Any, dtype: torch.dtype | None = None) -> Any:
    """The model with its weights in fp32, which remembers the dtype that it came in."""
    remember_dtype(model, dtype)
    return to_compute_dtype(model, torch.float32)


def remember_dtype(model: Any, dtype: torch.dtype | None = None) -> None:
    """Let the model and its copies know the dtype that it came in: `dtype`, else what it has."""
    if not hasattr(model, "stored_dtype"):
        model.stored_dtype = dtype or model.dtype


def stored_dtype(model: Any) -> torch.dtype:
    """The dtype that a model came in; fp32 where its base was quantized."""
    return getattr(model, "stored_dtype", torch.float32)


def storage_dtype(name: str, auto: torch.dtype) -> torch.dtype:
    """The dtype of a `run.save_dtype`, of which "auto" is `auto`."""
    return auto if name == "auto" else _DTYPES[name]


def as_stored(model: Any, name: str) -> Any:
    """The model with its weights in the dtype `name`, or the one that it came in ("auto"): itself
    where they are, else a copy on the CPU, from their masters.

    Those that its family keeps in fp32 are kept so.
    """
    dtype = storage_dtype(name, stored_dtype(model))
    kept = kept_in_fp32(model, dtype)
    dtypes = {
        id(x): torch.float32 if kept(name) else dtype
        for name, x in model.named_parameters()
        if x.is_floating_point()
    }
    same = all(x.dtype == dtypes.get(id(x), x.dtype) for x in model.parameters())
    return model if same else copy_on_cpu(model, dtypes)
