"""`pairwise_loss` and `ranking_loss`, against logsigmoid in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.case import Case, Cost, Inputs, Outputs, Size, compiled, normal
from ppo_kernels import pairwise_loss, ranking_loss

_PAIRS: dict[str, list[tuple[Size, int]]] = {
    "cpu": [("small", 512), ("medium", 2**19), ("large", 2**22)],
    "cuda": [("small", 512), ("medium", 2**20), ("large", 2**25)],
}


# (size, prompts, responses to each)
_RANKINGS: dict[str, list[tuple[Size, int, int]]] = {
    "cpu": [("small", 8, 4), ("medium", 2**16, 8), ("large", 2**20, 4)],
    "cuda": [("small", 64, 4), ("medium", 2**16, 8), ("large", 2**20, 8)],
}


def cases(device: str) -> list[Case]:
    pairs = [_case(device, size, pairs) for size, pairs in _PAIRS[device]]
    return pairs + [_ranking(device, *shape) for shape in _RANKINGS[device]]


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


def _ranking(device: str, size: Size, prompts: int, candidates: int) -> Case:
    def inputs(on: torch.device) -> Inputs:
        noise = normal(prompts, candidates, device=on, dtype=torch.float32, seed=4)
        return {
            "scores": normal(prompts, candidates, device=on, dtype=torch.float32, seed=2),
            "ranks": noise.argsort(-1),
        }

    def ours(x: Inputs, impl: str) -> Outputs:
        loss, stats = ranking_loss(x["scores"], x["ranks"], impl=impl)
        return loss, stats.accuracy

    count = prompts * candidates
    return Case(
        op="ranking_loss",
        size=size,
        shape=f"{prompts}x{candidates}",
        dtype=torch.float32,
        device=device,
        inputs=inputs,
        ours=ours,
        alternatives={"all pairs, plain": _all_pairs, "all pairs, compiled": compiled(_all_pairs)},
        # Read: a score and a rank; written: a gradient.
        costs={
            "fwd": Cost(12 * count, 0, 5 * count * candidates),
            "both": Cost(12 * count, 4 * count, 8 * count * candidates),
        },
        trained=("scores",),
    )


# --- What one would use instead ------------------------------------------------------------------


def _plain(x: Inputs) -> Outputs:
    difference = x["chosen"] - x["rejected"]
    with torch.no_grad():
        accuracy = (difference > 0).float().mean()
    return -F.logsigmoid(difference).mean(), accuracy


def _all_pairs(x: Inputs) -> Outputs:
    scores, ranks = x["scores"], x["ranks"]
    better = ranks[:, :, None] < ranks[:, None, :]
    difference = scores[:, :, None] - scores[:, None, :]
    loss = -(F.logsigmoid(difference) * better).sum((1, 2)) / better.sum((1, 2))
    with torch.no_grad():
        accuracy = ((difference > 0) & better).sum() / better.sum()
    return loss.mean(), accuracy
