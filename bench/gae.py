"""`gae` and `kl_shaped_gae`, against the loop over time that TRL, OpenRLHF and verl run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.case import Case, Cost, Inputs, Outputs, Run, Size, normal, ragged_mask
from ppo_kernels import gae, kl_shaped_gae

GAMMA, LAM, KL_COEF = 1.0, 0.95, 0.05

# (size, rows, length). Few long rows: an agent's episodes rather than a batch of answers.
_SHAPES: dict[str, list[tuple[Size, int, int]]] = {
    "cpu": [("small", 8, 64), ("medium", 512, 1024), ("large", 4096, 1024)],
    "cuda": [("small", 8, 64), ("medium", 512, 1024), ("large", 4096, 4096)],
}
_LONG_ROWS: dict[str, tuple[Size, int, int]] = {
    "cpu": ("large", 8, 32768),
    "cuda": ("large", 8, 131072),
}


def cases(device: str) -> list[Case]:
    shapes = _SHAPES[device]
    return [
        *(_gae(device, *shape) for shape in shapes),
        _gae(device, *_LONG_ROWS[device], variant="long rows"),
        *(_kl_shaped(device, *shape) for shape in shapes),
        *([_kl_shaped(device, *_LONG_ROWS[device], variant="long rows")] * (device == "cuda")),
        *(_packed(device, *shape) for shape in shapes[1:]),
    ]


def _gae(device: str, size: Size, rows: int, length: int, variant: str = "") -> Case:
    def inputs(on: torch.device) -> Inputs:
        mask = ragged_mask(rows, length, on)
        return {
            "rewards": normal(rows, length, device=on, dtype=torch.float32, seed=2) * mask,
            "values": normal(rows, length, device=on, dtype=torch.float32, seed=3) * mask,
            "mask": mask,
        }

    def ours(x: Inputs, impl: str) -> Outputs:
        return gae(x["rewards"], x["values"], gamma=GAMMA, lam=LAM, mask=x["mask"], impl=impl)

    def loop(step: Step) -> Run:
        return lambda x: _loop(step, x["rewards"], x["values"], x["mask"])

    return Case(
        op="gae",
        variant=variant,
        size=size,
        shape=f"{rows}x{length}",
        dtype=torch.float32,
        device=device,
        inputs=inputs,
        ours=ours,
        alternatives=_loops(device, variant, loop),
        # Read: rewards, values, mask; written: advantages, returns.
        costs={"fwd": _cost(rows * length, read=9, flops=6)},
    )


def _loops(device: str, variant: str, loop: Callable[[Step], Run]) -> dict[str, Run]:
    """Of long rows, on a CPU, the plain loop alone: seconds a call, and the faster of the two; on a
    GPU none, as 131,072 steps of several kernels each take the host longer still."""
    if variant and device == "cuda":
        return {}
    compiled = {} if variant else {"loop, compiled step": loop(_compiled_step)}
    return {"loop over T": loop(_step)} | compiled


def _kl_shaped(device: str, size: Size, rows: int, length: int, variant: str = "") -> Case:
    def inputs(on: torch.device) -> Inputs:
        return _rollout(rows, length, on)

    def ours(x: Inputs, impl: str) -> Outputs:
        return kl_shaped_gae(
            x["scores"], x["logprobs"], x["ref_logprobs"], x["values"], kl_coef=KL_COEF,
            gamma=GAMMA, lam=LAM, mask=x["mask"], impl=impl,
        )  # fmt: skip

    return Case(
        op="kl_shaped_gae",
        variant=variant,
        size=size,
        shape=f"{rows}x{length}",
        dtype=torch.float32,
        device=device,
        inputs=inputs,
        ours=ours,
        alternatives=_loops(device, variant, lambda step: partial(_shaped_loop, step)),
        # Read: both log-probs, values, mask; written: advantages, returns.
        costs={"fwd": _cost(rows * length, read=13, flops=15)},
    )


def _packed(device: str, size: Size, rows: int, length: int) -> Case:
    """The same tokens without the padding; the loop has to pad them and to pack its results."""
    mask = ragged_mask(rows, length, torch.device("cpu"))
    tokens = int(mask.sum())

    def inputs(on: torch.device) -> Inputs:
        padded = _rollout(rows, length, on)
        inside = padded.pop("mask")
        return {
            "scores": padded.pop("scores"),
            **{name: x[inside] for name, x in padded.items()},
            "cu_seqlens": torch.nn.functional.pad(inside.sum(1).cumsum(0), (1, 0)),
        }

    def ours(x: Inputs, impl: str) -> Outputs:
        return kl_shaped_gae(
            x["scores"], x["logprobs"], x["ref_logprobs"], x["values"], kl_coef=KL_COEF,
            gamma=GAMMA, lam=LAM, cu_seqlens=x["cu_seqlens"], impl=impl,
        )  # fmt: skip

    def padded_loop(step: Step) -> Run:
        def run(x: Inputs) -> Outputs:
            starts = x["cu_seqlens"]
            steps = torch.arange(tokens, device=starts.device)
            # Indices, as a boolean mask makes the host wait for the GPU.
            row = torch.searchsorted(starts, steps, right=True) - 1
            place = row, steps - starts[row]
            padded = {
                name: torch.zeros(rows, length, device=starts.device).index_put(place, x[name])
                for name in ("logprobs", "ref_logprobs", "values")
            }
            inside = torch.arange(length, device=starts.device) < starts.diff()[:, None]
            advantages, returns, kl, moments = _shaped_loop(
                step, {"scores": x["scores"], "mask": inside, **padded}
            )
            return advantages[place], returns[place], kl, moments

        return run

    return Case(
        op="kl_shaped_gae",
        variant="packed",
        size=size,
        shape=f"{tokens}",
        dtype=torch.float32,
        device=device,
        inputs=inputs,
        ours=ours,
        alternatives={
            "pad, loop over T": padded_loop(_step),
            "pad, loop, compiled step": padded_loop(_compiled_step),
        },
        costs={"fwd": _cost(tokens, read=12, flops=15)},
    )


def _cost(tokens: int, read: int, flops: int) -> Cost:
    return Cost(read=tokens * read, written=tokens * 8, flops=tokens * flops)


def _rollout(rows: int, length: int, on: torch.device) -> Inputs:
    mask = ragged_mask(rows, length, on)
    logprobs = -normal(rows, length, device=on, dtype=torch.float32, seed=2).abs()
    return {
        "scores": normal(rows, device=on, dtype=torch.float32, seed=5),
        "logprobs": logprobs,
        "ref_logprobs": logprobs
        + normal(rows, length, device=on, dtype=torch.float32, seed=3, scale=0.1),
        "values": normal(rows, length, device=on, dtype=torch.float32, seed=4),
        "mask": mask,
    }


# --- What one would use instead ------------------------------------------------------------------

Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _step(advantage: Tensor, reward: Tensor, next_value: Tensor, value: Tensor) -> Tensor:
    return reward + GAMMA * next_value - value + GAMMA * LAM * advantage


# The loop as a whole cannot be compiled in reasonable time: its T steps are unrolled.
_compiled_step = torch.compile(_step, dynamic=False)


def _loop(step: Step, rewards: Tensor, values: Tensor, mask: Tensor) -> Outputs:
    """Reversed over time; padding is zeroed before, so that it adds nothing."""
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    length = rewards.shape[1]
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    reversed_advantages = []
    for t in reversed(range(length)):
        advantage = step(advantage, rewards[:, t], next_value, values[:, t])
        reversed_advantages.append(advantage)
        next_value = values[:, t]
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    return advantages, advantages + values


def _shaped_loop(step: Step, x: Inputs) -> Outputs:
    """Per-token KL penalty, score on the last token, the loop, moments for the whitening."""
    mask = x["mask"]
    kl = (x["logprobs"] - x["ref_logprobs"]).masked_fill(~mask, 0)
    rewards = -KL_COEF * kl
    rewards[torch.arange(len(mask), device=mask.device), mask.sum(1) - 1] += x["scores"]
    advantages, returns = _loop(step, rewards, x["values"], mask)
    count = mask.sum()
    mean = advantages.sum() / count
    m2 = ((advantages - mean).square() * mask).sum()
    return advantages, returns, kl.sum(1), torch.stack((count.to(mean.dtype), mean, m2))
