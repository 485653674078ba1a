"""`ppo_policy_loss` and `ppo_value_loss`, against masked losses in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.case import Case, Cost, Inputs, Outputs, Run, Size, compiled, normal, ragged_mask
from ppo_kernels import ppo_policy_loss, ppo_value_loss

CLIP_RANGE = 0.2

_SHAPES: dict[str, list[tuple[Size, int, int]]] = {
    "cpu": [("small", 8, 64), ("medium", 512, 1024), ("large", 4096, 1024)],
    "cuda": [("small", 8, 64), ("medium", 512, 2048), ("large", 4096, 4096)],
}


def cases(device: str) -> list[Case]:
    return [make(device, *shape) for make in (_policy, _value) for shape in _SHAPES[device]]


def _policy(device: str, size: Size, rows: int, length: int) -> Case:
    def inputs(on: torch.device) -> Inputs:
        logprobs = -normal(rows, length, device=on, dtype=torch.float32, seed=2).abs()
        advantages = normal(rows, length, device=on, dtype=torch.float32, seed=4, scale=2.0)
        mask = ragged_mask(rows, length, on)
        real = advantages[mask].double()
        moments = (
            torch.tensor(float(len(real))),
            real.mean(),
            real.var(unbiased=False) * len(real),
        )
        return {
            "logprobs": logprobs,
            "old_logprobs": logprobs
            + normal(rows, length, device=on, dtype=torch.float32, seed=3, scale=0.2),
            "advantages": advantages,
            "mask": mask,
            "moments": torch.stack([x.to(on, torch.float32) for x in moments]),
        }

    def ours(x: Inputs, impl: str) -> Outputs:
        loss, stats = ppo_policy_loss(
            x["logprobs"], x["old_logprobs"], x["advantages"], mask=x["mask"],
            clip_range=CLIP_RANGE, moments=x["moments"], impl=impl,
        )  # fmt: skip
        return loss, stats.approx_kl, stats.clip_fraction

    return _case(
        "ppo_policy_loss", device, size, rows, length, inputs, ours, _plain_policy, "logprobs"
    )


def _value(device: str, size: Size, rows: int, length: int) -> Case:
    def inputs(on: torch.device) -> Inputs:
        values = normal(rows, length, device=on, dtype=torch.float32, seed=2)
        return {
            "values": values,
            "old_values": values
            + normal(rows, length, device=on, dtype=torch.float32, seed=3, scale=0.2),
            "returns": normal(rows, length, device=on, dtype=torch.float32, seed=4),
            "mask": ragged_mask(rows, length, on),
        }

    def ours(x: Inputs, impl: str) -> Outputs:
        loss, stats = ppo_value_loss(
            x["values"], x["old_values"], x["returns"], mask=x["mask"], clip_range=CLIP_RANGE,
            impl=impl,
        )  # fmt: skip
        return loss, stats.clip_fraction

    return _case("ppo_value_loss", device, size, rows, length, inputs, ours, _plain_value, "values")


def _case(
    op: str, device: str, size: Size, rows: int, length: int,
    inputs: Callable[[torch.device], Inputs], ours: Callable[[Inputs, str], Outputs], plain: Run,
    trained: str,
) -> Case:  # fmt: skip
    tokens = rows * length
    # Read: three tensors and the mask; written: one gradient.
    return Case(
        op=op,
        size=size,
        shape=f"{rows}x{length}",
        dtype=torch.float32,
        device=device,
        inputs=inputs,
        ours=ours,
        alternatives={"masked, plain": plain, "masked, compiled": compiled(plain)},
        costs={
            "fwd": Cost(13 * tokens, 0, 15 * tokens),
            "both": Cost(13 * tokens, 4 * tokens, 20 * tokens),
        },
        trained=(trained,),
    )


# --- What one would use instead ------------------------------------------------------------------


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def _plain_policy(x: Inputs) -> Outputs:
    mask = x["mask"]
    count, mean, m2 = x["moments"].unbind()
    advantages = (x["advantages"] - mean) * torch.rsqrt(m2 / count + 1e-8)
    log_ratio = x["logprobs"] - x["old_logprobs"]
    ratio = torch.exp(log_ratio)
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1 - CLIP_RANGE, 1 + CLIP_RANGE)
    loss = _masked_mean(torch.maximum(unclipped, clipped), mask)
    with torch.no_grad():
        approx_kl = _masked_mean(log_ratio.square() / 2, mask)
        clip_fraction = _masked_mean((clipped > unclipped).float(), mask)
    return loss, approx_kl, clip_fraction


def _plain_value(x: Inputs) -> Outputs:
    mask, values, returns = x["mask"], x["values"], x["returns"]
    clipped = torch.clamp(values, x["old_values"] - CLIP_RANGE, x["old_values"] + CLIP_RANGE)
    unclipped_loss = (values - returns).square()
    clipped_loss = (clipped - returns).square()
    loss = _masked_mean(torch.maximum(unclipped_loss, clipped_loss), mask) / 2
    with torch.no_grad():
        clip_fraction = _masked_mean((clipped_loss > unclipped_loss).float(), mask)
    return loss, clip_fraction
