"""Signs that a run is pointless, or goes wrong: each is said once, when it first means something,
with what to try.

A sign is read off metrics alone, of a step or of the last few: the finished run's metrics.jsonl
tells how often it showed, also where the run was resumed, and so does its page.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppo_engine.errors import UserError
from ppo_engine.messages import counted
from ppo_engine.settings.schema import (
    PPOConfig,
    PPOSettings,
    RewardModelConfig,
    SFTConfig,
    resolved,
)

Row = Mapping[str, float]  # a step's metrics, with its number as "step"

_UPDATES = 3  # steps that must have left no trace: the first of a warm-up is next to nothing
_ROUNDING = 1e-6  # of a number computed in fp32
_UNMOVED = 1e-13  # policy/approx_kl of rounding alone in fp32: half the square of some 4e-7
# Where so many responses in a row are all cut, at most a tenth of them end, at 95 % (rule of three:
# Hanley and Lippman-Hand 1983).
_ENOUGH = 30
_NO_ENTROPY = 0.05  # nats a token
_SAMPLER_OFF = 0.1  # nats a token
_RATIO_OFF = 0.1
_SHORT, _LONG, _LONGER = 3, 10, 20  # steps
_TOGETHER = 0.9  # a correlation


@dataclass(frozen=True)
class Sign:
    """`what` goes on after "Step 3: " and "In 3 of 20 steps "; `advice` is whole sentences."""

    shows: Callable[..., bool]  # of the rows of the last `over` steps, the newest last
    what: str
    advice: str
    pointless: bool = True  # otherwise it is explained once, and not repeated at the end
    after: int = 1  # steps in a row, before which it may be chance
    over: int = 1

    def holds(self, rows: Sequence[Row]) -> bool:
        """Whether the newest of `rows` shows it."""
        return len(rows) >= self.over and self.shows(*rows[-self.over :])


@dataclass(frozen=True)
class Finding:
    """A sign that a run showed for as long as it takes to mean something."""

    sign: Sign
    ends: float  # the step at which it first meant something
    shown: int  # steps of the run
    lasts: bool  # whether the run's newest step shows it

    @property
    def when(self) -> str:
        return _when(self.sign, self.ends)


def findings(signs: Sequence[Sign], rows: Sequence[Row]) -> list[Finding]:
    """Those of the `signs` that mean something in a run's `rows`, in the order of the signs."""
    found = []
    for sign in signs:
        shown = [sign.holds(rows[max(0, i - sign.over) : i]) for i in range(1, len(rows) + 1)]
        running, ends = 0, None
        for row, shows in zip(rows, shown, strict=True):
            running = running + 1 if shows else 0
            if running == sign.after and ends is None:
                ends = row["step"]
        if ends is not None:
            found.append(Finding(sign, ends, sum(shown), shown[-1]))
    return found


class Watch:
    """Looks at the steps of a run for `signs`."""

    def __init__(self, signs: Sequence[Sign]) -> None:
        self._signs = signs
        self._running: Counter[Sign] = Counter()  # steps in a row
        self._told: dict[Sign, float] = {}  # at which step
        self._rows: list[Row] = []  # the last ones, as many as a sign looks at

    def look(self, row: Row) -> list[str]:
        """What shows for the first time, for as long as it takes to mean something."""
        found, step = [], row["step"]
        longest = max((sign.over for sign in self._signs), default=1)
        self._rows = [*self._rows, row][-longest:]
        for sign in self._signs:
            self._running[sign] = self._running[sign] + 1 if sign.holds(self._rows) else 0
            if self._running[sign] == sign.after and sign not in self._told:
                self._told[sign] = step
                found.append(f"{_when(sign, step)}: {sign.what}. {sign.advice}")
        return found

    def summary(self, rows: Sequence[Row]) -> list[str]:
        """How often each of them showed in the run's `rows`, but for what the last one told."""
        return [
            f"In {found.shown} of {counted(len(rows), 'step')} {found.sign.what}. "
            f"{found.sign.advice}"
            for found in findings(self._signs, rows)
            if found.sign.pointless and self._told.get(found.sign) != rows[-1]["step"]
        ]


def signs_of(config: Any, before: Row) -> list[Sign]:
    """Those of the command whose settings these are; `before` are the held-out metrics of the
    untrained model, which `sft` and `reward` compare with."""
    match config:
        case PPOConfig():
            return ppo_signs(config)
        case SFTConfig() | RewardModelConfig():
            command = "sft" if isinstance(config, SFTConfig) else "reward"
            rate = resolved(config).model.optimizer.learning_rate
            return supervised_signs(command, rate, before)
        case _:
            return []


def _when(sign: Sign, ends: float) -> str:
    """The steps by which it means something at step `ends`."""
    begins = ends - (sign.after - 1) - (sign.over - 1)
    return f"Steps {begins} to {ends}" if begins < ends else f"Step {ends}"


