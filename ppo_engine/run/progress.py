"""What a person sees during a run: a live display in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ppo_engine.messages import counted

Item = TypeVar("Item")

# The metrics that are shown, in this order where present: metric, label, format.
_HEADLINES = (
    ("objective/scores", "score", "{:+.3f}"),
    ("objective/kl", "KL", "{:.3f}"),
    ("objective/entropy", "entropy", "{:.2f}"),
    ("objective/response_length", "length", "{:.0f}"),
    ("policy/clip_fraction", "clipped", "{:.1%}"),
    ("value/explained_variance", "explained variance", "{:+.2f}"),
    ("sft/loss", "loss", "{:.4f}"),
    ("eval/perplexity", "held-out perplexity", "{:.3f}"),
    ("reward/loss", "loss", "{:.4f}"),
    ("reward/accuracy", "accuracy", "{:.1%}"),
    ("eval/accuracy", "held-out accuracy", "{:.1%}"),
    ("eval/scores", "held-out score", "{:+.3f}"),
    ("eval/win_rate", "win rate", "{:.1%}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("mfu/step", "MFU", "{:.0%}"),
)
_REFRESH_PER_SECOND = 4
_PLAIN_SECONDS = 15.0  # between lines of `track` where there is no terminal
_SAMPLE_CHARACTERS = 600


class Progress:
    """Shows the steps of a run and measures its phases; use it as a context manager.

    `times` holds the seconds of each phase since the last `step`, as metrics (`time/generate`).
    """

    def __init__(
        self, total_steps: int, title: str, *, start: int = 0, console: Console | None = None
    ) -> None:
        self.total_steps = total_steps
        self.title = title
        self.times: dict[str, float] = {}
        self._console = console or Console(highlight=False)
        self._step = self._start = start
        self._phase = ""
        self._phase_started = self._started = time.perf_counter()
        self._facts = ""
        self._seconds = ""
        self._sample: RenderableType | None = None
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        self._started = time.perf_counter()
        if is_interactive(self._console):
            self._live = Live(
                get_renderable=self._render,
                console=self._console,
                refresh_per_second=_REFRESH_PER_SECOND,
            )
            self._live.start()
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
            self._live.stop()
            self._live = None

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
        self._step = step
        self._facts = _headlines(metrics)
        self._seconds = _phase_times({**metrics, **self.times})
        self.times = {}
        if self._live is None:
            parts = (f"step {step}/{self.total_steps}", self._facts, self._seconds, self._eta())
            self._print(" | ".join(part for part in parts if part))

    def sample(self, prompt: str, response: str, score: float, name: str = "sample") -> None:
        """Show one response, as the model wrote it except for control characters."""
        asked, answered = printable(prompt), printable(response) or "(empty)"
        if self._live is None:
            self._print(f"  {name} (score {score:+.3f}): {_one_line(asked)}")
            self._print(f"    → {_one_line(answered)}")
        else:
            self._sample = Panel(
                Text.assemble((_cut(asked, 200), "dim"), "\n", _cut(answered, _SAMPLE_CHARACTERS)),
                title=f"{name} of step {self._step}, score {score:+.3f}",
                title_align="left",
                border_style="dim",
            )

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self._live is not None:
            self._live.console.print(Text(printable(text)))
        else:
            self._print(printable(text))

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

    def _eta(self) -> str:
        done, left = self._step - self._start, self.total_steps - self._step
        if done <= 0 or left <= 0:
            return ""
        return f"{duration((time.perf_counter() - self._started) / done * left)} left"

    def _render(self) -> RenderableType:
        head = Table.grid(padding=(0, 1))
        head.add_row(
            Text(self.title, style="bold"),
            Text(f"step {self._step}/{self.total_steps}"),
            ProgressBar(total=self.total_steps, completed=self._step, width=24),
            Text(duration(time.perf_counter() - self._started), style="dim"),
            Text(self._eta(), style="cyan"),
        )
        lines: list[RenderableType] = [head]
        if self._phase:
            running = time.perf_counter() - self._phase_started
            lines.append(Text(f"now: {self._phase} ({running:.0f} s)", style="yellow"))
        lines += [Text(line) for line in (self._facts, self._seconds) if line]
        if self._sample is not None:
            lines.append(self._sample)
        return Group(*lines)

    def _print(self, line: str) -> None:
        """Unwrapped, without escape codes, for log files; `?` for what the stream cannot encode."""
        stream = self._console.file
        encoding = getattr(stream, "encoding", None) or "utf-8"
        print(line.encode(encoding, "replace").decode(encoding), file=stream, flush=True)


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


def with_error(metrics: Mapping[str, float], name: str, form: str) -> str:
    """`metrics[name]` written as `form` has it, with its standard error where it has one."""
    value, error = form.format(metrics[name]), metrics.get(f"{name}_se", math.nan)
    return value if math.isnan(error) else f"{value} ± {form.format(error).lstrip('+')}"


def _headlines(metrics: Mapping[str, float]) -> str:
    return "  ".join(
        f"{label} {with_error(metrics, name, form)}"
        for name, label, form in _HEADLINES
        if name in metrics
    )


def _phase_times(metrics: Mapping[str, float]) -> str:
    times = [(name[5:], value) for name, value in metrics.items() if name.startswith("time/")]
    return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in times)


def _one_line(text: str) -> str:
    return _cut(" ".join(text.split()), _SAMPLE_CHARACTERS)


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"
