"""Progress: readable in a terminal, plain in a log, and harmless whatever the model writes."""

from __future__ import annotations

import io
import math
import time

import pytest
from rich.console import Console
from screen import open_terminal

from ppo_engine.run.headlines import Fact, before_and_after, fitted, headlines, with_error
from ppo_engine.run.progress import Progress, duration, is_interactive, printable

METRICS = {"objective/scores": 0.5, "objective/kl": 0.031, "policy/clip_fraction": 0.125}
EVERYTHING = {
    **METRICS,
    "rewards/length/mean": 0.25,
    "rewards/style/mean": -1.0,
    "objective/entropy": 2.5,
    "objective/response_length": 100.0,
    "objective/finished": 0.75,
    "eval/scores": 1.0,
    "eval/scores_se": 0.125,
    "eval/best_of_2": 1.5,
    "eval/rewards/length": 0.5,
    "eval/rewards/length_se": 0.25,
    "value/explained_variance": 0.5,
    "tokens_per_second": 1234.0,
}


def plain() -> tuple[io.StringIO, Console]:
    stream = io.StringIO()
    return stream, Console(file=stream, force_terminal=False)


def run(progress: Progress, response: str) -> None:
    with progress:
        with progress.phase("generate"):
            pass
        progress.note("a [bold]note[/bold]")
        progress.step(1, METRICS)
        progress.sample("Say hi.", response, 0.25, "sample of step 1")
        progress.step(2, METRICS)


def test_plain_lines_without_a_terminal() -> None:
    stream, console = plain()
    run(Progress(2, "PPO", console=console), "line one\nline two " + "w" * 300)
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue()
    assert lines[0] == "PPO: 2 steps"
    assert lines[1] == "a [bold]note[/bold]"
    assert lines[2].startswith(
        "step 1/2 | score +0.500  KL 0.031  ratio clipped 12.5% | generate 0.0 s"
    )
    assert lines[2].endswith("left")
    assert lines[3] == "  sample of step 1 (score +0.250): Say hi."
    assert lines[4].startswith("    → line one line two www") and len(lines[4]) > 300
    assert lines[5].startswith("step 2/2 |") and "left" not in lines[5] and len(lines) == 6


def test_a_terminal_keeps_every_step_and_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    run(Progress(2, "PPO" * 30, console=Console(highlight=False)), "line one\nline two")
    shown = terminal.screen
    kept = [line for line in shown if line.startswith("step ")]
    assert kept == [f"step {n}/2 | score +0.500  KL 0.031  ratio clipped 12.5%" for n in (1, 2)]
    assert shown.index(kept[0]) < shown.index("│ line two".ljust(99) + "│") < shown.index(kept[1])
    assert any(line.startswith("╭─ sample of step 1, score +0.250 ─") for line in shown)
    assert "…" in shown[-1] and shown[-1].split()[1:3] == ["step", "2/2"]  # the live part's last
    assert all(len(line) <= 100 for line in shown)


def test_a_step_is_one_line_of_a_terminal_without_what_matters_least(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = open_terminal(monkeypatch)
    with Progress(1, "PPO", console=Console(highlight=False)) as progress:
        progress.step(1, EVERYTHING)
    [line] = [line for line in terminal.screen if line.startswith("step 1/1 |")]
    assert line == (
        "step 1/1 | score +0.500  length +0.250  KL 0.031  cut 25%  held-out score +1.000 ± 0.125"
    )
    assert [fact.text for fact in headlines(EVERYTHING)][3:] == [
        "KL 0.031", "entropy 2.50", "tokens 100", "cut 25%", "ratio clipped 12.5%",
        "explained variance +0.50", "held-out score +1.000 ± 0.125", "best of 2 +1.500",
        "held-out length +0.500 ± 0.250", "tokens/s 1,234",
    ]  # fmt: skip


def test_a_step_is_a_line_of_a_log_that_can_be_read() -> None:
    phases = {f"time/{name}": 10.04 for name in ("generate", "score", "advantages", "update")}
    lines = []
    for metrics in (METRICS, EVERYTHING):
        stream, console = plain()
        Progress(1000, "PPO", console=console).step(10, {**metrics, **phases})
        lines.append(stream.getvalue().rstrip("\n"))
    by_phase, in_all = lines
    assert " | generate 10.0 s, score 10.0 s, advantages 10.0 s, update 10.0 s | " in by_phase
    assert in_all.startswith("step 10/1000 | score +0.500  length +0.250  style -1.000  KL 0.031")
    assert " | 40.2 s | " in in_all and in_all.endswith(" left") and 140 < len(in_all) <= 160


def test_the_live_part_is_as_high_whatever_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich may redraw it while a line that stays is printed, and then erases as many lines."""
    open_terminal(monkeypatch)
    console = Console(highlight=False, width=60)
    with Progress(10_000, "A long title " * 9, console=console) as progress:
        heights = [len(console.render_lines(progress._render()))]
        with progress.phase("generate " * 20):
            heights.append(len(console.render_lines(progress._render())))
        progress.step(9_999, {f"time/{name}": 100.0 for name in "abcdefgh"})
        heights.append(len(console.render_lines(progress._render())))
    assert heights == [3, 3, 3]


def test_wide_letters_count_as_two_columns() -> None:
    facts = [Fact("点数 1", 0), Fact("b 2", 1)]
    assert [fitted("", facts, width) for width in (11, 10)] == ["点数 1  b 2", "点数 1"]


def test_the_first_step_tells_how_long_all_take(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    for seconds, said in (
        (90.0, ["The first step took 1:30: 4 steps like it take about 6:00."]),
        (2.0, []),
    ):
        stream, console = plain()
        with Progress(5, "PPO", start=1, console=console) as progress:
            for step in (2, 3):
                clock[0] += seconds
                progress.step(step, {})
        lines = stream.getvalue().splitlines()
        assert [line for line in lines if line.startswith("The first")] == said


def test_a_table_stays_in_a_log_and_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    rows = [("score", "a", "{:+.1f}"), ("absent", "b", "{}"), ("late", "c", "{:.0%}")]
    before, after = {"a": 1.0, "a_se": 0.5}, {"a": 2.0, "c": 0.5}
    stream, log = plain()
    for console in (Console(highlight=False), log):
        with Progress(1, "PPO", console=console) as progress:
            progress.table(before_and_after("All", rows, before, after))
    for lines in (terminal.screen, stream.getvalue().splitlines()):
        cells = [line.strip("│").split("│") for line in lines if line.startswith("│")]
        assert [[cell.strip() for cell in row] for row in cells] == [
            ["score", "+1.0 ± 0.5", "+2.0"],
            ["late", "", "50%"],
        ]


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
