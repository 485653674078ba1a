"""Candidates to be ranked, and the server of the ranking page as a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ppo_engine.pages.ranking.candidates import Candidate, candidate_of

ROOT = Path(__file__).parents[1]


def row(number: int, responses: int = 4, **more: Any) -> dict[str, Any]:
    """As `ppo-engine generate --n` writes it; the last response was cut off."""
    texts = [f"Answer {chr(65 + index)} to question {number}." for index in range(responses)]
    ended = [True] * (responses - 1) + [False]
    asked = [{"role": "user", "content": f"Question {number}?"}]
    return {"prompt": asked, "responses": texts, "finished": ended} | more


def candidates(count: int, responses: int = 4) -> list[Candidate]:
    return [candidate_of(row(number, responses), f"c:{number}") for number in range(count)]


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return file


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


class Server:
    """`ppo-engine rank` as a process; `address` is the page's."""

    def __init__(self, file: Path, out: Path, *options: str) -> None:
        # -P, and what PYTHONPATH has first: of a copy with a planted bug, say.
        command = [sys.executable, "-P", "-m", "ppo_engine", "rank", str(file), "--out", str(out)]
        before = os.environ.get("PYTHONPATH", "")
        paths = {"PYTHONPATH": f"{before}:{ROOT}/kernels:{ROOT}"}
        self.process = subprocess.Popen(
            [*command, "--no-browser", *options], env=os.environ | paths, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(self.process.communicate()[1])
        self.address = line.split()[-1]

    def end(self, number: int = signal.SIGINT) -> tuple[int, str, str]:
        """Exit status and what it printed then, after a signal."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@contextmanager
def served(file: Path, out: Path, *options: str) -> Iterator[Server]:
    server = Server(file, out, *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()