def ppo_signs(config: PPOConfig) -> list[Sign]:
    """Those of PPO and its relatives."""
    settings, tokens = config.ppo, config.generation.max_new_tokens
    responses = settings.rollout_batch_size
    # Otherwise the ratio is 1 whatever the policy does.
    several_updates = settings.epochs > 1 or settings.mini_batch_size < responses
    measured = settings.kl_coef > 0 or config.evaluation.prompts or config.evaluation.path
    rate = resolved(config).policy.optimizer.learning_rate
    reward = config.reward
    penalized = reward.missing_eos_penalty > 0 or reward.missing_eos_score is not None
    dearer = "" if penalized else ", or set reward.missing_eos_penalty"

    def constant(row: Row) -> bool:
        spread, score = row.get("objective/scores_std"), row.get("objective/scores", 0.0)
        return responses > 1 and spread is not None and spread <= _ROUNDING * abs(score)

    def equal(row: Row) -> bool:
        return row.get("objective/equal_groups") == 1 and not constant(row)

    def unmoved(row: Row) -> bool:
        far = row.get("objective/kl", row.get("eval/kl"))
        updates = row["step"] - 1 - settings.critic_warmup_steps
        if far is None or updates < _UPDATES or constant(row) or equal(row) or still(row):
            return False
        return abs(far) <= _ROUNDING * row.get("objective/response_length", 0.0)

    def still(row: Row) -> bool:
        return row.get("policy/grad_norm") == 0 and not constant(row) and not equal(row)

    def idle(row: Row) -> bool:
        if measured or not several_updates or constant(row) or equal(row) or still(row):
            return False
        # At the end of a schedule that falls to 0 nothing moves any more, and need not.
        slow = row.get("policy/learning_rate", 0.0) < rate / 2
        return not slow and row.get("policy/approx_kl", 1.0) <= _UNMOVED

    learn = (
        f"Nothing was learned: raise policy.optimizer.learning_rate ({rate:g}), or look at what is "
        "trained (policy.trainable_layers, policy.lora)."
    )
    return [
        Sign(
            constant,
            f"all {responses} responses have the same score",
            "Nothing tells good from bad, so nothing is learned of the reward. Where it stays so, "
            "read samples.jsonl and try the reward on some of its rows; where scores are 0 or 1, "
            "take easier or harder prompts, or a reward with degrees.",
        ),
        Sign(
            equal,
            f"no group of {settings.group_size} responses to a prompt has a spread of scores",
            "Every advantage is 0, so nothing is learned of the reward. Try a larger "
            "ppo.group_size, prompts that are neither too easy nor too hard, or a reward with "
            "degrees.",
        ),
        Sign(
            lambda row: row.get("objective/finished") == 0,
            f"all {responses} responses are cut at generation.max_new_tokens={tokens}",
            "The reward sees no whole answer. Raise generation.max_new_tokens; where answers never "
            "end, fine-tune the model on answers that do (ppo-engine sft)"
            f"{dearer}.",
            after=math.ceil(_ENOUGH / responses),
        ),
        Sign(
            still,
            "no gradient reached the policy (policy/grad_norm is 0)",
            "Look at what is trained (policy.trainable_layers, policy.lora) and at the scores in "
            "samples.jsonl.",
        ),
        Sign(
            unmoved,
            f"the policy is still where it began (KL 0 after {_UPDATES} updates or more)",
            learn,
        ),
        Sign(
            idle,
            "updates change no token's probability (policy/approx_kl is 0)",
            learn,
            after=_UPDATES,
        ),
        Sign(
            lambda row: row.get("objective/kl", 0.0) < -0.0005,  # above, it is shown as 0
            "the KL is shown below 0",
            "It is an estimate from the sampled tokens, the mean of log pi - log pi_ref: near 0 it "
            "may fall below by chance, which the KL itself never does.",
            pointless=False,
            after=3,  # of a policy that moves away the mean is above 0: one step is soon followed
        ),
        *_wrong_ways(config),
    ]


