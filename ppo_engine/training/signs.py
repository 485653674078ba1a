"""Signs that a run is pointless, each said once, when it first means something, with what to try.

A sign is read off a step's metrics alone: the finished run's metrics.jsonl tells how often it
showed, also where the run was resumed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from ppo_engine.messages import counted
from ppo_engine.settings.schema import PPOConfig, resolved

Row = Mapping[str, float]  # a step's metrics, with its number as "step"

_UPDATES = 3  # steps that must have left no trace: the first of a warm-up is next to nothing
_ROUNDING = 1e-6  # of a number computed in fp32
_UNMOVED = 1e-13  # policy/approx_kl of rounding alone in fp32: half the square of some 4e-7
# Where so many responses in a row are all cut, at most a tenth of them end, at 95 % (rule of three:
# Hanley and Lippman-Hand 1983).
_ENOUGH = 30


@dataclass(frozen=True)
class Sign:
    """`what` goes on after "Step 3: " and "In 3 of 20 steps "; `advice` is whole sentences."""

    shows: Callable[[Row], bool]
    what: str
    advice: str
    pointless: bool = True  # otherwise it is explained once, and not repeated at the end
    after: int = 1  # steps in a row, before which it may be chance


class Watch:
    """Looks at the steps of a run for `signs`."""

    def __init__(self, signs: Sequence[Sign]) -> None:
        self._signs = signs
        self._running: Counter[Sign] = Counter()  # steps in a row
        self._told: dict[Sign, float] = {}  # at which step

    def look(self, row: Row) -> list[str]:
        """What shows for the first time, for as long as it takes to mean something."""
        found, step = [], row["step"]
        for sign in self._signs:
            self._running[sign] = self._running[sign] + 1 if sign.shows(row) else 0
            if self._running[sign] == sign.after and sign not in self._told:
                self._told[sign] = step
                when = (
                    f"Steps {step - sign.after + 1} to {step}" if sign.after > 1 else f"Step {step}"
                )
                found.append(f"{when}: {sign.what}. {sign.advice}")
        return found

    def summary(self, rows: Sequence[Row]) -> list[str]:
        """How often each of them showed in the run's `rows`, but for what the last one told."""
        found = []
        for sign in filter(lambda sign: sign.pointless, self._signs):
            shown = list(map(sign.shows, rows))
            longest = max((sum(same) for _, same in groupby(shown)), default=0)
            if longest >= sign.after and self._told.get(sign) != rows[-1]["step"]:
                of_all = f"{sum(shown)} of {counted(len(rows), 'step')}"
                found.append(f"In {of_all} {sign.what}. {sign.advice}")
        return found


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
        return abs(far) <= _ROUNDING * row["objective/response_length"]

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
    ]


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
