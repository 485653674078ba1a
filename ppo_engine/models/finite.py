"""Numbers that are not finite: refused before a weight has changed by them, and named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from ppo_engine.errors import UserError

# One bad batch passes; a model that is broken gives bad numbers in every step that follows.
SKIPPED_IN_A_ROW = 3
_NAMED = 3

# Of each forward pass of a mini-batch: the numbers of its samples there, and its loss, 0-dim.
Losses = Sequence[tuple[Sequence[int], Tensor]]


class NotFiniteError(UserError, ValueError):
    """Of a batch `what` ("the loss of the policy is") is not finite, before any weight has changed
    by it; `samples` are the numbers in the batch of those that it came from, where that is known.
    """

    def __init__(self, what: str, samples: Sequence[int] = (), place: str = "") -> None:
        self.what, self.samples = what, tuple(samples)
        super().__init__(
            f"{what[0].upper()}{what[1:]} not finite{place}. No weight has changed by it. Try a "
            "lower learning rate, float32 compute (run.dtype=float32), or look for extreme rewards "
            "or examples in the data; run.on_bad_numbers=skip leaves such a step out."
        )

    def at(self, step: int, name: Callable[[int], str]) -> NotFiniteError:
        """The same with the run's step, and the samples as `name` has them."""
        named = "; ".join(name(number) for number in self.samples[:_NAMED])
        more = len(self.samples) - _NAMED
        found = f", in {named}" * bool(named) + f" and {more} more" * (more > 0)
        return NotFiniteError(f"step {step}: {self.what}", self.samples, found)


class Skips:
    """What becomes of a `NotFiniteError` by `run.on_bad_numbers`. Steps in a row that had one are
    counted anew when a run is resumed: a person has looked at it."""

    def __init__(self, choice: Literal["raise", "skip"]) -> None:
        self.asked = choice == "skip"
        self._of_step: list[NotFiniteError] = []
        self._in_a_row = 0
        self._notes: list[str] = []

    @contextmanager
    def left_out(
        self, named: Callable[[NotFiniteError], NotFiniteError] = lambda error: error
    ) -> Iterator[None]:
        """Around what changes nothing where it raises a NotFiniteError: this is skipped where that
        is asked for, and else raised, as `named` has it."""
        try:
            yield
        except NotFiniteError as error:
            error = named(error)
            if not self.asked:
                raise error from None
            self._of_step.append(error)

    def end_step(self) -> dict[str, float]:
        """How much was left out of the step, as a metric; a UserError where too many in a row were
        such steps."""
        errors, self._of_step = self._of_step, []
        self._in_a_row = self._in_a_row + 1 if errors else 0
        if self._in_a_row > SKIPPED_IN_A_ROW:
            raise UserError(
                f"{errors[0]} {SKIPPED_IN_A_ROW} steps were left out before this one: so many in a "
                "row are no bad batch, but a model or settings that do not work."
            )
        if errors:
            self._notes.append(f"{str(errors[0]).partition(' Try ')[0]} It was left out.")
        return {"skipped_updates": float(len(errors))} if self.asked else {}

    def take_notes(self) -> list[str]:
        """What is to be told of the steps since this was called last."""
        notes, self._notes = self._notes, []
        return notes


def refuse_not_finite(quantities: Mapping[str, Tensor | None]) -> None:
    """Raise a NotFiniteError for the first of these `[B, …]` that has such a number. A GPU is
    waited for once."""
    given = {name: x for name, x in quantities.items() if x is not None and x.numel()}
    good = torch.stack([x.isfinite().all() for x in given.values()]).tolist()
    for (name, x), is_good in zip(given.items(), good, strict=True):
        if not is_good:
            bad = (~x.isfinite()).flatten(1).any(1) if x.ndim > 1 else ~x.isfinite()
            raise NotFiniteError(name, bad.nonzero()[:, 0].tolist())


def refuse_bad_gradient(name: str, norm: Tensor, losses: Losses) -> None:
    """Raise a NotFiniteError unless `losses`, and the `norm` of the gradient that they gave of the
    model `name`, are finite. A GPU is waited for once, as it is for the norm alone."""
    good = torch.stack([norm, *(loss.to(norm) for _, loss in losses)]).isfinite().tolist()
    bad = [samples for (samples, _), is_good in zip(losses, good[1:], strict=True) if not is_good]
    if bad:
        raise NotFiniteError(f"the loss of {name} is", [n for samples in bad for n in samples])
    if not good[0]:
        every = [n for samples, _ in losses for n in samples]
        raise NotFiniteError(f"the gradient of {name} is", every)
