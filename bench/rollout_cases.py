"""What `bench/rollout.py` samples: the cases, their targets, their prompts, and where they end."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from bench.e2e_models import MODELS
from ppo_engine.demo.prompts import HELD_OUT_TOPICS, TRAINING_TOPICS, prompt_about
from ppo_engine.errors import UserError
from ppo_engine.models.language_model import LanguageModel

EARLY = 8  # tokens, by which half of the responses of varied length have ended
_AT_ONCE = 2  # tokens of a response that is hardly begun
_BYTES = 256  # token ids that every vocabulary has


class Target(NamedTuple):
    """Ours is to be at least `least` times as fast as the side `beside`, or to take at most `most`
    of `of`: seconds on the device that `on` names, or floors."""

    least: float = 0.0
    beside: str = ""
    most: float = 0.0
    of: str = ""
    on: str = ""


@dataclass(frozen=True)
class Case:
    """Responses of at most `new_tokens` tokens, `group` of them to each prompt.

    `prompt_tokens` None: the demo's prompts, of various lengths. `rows` is how many responses the
    memory for keys and values holds; None: all. `varied`: half of them end early, else none does.
    `sides` are measured beside ours.
    """

    name: str
    model: str
    responses: int
    new_tokens: int
    group: int = 1
    prompt_tokens: int | None = None
    rows: int | None = None
    varied: bool = False
    sides: Sequence[str] = ("generate", "continuous")
    targets: Mapping[str, Target] = field(default_factory=dict)  # by dtype


_SMOLLM2, _SMALL_QWEN, _QWEN = MODELS
_CPU_TARGETS = {"float32": Target(2.2, "generate"), "bfloat16": Target(1.9, "generate")}
_GROUPED_TARGETS = dict.fromkeys(_CPU_TARGETS, Target(3.0, "generate"))
CASES: dict[str, Sequence[Case]] = {
    "cpu": (
        Case("16x32", _SMOLLM2, 16, 32, targets=_CPU_TARGETS),
        Case("64x32", _SMOLLM2, 64, 32, targets=_CPU_TARGETS),
        Case("16x32-groups", _SMOLLM2, 16, 32, 8, 128, targets=_GROUPED_TARGETS),
        Case("64x32-groups", _SMOLLM2, 64, 32, 8, 128, targets=_GROUPED_TARGETS),
        Case(
            "varied", _SMOLLM2, 256, 128, 8, rows=64, varied=True, sides=("no refill", "generate"),
            targets=dict.fromkeys(_CPU_TARGETS, Target(1.8, "no refill")),
        ),
    ),
    "cuda": (
        Case(
            "1.5b", _SMALL_QWEN, 64, 128, prompt_tokens=128,
            targets={"bfloat16": Target(most=0.45, of="seconds", on="H200")},
        ),
        Case("1.5b-groups", _SMALL_QWEN, 64, 128, 8, 128),
        Case(
            "7b", _QWEN, 64, 512, prompt_tokens=128, sides=("generate", "continuous"),
            targets={"bfloat16": Target(most=1 / 0.6, of="floors")},
        ),
    ),
}  # fmt: skip


def prompt_rows(case: Case, policy: LanguageModel) -> list[list[int]]:
    """The token ids of each response's prompt, those of a group in a row."""
    count = case.responses // case.group
    if case.prompt_tokens is None:
        prompts = list(islice(_of_the_demo(policy), count))
    elif case.model == _SMOLLM2:
        prompts = _cut(_of_the_demo(policy), case.prompt_tokens, count)
    else:
        draw = random.Random(0)
        prompts = [draw.choices(range(_BYTES), k=case.prompt_tokens) for _ in range(count)]
    if len(prompts) < count:
        raise UserError(f"There are prompts for {len(prompts)} groups; {case.name} has {count}.")
    return [prompt for prompt in prompts for _ in range(case.group)]


def _of_the_demo(policy: LanguageModel) -> list[list[int]]:
    topics = [*TRAINING_TOPICS, *HELD_OUT_TOPICS]
    return [policy.renderer.prompt(prompt_about(topic)) for topic in topics]


def _cut(texts: Sequence[list[int]], size: int, count: int) -> list[list[int]]:
    """The texts end to end, cut into `count` pieces of `size` tokens."""
    joined = [token for text in texts for token in text]
    whole = range(0, len(joined) - size + 1, size)
    return [joined[start : start + size] for start in islice(whole, count)]


def early_ends(written: Sequence[Sequence[int]], share: float = 0.5) -> list[int]:
    """Tokens that, taken for ends, end a `share` of the responses `written` within `EARLY` tokens,
    few of these at once and few of the others at all: one at a time the token that ends the most
    such responses beside those that it would end at another place."""
    left = set(range(len(written)))
    kept, ends = len(written) - round(share * len(written)), list[int]()
    few = 1 + len(written) // 20  # one response alone says nothing of the next rollout
    while len(left) > kept:
        early: dict[int, set[int]] = {}
        elsewhere: dict[int, set[int]] = {}
        for row in left:
            for place, token in enumerate(written[row]):
                places = early if _AT_ONCE <= place < EARLY else elsewhere
                places.setdefault(token, set()).add(row)
        best = max(sorted(early), key=lambda t: len(early[t]) / (few + len(elsewhere.get(t, ()))))
        ends.append(best)
        left = {row for row in left if best not in written[row][:EARLY]}
    return ends
