"""`pairwise_loss`, against logsigmoid in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.case import Case, Cost, Inputs, Outputs, Size, compiled, normal
from ppo_kernels import pairwise_loss

_PAIRS: dict[str, list[tuple[Size, int]]] = {
    "cpu": [("small", 512), ("medium", 2**19), ("large", 2**22)],
    "cuda": [("small", 512), ("medium", 2**20), ("large", 2**25)],
}


def cases(device: str) -> list[Case]:
    return [_case(device, size, pairs) for size, pairs in _PAIRS[device]]


def _case(device: str, size: Size, pairs: int) -> Case:
    def inputs(on: torch.device) -> Inputs:
        return {
            "chosen": normal(pairs, device=on, dtype=torch.float32, seed=2, scale=2.0),
            "rejected": normal(pairs, device=on, dtype=torch.float32, seed=3, scale=2.0),
        }

    def ours(x: Inputs, impl: str) -> Outputs:
        loss, stats = pairwise_loss(x["chosen"], x["rejected"], impl=impl)
        return loss, stats.accuracy

    return Case(
        op="pairwise_loss",
        size=size,
        shape=f"{pairs}",
        dtype=torch.float32,
        device=device,
        inputs=inputs,
        ours=ours,
        alternatives={"logsigmoid, plain": _plain, "logsigmoid, compiled": compiled(_plain)},
        # Read: two scores; written: the gradients of both.
        costs={
            "fwd": Cost(8 * pairs, 0, 10 * pairs),
            "both": Cost(8 * pairs, 8 * pairs, 15 * pairs),
        },
        trained=("chosen", "rejected"),
    )


# --- What one would use instead ------------------------------------------------------------------


def _plain(x: Inputs) -> Outputs:
    difference = x["chosen"] - x["rejected"]
    with torch.no_grad():
        accuracy = (difference > 0).float().mean()
    return -F.logsigmoid(difference).mean(), accuracy
