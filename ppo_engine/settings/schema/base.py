"""What every settings class is made with: kinds of numbers, checks in the user's words, and the
descriptions that stand below the fields."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Optional, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from ppo_engine.errors import UserError
from ppo_engine.messages import shown
from ppo_engine.settings.problems import (
    problems_of_call,
    refusal,
    section_in_list,
    section_kinds,
    section_of,
)

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]

T = TypeVar("T")

# The type of a setting that follows from others as long as it is None: see `derived`. Who reads it
# has resolved settings, so that a type checker need not hear of None.
if TYPE_CHECKING:
    Derived = Annotated[T, "derived"]
else:
    Derived = Optional


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def settings(cls: type[T]) -> type[T]:
    """A frozen dataclass that validates its fields, and whose `help` describes them. A `UserError`
    names unknown fields and wrong values."""
    made: Any = dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls)
    validated = made.__init__

    @functools.wraps(validated)
    def checked(self: Any, /, *args: Any, **kwargs: Any) -> None:
        try:
            validated(self, *args, **kwargs)
        except ValidationError as error:
            problems = problems_of_call(made, args, kwargs, error)
            raise refusal(problems, f" in {made.__name__}") from None

    made.__init__ = checked
    made.__doc__ = "\n\n".join([inspect.cleandoc(cls.__doc__ or ""), _listed(made)])
    return cast(type[T], made)


def settings_of(cls: type[T], given: T | Mapping[str, Any] | None) -> T:
    """The settings of class `cls` that Python was given: they themselves, a dictionary of their
    keys, or None for the defaults; a `UserError` for anything else."""
    if isinstance(given, cls):
        return given
    if given is None or isinstance(given, Mapping):
        return cls(**{str(key): value for key, value in (given or {}).items()})
    raise UserError(
        f"config should be a {cls.__name__}, or a dictionary of its keys, but is {shown(given)}."
    )


def described(cls: type) -> dict[str, str]:
    """The description of each field by its name, in one line: the docstring below it, or below the
    field of the base class that it overrides."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= _docstrings(base.__module__).get(base.__name__, {})
    return found


@functools.cache
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    """The docstrings below the fields of a module's classes, read from its source: at run time
    Python has them no more. Empty without a source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):
        return {}
    found: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, below in zip(node.body, node.body[1:], strict=False):
            match field, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found.setdefault(node.name, {})[name] = " ".join(text.split())
    return found


def _listed(cls: type) -> str:
    """The fields with their descriptions, for `help`; sections with their classes."""
    lines = []
    kinds, texts = section_kinds(cls), described(cls)
    for name, kind in kinds.items():
        section = section_of(kind) or section_in_list(kind)
        title = name if section is None else f"{name} ({section.__name__})"
        text = f"{title}: {texts.get(name, '')}"
        lines.append(textwrap.fill(text, 88, subsequent_indent="    "))
    return "\n".join(lines)
