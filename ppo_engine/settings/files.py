"""YAML files and dotted overrides to validated settings, and back.

The keys are those of the dataclasses in `schema`; all problems are reported at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from ppo_engine.errors import UserError
from ppo_engine.messages import nearest_path
from ppo_engine.settings.problems import (
    explain,
    flatten,
    keys,
    refusal,
    section_kinds,
    section_of,
    without_unknown,
)
from ppo_engine.settings.schema import COMMANDS

Config = TypeVar("Config")


def load_config(
    cls: type[Config],
    file: str | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """Settings of class `cls`: its defaults, then the YAML `file`, then `key.key=value` overrides.

    Values are YAML: `null` is None, `1e-5` a number, `[a, b]` a list. An override of a key in a
    section that is None by default (`ppo.adaptive_kl.target=3`) switches the section on. Raises
    one `UserError` that lists every problem.
    """
    data = _read_file(file) if file is not None else {}
    _refuse_another_commands(cls, file, data)
    known = keys(cls)
    problems: list[str] = []
    for override in overrides:
        try:
            _set(data, *_parse_override(override), known)
        except UserError as error:
            problems.append(str(error))
    data = without_unknown(cls, data, "", [*known], problems)
    try:
        # Strict JSON refuses "yes" for a number, but takes 1 for 1.0 and a mapping for a section.
        config = TypeAdapter(cls).validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        problems.extend(explain(error, [*known]))
    if problems:
        raise refusal(problems, f" in {file}" if file is not None else "")
    return config


def as_yaml(tree: Any) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def as_dict(config: Any) -> dict[str, Any]:
    """Settings as nested dictionaries of values that JSON has; a UserError where Python has given
    another kind, such as a tensor among the arguments of a reward."""
    try:
        return cast(dict[str, Any], TypeAdapter(type(config)).dump_python(config, mode="json"))
    except PydanticSerializationError as error:
        raise UserError(
            f"A setting holds what config.yaml cannot: {error}. Give numbers, text, lists and "
            "dictionaries: of a number of NumPy or a tensor, value.item() or value.tolist()."
        ) from None


def changed_settings(
    then: Mapping[str, Any], now: Mapping[str, Any], free: Iterable[str]
) -> list[str]:
    """A line, without secrets, for each key in which two settings (`as_dict`) differ; not for
    those that are `free`."""
    before, after = (flatten(dict(tree)) for tree in (then, now))
    old, new = (flatten(shown_settings(dict(tree))) for tree in (then, now))
    return [
        f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
        for key in sorted({*before, *after} - set(free))
        if before.get(key) != after.get(key)
    ]


def shown_settings(tree: Any) -> Any:
    """Settings (lists and dictionaries) without secrets: every `url` as `shown_url` gives it."""
    if isinstance(tree, dict):
        return {
            key: shown_url(value) if key == "url" and value else shown_settings(value)
            for key, value in tree.items()
        }
    return [shown_settings(value) for value in tree] if isinstance(tree, list) else tree


def shown_url(url: str) -> str:
    """A URL without what may be secret: user and password, query, fragment.

    Of an invalid URL nothing is kept, as nobody can tell where its password ends.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return "http://…" if re.search("[@?#]", url) else url
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="…" if parts.query else "", fragment="").geturl()


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `1e-5` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a name, not a list or section", key_node.start_mark
                )
            key = key_node.value
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would read as numbers, or not as they are."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        # A "next line" that is not escaped is a line's end to YAML, and read as a space.
        style = '"' if "\x85" in text else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_str)


def _construct_number(loader: _Loader, node: yaml.ScalarNode) -> float | int:
    """A whole number such as 1e4 is an int, so that it serves integer settings too."""
    number = float(node.value.replace("_", ""))
    return int(number) if number.is_integer() else number


_LARGEST = 100_000  # values in a file: more than anybody writes

