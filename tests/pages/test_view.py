"""`ppo-engine view`: one run, several, what is not there, and what may be written over."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import pytest
from made_runs import made_record, made_run

from ppo_engine import cli
from ppo_engine.settings.schema import PPOConfig, PPOSettings


@pytest.fixture(autouse=True)
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that a browser was asked to open."""
    found: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(webbrowser, "open", lambda url: bool(found.append(url)) or True)
    return found


def test_one_run(tmp_path: Path, opened: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    made_run(Path("runs/a"))
    assert cli.main(["view", "runs/a"]) == 0
    assert capsys.readouterr().out == "The page is runs/a/report.html\n"
    assert opened == [(tmp_path / "runs/a/report.html").as_uri()]
    assert '"name":"runs/a"' in Path("runs/a/report.html").read_text()
    assert cli.main(["view", "runs/a", "--no-browser"]) == 0  # over the one from before
    assert len(opened) == 1


def test_several_runs(opened: list[str]) -> None:
    made_run(Path("a"))
    made_run(Path("b"), config=PPOConfig(ppo=PPOSettings(kl_coef=0.5)))
    assert cli.main(["view", "a", "b", "a"]) == 0
    text = Path("report.html").read_text()
    assert text.count('"name":"a"') == text.count('"name":"b"') == 1
    assert cli.main(["view", "a", "b", "--out", "both.html", "--no-browser"]) == 0
    assert Path("both.html").exists() and not Path("a/report.html").exists()


def test_a_run_of_which_there_is_a_record_alone(opened: list[str]) -> None:
    run = made_run(Path("a"), records=[made_record(1)])
    (run / "metrics.jsonl").unlink()
    assert cli.main(["view", "a"]) == 0


def test_without_a_browser(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_run(Path("a"))
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    assert cli.main(["view", "a"]) == 0
    assert "No browser was found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runs/ab"], "There is no run folder 'runs/ab'. Did you mean 'runs/a'?"),
        (["empty"], "empty has no metrics.jsonl, so there is nothing of a run to see yet.\n"),
        (["runs"], "These have: runs/a."),
        (["runs/a", "--out", "notes.html"], "notes.html is no page of a run"),
        (["runs/a", "--out", "empty"], "empty is a folder"),
        (["runs/a", "--out", "no/x.html"], "there is no folder 'no'"),
        (["runs/a", "ppo.kl_coef=1"], "There is no run folder 'ppo.kl_coef=1'"),
        (["runs/a", "--output", "x"], "unknown argument '--output'. Did you mean --out?"),
    ],
)
def test_what_it_refuses(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made_run(Path("runs/a"))
    Path("empty").mkdir()
    Path("notes.html").write_text("<p>mine</p>")
    try:
        status = cli.main(["view", *arguments, "--no-browser"])
    except SystemExit as ended:  # by argparse
        status = int(ended.code or 0)
    assert status == 2
    assert said in capsys.readouterr().err
    assert Path("notes.html").read_text() == "<p>mine</p>"
    assert not Path("runs/a/report.html").exists()


def test_a_folder_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_run(Path("a"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ppo_engine.pages.report.view.write_page", full)
    assert cli.main(["view", "a"]) == 2
    assert "a/report.html cannot be written: No space left on device." in capsys.readouterr().err
