"""Progress: readable in a terminal, plain in a log, and harmless whatever the model writes."""

from __future__ import annotations

import io
import math
import time

import pytest
from rich.console import Console

from ppo_engine.run.progress import Progress, duration, is_interactive, printable, with_error

METRICS = {"objective/scores": 0.5, "objective/kl": 0.031, "policy/clip_fraction": 0.125}


def plain() -> tuple[io.StringIO, Console]:
    stream = io.StringIO()
    return stream, Console(file=stream, force_terminal=False)


def run(progress: Progress, response: str) -> None:
    with progress:
        with progress.phase("generate"):
            pass
        progress.note("a [bold]note[/bold]")
        progress.step(1, METRICS)
        progress.sample("Say hi.", response, 0.25)
        progress.step(2, METRICS)


def test_plain_lines_without_a_terminal() -> None:
    stream, console = plain()
    run(Progress(2, "PPO", console=console), "line one\nline two " + "w" * 300)
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue()
    assert lines[0] == "PPO: 2 steps"
    assert lines[1] == "a [bold]note[/bold]"
    assert lines[2].startswith("step 1/2 | score +0.500  KL 0.031  clipped 12.5% | generate 0.0 s")
    assert lines[2].endswith("left")
    assert lines[3] == "  sample (score +0.250): Say hi."
    assert lines[4].startswith("    → line one line two www") and len(lines[4]) > 300
    assert lines[5].startswith("step 2/2 |") and "left" not in lines[5] and len(lines) == 6


def test_continuous_integration_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert is_interactive(console)
    monkeypatch.setenv("CI", "true")
    assert not is_interactive(console)


@pytest.mark.parametrize("text", ["[bold red]x[/nonsense]", "[/]", "\x1b[2J\x1b]0;title\x07"])
def test_what_a_model_writes_cannot_command_the_terminal(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    run(Progress(2, "PPO", console=Console(file=stream, force_terminal=True, width=100)), text)
    shown = stream.getvalue()
    assert printable(text) in shown and "a [bold]note[/bold]" in shown
    assert "\x1b[2J" not in shown and "\x1b]0" not in shown
    assert "step 2/2" in shown and "score +0.500" in shown

    stream, console = plain()
    run(Progress(2, "PPO", console=console), text)
    assert "\x1b" not in stream.getvalue() and printable(text) in stream.getvalue()


def test_phase_times_add_up_within_a_step_and_start_anew() -> None:
    _, console = plain()
    progress = Progress(2, "PPO", console=console)
    with progress:
        for _ in range(2):
            with progress.phase("generate"):
                time.sleep(0.02)
        with pytest.raises(ValueError), progress.phase("score"):
            raise ValueError
        assert progress.times["time/generate"] >= 0.04 and "time/score" in progress.times
        progress.step(1, {**METRICS, **progress.times})
        assert progress.times == {}


def test_stream_that_lacks_a_letter() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    run(Progress(2, "PPO", console=Console(file=stream, force_terminal=False)), "naïve 😀")
    assert b"na?ve ?" in raw.getvalue()


def test_track_passes_everything_through() -> None:
    _, console = plain()
    with Progress(1, "PPO", console=console) as progress:
        assert list(progress.track([1, 2, 3], "scoring")) == [1, 2, 3]


def test_durations_for_people() -> None:
    assert [duration(s) for s in (0.4, 61, 3600, 7325)] == ["0:00", "1:01", "1:00:00", "2:02:05"]


def test_figures_are_told_with_their_standard_errors():
    metrics = {"a": 0.947, "a_se": 0.052, "b": 2.0, "b_se": math.nan, "c": 1.0, "c_se": 0.5}
    assert with_error(metrics, "a", "{:.1%}") == "94.7% ± 5.2%"
    assert with_error(metrics, "b", "{:.1f}") == "2.0"  # one prompt alone
    assert with_error(metrics, "c", "{:+.1f}") == "+1.0 ± 0.5"