# YAML 1.1 wants a dot in the mantissa and a sign in the exponent: 1e-5 and 1.5e4 would be strings.
_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9]*)?[eE][-+]?[0-9]+$")
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("!exponent", _EXPONENT, list("-+0123456789"))
_Loader.add_constructor("!exponent", _construct_number)


def _read_file(file: str) -> dict[str, Any]:
    path = Path(file).expanduser()
    if path.is_dir():
        of_run = path / "config.yaml"
        hint = f" Did you mean {str(of_run)!r}?" if of_run.is_file() else ""
        raise UserError(f"Settings file {file!r} is a folder.{hint}")
    if not path.is_file():
        raise UserError(f"Settings file {file!r} does not exist.{nearest_path(file)}")
    try:
        data = _parse_yaml(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{_place(file, error)}: not valid YAML: {_what(error)}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{file}: settings must be `key: value` lines, got {type(data).__name__}.")
    return data


def _refuse_another_commands(cls: Any, file: str | None, data: dict[str, Any]) -> None:
    """A UserError where the keys of a file are those of one other command, and not of this one."""
    unknown = data.keys() - section_kinds(cls).keys()
    owners = [
        command
        for command, owner in COMMANDS.items()
        if unknown and command != "grpo" and data.keys() <= section_kinds(owner).keys()
    ]
    if len(owners) == 1:
        names = ", ".join(sorted(unknown))
        raise UserError(
            f"{file} holds the settings of `ppo-engine {owners[0]}`, not of this command, which "
            f"does not know {names}. What both have can be copied into a file of its own; the "
            "command's --dry-run prints what it takes."
        )


def _parse_override(override: str) -> tuple[list[str], Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{override!r}: an override is written key=value, such as run.seed=1")
    try:
        value = _parse_yaml(text) if text else ""
        _refuse_comment(text)
    except yaml.YAMLError as error:
        raise UserError(
            f"{override!r}: the value is not valid YAML: {_what(error)}. If it is text, quote it "
            f"for YAML too: {key}='\"…\"'"
        ) from error
    try:
        json.dumps([key, value], ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{override!a}: not UTF-8 text. Type it anew, or rename the file that it names."
        ) from None
    return key.strip().split("."), value


def _refuse_comment(text: str) -> None:
    """Raise a YAMLError where YAML leaves out the end of a value that stands alone."""
    node = yaml.compose(text, Loader=_Loader)
    rest = text[node.end_mark.index :].strip() if node is not None else text.strip()
    if rest:
        raise yaml.YAMLError(f"{rest!r} is a comment there, and would be left out")


def _parse_yaml(text: str) -> Any:
    try:
        data = yaml.load(text, Loader=_Loader)
        _refuse_endless(data)
        return data
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except ValueError as error:  # such as the date 2026-13-01
        raise yaml.YAMLError(str(error)) from None


def _refuse_endless(data: Any) -> None:
    """Raise a YAMLError where anchors make of a short text one without an end, or nearly so."""
    left, found = [data], 0
    while left:
        item = left.pop()
        found += 1
        if found > _LARGEST:
            raise yaml.YAMLError("an anchor (&name) holds itself, or too much")
        if isinstance(item, dict | list):
            left += item.values() if isinstance(item, dict) else item


def _set(data: dict[str, Any], path: list[str], value: Any, kinds: Mapping[str, Any]) -> None:
    """Set `value` at `path`; a section that is absent or null is created. Of a section, what
    `value` does not name stays as it is."""
    if isinstance(value, dict) and section_of(kinds.get(".".join(path))) is not None:
        _section(data, path)
        for name, inner in value.items():
            _set(data, [*path, str(name)], inner, kinds)
        return
    _section(data, path[:-1])[path[-1]] = value


def _section(data: dict[str, Any], path: list[str]) -> dict[str, Any]:
    for name in path:
        if not isinstance(data.get(name), dict):
            data[name] = {}
        data = data[name]
    return data


def _place(file: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return f"{file}:{mark.line + 1}" if mark is not None else file


def _what(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error).split("\n")[0]
