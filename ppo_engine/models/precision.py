"""Where a model computes, and in what dtype."""

from __future__ import annotations

import torch

from ppo_engine.errors import UserError
from ppo_engine.messages import first_line
from ppo_kernels.head import multiplies


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # which meta tensors cannot be
    except Exception as error:  # each kind of device has its own
        reason = _no_gpu(name) or f"{first_line(error)[:200].rstrip('.')}."
        raise UserError(
            f"Device {name!r} cannot be used: {reason} The device 'auto' is a GPU where there is "
            "one, and else the CPU."
        ) from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # whose streams, events and graphs are those that are made
    return device


def _no_gpu(name: str) -> str:
    """What of a GPU is missing, where one is asked for and not there."""
    if not name.startswith("cuda"):
        return ""
    if not torch.backends.cuda.is_built():
        return f"this is torch {torch.__version__}, built without CUDA."
    if torch.cuda.device_count():
        return ""
    return f"torch {torch.__version__} finds no GPU, or no driver for it (`nvidia-smi` tells)."


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype. `auto` is bf16 where the hardware multiplies it faster than fp32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = device.type == "cpu" and multiplies(torch.bfloat16, device)
    return torch.bfloat16 if fast else torch.float32


def rounding(dtype: torch.dtype) -> float:
    """What arithmetic in `dtype` may change in a result, as a share of its size: two roundings to
    `dtype`, and a sum of about a thousand terms in fp32, whose errors add up as random ones do
    (Higham 2002, section 2.8: as the square root of their number, here 32).

    4e-6 in fp32, 0.016 in bf16.
    """
    return 2 * torch.finfo(dtype).eps + 32 * torch.finfo(torch.float32).eps
