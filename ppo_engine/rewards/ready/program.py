"""A Python program and its tests, in a process of their own with limits.

The limits stop accidents of a model that learns to program: endless loops, too much memory, floods
of output, processes without end, an `exit(0)` ahead of the tests. They are **no sandbox**: a
program can read and write every file that this user can, and use the network; and one that is
written to deceive can find out what a passed test looks like. Against malicious code run the
training in a container or a virtual machine that has nothing to lose.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ppo_engine.rewards.ready import harness

_LONGEST = 1e6  # seconds; some more and a limit of CPU time is refused
_LOOK = 0.2  # seconds between looks at whether to stop


def passes(
    program: str,
    tests: list[str],
    *,
    timeout: float,
    memory: int,
    stop: threading.Event | None = None,
) -> bool:
    """Whether all `tests` ran to their end after `program`, within `timeout` seconds of wall-clock
    time and as many of CPU time, and within `memory` bytes of address space; and before `stop` is
    set, which kills it.

    It works in a temporary folder, with nothing to read on standard input, with nothing of this
    process's environment but the path, and its output goes nowhere. It cannot start processes by
    Python's own means; what it starts by others is killed with it, unless it leaves its session.
    """
    timeout = min(timeout, _LONGEST)
    # Whoever does not get to the end of the tests cannot know it: an exit status can be had by an
    # exit(0) in their middle.
    token = secrets.token_hex(16)
    with _folder() as folder:
        todo = {
            "program": program,
            "tests": tests,
            "token": token,
            "memory": memory,
            "seconds": timeout,
        }
        (Path(folder) / harness.TODO).write_text(json.dumps(todo), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-I", harness.__file__],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_environment(folder),
            start_new_session=True,
        )
        assert process.stdout is not None  # it is a pipe
        try:
            # Not until the pipe closes: what the program started may hold it open.
            waiting = select.poll()
            waiting.register(process.stdout, select.POLLIN)
            end = time.monotonic() + timeout
            written: list[tuple[int, int]] = []
            while not written and not (stop and stop.is_set()):
                left = end - time.monotonic()
                if left <= 0:
                    break
                written = waiting.poll(min(left, _LOOK) * 1000)
            said = os.read(process.stdout.fileno(), 2 * len(token)) if written else b""
            return said == token.encode()
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its leader is not yet waited for: no other's
            process.wait()
            process.stdout.close()


@contextmanager
def _folder() -> Iterator[str]:
    """A temporary folder, removed with whatever a program has left in it."""
    folder = tempfile.TemporaryDirectory(prefix="unit-tests-", ignore_cleanup_errors=True)
    try:
        yield folder.name
    finally:
        with suppress(RecursionError):
            folder.cleanup()
        if os.path.exists(folder.name):  # folders in folders, deeper than Python goes
            subprocess.run(["rm", "-rf", "--", folder.name], stderr=subprocess.DEVNULL, check=False)


def _environment(folder: str) -> dict[str, str]:
    """No access tokens. Libraries with threads would reserve address space for each core."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return {"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", **threads, **path}
