"""What passes may take of the memory: half of it where it runs out, and all of them once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ppo_engine.errors import UserError
from ppo_engine.models.determinism import is_deterministic
from ppo_engine.models.out_of_memory import MemoryRanOut, freeing
from ppo_engine.models.reader import Limit, plan

Result = TypeVar("Result")

# By the section of the settings: what says how long a row is.
_LENGTHS = {
    "ppo": "generation.max_new_tokens or data.max_prompt_tokens",
    "sft": "data.max_tokens",
    "reward": "data.max_tokens",
    "": "the length of texts",
}


class Budget:
    """What a pass has at most, of all models that share it. Where memory runs out in one, it is
    half of what that had, for good."""

    def __init__(self, limit: Limit, section: str = "") -> None:
        """`section` of the settings has `micro_batch_tokens`, if any does."""
        self.limit = limit
        self._section = section
        self._note: str | None = None

    def run(
        self,
        lengths: Sequence[int],
        attempt: Callable[[list[list[int]]], Result],
        *,
        packed: bool,
    ) -> Result:
        """What `attempt` gives of the passes over texts of these `lengths`, as `plan` has them.

        Where memory runs out, it begins again with passes of half the size, and what it gives is
        what it would have given if these had been the first: it must not depend on what an attempt
        before it has left. Raises a `UserError` where each pass has but one row.
        """
        failure: tuple[int, str] | None = None  # the first: tokens of its largest pass, and why
        while True:
            passes = plan(lengths, self.limit, packed=packed)
            try:
                result = freeing(attempt, passes)
                break
            except MemoryRanOut as error:
                tokens = [_tokens(lengths, indices, packed) for indices in passes]
                of_several = [n for n, x in zip(tokens, passes, strict=True) if len(x) > 1]
                if not of_several:
                    raise UserError(self._of_one_row(max(tokens), str(error))) from error
                if is_deterministic():
                    raise UserError(
                        f"Memory ran out in a pass of {max(tokens):,} tokens ({error}). As "
                        "run.deterministic is set it is not repeated in smaller ones, which round "
                        "otherwise: set micro_batch_tokens to half of that."
                    ) from error
                self.limit = self.limit._replace(tokens=max(of_several) // 2)
                failure = failure or (max(tokens), str(error))
        if failure:
            self._note = self._told(*failure)
        return result

    def take_note(self) -> str | None:
        """What is to be said of the last failures, once."""
        note, self._note = self._note, None
        return note

    def _told(self, tokens: int, reason: str) -> str:
        set_it = f" Set {self._section}.micro_batch_tokens={self.limit.tokens} to begin with that."
        return (
            f"Memory ran out in a pass of {tokens:,} tokens ({reason}). It was repeated in passes "
            f"of at most {self.limit.tokens:,}, as all are from here on: more time, but the same "
            f"results up to rounding.{set_it * bool(self._section)}"
        )

    def _of_one_row(self, tokens: int, reason: str) -> str:
        return (
            f"Memory ran out in a pass of one row of {tokens:,} tokens, which cannot be divided "
            f"({reason}). Lower {_LENGTHS[self._section]}; of the models that are trained set "
            "gradient_checkpointing=true, optimizer.moments=8bit, trainable_layers or lora.rank=16."
        )


def _tokens(lengths: Sequence[int], indices: Sequence[int], packed: bool) -> int:
    """Of a pass, padding included."""
    of_texts = [lengths[i] for i in indices]
    return sum(of_texts) if packed else len(of_texts) * max(of_texts)
