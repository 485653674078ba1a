"""Runs the steps of a page in a folder of its own, in a terminal of 100 columns or without one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import shlex
import shutil
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from documents import ROOT
from documents.page import Step, steps_of
from documents.screen import screen
from documents.shown import mismatch

LINES, COLUMNS = 40, 100
LIMIT = 2400.0  # seconds for one step
# What the surroundings of this process would tell the programs that a reader starts.
_NOT_A_READERS = re.compile(
    "PYTEST_.*|PYTHONWARNINGS|PYTHONPATH|VIRTUAL_ENV|COLUMNS|LINES|NO_COLOR|FORCE_COLOR|MAKE.*|MFLAGS|TRITON_INTERPRET|"
    "TEST_NATIVE_BF16"
)
_WARNING = re.compile(r"^.*(?:\b[A-Z]\w*Warning: |\[(?:transformers|WARNING)[^\]]*\]).*$", re.M)
_TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Surroundings:
    """The commands that a reader's shell finds first, and variables beside those of this
    process."""

    commands: Path
    variables: dict[str, str]
    installs: bool = False  # whether `pip install` in a page is run

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not _NOT_A_READERS.fullmatch(k)}
        path = f"{self.commands}{os.pathsep}{os.environ['PATH']}"
        return kept | {"TERM": "xterm-256color", "PATH": path} | self.variables


@dataclass(frozen=True)
class Result:
    """`printed` is stdout and stderr together as they came, in a terminal, and else stdout."""

    code: int
    printed: str
    errors: str = ""  # stderr, where it can be told apart


def check_page(
    page: Path, folder: Path, where: Surroundings, *, terminal: bool, short: bool
) -> tuple[int, list[str], list[str]]:
    """How many steps of `page` were run in `folder`, what was left out and why, and the faults.

    The steps after one that fails are run too: what they say may be of use.
    """
    steps, left_out = steps_of(page, short=short or not terminal)
    shutil.copytree(ROOT / "examples", folder / "examples")
    faults = []
    for step in steps:
        if step.file:
            (folder / step.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / step.file).write_text(step.text, encoding="utf-8")
            continue
        result = run(_script(step, folder, where), folder, where, terminal=terminal)
        how = "in a terminal" if terminal else "without a terminal"
        faults += [
            f"{page.name}:{step.line} {how}: {fault}" for fault in faults_of(step, result, terminal)
        ]
    return sum(not step.file for step in steps), left_out, faults


def faults_of(step: Step, result: Result, terminal: bool) -> list[str]:
    """What is wrong with what a step did, each with the end of what it printed."""
    printed = screen(result.printed, COLUMNS if terminal else 10**6)
    everything = f"{printed}\n{screen(result.errors, 10**6)}".strip()
    found = []
    if _TRACEBACK in everything:
        found.append("a traceback")
    if (result.code != 0) != step.fails:
        found.append(f"exit status {result.code}")
    if warning := _WARNING.search(everything):
        found.append(f"a library's warning: {warning[0].strip()}")
    if step.shown is not None:
        # A terminal shows both; without one, an error that the page shows is on stderr.
        told = everything if terminal or step.fails else printed
        if difference := mismatch(step.shown, told):
            found.append(difference)
    end = "\n".join(f"    │ {line}" for line in everything.splitlines()[-12:])
    return [f"{fault}\n{end}" for fault in found]


def run(script: str, folder: Path, where: Surroundings, *, terminal: bool) -> Result:
    """A bash script, in a session of its own, which ends with it."""
    arguments = {"cwd": folder, "env": where.environment(), "start_new_session": True}
    command = ["bash", "-c", script]
    if not terminal:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", **arguments,
        )  # fmt: skip
        with _ended(process):
            try:
                printed, errors = process.communicate(timeout=LIMIT)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                printed, errors = process.communicate()
                errors += f"\nnot done after {LIMIT:.0f} s"
        return Result(process.returncode, printed, errors)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, **arguments)
    os.close(theirs)
    try:
        with _ended(process):
            printed = b"".join(_read(ours, process)).decode("utf-8", "replace")
    finally:
        os.close(ours)
    return Result(process.wait(), printed)


@contextlib.contextmanager
def _ended(process: subprocess.Popen) -> Iterator[None]:
    """Where the block is interrupted, the process and those it started end too: they have a session
    of their own, to which no terminal tells it."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def _read(terminal: int, process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """What comes until the last of the terminal's programs has ended; they are killed at the
    limit."""
    timer = time.monotonic() + LIMIT
    os.set_blocking(terminal, False)
    with contextlib.suppress(OSError):  # EIO: nobody writes any more
        while True:
            try:
                if not (part := os.read(terminal, 1 << 16)):
                    return
                yield part
            except BlockingIOError:
                time.sleep(0.02)
            if time.monotonic() > timer:
                os.killpg(process.pid, signal.SIGKILL)
                yield f"\r\nnot done after {LIMIT:.0f} s\r\n".encode()
                return


def _script(step: Step, folder: Path, where: Surroundings) -> str:
    """What bash is given for a step: a snippet as a file, commands as they stand.

    `make` is only asked whether it could: CI runs what the pages name, and for hours. `pip install`
    is run with this checkout in the place of its name, or, in an environment that is to stay as it
    is, not at all.
    """
    if step.python:
        (folder / f"snippet_{step.line}.py").write_text(step.text + "\n", encoding="utf-8")
        return f"python snippet_{step.line}.py"
    root = shlex.quote(str(ROOT))
    script = re.sub(r"^make\b", f"make --silent --dry-run -C {root}", step.text, flags=re.M)
    install = r"^pip install\b"
    if not where.installs:
        script = re.sub(install, ": pip install", script, flags=re.M)
    else:
        script = re.sub(r"(['\"])ppo-engine\[", rf"\1{ROOT}[", script)
        script = re.sub(r"^pip install \.", f"pip install {root}", script, flags=re.M)
        script = re.sub(
            install, f"pip install --quiet -c {root}/constraints.txt", script, flags=re.M
        )
    return f"set -e\n{script}\n"
