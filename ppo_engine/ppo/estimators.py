"""Advantage estimators: from the scores of responses to the advantages of their tokens.

Each is a function `(Evidence, PPOSettings) -> ShapedGAE`, found by the name that `ppo.estimator`
takes in `ESTIMATORS`; `PPOSettings` says what each needs. All of them run on `kl_shaped_gae`.
There are two kinds:

- of tokens: rewards are the score at the end and the KL penalty of each token, and a token's
  advantage comes from the rewards after it (with values, discount and lambda where there is a
  critic; without, from their sum);
- of sequences: a response has one reward, its score minus the KL penalty of all its tokens, and
  all its tokens have the advantage that comes from comparing it to the others of its group.

The penalty is 0 in both where it is a part of the loss (`ppo.kl_in=loss`).

Scores that differ by no more than rounding (`Evidence.rounding`) are equal, in a group, or in the
whole batch where no groups are compared: standardized, whitened, or in the eyes of AdamW, noise
would be as large a signal as any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ppo_engine.models import precision
from ppo_engine.settings.schema import PPOSettings
from ppo_engine.text.prompt import Prompt
from ppo_kernels import gae, kl_shaped_gae
from ppo_kernels.reference import ShapedGAE

_STD_EPS = 1e-6  # keeps the advantages of equal rewards at 0


class Evidence(NamedTuple):
    """The input of an estimator: B responses of at most T tokens, G to each prompt in a row."""

    scores: Tensor  # [B] fp32
    logprobs: Tensor  # [B, T] fp32, of the policy
    ref_logprobs: Tensor  # [B, T] fp32
    mask: Tensor  # [B, T] bool, True is a token of the policy's
    kl_coef: Tensor  # 0-dim, of the penalty
    values: Tensor | None = None  # [B, T] fp32, of the critic
    greedy_scores: Tensor | None = None  # [B] fp32, of the greedy responses to the same prompts
    # [B], by how much rounding alone may change a score; None: that of numbers in fp32.
    rounding: Tensor | None = None


def generalized(evidence: Evidence, settings: PPOSettings) -> ShapedGAE:
    """Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16)."""
    return _of_tokens(evidence, settings, _of_batch(evidence), settings.lam)


def monte_carlo(evidence: Evidence, settings: PPOSettings) -> ShapedGAE:
    """Rewards-to-go minus the value (the same, eq. 18: lambda = 1)."""
    return _of_tokens(evidence, settings, _of_batch(evidence), 1.0)


def td(evidence: Evidence, settings: PPOSettings) -> ShapedGAE:
    """One-step temporal difference (the same, eq. 17: lambda = 0)."""
    return _of_tokens(evidence, settings, _of_batch(evidence), 0.0)


def reinforce_pp(evidence: Evidence, settings: PPOSettings) -> ShapedGAE:
    """Rewards-to-go, whitened over the whole batch (REINFORCE++, Hu 2025, arXiv:2501.03262)."""
    return _of_tokens(evidence, settings, _of_batch(evidence), 1.0)


def remax(evidence: Evidence, settings: PPOSettings) -> ShapedGAE:
    """Minus the score of the greedy response (ReMax, Li et al. 2023, arXiv:2310.10505, eq. 4)."""
    assert evidence.greedy_scores is not None
    slack = rounding_of(evidence.scores, evidence.rounding)
    better = evidence.scores - evidence.greedy_scores
    better = torch.where(better.abs() <= slack, 0.0, better)
    return _of_tokens(evidence, settings, better, 1.0)


def grpo(evidence: Evidence, settings: PPOSettings) -> ShapedGAE:
    """Rewards standardized within the group, by the unbiased deviation.

    Shao et al. 2024 (DeepSeekMath, arXiv:2402.03300), section 4.1.2.
    """
    rewards = _of_groups(evidence, settings)
    deviation = rewards.std(1, keepdim=True)
    return _of_sequences(
        evidence, settings, (rewards - rewards.mean(1, keepdim=True)) / (deviation + _STD_EPS)
    )


def dr_grpo(evidence: Evidence, settings: PPOSettings) -> ShapedGAE:
    """Rewards minus the group's mean (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783, section 3.2).

    Its loss sums over a constant: `ppo.reduction=sum`.
    """
    rewards = _of_groups(evidence, settings)
    return _of_sequences(evidence, settings, rewards - rewards.mean(1, keepdim=True))


def rloo(evidence: Evidence, settings: PPOSettings) -> ShapedGAE:
    """Rewards minus the mean of the others in the group (RLOO, Ahmadian et al. 2024,
    arXiv:2402.14740, section 2.2): G / (G - 1) times those of `dr_grpo`."""
    rewards = _of_groups(evidence, settings)
    others = (rewards.sum(1, keepdim=True) - rewards) / (settings.group_size - 1)
    return _of_sequences(evidence, settings, rewards - others)


ESTIMATORS: dict[str, Callable[[Evidence, PPOSettings], ShapedGAE]] = {
    "gae": generalized,
    "monte_carlo": monte_carlo,
    "td": td,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "remax": remax,
}

TITLES = {  # what a run with each is called
    **dict.fromkeys(("gae", "monte_carlo", "td"), "PPO"),
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "rloo": "RLOO",
    "reinforce_pp": "REINFORCE++",
    "remax": "ReMax",
}


def estimate(evidence: Evidence, settings: PPOSettings) -> ShapedGAE:
    """By `ppo.estimator`; the KL is no part of the rewards where it is one of the loss."""
    if settings.kl_in != "reward":
        evidence = evidence._replace(kl_coef=torch.zeros_like(evidence.kl_coef))
    return ESTIMATORS[settings.estimator](evidence, settings)


def check_groups(prompts: Sequence[Prompt], settings: PPOSettings) -> None:
    """Raise a ValueError unless responses come in complete groups, each of one prompt."""
    size = settings.group_size
    if not in_groups(prompts, size):
        raise ValueError(
            f"ppo.estimator={settings.estimator} needs groups of {size} consecutive responses to a "
            f"prompt, but the rollout has {len(prompts)} responses in another "
            "order; see PPOEngine.generate."
        )


def in_groups(prompts: Sequence[Prompt], size: int) -> bool:
    """Whether responses come in complete groups of `size`, each of one prompt."""
    return len(prompts) % size == 0 and all(
        prompts[row] == prompts[row - row % size] for row in range(len(prompts))
    )


def equal_groups(scores: Tensor, settings: PPOSettings, rounding: Tensor | None = None) -> float:
    """The share of groups whose scores `[B]` are equal, but for rounding: they carry no signal."""
    groups = _leveled(scores, rounding_of(scores, rounding), settings.group_size)
    return float((groups == groups[:, :1]).all(1).float().mean())


def rounding_of(scores: Tensor, rounding: Tensor | None) -> Tensor:
    """By how much rounding alone may change each of the scores `[B]`: as given, or as of numbers
    computed in fp32."""
    return precision.rounding(torch.float32) * scores.abs() if rounding is None else rounding


def _leveled(x: Tensor, rounding: Tensor, size: int) -> Tensor:
    """Numbers `[B]` in groups, `[B / size, size]`; those of a group that differ by no more than
    `rounding` [B], the largest of the group's, all become its first."""
    groups = x.view(-1, size)
    slack = rounding.view(-1, size).amax(1, keepdim=True)
    spread = groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)
    return torch.where(spread <= slack, groups[:, :1], groups)


