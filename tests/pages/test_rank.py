"""`ppo-engine rank` as a process: its address, its end, its mistakes."""

from __future__ import annotations

import json
import signal
import sys
import urllib.error
import urllib.request

import pytest
from ranking import candidates, read_rows, row, served, write_rows

from ppo_engine import cli
from ppo_engine.pages.ranking.work import Work

pytest.importorskip("uvicorn", reason="pip install 'ppo-engine[pages]'")

from ppo_engine.pages import serving


@pytest.fixture
def files(tmp_path):
    rows = [row(number) for number in range(5)]
    return write_rows(tmp_path / "candidates.jsonl", rows), tmp_path / "rankings.jsonl"


def send(address, path, body=None):
    origin = "/".join(address.split("/")[:3])
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, content, {"Origin": origin})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read())


def decide(address, place):
    shown = send(address, f"task?annotator=ada&place={place}")["shown"]
    body = {"annotator": "ada", "place": place, "ranks": [0, 1, 2, 3], "seconds": 2, "shown": shown}
    return send(address, "decision", body)


def test_from_the_address_to_ctrl_c(files):
    source, out = files
    with served(source, out) as server:
        assert server.address.startswith("http://127.0.0.1:")
        assert decide(server.address, 0)["place"] == 1
        assert server.end() == (
            0, f"Of 5 prompts 1 ranked by ada: {out}. The same command goes on.\n", ""
        )  # fmt: skip
    with served(source, out) as server:
        assert send(server.address, "task?annotator=ada")["place"] == 1
        assert server.end(signal.SIGTERM)[0] == 143
    assert [path.name for path in out.parent.iterdir()] == ["candidates.jsonl", "rankings.jsonl"]


def test_killed_it_goes_on_after_the_last(files):
    source, out = files
    for place in range(3):
        with served(source, out) as server:
            assert send(server.address, "task?annotator=ada")["place"] == place
            decide(server.address, place)
            server.end(signal.SIGKILL)
    assert [one["prompt"][0]["content"] for one in read_rows(out)] == [
        f"Question {number}?" for number in range(3)
    ]


def test_the_address_is_new_each_time(files):
    with served(*files) as server:
        first = server.address
    with served(*files, "--port", first.split(":")[2].split("/")[0]) as server:
        assert server.address.split("/")[2] == first.split("/")[2] and server.address != first
        with pytest.raises(urllib.error.HTTPError, match="404"):
            send(server.address.rsplit("/", 2)[0] + "/", "session")


def test_nothing_ranked_nothing_written(files):
    with served(*files) as server:
        assert server.end() == (0, f"Nothing was ranked: there is no {files[1]} yet.\n", "")
    assert not files[1].exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["no.jsonl", "--out", "r.jsonl"], "no.jsonl does not exist"),
        (["c.jsonl", "--out", "c.jsonl"], "--out c.jsonl is the file of candidates"),
        (["c.jsonl", "--out", "o.jsonl"], "o.jsonl:1: no 'annotator'"),
        (["c.jsonl", "--out", "r.jsonl.gz"], "would be read as .gz"),
        (["c.jsonl", "--out", "r.parquet"], "would be read as .parquet"),
        (["c.jsonl", "--out", "c.jsonl/r.jsonl"], "r.jsonl cannot be written: File exists"),
        (["c.jsonl", "--out", "r.jsonl", "--port", "70000"], "--port must be 0"),
        (["c.jsonl", "--out", "r.jsonl", "--host", "192.0.2.1"], "of 192.0.2.1 cannot be had"),
        (["c.jsonl", "--out", "r.jsonl", "--annotator", "a\tb\x00"], "A name must have"),
        (["c.jsonl", "--out", "r.jsonl", "--guidelines", "g.md"], "g.md does not exist"),
        (["c.jsonl", "--out", "r.jsonl", "run.seed=1"], "rank takes no settings"),
        (["empty.jsonl", "--out", "r.jsonl"], "empty.jsonl is empty"),
    ],
)
def test_mistakes_are_told_before_anything_is_served(
    tmp_path, monkeypatch, capsys, options, problem
):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "c.jsonl", [row(0)])
    write_rows(tmp_path / "o.jsonl", [row(0, ranks=[0, 1, 2, 3])])
    write_rows(tmp_path / "empty.jsonl", [])
    assert cli.main(["rank", *options, "--no-browser"]) == 2
    error = capsys.readouterr().err
    assert problem in error and error.startswith("error: ")
    assert not list(tmp_path.glob("r.*"))


def test_an_output_in_use_is_refused(files, capsys):
    work = Work(candidates(1), files[1], 0)
    assert cli.main(["rank", str(files[0]), "--out", str(files[1]), "--no-browser"]) == 2
    assert "rankings.jsonl is in use by process" in capsys.readouterr().err
    work.close()


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_named(files, monkeypatch, capsys, package):
    for name in [name for name in sys.modules if name.startswith("ppo_engine.pages.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["rank", str(files[0]), "--out", str(files[1])]) == 2
    error = capsys.readouterr().err
    assert f"needs the package {package}: pip install 'ppo-engine[pages]'" in error


def test_a_browser_is_opened_beside_the_terminal_only(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert not serving.has_browser()
    monkeypatch.setenv("DISPLAY", ":0")
    assert serving.has_browser()
