"""The page's file: whole or not at all, and no text of a run is anything but text in it."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from made_runs import PIECES, made_record, made_run, metrics_row, write_rows

from ppo_engine.pages.report.live import LivePage
from ppo_engine.pages.report.page import MARK, NAME, as_json, page, write_page

HOSTILE = (
    "</script><script>hacked()</script>",
    "<!-- <script>",
    "<img src=x onerror=hacked()>",
    "\u2028\u2029 \ud800 & {{program}} \u202e",
)


class Reader(html.parser.HTMLParser):
    """The elements of a page, and the texts of its scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        tag = self.tags[-1][0] if self.tags else ""
        if tag in ("script", "style") and data.strip():
            self.texts.append((tag, data))


def data_of(text: str) -> Any:
    [found] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found)


def test_hostile_texts_are_data_and_come_back_as_they_were(tmp_path: Path) -> None:
    record = made_record(1, pieces=[*PIECES[:6], *HOSTILE], prompt=HOSTILE[0])
    run = made_run(tmp_path / HOSTILE[2], records=[record], held_out=HOSTILE)
    text = page([run])
    found = data_of(text)
    [step] = found["runs"][0]["rollouts"]["steps"]
    assert step["pieces"] == record.pieces
    assert {turn["content"] for prompt in step["prompts"] for turn in prompt} == {HOSTILE[0]}
    reader = Reader(text)
    assert [tag for tag, _ in reader.tags].count("script") == 2
    assert not any(tag == "img" for tag, _ in reader.tags)
    text.encode()  # no lone surrogate is left


def test_json_has_nothing_that_a_browser_reads() -> None:
    text = as_json(HOSTILE)
    assert json.loads(text) == list(HOSTILE)
    assert text.isascii() and not re.search("[<>&]", text)
    with pytest.raises(ValueError):
        as_json([float("nan")])


def test_the_policy_allows_this_program_and_style_alone(tmp_path: Path) -> None:
    text = page([made_run(tmp_path / "run")])
    reader = Reader(text)
    [policy] = [
        attrs["content"] or ""
        for tag, attrs in reader.tags
        if tag == "meta" and attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    (_, style), (_, _), (_, program) = reader.texts
    for kind, content in (("style-src", style), ("script-src", program)):
        digest = hashlib.sha256(content.encode()).digest()
        assert rules[kind] == f"'sha256-{base64.b64encode(digest).decode()}'"


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    text = page([made_run(tmp_path / "run")])
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(|<link|<iframe", text)
    assert not [attrs for _, attrs in Reader(text).tags if "src" in attrs or "href" in attrs]
    program = "".join(content for tag, content in Reader(text).texts if tag == "script")
    reads_markup = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\("
    assert not re.search(reads_markup, program)


def test_it_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made_run(tmp_path / "run")
    write_page([run], run / NAME)
    before = (run / NAME).read_text()
    assert MARK in before[:2_000]

    def fails(*_: Any) -> None:
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="no room"):
            write_page([run], run / NAME)
    assert (run / NAME).read_text() == before
    assert not [file for file in run.iterdir() if file.name.endswith(".partial")]


def test_a_folder_whose_name_is_no_text_has_a_page(tmp_path: Path) -> None:
    run = made_run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/run-\xe9")))
    write_page([run], run / NAME)
    assert "run-?" in (run / NAME).read_text(encoding="utf-8").partition("</title>")[0]


def test_a_run_writes_over_what_a_kill_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_run(tmp_path / "run")
    child = os.fork()
    if not child:
        monkeypatch.setattr(os, "replace", lambda *_: os._exit(0))  # as killed: no clean-up
        try:
            LivePage(1, pytest.fail).write(run)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert [file for file in run.iterdir() if file.name.endswith(".partial")]
    LivePage(1, pytest.fail).write(run)
    assert not [file for file in run.iterdir() if file.name.endswith(".partial")]


def test_several_runs_share_the_room_for_rollouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [made_run(tmp_path / name, records=[made_record(1)]) for name in "ab"]
    monkeypatch.setattr("ppo_engine.pages.report.page.TOKENS", 48)
    found = data_of(page(runs))["runs"]
    assert [len(run["rollouts"]["steps"][0]["pieces"]) for run in found] == [2, 2]
    assert [run["name"] for run in found] == [str(run) for run in runs]


@pytest.mark.slow
def test_a_long_run_makes_a_page_of_a_bounded_size(tmp_path: Path) -> None:
    """Made, not trained: 10,000 steps and three records of 64 responses of 512 tokens."""
    run = long_run(tmp_path / "run")
    began = time.perf_counter()
    size = len(page([run]).encode())
    print(f"{size / 1e6:.1f} MB in {time.perf_counter() - began:.2f} s")
    assert size < 20e6


def long_run(folder: Path) -> Path:
    records = [made_record(step, responses=64, tokens=512) for step in (1, 5_000, 10_000)]
    run = made_run(folder, records=records)
    more = {f"extra/{n}": 0.123456789 * n for n in range(40)}
    rows = ({**metrics_row(step), **more} for step in range(1, 10_001))
    write_rows(run / "metrics.jsonl", rows)
    return run


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_page_while_the_run_goes_on_takes_a_hundredth_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, written = Clock(), []

    def write(runs: list[Path], path: Path, *, by_run: bool) -> None:
        assert path == runs[0] / NAME and by_run
        written.append(clock.now)
        clock.now += 2.0  # it takes so long

    monkeypatch.setattr("ppo_engine.pages.report.live.write_page", write)
    live = LivePage(2, pytest.fail, clock)
    for step in range(1, 1_001):
        clock.now += 1.0
        live.write_if_due(tmp_path, step)
    # The first after 10 s, as if one took a tenth of a second; then after 200 s each.
    assert written == [10.0, 212.0, 414.0, 616.0, 818.0]
    live.write(tmp_path)
    assert len(written) == 6
    clock.now += 10_000
    LivePage(0, pytest.fail, clock).write_if_due(tmp_path, 2)
    live.write_if_due(tmp_path, 3)
    assert len(written) == 6  # not at every step, and at none


def test_a_page_that_fails_stops_nothing_and_is_told_once(tmp_path: Path) -> None:
    told: list[str] = []
    live = LivePage(1, told.append)
    missing = tmp_path / "gone"
    live.write(missing)
    live.write(missing)
    [line] = told
    assert "gone/report.html could not be written (FileNotFoundError" in line
