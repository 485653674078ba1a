"""Which parameters of a user's function get which lists: the batch's own, and the data's columns.

Names decide wherever they say enough: `responses`, or a column's name. Position decides where they
do not, as in `def f(p, r)`.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from ppo_engine.errors import UserError

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_VARIABLE = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)

_ONE_AT_A_TIME = "is called for one response at a time; here it is called once for the whole batch"
_TRL_ONLY = "needs a default: only TRL's trainers can hand it over"
# Names of what functions for other trainers are given, and these are not.
_FOREIGN = {
    **dict.fromkeys(("prompt", "response", "completion"), _ONE_AT_A_TIME),
    **dict.fromkeys(("solution_str", "data_source"), f"as one for verl, {_ONE_AT_A_TIME}"),
    "queries": "as one for OpenRLHF, gets prompts and responses joined; here they are two lists",
    **dict.fromkeys(("trainer_state", "log_extra", "log_metric", "environments"), _TRL_ONLY),
}
# No word for prompts, responses or turns: they get these lists by their names or not at all.
_NEVER_BY_POSITION = {
    *("prompts", "responses", "completions", "completion_ids", "completions_ids", "finished"),
    *("turns", *_FOREIGN),
}
# Words in a parameter's name, in the singular, that speak of something else than it would get at
# the first and the second place.
_REFERENCES = {
    *("truth", "gt", "solution", "label", "target", "reference", "ref", "expected", "gold"),
    *("golden", "correct"),
}
_SPEAKS_OF_OTHERS = (
    {
        *("response", "completion", "output", "answer", "generation", "generated", "prediction"),
        *("pred", "reply", "replie", "sample", *_REFERENCES),
    },
    {"prompt", "question", "query", "querie", "input", "instruction", "problem", *_REFERENCES},
)


@dataclass(frozen=True)
class Lists:
    """What a kind of function is given of a batch, besides the data's columns."""

    first: str  # what the first two parameters are where their names say nothing
    second: str
    answers: tuple[str, ...]  # forms of what the policy wrote: a function takes one at least
    arguments: str = ""  # the setting that gives arguments, if there is one


@dataclass(frozen=True)
class Arguments:
    """What a call passes: names of lists or columns."""

    positional: list[str]
    by_name: dict[str, str]  # by the parameter's name


