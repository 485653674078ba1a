"""What `ppo-engine inspect` prints: a summary of the file, then rows token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ppo_engine.inspection.kinds import KINDS, guess
from ppo_engine.inspection.rows import Inspection, Model, Part, Shown, open_model
from ppo_engine.messages import counted
from ppo_engine.text.tokenizer import spellings

_SHOWN = 400  # tokens of a part; of longer ones the first half and the last
_FACT = 200  # characters
_BETWEEN, _NEWLINE, _OPEN, _CLOSE = "·", "⏎", "⟦", "⟧"
_STYLES = {"special": "magenta", "marked": "bold green", "between": "dim"}


def inspect(
    configs: Mapping[str, Any],
    path: str,
    count: int,
    kind: str | None = None,
    *,
    trust: bool = False,
) -> None:
    """Show what becomes of the data for the model at `path`, and the first `count` rows.

    `configs`: settings by the kinds that the rows may be of; `kind` is theirs, or is guessed. With
    `trust`, the model's configuration and tokenizer are those of code that comes with it.
    """
    model = open_model(path, trust=trust)
    data = next(iter(configs.values())).data
    name = kind or guess(data.path, model, configs)
    found = KINDS[name].inspect(configs[name], model, count)
    console = Console(highlight=False, soft_wrap=True)
    guessed = "" if kind else " (a guess: --as sft, preferences or prompts tells)"
    console.print(Text(f"{data.path}, as {KINDS[name].unit}{guessed}", style="bold"))
    for label, text in _summary(found, name, configs[name].data.on_bad_line, model):
        console.print(Text.assemble((f"  {label:<10}", "cyan"), text))
    if found.rows:
        console.print(_legend(KINDS[name].marks))
    for row in found.rows:
        _print_row(console, row, model.tokenizer)
    if found.usable > len(found.rows):
        further = counted(found.usable - len(found.rows), "further row")
        console.print(Text(f"\n{further} not shown"))


def _summary(
    found: Inspection, name: str, on_bad_line: str, model: Model
) -> Iterator[tuple[str, str]]:
    tokenizer = model.tokenizer
    ends = ", ".join(tokenizer.convert_ids_to_tokens(found.end_ids))
    template = "a" if tokenizer.chat_template else "no"
    yield "model", f"{model.path}, with {template} chat template; answers end with {ends}"
    yield "rows", f"{found.usable} usable, {found.skipped} not"
    if found.skipped and on_bad_line == "error":
        command = KINDS[name].command
        yield "", f"ppo-engine {command} stops at a bad row, unless data.on_bad_line=skip"
    yield "form", _forms(found, model)
    for label, lengths in found.tokens.items():
        yield label, f"{_quantiles(lengths)}, {found.per}"
    for note in found.notes:
        yield "note", note


def _forms(found: Inspection, model: Model) -> str:
    texts = found.usable - found.chats
    forms = []
    if found.chats:
        forms.append(f"{counted(found.chats, 'chat')}, rendered by the chat template")
    if texts:
        past = ", past the chat template" if model.tokenizer.chat_template else ""
        forms.append(f"{counted(texts, 'raw text')}{past}")
    return "; ".join(forms)


def _quantiles(lengths: Sequence[int]) -> str:
    ordered = sorted(lengths)
    last = len(ordered) - 1
    parts = {"min": 0, "median": last // 2, "95 %": round(0.95 * last), "max": last}
    return ", ".join(f"{name} {ordered[place]:,}" for name, place in parts.items())


def _legend(marks: str) -> Text:
    legend = f"\n  {_BETWEEN} between tokens, {_NEWLINE} newline"
    return Text(legend + (f", {_OPEN}{marks}{_CLOSE}" if marks else ""), style="dim")


def _print_row(console: Console, row: Shown, tokenizer: PreTrainedTokenizerBase) -> None:
    console.print(Text(f"\n{row.place}", style="bold"))
    for fact in row.facts:
        console.print(Text(f"  {_shortened(fact)}"))
    for part in row.parts:
        console.print(Text(f"  {part.title}", style="cyan"))
        for line in _text_of(part, tokenizer).split("\n"):
            console.print(Text.assemble(("  │ ", "dim"), line))
        if part.then:
            console.print(Text(f"  ▶ {part.then}", style="cyan"))


def _shortened(fact: str) -> str:
    if len(fact) <= _FACT:
        return fact
    return f"{fact[:_FACT]}… ({len(fact) - _FACT:,} characters more)"


def _text_of(part: Part, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The tokens of a part as text: special tokens and newlines visible, marks around marked
    ones."""
    text = Text()
    start, end = part.truncated
    if start:
        text.append(f"[{counted(start, 'token')} truncated]\n", style="yellow")
    for piece in _windows(len(part.ids)):
        if piece.start:
            left_out = slice(_SHOWN // 2, piece.start)
            hidden, marked = len(part.ids[left_out]), sum(part.marked[left_out])
            of_these = f", {marked} of them marked" if marked else ""
            text.append(f"\n[{counted(hidden, 'token')} not shown{of_these}]\n", style="yellow")
        _append_tokens(text, part, piece, tokenizer)
    if end:
        text.append(f"\n[{counted(end, 'token')} truncated]", style="yellow")
    return text


def _windows(length: int) -> list[range]:
    """The tokens that are shown."""
    if length <= _SHOWN:
        return [range(length)]
    return [range(_SHOWN // 2), range(length - _SHOWN // 2, length)]


def _append_tokens(
    text: Text, part: Part, window: range, tokenizer: PreTrainedTokenizerBase
) -> None:
    special = set(tokenizer.added_tokens_decoder)
    inside = False
    for tokens, written in spellings(tokenizer, part.ids, part.marked, window):
        marked = part.marked[tokens.start]
        if inside and not marked:
            _append_to_line(text, _CLOSE, "marked")
        elif tokens.start > window.start and marked == inside:
            _append_to_line(text, _BETWEEN, "between")
        if marked and not inside:
            text.append(_OPEN, style=_STYLES["marked"])
        inside = marked
        style = "special" if part.ids[tokens.start] in special else "marked" if marked else ""
        text.append(_visible(written), style=_STYLES.get(style, ""))
    if inside:
        _append_to_line(text, _CLOSE, "marked")


def _append_to_line(text: Text, mark: str, style: str) -> None:
    """Append what belongs to the token before it: ahead of the line's break, if it has ended."""
    ended = text.plain.endswith("\n")
    if ended:
        text.right_crop(1)
    text.append(mark, style=_STYLES[style])
    if ended:
        text.append("\n")


def _visible(text: str) -> str:
    """Newlines and all that does not print can be seen."""
    newline = f"{_NEWLINE}\n"
    return "".join(
        newline if c == "\n" else c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in text
    )