def _of_batch(evidence: Evidence) -> Tensor:
    """The scores `[B]`, equal where all of them are but for rounding."""
    scores = evidence.scores
    return _leveled(scores, rounding_of(scores, evidence.rounding), len(scores)).flatten()


def _of_tokens(evidence: Evidence, settings: PPOSettings, scores: Tensor, lam: float) -> ShapedGAE:
    values = evidence.values
    if values is None:
        values = torch.zeros_like(evidence.logprobs)
    if not settings.whiten_rewards:
        return _shaped(evidence, settings, scores, values, evidence.kl_coef, settings.gamma, lam)
    # Without values, discount 0 makes the returns the shaped rewards themselves.
    none = torch.zeros_like(values)
    rewards = _shaped(evidence, settings, scores, none, evidence.kl_coef, 0.0, 0.0)
    count, _, m2 = rewards.moments.unbind()
    # Reward whitening scales and does not shift: a shift would reward every token written.
    scaled = rewards.returns * torch.rsqrt(m2 / count + 1e-8)
    advantages, returns = gae(scaled, values, gamma=settings.gamma, lam=lam, mask=evidence.mask)
    real = advantages[evidence.mask]
    mean = real.mean()
    moments = torch.stack((count, mean, (real - mean).square().sum()))
    return ShapedGAE(advantages, returns, rewards.kl, moments)


def _of_groups(evidence: Evidence, settings: PPOSettings) -> Tensor:
    """The reward of each response, `[B / G, G]` in float64, which keeps equal ones equal."""
    rewards, rounding = evidence.scores.double(), rounding_of(evidence.scores, evidence.rounding)
    if settings.kl_in == "reward":
        none = torch.zeros_like(evidence.logprobs)
        kl = _shaped(evidence, settings, evidence.scores, none, evidence.kl_coef, 1.0, 1.0).kl
        rewards = rewards - evidence.kl_coef * kl.double()
        # The penalty's own: it is the difference of two sums of log-probs.
        sizes = evidence.logprobs.abs() + evidence.ref_logprobs.abs()
        sums = torch.where(evidence.mask, sizes, 0.0).sum(1)
        rounding = rounding + evidence.kl_coef * torch.finfo(torch.float32).eps * sums
    return _leveled(rewards, rounding, settings.group_size)


def _of_sequences(evidence: Evidence, settings: PPOSettings, advantages: Tensor) -> ShapedGAE:
    """The same advantage for all tokens of a response: a reward at its end, neither discounted
    nor penalized."""
    none = torch.zeros_like(evidence.logprobs)
    scores = advantages.flatten().to(evidence.scores.dtype)
    return _shaped(evidence, settings, scores, none, torch.zeros_like(evidence.kl_coef), 1.0, 1.0)


def _shaped(
    evidence: Evidence,
    settings: PPOSettings,
    scores: Tensor,
    values: Tensor,
    kl_coef: Tensor,
    gamma: float,
    lam: float,
) -> ShapedGAE:
    return kl_shaped_gae(
        scores,
        evidence.logprobs,
        evidence.ref_logprobs,
        values,
        kl_coef=kl_coef,
        gamma=gamma,
        lam=lam,
        kl_estimator=settings.kl_estimator,
        mask=evidence.mask,
    )
