"""What a person sees during a run: a live display in a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import IO, TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ppo_engine.messages import counted
from ppo_engine.run.headlines import Fact, fitted, headlines

Item = TypeVar("Item")

_REFRESH_PER_SECOND = 4
_PLAIN_SECONDS = 15.0  # between lines of `track` where there is no terminal
_SAMPLE_CHARACTERS = 600
_PLAIN_COLUMNS = 100  # of tables in a log
_LOG_COLUMNS = 160  # of a step's line in a log, of which nobody sees more at once
_WORTH_SAYING = 60.0  # seconds; how long a shorter run takes is soon seen


class Progress:
    """Shows the steps of a run and measures its phases; use it as a context manager.

    `times` holds the seconds of each phase since the last `step`, as metrics (`time/generate`).
    `moment` is what the line of a step begins with, in place of its number.
    """

    def __init__(
        self,
        total_steps: int,
        title: str,
        *,
        start: int = 0,
        moment: str = "",
        console: Console | None = None,
    ) -> None:
        self.total_steps = total_steps
        self.title = title
        self._moment = moment
        self.times: dict[str, float] = {}
        self._console = console or Console(highlight=False)
        self._step = self._start = start
        self._phase = ""
        self._phase_started = self._started = self._stepped = time.perf_counter()
        self._seconds = self._in_all = ""  # of the last step: by phase, and all of them
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        self._started = time.perf_counter()
        if is_interactive(self._console):
            self._live = Live(
                get_renderable=self._render,
                console=self._console,
                refresh_per_second=_REFRESH_PER_SECOND,
            )
            self._live.start(refresh=True)
        else:
            self._print(f"{self.title}: {counted(self.total_steps, 'step')}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name and time what is running now; repeated phases of one step add up."""
        started = time.perf_counter()
        before = self._phase, self._phase_started
        self._phase, self._phase_started = name, started
        try:
            yield
        finally:
            key = f"time/{name}"
            self.times[key] = self.times.get(key, 0.0) + time.perf_counter() - started
            self._phase, self._phase_started = before

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step number `step` (from 1) is done; resets the phase times."""
        self._step, self._stepped = step, time.perf_counter()
        facts = headlines(metrics)
        times = _phase_times({**metrics, **self.times})
        self._seconds = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in times.items())
        self._in_all = f"{sum(times.values()):.1f} s" if times else ""
        self.times = {}
        count = self._moment or f"step {step}/{self.total_steps}"
        if self._live is None:
            self._print(self._log_line(count, facts))
        elif facts:  # times are in the live part
            line = fitted(f"{count} | ", facts, self._console.width)
            self._live.console.print(Text(line, no_wrap=True, overflow="ellipsis"))
        took = time.perf_counter() - self._started
        steps = self.total_steps - self._start
        if step == self._start + 1 and steps > 1 and took * steps > _WORTH_SAYING:
            self.note(
                f"The first step took {duration(took)}: {counted(steps, 'step')} like it take "
                f"about {duration(took * steps)}."
            )

    def sample(self, prompt: str, response: str, score: float, name: str) -> None:
        """Show one response, as the model wrote it except for control characters; `name` says
        what it is a sample of."""
        asked, answered = printable(prompt), printable(response) or "(empty)"
        if self._live is None:
            self._print(f"  {name} (score {score:+.3f}): {_one_line(asked)}")
            self._print(f"    → {_one_line(answered)}")
        else:
            panel = Panel(
                Text.assemble((_cut(asked, 200), "dim"), "\n", _cut(answered, _SAMPLE_CHARACTERS)),
                title=Text(f"{name}, score {score:+.3f}"),
                title_align="left",
                border_style="dim",
            )
            self._live.console.print(panel)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self._live is not None:
            self._live.console.print(Text(printable(text)))
        else:
            self._print(printable(text))

    def table(self, table: Table) -> None:
        """Print a table that stays."""
        if self._live is not None:
            self._live.console.print(table)
            return
        drawn = io.StringIO()
        Console(file=drawn, width=_PLAIN_COLUMNS, color_system=None).print(table)
        for line in drawn.getvalue().splitlines():
            self._print(line)

    def track(self, items: Sequence[Item], description: str) -> Iterable[Item]:
        """Iterate over `items` with their progress; for parts of a phase that take seconds."""
        before, spoken = self._phase, time.perf_counter()
        for done, item in enumerate(items, start=1):
            self._phase = f"{description} {done}/{len(items)}"
            if self._live is None and time.perf_counter() - spoken > _PLAIN_SECONDS:
                self._print(f"  {self._phase}")
                spoken = time.perf_counter()
            yield item
        self._phase = before

    def _log_line(self, count: str, facts: Sequence[Fact]) -> str:
        """All facts and phases where they fit; else the seconds in all, and the facts that fit."""
        eta = self._eta()
        told = "  ".join(fact.text for fact in facts)
        line = " | ".join(filter(None, (count, told, self._seconds, eta)))
        if len(line) <= _LOG_COLUMNS:
            return line
        end = "".join(f" | {part}" for part in (self._in_all, eta) if part)
        return fitted(f"{count} | ", facts, _LOG_COLUMNS - len(end)) + end

    def _eta(self) -> str:
        done, left = self._step - self._start, self.total_steps - self._step
        if done <= 0 or left <= 0:
            return ""
        whole = (self._stepped - self._started) / done * left
        return f"{duration(max(0.0, whole - (time.perf_counter() - self._stepped)))} left"

    def _render(self) -> RenderableType:
        head = Table.grid(padding=(0, 1))
        head.add_column(max_width=max(10, self._console.width - 66), no_wrap=True)
        for _ in range(4):
            head.add_column(no_wrap=True)
        head.add_row(
            Text(self.title, style="bold", overflow="ellipsis"),
            Text(f"step {self._step}/{self.total_steps}"),
            ProgressBar(total=self.total_steps, completed=self._step, width=20),
            Text(duration(time.perf_counter() - self._started), style="dim"),
            Text(self._eta(), style="cyan"),
        )
        if self._live is None:  # the last time, as it stays
            return head
        running = time.perf_counter() - self._phase_started
        now = f"now: {self._phase} ({running:.0f} s)" if self._phase else ""
        last = f"last step: {self._seconds}" if self._seconds else ""
        # Always as many lines: rich may print what stays while it redraws in its own thread, and
        # would erase as many as there were before.
        return Group(
            head,
            Text(now, style="yellow", no_wrap=True, overflow="ellipsis"),
            Text(last, no_wrap=True, overflow="ellipsis"),
        )

    def _print(self, line: str) -> None:
        """Unwrapped, without escape codes, for log files."""
        print_plain(line, self._console.file)


def print_plain(text: str, stream: IO[str]) -> None:
    """Print to `stream`, with `?` for what it cannot encode."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)


def is_interactive(console: Console) -> bool:
    """Whether a live display makes sense: an interactive terminal."""
    return console.is_terminal and not console.is_dumb_terminal and not os.environ.get("CI")


def printable(text: str) -> str:
    """`text` without control characters, which could control the terminal; newlines stay."""
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text).strip()


def duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _phase_times(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name[5:]: value for name, value in metrics.items() if name.startswith("time/")}


def _one_line(text: str) -> str:
    return _cut(" ".join(text.split()), _SAMPLE_CHARACTERS)


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"
