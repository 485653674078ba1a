"""The sides of `bench/rollout.py` in turn, and what they took."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from bench import table
from bench.e2e_floor import Shape
from bench.e2e_worker import PhaseClock
from bench.machine import Ceilings
from bench.results import Row
from bench.rollout_cases import EARLY, Case
from bench.rollout_floor import floor
from bench.rollout_sides import GENERATE, NO_REFILL, Sides, Written
from ppo_engine.errors import UserError
from ppo_engine.messages import first_line
from ppo_engine.models.language_model import LanguageModel

# What a ratio is to, and its column.
RATIOS = {GENERATE: "x_generate", NO_REFILL: "x_no_refill"}
_MEASURED = (
    "seconds", "seconds_min", "seconds_max", "rounds", "written", "early", "tokens_per_second",
    *RATIOS.values(), "floor_seconds", "x_floor", "others",
)  # fmt: skip


@dataclass
class Result:
    """What one side took in each round; `skipped` says why there is nothing."""

    name: str
    seconds: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # of each response of the last round
    others: float = 0.0  # the largest share of the machine that other processes took
    skipped: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def compare(
    results: Sequence[Result], case: Case, sides: Sides, prompts: list[list[int]], repeats: int
) -> None:
    """Fill the `results`: every side once in each round, the first of which does not count. A side
    that cannot run is left out from there on."""
    device = sides.policy.device
    for number in range(repeats + 1):
        for result in results:
            if result.skipped:
                continue
            write_weights_anew(sides.policy)
            clock = PhaseClock(device)
            try:
                run = sides.run(result.name, case)
                with table.waiting(f"{case.name}: {result.name}, round {number} of {repeats}"):
                    clock.start("generate")
                    written = run(prompts)
                    clock.switch("generate")
            except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as failure:
                result.skipped, result.seconds = first_line(failure), []
                continue
            result.lengths = check_work(result.name, case, sides.ends, written)
            if number:
                result.seconds.append(clock.seconds["generate"])
                result.others = max(result.others, clock.others())


def write_weights_anew(policy: LanguageModel) -> None:
    """As an update does: the tensors are the same, their versions are not."""
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.0)


def check_work(name: str, case: Case, ends: Sequence[int], written: Written) -> list[int]:
    """The lengths of the responses; a UserError unless each is whole: it ends with an end, or has
    all its tokens."""
    lengths = [len(tokens) for tokens in written]
    whole = [
        len(tokens) == case.new_tokens or (len(tokens) > 0 and tokens[-1] in ends)
        for tokens in written
    ]
    if len(written) != case.responses or not all(whole) or max(lengths) > case.new_tokens:
        raise UserError(
            f"{name} wrote {len(written)} responses of {min(lengths, default=0)} to "
            f"{max(lengths, default=0)} tokens where {case.responses} of {case.new_tokens} were "
            "asked for: the sides did not do the same work, so there is nothing to compare."
        )
    return lengths


def rows_of(
    results: Sequence[Result],
    case: Case,
    prompts: list[list[int]],
    policy: LanguageModel,
    ceilings: Ceilings,
) -> list[Row]:
    """One for each side; a side that was not measured has a `status` and no time."""
    shape = Shape.of(policy.model.config)
    seconds = {result.name: result.seconds for result in results}
    found: list[Row] = []
    for result in results:
        row: Row = {
            "case": case.name,
            "side": result.name,
            "model": case.model,
            "dtype": str(policy.dtype).removeprefix("torch."),
            "responses": case.responses,
            "group": case.group,
            "prompt_tokens": sum(map(len, prompts)),
            "new_tokens": case.new_tokens,
            "rows": case.rows or case.responses,
            "status": result.skipped or "ok",
        } | dict.fromkeys(_MEASURED)
        if result.seconds:
            least = floor(
                shape, prompts, result.lengths, case.rows or case.responses, ceilings, policy.dtype
            )
            row |= {
                "seconds": result.median,
                "seconds_min": min(result.seconds),
                "seconds_max": max(result.seconds),
                "rounds": len(result.seconds),
                "written": sum(result.lengths),
                "early": sum(n <= EARLY for n in result.lengths) / len(result.lengths),
                "tokens_per_second": sum(result.lengths) / result.median,
                "floor_seconds": least,
                "x_floor": result.median / least,
                "others": result.others,
            }
            for other, column in RATIOS.items():
                row[column] = times_as_fast(result.seconds, seconds.get(other, []))
        found.append(row)
    return found


def times_as_fast(seconds: Sequence[float], others: Sequence[float]) -> float | None:
    """How many times as fast as another side, the median of the rounds; None without it."""
    if not others:
        return None
    return statistics.median(b / a for a, b in zip(seconds, others, strict=True))
