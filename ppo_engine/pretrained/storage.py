"""The dtype that a model's weights are stored in: in training they are fp32, saved as they came."""

from __future__ import annotations

import re
from typing import Any

import torch

from ppo_engine.pretrained.adapters import copy_on_cpu

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def named_dtype(config: Any) -> torch.dtype | None:
    """The dtype that a checkpoint's configuration names; None where it names none."""
    named = config.dtype or config.get_text_config().dtype
    return _DTYPES.get(str(named).removeprefix("torch."), torch.float32) if named else None


def in_fp32(model: Any, dtype: torch.dtype | None = None) -> Any:
    """The model with its weights in fp32. It and its copies remember the dtype that it came in:
    `dtype`, else what it has."""
    if not hasattr(model, "stored_dtype"):
        model.stored_dtype = dtype or model.dtype
    return model.float()


def stored_dtype(model: Any) -> torch.dtype:
    """The dtype that a model came in; fp32 where its base was quantized."""
    return getattr(model, "stored_dtype", torch.float32)


def as_stored(model: Any, name: str) -> Any:
    """The model with its weights in the dtype `name`, or the one that it came in ("auto"): itself,
    or a copy on the CPU, as the weights in training stay fp32.

    Those that its family keeps in fp32, such as the biases of a router, are kept so, as
    transformers does when it loads them.
    """
    dtype = stored_dtype(model) if name == "auto" else _DTYPES[name]
    if dtype == torch.float32:
        return model
    kept = [*(model._keep_in_fp32_modules_strict or ())]
    if dtype == torch.float16:
        kept += model._keep_in_fp32_modules or ()
    patterns = [re.compile(part.replace("*", ".*")) for part in kept]
    return copy_on_cpu(
        model,
        {
            id(x): dtype
            for name, x in model.named_parameters()
            if x.is_floating_point() and not any(pattern.search(name) for pattern in patterns)
        },
    )
