"""What is wrong with settings, in words: unknown keys with the nearest known one, and wrong values,
the same for files, the command line and Python."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from ppo_engine.errors import UserError


def refusal(problems: Sequence[str], source: str = "") -> UserError:
    return UserError(f"Bad settings{source}:\n" + "\n".join(f"  - {line}" for line in problems))


def problems_of_call(
    cls: Any, args: Sequence[Any], kwargs: Mapping[str, Any], error: ValidationError
) -> list[str]:
    """A line for each problem of a settings class `cls` that was called with these."""
    names, known = list(section_kinds(cls)), list(keys(cls))
    problems: list[str] = []
    without_unknown(cls, {**dict(zip(names, args, strict=False)), **kwargs}, "", known, problems)
    return problems + explain(error, known, names)


def section_kinds(cls: Any) -> dict[str, Any]:
    """The type of each field of a settings class, in their order."""
    kinds = typing.get_type_hints(cls, include_extras=True)
    return {field.name: kinds[field.name] for field in dataclasses.fields(cls)}


def keys(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a settings class, sections included, and the type of each."""
    found: dict[str, Any] = {}
    for name, kind in section_kinds(cls).items():
        found[prefix + name] = kind
        section = section_of(kind)
        if section is not None:
            found.update(keys(section, f"{prefix}{name}."))
    return found


def section_of(kind: Any) -> Any:
    """The dataclass behind a field's type, also when it is optional; None for plain values."""
    if dataclasses.is_dataclass(kind):
        return kind
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next(filter(dataclasses.is_dataclass, typing.get_args(kind)), None)
    return None


def section_in_list(kind: Any) -> Any:
    """The dataclass of a list of sections, such as `reward.sources`; None for all else."""
    section = next(iter(typing.get_args(kind)), None)
    return section if typing.get_origin(kind) is list and section_of(section) else None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def without_unknown(
    cls: Any, data: Mapping[str, Any], prefix: str, known: Sequence[str], problems: list[str]
) -> dict[str, Any]:
    """`data` without unknown keys, each a problem that names the nearest known one."""
    kinds = section_kinds(cls)
    kept: dict[str, Any] = {}
    for name, value in data.items():
        kind = kinds.get(name)
        if kind is None:
            for key in flatten({name: value}, prefix):
                problems.append(f"{key}: unknown key{nearest(key, known)}")
            continue
        section, in_list = section_of(kind), section_in_list(kind)
        if value is None and section is not None and kind is section:
            value = {}  # a section whose every line is commented out
        if section is not None and isinstance(value, dict):
            value = without_unknown(section, value, f"{prefix}{name}.", known, problems)
        if in_list is not None and isinstance(value, list):
            value = [
                _item(in_list, item, f"{prefix}{name}[{index}].", problems)
                for index, item in enumerate(value)
            ]
        kept[name] = value
    return kept


def _item(cls: Any, item: Any, prefix: str, problems: list[str]) -> Any:
    if not isinstance(item, dict):
        return item
    return without_unknown(cls, item, prefix, list(keys(cls, prefix)), problems)


def nearest(unknown: str, known: Iterable[str]) -> str:
    """The end of a message: which of the `known` keys the `unknown` one may have meant."""
    known = list(known)
    if unknown in known:  # a dotted key inside a YAML file
        section, _, name = unknown.rpartition(".")
        return f": write {name!r} inside the section {section!r}"
    last = unknown.rpartition(".")[2]
    by_name: dict[str, list[str]] = {}
    for key in known:
        by_name.setdefault(key.rpartition(".")[2], []).append(key)
    meant = by_name.get(last) or difflib.get_close_matches(unknown, known, n=1)
    if not meant:
        names = difflib.get_close_matches(last, list(by_name), n=1)
        meant = by_name[names[0]] if names else []
    if not meant:
        return f"; the sections are {', '.join(key for key in known if '.' not in key)}"
    return f"; did you mean {' or '.join(meant[:3])}?"


def explain(
    error: ValidationError, known: Sequence[str], positional: Sequence[str] = ()
) -> list[str]:
    """One line per wrong value: its key, what was expected and what came. Unknown keys have their
    lines from `without_unknown`; `positional` arguments have names."""
    expected: dict[str, list[str]] = {}
    given: dict[str, Any] = {}
    for problem in error.errors(include_url=False):
        if problem["type"] == "unexpected_keyword_argument":
            continue
        loc = list(problem["loc"])
        if loc and isinstance(loc[0], int) and loc[0] < len(positional):
            loc[0] = positional[loc[0]]
        parts = [str(part) for part in loc]
        # Pydantic adds the members of a union and the indices of a list behind the key.
        while parts and ".".join(parts) not in known:
            parts.pop()
        key = ".".join(parts) or "settings"
        message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        message = message.partition(", unable to ")[0]
        if problem["type"] == "dataclass_type" and dataclasses.is_dataclass(problem["input"]):
            message = _wanted_section(problem["ctx"]["class_name"], type(problem["input"]))
        elif problem["type"].endswith("dataclass_type"):
            first = next((name for name in known if name.startswith(f"{key}.")), "")
            message = f"should be a section of keys, such as {first}" if first else message
        elif problem["type"] == "list_type":
            message = "should be a list, such as [a, b]"
        elif problem["type"] == "missing":  # of a list of fixed length: a section has defaults
            message = f"should have at least {int(problem['loc'][-1]) + 1} values"
        if message not in expected.setdefault(key, []):
            expected[key].append(message)
        given.setdefault(key, problem["input"])
    return [
        f"{key}: {' or '.join(messages)}, got {_shown(given[key])}"
        for key, messages in expected.items()
    ]


def _wanted_section(name: str, given: type) -> str:
    """What a section of Python's should be, which is of another class; a class that is made of the
    `given` one has its settings, with other defaults."""
    made_of_it: list[type] = given.__subclasses__()
    has_all = name in [cls.__name__ for cls in made_of_it]
    more = f" (which has all of {given.__name__})" if has_all else ""
    return f"should be a {name}{more}, or a dictionary of its keys"


def _shown(value: Any) -> str:
    """A value as it is written in YAML, a section of Python's by the name of its class."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__name__}(…)"
    return json.dumps(value, default=repr)