class Signature:
    """The parameters of a user's function, as far as they can be seen.

    `subject` begins the messages.
    """

    def __init__(self, function: Callable[..., Any], lists: Lists, subject: str) -> None:
        found = _parameters(function)
        # What a partial has filled in is the user's choice, also where a column has that name.
        self._filled = {*function.keywords} if isinstance(function, functools.partial) else set()
        named = [p for p in found if p.kind not in _VARIABLE]
        self._named = [p for p in named if p.name not in self._filled]
        self._first_two = [p for p in self._named if p.kind in _POSITIONAL][:2]
        self._any_position = any(p.kind is p.VAR_POSITIONAL for p in found)
        self._any_name = any(p.kind is p.VAR_KEYWORD for p in found)
        self._lists = lists
        self._subject = subject

    def accepts(self, column: str) -> bool:
        """Whether the function gets a column of that name."""
        return self._any_name or any(p.name == column for p in self._named)

    def arguments(self, offered: Collection[str], columns: Collection[str]) -> Arguments:
        """What to pass, of the batch's lists `offered` and of the data's `columns`.

        Raises a UserError where the function asks for something else, does not take what the policy
        wrote, or takes a list whose name a column has too.
        """
        lists = self._lists
        if self._any_position and not self._any_name and not self._named:
            return Arguments([lists.first, lists.second], {})
        for p in self._required():
            if p.name in _FOREIGN and p.name not in columns:
                raise self._error(f"takes {p.name!r}, and {_FOREIGN[p.name]}")
        taken = {p.name: p.name for p in self._named if p.name in {*offered, *columns}}
        taken |= self._by_position(offered, columns)
        named = {_bare(name): name for name in columns if name not in taken}
        for p in self._named:
            if p.name not in taken and p.default is not p.empty and _bare(p.name) in named:
                raise UserError(
                    f"{self._subject} takes {p.name!r}, and the prompts have a column "
                    f"{named[_bare(p.name)]!r}: it would get its default. Give both one name."
                )
        if self._any_name:
            # TRL's functions find there whatever they do not name; ours name the responses.
            rest = columns if lists.second in taken.values() else (*columns, *offered)
            taken |= {name: name for name in rest if name not in {*taken, *self._filled}}
        both = sorted({*offered} & {*columns} & {*taken.values()})
        if both:
            raise UserError(
                f"{self._subject} takes {_quoted(both)}, and the prompts have a column of that "
                "name too: rename the column."
            )
        self._check_answers(taken, offered, columns)
        absent = [p.name for p in self._required() if p.name not in taken]
        if absent:
            near = difflib.get_close_matches(absent[0], columns, n=1) or ["…"]
            setting = f", or get it from {lists.arguments}.{absent[0]}" if lists.arguments else ""
            raise UserError(
                f"{self._subject} asks for {_quoted(absent)}, but the prompts have "
                f"{_quoted(columns) if columns else 'no other columns'}. Add the column, or name "
                f"the one that holds it (data.columns={{{absent[0]}: {near[0]}}}); a function of "
                f"your own may give the parameter a default{setting}."
            )
        return self._arranged(taken)

    def _required(self) -> Iterable[Parameter]:
        return (p for p in self._named if p.default is p.empty)

    def _by_position(self, offered: Collection[str], columns: Collection[str]) -> dict[str, str]:
        """The lists of the first two parameters: where the names of both say nothing, or where one
        stands beside the other's right name."""
        lists = self._lists
        known = {*offered, *columns, *_NEVER_BY_POSITION}
        blank = [
            p
            for p, others in zip(self._first_two, _SPEAKS_OF_OTHERS, strict=False)
            if p.name not in known and p.default is p.empty and not others & _words(p.name)
        ]
        right = ({lists.first}, {*lists.answers} & {*offered})
        pairs = list(zip(self._first_two, right, strict=False))
        if len(pairs) < 2 or not all(p in blank or p.name in names for p, names in pairs):
            return {}
        for parameter in blank:
            near = difflib.get_close_matches(parameter.name, columns, n=1, cutoff=0.8)
            if near:
                raise self._error(f"takes {parameter.name!r}, almost the name of a column")
        names = zip(self._first_two, (lists.first, lists.second), strict=True)
        return {p.name: name for p, name in names if p in blank}

    def _check_answers(
        self, taken: Mapping[str, str], offered: Collection[str], columns: Collection[str]
    ) -> None:
        lists = self._lists
        second = self._first_two[1].name if len(self._first_two) > 1 else ""
        named = {taken.get(p.name) for p in self._named} & {*lists.answers} & {*offered}
        if named:
            return
        if second in columns:
            raise self._error(f"takes the column {second!r} in place of the {lists.second}")
        if not self._any_name:
            raise self._error(f"does not take the {lists.second}")
        if not self._named and self._any_position:
            raise self._error("does not say what it takes (a decorator needs functools.wraps)")

    def _arranged(self, taken: Mapping[str, str]) -> Arguments:
        """By name, but the first two lists where they come first, whatever a decorator calls them,
        and what can only be passed by position."""
        positional = [p for p in self._named if p.kind is p.POSITIONAL_ONLY]
        found = [taken.get(p.name) for p in self._first_two]
        if len(positional) < 2 and found == [self._lists.first, self._lists.second]:
            positional = self._first_two
        names = list(itertools.takewhile(taken.__contains__, (p.name for p in positional)))
        by_name = {name: source for name, source in taken.items() if name not in names}
        return Arguments([taken[name] for name in names], by_name)

    def _error(self, what: str) -> UserError:
        """That the function `what`, and how to write it."""
        lists = self._lists
        return UserError(
            f"{self._subject} {what}. Write it with the parameters {lists.first} and "
            f"{lists.second}, lists as long as the batch, and with a parameter for each column "
            "that it needs, of the column's name."
        )


def _parameters(function: Callable[..., Any]) -> list[Parameter]:
    """Those of the outermost function that names any: a decorator's own may be `*args, **kwargs`.
    `*args` where they cannot be seen, as of some built-in functions."""
    try:
        outer = list(inspect.signature(function, follow_wrapped=False).parameters.values())
        if any(p.kind not in _VARIABLE for p in outer):
            return outer
        if inspect.isfunction(function) and hasattr(function, "__wrapped__"):
            return _parameters(function.__wrapped__)
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return [Parameter("args", Parameter.VAR_POSITIONAL)]


def _bare(name: str) -> str:
    """The same for names that differ in case, underscores and number only."""
    return name.lower().replace("_", "").rstrip("s")


def _words(name: str) -> set[str]:
    return {word.rstrip("s") for word in re.findall("[a-z]+", name.lower())}


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
