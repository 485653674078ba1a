"""Best-of-n: of n sampled responses to a prompt the one with the highest score is kept.

The score that this gives a policy, estimated from K responses to each prompt, and its KL from the
policy. A trained policy is worth its cost where it beats this.
"""

from __future__ import annotations

import math

import torch
from rich.table import Table
from torch import Tensor

from ppo_engine.messages import counted


def expected_best(scores: Tensor, n: int) -> Tensor:
    """Unbiased estimate of E[max of n scores] for each prompt: [P], from `scores` [P, K], n <= K.

    The mean of the maximum over all C(K, n) subsets of n scores: the i-th smallest of K is the
    maximum of C(i-1, n-1) of them, so that the estimate is sum_i C(i-1, n-1) / C(K, n) * s_(i).
    Best-of-n as in Nakano et al. 2021 (arXiv:2112.09332); for scores of 0 and 1 it is the pass@k of
    Chen et al. 2021 (arXiv:2107.03374, section 2.1). Summed in fp64, returned in the dtype of
    `scores`. Raises ValueError where the shape or `n` does not fit.
    """
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(
            "scores must be floating-point [prompts, responses], but are "
            f"{tuple(scores.shape)} {scores.dtype}"
        )
    count = scores.shape[1]
    if not 1 <= n <= count:
        raise ValueError(f"n must be from 1 to {count}, the responses to each prompt, but is {n}")
    # The n - 1 smallest are never the maximum.
    ranked = scores.double().sort(dim=1).values[:, n - 1 :]
    subsets = math.comb(count, n)
    weights = [math.comb(below, n - 1) / subsets for below in range(n - 1, count)]
    return (ranked @ torch.tensor(weights, dtype=torch.float64, device=scores.device)).to(
        scores.dtype
    )


def kl_bound(n: int) -> float:
    """log n - (n-1)/n nats: an upper bound of KL(best-of-n || policy), whatever the scores.

    Beirami et al. 2024, arXiv:2401.01879.
    """
    return math.log(n) - (n - 1) / n


def best_of_n_table(scores: Tensor) -> Table:
    """The mean score, and the best-of-n scores for n = 2, 4, … K: from `scores` [P, K]."""
    prompts, count = scores.shape
    table = Table(
        "best of",
        "score, mean ± SE" if prompts > 1 else "score",
        "KL to the policy",
        title=f"Scores of {counted(prompts, 'prompt')}, {counted(count, 'response')} each",
        title_justify="left",
    )
    for n in sorted({count, *(2**power for power in range(count.bit_length()))}):
        best = expected_best(scores, n)
        error = f" ± {float(best.std()) / math.sqrt(prompts):.3f}" if prompts > 1 else ""
        far = f"at most {kl_bound(n):.2f} nats" if n > 1 else "0"
        table.add_row(f"{n} (mean)" if n == 1 else str(n), f"{float(best.mean()):+.3f}{error}", far)
    return table
