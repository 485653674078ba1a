"""What is to be ranked: prompts with several responses, as `ppo-engine generate` writes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from ppo_engine.data.columns import Columns, kind
from ppo_engine.data.forms import (
    CHATS,
    PROMPTS,
    ChatRules,
    check_prompt,
    complete_prompt,
    take_prompt,
)
from ppo_engine.data.preferences import check_response
from ppo_engine.data.rows import BadLineError, BadLines, Row, read_rows
from ppo_engine.errors import UserError
from ppo_engine.messages import counted
from ppo_engine.text.prompt import Message, Prompt

Rank = TypeVar("Rank")

# Prompts are shown as chats wherever that is possible; what a model will be given is another thing.
_SHOWN = ChatRules(template=True, as_chat=False)


@dataclass(frozen=True)
class Candidate:
    """A prompt and the responses to it. `row` is what its file has, which a ranking keeps."""

    row: Row
    place: str  # in its file
    prompt: Prompt
    responses: tuple[str | Message, ...]
    finished: tuple[bool, ...]  # whether each ended by itself
    options: dict[str, Any] = field(default_factory=dict)  # tools and arguments for the template

    @cached_property
    def key(self) -> str:
        """The same for the same prompt and responses, in whatever order these stand."""
        answers = sorted(map(_text, self.answers))
        return hashlib.sha256(_text([self.prompt, self.options, answers]).encode()).hexdigest()

    @cached_property
    def answers(self) -> tuple[tuple[str | Message, bool], ...]:
        """The responses, each with whether it ended by itself: all that tells them apart."""
        return tuple(zip(self.responses, self.finished, strict=True))

    @cached_property
    def distinct(self) -> tuple[int, ...]:
        """The responses that a person is shown: of equal ones, as sampled ones often are, the
        first."""
        return tuple(dict.fromkeys(self.first_like))

    @cached_property
    def first_like(self) -> tuple[int, ...]:
        """Of each response, the first that is equal to it."""
        return tuple(map(self.answers.index, self.answers))

    def in_order_of(self, other: Candidate, ranks: Sequence[Rank]) -> list[Rank]:
        """The `ranks` of these responses as the `other` has the different ones of the same."""
        return [ranks[self.answers.index(other.answers[number])] for number in other.distinct]


def load_candidates(path: str | Path) -> tuple[list[Candidate], list[str]]:
    """Each prompt of a file that has something to rank, once; and notes on what was left out.

    Any file of rows with a prompt (`data.forms` names its columns) and `responses`. Raises a
    UserError for a row without them, and where nothing is left.
    """
    bad_lines = BadLines("error", "`ppo-engine generate --n 4 --out FILE` writes such rows.")
    found: dict[str, Candidate] = {}
    alone = again = 0
    for place, row in read_rows(path, "candidates", bad_lines):
        try:
            candidate = candidate_of(row, place)
        except BadLineError as error:
            bad_lines.add(place, error.reason, error.detail)
            continue
        if len(candidate.distinct) < 2:
            alone += 1
        elif candidate.key in found:
            again += 1
        else:
            found[candidate.key] = candidate
    if not found:
        raise UserError(f"{path} has nothing to rank: no prompt with two different responses.")
    notes = []
    if alone:
        notes.append(f"{counted(alone, 'row')} left out: they have no two different responses.")
    if again:
        notes.append(f"{counted(again, 'row')} left out: the same came before.")
    return list(found.values()), notes


def candidate_of(row: Any, place: str) -> Candidate:
    """The candidate in a row of a file; a `BadLineError` where it is none."""
    columns = Columns(row)
    for names in ((*PROMPTS, *CHATS), ("responses",)):
        if not columns.find(names):
            there = ", ".join(map(repr, columns.left)) or "none"
            raise BadLineError(f"no column {names[0]!r}", f" (columns: {there})")
    prompt, options = complete_prompt(check_prompt(take_prompt(columns)[1]), columns, _SHOWN)
    responses = columns.take("responses")
    finished = columns.take("finished")
    if not isinstance(responses, list | tuple):
        raise BadLineError("'responses' must be a list", f", not {kind(responses)}")
    if finished is None:
        finished = [True] * len(responses)
    if not isinstance(finished, list | tuple) or len(finished) != len(responses):
        raise BadLineError("'responses' and 'finished' differ in length")
    if not all(isinstance(ended, bool) for ended in finished):
        raise BadLineError("'finished' must be true or false, of each response")
    checked = tuple(map(check_response, responses))
    return Candidate(dict(row), place, prompt, checked, tuple(finished), options)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
