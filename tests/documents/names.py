"""What pages name and must exist: links, anchors, settings, metrics, options of `ppo-engine`."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from documents.page import blocks_of
from ppo_engine.cli.parser import make_parser
from ppo_engine.errors import UserError
from ppo_engine.settings import schema
from ppo_engine.settings.files import load_config

COMMANDS = (
    schema.PPOConfig, schema.RewardModelConfig, schema.SFTConfig, schema.GenerateConfig,
    schema.DemoConfig,
)  # fmt: skip
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_SETTING = re.compile(r"([a-z]\w*(?:\.[a-z]\w*)+)(?:=(\S*))?")
_METRIC = re.compile(
    r"(?:objective|policy|value|critic|rollout|eval|rewards|reward|train|time|tokens_per_second|mfu|"
    r"padding|overhead|memory)/[\w<>/…*{}-]+"
)
# They begin like a setting, and are files or Python.
_FILE_ENDS = ("py", "json", "jsonl", "yaml", "md", "csv", "png", "safetensors")
_PYTHON = ("model.generate", "policy.save")
_PLACEHOLDER = re.compile(r"…|\.\.\.|[A-Z]{2,}|^[A-Za-z]?$")


def faults(page: Path, root: Path) -> list[str]:
    """A line for each thing that `page` names and that does not exist; `root` has docs/."""
    text = page.read_text(encoding="utf-8")
    prose = _without_blocks(text)
    known = _metrics(root / "docs" / "metrics.md")
    found = []
    for link in _LINK.finditer(_SPAN.sub(lambda span: " " * len(span[0]), prose)):
        found += [(link.start(), problem) for problem in _link(link[1], page)]
    for span in _SPAN.finditer(prose):
        words = " ".join(span[2].split())
        if words.startswith("ppo-engine "):
            problems = [*_command(words)]
        elif match := _SETTING.fullmatch(words):
            problems = [*_setting(match[1], match[2])]
        elif known and _METRIC.fullmatch(words):
            problems = [] if _is_metric(words, known) else [f"no metric {words!r} in metrics.md"]
        else:
            continue
        found += [(span.start(), problem) for problem in problems]
    where = [f"{page.name}:{prose.count(chr(10), 0, at) + 1}: {what}" for at, what in found]
    for block in blocks_of(page):
        if block.kind == "commands":
            script = re.sub(r"\\\n", " ", block.text)
            for command in re.findall(r"^(?:\$ )?(ppo-engine .*)$", script, re.MULTILINE):
                where += [f"{page.name}:{block.line}: {what}" for what in _command(command)]
    return where


def _without_blocks(text: str) -> str:
    """The same lines, with nothing in those of fenced blocks and of comments."""

    def blank(match: re.Match[str]) -> str:
        return "\n" * match[0].count("\n")

    text = re.sub(r"^ *(`{3,}).*?^ *\1`* *$", blank, text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<!--.*?-->", blank, text, flags=re.DOTALL)


def _link(target: str, page: Path) -> Iterator[str]:
    if re.match(r"[a-z]+:", target):
        return
    path, _, anchor = target.partition("#")
    file = (page.parent / path) if path else page
    if not file.exists():
        yield f"a dead link: {target}"
    elif anchor and file.suffix == ".md" and anchor not in _anchors(file):
        yield f"a link to a heading that is not there: {target}"


def _anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    names: set[str] = set()
    prose = _without_blocks(page.read_text(encoding="utf-8"))
    for heading in re.findall(r"^#+ +(.*?)#* *$", prose, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = sum(
            re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in names
        )
        names.add(f"{name}-{count}" if count else name)
    return names


def _setting(key: str, value: str | None) -> Iterator[str]:
    section, _, _ = key.partition(".")
    if section not in {name.partition(".")[0] for cls in COMMANDS for name in _keys(cls)}:
        return
    if key in _PYTHON or (value is None and key.rpartition(".")[2] in _FILE_ENDS):
        return
    having = [cls for cls in COMMANDS if _has(cls, key)]
    if not having:
        yield f"no setting {key!r}"
    elif value is not None and not _PLACEHOLDER.search(value):
        problems = [_refusal(cls, f"{key}={value}") for cls in having]
        if all(problems):
            yield f"{key}={value} is refused: {problems[0]}"


def _has(cls: type, key: str) -> bool:
    """Whether a command takes `key`, a setting or a section; what is below an open dictionary is
    for its reader to judge."""
    keys = _keys(cls)
    return key in keys or any(keys[k] and key.startswith(f"{k}.") for k in keys)


def _refusal(cls: type, override: str) -> str:
    try:
        load_config(cls, overrides=[override])
    except UserError as error:
        return str(error).splitlines()[-1].strip(" -")
    return ""


@cache
def _keys(cls: type, prefix: str = "") -> dict[str, bool]:
    """Every key of a command's settings; whether it is a dictionary with keys of the user's."""
    found: dict[str, bool] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        options = typing.get_args(hint) if union else (hint,)
        found[prefix + field.name] = any(typing.get_origin(o) is dict for o in options)
        for option in options:
            if dataclasses.is_dataclass(option):
                found |= _keys(option, f"{prefix}{field.name}.")
    return found


def _command(words: str) -> Iterator[str]:
    """Of a command line: the command, its options and its settings."""
    words = words.split(" #")[0]
    try:
        name, *rest = shlex.split(words)[1:]
    except ValueError:  # a part of a command, with one of two quotes
        name, *rest = words.split()[1:]
    parsers = next(
        action.choices
        for action in make_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    if name.startswith("-"):
        parsers, name, rest = {"": make_parser()}, "", [name, *rest]
    if name.isupper():
        return
    if name not in parsers:
        yield f"no command 'ppo-engine {name}'"
        return
    for word in rest:
        option = word.strip("[]").partition("=")[0]
        if option.startswith("--") and option not in parsers[name]._option_string_actions:
            yield f"'ppo-engine {name}' has no option {option}"
        elif match := _SETTING.fullmatch(word):
            yield from _setting(match[1], match[2] or "…")


def _metrics(page: Path) -> list[str]:
    """What docs/metrics.md has in backticks, none where there is no such page yet."""
    if not page.exists():
        return []
    return [span[2] for span in _SPAN.finditer(_without_blocks(page.read_text(encoding="utf-8")))]


def _is_metric(name: str, known: list[str]) -> bool:
    """Whether one of `known` is `name`. In either, `<name>`, `…`, `*` and `{name}` stand for any
    text."""
    open_part = r"<[^>]*>|…|\*|\{[^}]*\}"
    fixed = [re.sub(open_part, "\0", other) for other in (*known, name)]
    patterns = [".+".join(map(re.escape, other.split("\0"))) for other in fixed]
    asked = fixed[-1]
    return any(
        re.fullmatch(pattern, asked) or re.fullmatch(patterns[-1], other)
        for pattern, other in zip(patterns[:-1], fixed[:-1], strict=True)
    )
