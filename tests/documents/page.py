"""A page as blocks: what is to be run, what it shows, and the comments that say how."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

# `<!-- check: RULE … -->` above a block; whether the rule needs more words.
RULES = {
    "skip because": True,
    "long because": True,  # skipped in the short form, and run once, in a terminal
    "file": True,  # the block is this file
    "output": False,  # the block is what the one above prints
    "fails": False,  # the command ends with an error, without a traceback
    "goes on": False,  # the snippet is run as one with that above
}
_COMMENT = re.compile(r"<!-- check: (.*?)-->", re.DOTALL)
_FENCE = re.compile(r"( *)(`{3,})(\w*) *$")
_COMMANDS = re.compile(r"(\$ )?(ppo-engine|python|make|pip|git|bash|cat)\b")
_SHELLS = ("bash", "sh", "shell", "console")


class PageError(Exception):
    """A page that says something to the checker which it does not understand."""


@dataclass(frozen=True)
class Block:
    line: int  # of its first line, from 1
    language: str
    text: str
    rule: str = ""
    argument: str = ""

    @property
    def kind(self) -> str:
        """setup, python, commands, or "" for what is only to be looked at."""
        if self.language in ("setup", "python"):
            return self.language
        unnamed = not self.language and _COMMANDS.match(self.text)
        return "commands" if unnamed or self.language in _SHELLS else ""


@dataclass(frozen=True)
class Step:
    """Something that a reader runs, and what the page says that it prints, if it does."""

    line: int
    text: str
    python: bool = False
    shown: str | None = None
    fails: bool = False
    file: str = ""  # not run but written to this file


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks and setups of `page`; PageError for a rule that is none or has no block."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found: list[Block] = []
    rule, at = "", 0
    number = 0
    while number < len(lines):
        number += 1
        line = lines[number - 1]
        if "<!-- check:" in line:
            if rule:
                raise PageError(f"{page.name}:{at}: no block follows 'check: {rule}'")
            start = number
            while "-->" not in lines[number - 1]:
                number += 1
            comment = _COMMENT.search("\n".join(lines[start - 1 : number]))
            assert comment is not None
            words = comment[1]
            if words.startswith("setup\n"):
                found.append(Block(start + 1, "setup", words.removeprefix("setup\n")))
            else:
                rule, at = words.strip(), start
        elif fence := _FENCE.match(line):
            start = number + 1
            ends = re.compile(rf" *{fence[2]}`* *$")
            number += 1
            while number <= len(lines) and not ends.match(lines[number - 1]):
                number += 1
            text = textwrap.dedent("\n".join(lines[start - 1 : number - 1]))
            found.append(Block(start, fence[3], text, *_parsed(rule, f"{page.name}:{at}")))
            rule = ""
    if rule:
        raise PageError(f"{page.name}:{at}: no block follows 'check: {rule}'")
    return found


def _parsed(rule: str, where: str) -> tuple[str, str]:
    for name, needs_more in RULES.items():
        if rule == name or rule.startswith(f"{name} "):
            more = rule.removeprefix(name).strip()
            if bool(more) != needs_more:
                raise PageError(f"{where}: 'check: {name}' " + ("says no more" if more else "…?"))
            return name, more
    if rule:
        raise PageError(f"{where}: 'check: {rule}' is none of {', '.join((*RULES, 'setup'))}")
    return "", ""


def steps_of(page: Path, *, short: bool) -> tuple[list[Step], list[str]]:
    """What is run of `page`, in its order, and a line for each block that is not, with the
    reason."""
    steps: list[Step] = []
    left_out: list[str] = []
    for block in blocks_of(page):
        if block.rule == "skip because" or (short and block.rule == "long because"):
            left_out.append(f"{page.name}:{block.line} not run: {block.argument}")
        elif block.rule == "file":
            steps.append(Step(block.line, block.text + "\n", file=block.argument))
        elif block.rule in ("output", "goes on"):
            if not steps or steps[-1].file or (block.rule == "goes on" and not steps[-1].python):
                raise PageError(f"{page.name}:{block.line}: nothing is run above it")
            if block.rule == "output":
                steps[-1] = replace(steps[-1], shown=block.text)
            else:
                steps[-1] = replace(steps[-1], text=f"{steps[-1].text}\n{block.text}", shown=None)
        elif block.kind:
            steps += _run(block)
    return steps, left_out


def _run(block: Block) -> Iterator[Step]:
    """A snippet and a script are one step; of `$ command` and its output, each command is one."""
    fails = block.rule == "fails"
    if block.kind != "commands" or not block.text.startswith("$ "):
        yield Step(block.line, block.text, python=block.kind == "python", fails=fails)
        return
    for command in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        lines = command.splitlines()
        length = 1 + next((n for n, line in enumerate(lines) if not line.endswith("\\")), 0)
        shown = "\n".join(lines[length:]).strip("\n")
        yield Step(block.line, "\n".join(lines[:length]), shown=shown or None, fails=fails)