def _wrong_ways(config: PPOConfig) -> list[Sign]:
    """Signs of a run that learns, but not what it should."""
    settings = config.ppo
    found = [
        Sign(
            lambda row: row.get("objective/entropy", 1.0) < _NO_ENTROPY,
            f"the policy's entropy is near 0 (below {_NO_ENTROPY} nats a token)",
            "It writes the same again and again, and what is never tried cannot be rewarded. Try a "
            "higher ppo.kl_coef, ppo.entropy_coef=0.001 or a lower "
            "policy.optimizer.learning_rate; where one answer alone is right, it may be what you "
            "want.",
            pointless=False,
            after=_SHORT,
        ),
        Sign(
            lambda row: row.get("value/explained_variance", 0.0) < 0,
            "the critic is worse than a constant (value/explained_variance is below 0)",
            "Its noise goes into every advantage. Try ppo.critic_warmup_steps=10, a higher "
            "critic.optimizer.learning_rate, reward.normalize=true or ppo.lam=1; or no critic: "
            "ppo-engine grpo.",
            pointless=False,
            after=_LONG,
        ),
        Sign(
            lambda row: row.get("rollout/logprob_diff", 0.0) > _SAMPLER_OFF,
            "the ratio is off 1 before the first update: log-probs of sampler and trainer differ "
            f"by more than {_SAMPLER_OFF} nats a token (rollout/logprob_diff)",
            "generation.top_k, top_p and min_new_tokens make it so, and low precision. Leave them "
            "alone, or try run.dtype=float32 or ppo.importance_cap=2.",
            pointless=False,
        ),
        Sign(
            lambda row: abs(row.get("policy/ratio_mean", 1.0) - 1) > _RATIO_OFF,
            f"the mean ratio of new to old probability is off 1 by more than {_RATIO_OFF}",
            "The updates of a step go too far from what was sampled. Try a lower "
            "policy.optimizer.learning_rate, ppo.epochs=1 or a larger ppo.mini_batch_size.",
            pointless=False,
            after=_SHORT,
        ),
        Sign(
            _longer_is_better,
            "score and response length rise together",
            "Length may be all that is rewarded: compare short and long answers in samples.jsonl. "
            "Try reward.length_penalty=0.01 with reward.length_penalty_from, or a reward model "
            "from rankings in which short answers win too.",
            pointless=False,
            over=_LONGER,
        ),
    ]
    if settings.adaptive_kl is not None:
        target = settings.adaptive_kl.target
        too_far = Sign(
            lambda row: row.get("objective/kl", 0.0) > 2 * target,
            "the KL to the reference is above twice its target "
            f"(ppo.adaptive_kl.target={target:g})",
            "The controller raises the KL coefficient by no more than 20 % in "
            "ppo.adaptive_kl.horizon responses. Try a lower policy.optimizer.learning_rate, a "
            "higher ppo.kl_coef to begin with, or a shorter horizon.",
            pointless=False,
            after=_SHORT,
        )
        found.append(too_far)
    return found


def _longer_is_better(*rows: Row) -> bool:
    """Whether over these steps scores rise with lengths, which grow by a quarter or more."""
    names = ("objective/response_length", "objective/scores")
    lengths, scores = ([row.get(name, math.nan) for row in rows] for name in names)
    if not all(map(math.isfinite, [*lengths, *scores])):
        return False
    part = len(rows) // 4
    early, late = statistics.fmean(lengths[:part]), statistics.fmean(lengths[-part:])
    if late < 1.25 * early or len(set(scores)) == 1:
        return False
    return statistics.correlation(lengths, scores) >= _TOGETHER


def refuse_collapse(settings: PPOSettings, row: Row) -> None:
    """Raise a UserError where a step is beyond `ppo.stop_at_kl` or `ppo.stop_at_entropy`."""
    kl, entropy = row.get("objective/kl"), row.get("objective/entropy")
    if settings.stop_at_kl is not None and kl is not None and kl > settings.stop_at_kl:
        raise UserError(
            f"Step {row['step']}: the policy is {kl:.4g} nats a response from the reference, more "
            f"than ppo.stop_at_kl={settings.stop_at_kl:g}. What it writes may please the reward "
            "alone: read samples.jsonl. Try a lower policy.optimizer.learning_rate, a higher "
            "ppo.kl_coef, or ppo.adaptive_kl.target."
        )
    least = settings.stop_at_entropy
    if least is not None and entropy is not None and entropy < least:
        raise UserError(
            f"Step {row['step']}: the policy's entropy is {entropy:.4g} nats a token, less than "
            f"ppo.stop_at_entropy={least:g}: it writes the same again and again, and explores no "
            "more. Try a lower policy.optimizer.learning_rate, a higher ppo.kl_coef, or "
            "ppo.entropy_coef=0.01."
        )


def supervised_signs(command: str, rate: float, before: Row) -> list[Sign]:
    """Those of `ppo-engine sft` and `reward`, at this learning rate; `before` are the held-out
    metrics of the untrained model."""

    def learned(row: Row) -> bool:
        return row.get(f"{command}/loss", 1.0) <= _ROUNDING

    return [
        Sign(
            learned,
            "the loss is 0",
            "There is nothing left to learn from these examples: take fewer epochs, or see with "
            "`ppo-engine inspect` whether the data are what they should be.",
        ),
        Sign(
            lambda row: row.get(f"{command}/grad_norm") == 0 and not learned(row),
            f"no gradient reached the model ({command}/grad_norm is 0)",
            "Look at what is trained: model.trainable_layers, model.lora.",
        ),
        Sign(
            lambda row: "eval/loss" in row and row["eval/loss"] == before.get("eval/loss"),
            "the held-out loss is what it was before training",
            f"Nothing was learned: raise model.optimizer.learning_rate ({rate:g}), or look at "
            "what is trained (model.trainable_layers, model.lora).",
        ),
    ]
