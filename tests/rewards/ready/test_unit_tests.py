"""Programs in responses: which pass their tests, and what those that misbehave can do."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil
import pytest

from ppo_engine.errors import UserError
from ppo_engine.rewards import unit_tests
from ppo_engine.rewards.ready.unit_tests import program_in

ADD = "def add(a, b):\n    return a + b\n"
TEST = "assert add(1, 2) == 3"


def score(response, tests=TEST, **arguments):
    return unit_tests([response], [tests], **arguments)[0]


@pytest.mark.parametrize(
    ("response", "program"),
    [
        (ADD, ADD),
        ("Sure:\n```python\na\n```\nand\n```py\nb\nc\n```\nDone.", "b\nc"),
        ("```python\na\n```\nIt prints\n```\n3\n```", "a"),
        ('```json\n{}\n```\nand\n```\na\n```\n', "a"),
        ("```python\na", "```python\na"),
        ("1. So:\n   ```python\n   def f():\n       return 1\n   ```", "def f():\n    return 1"),
    ],
)  # fmt: skip
def test_the_last_block_is_the_program(response, program):
    assert program_in(response) == program


@pytest.mark.parametrize(
    ("tests", "expected"),
    [
        (TEST, 1),
        ([TEST, "assert add(2, 2) == 4"], 1),
        ([TEST, "assert add(2, 2) == 5"], 0),
        ("def test_add():\n    assert add(1, 1) == 2", 1),
        ("def test_add():\n    assert add(1, 1) == 3", 0),
        ("async def test_add():\n    assert add(1, 1) == 2", 1),
        ("async def test_add():\n    assert add(1, 1) == 3", 0),
        ("def check(f):\n    assert f(1, 1) == 3\ncheck(add)", 0),
        (["three = add(1, 1)", "assert three == 3"], 0),
        ("import numpy\nassert add(numpy.ones(2), 1).sum() == 4", 1),
        ("raise SystemExit(0)", 0),
        (" \n", 0),
        ([], 0),
        (None, 0),
    ],
)
def test_a_program_passes_all_of_its_tests_or_none(tests, expected):
    assert score(ADD, tests) == expected


@pytest.mark.parametrize(
    "program",
    [
        "def add(a, b):\n    return a - b",
        "not python at all",
        "exit(0)",
        "import os\nos._exit(0)",
        "import os\ndef add(a, b):\n    os._exit(0)",
        f"{ADD}import os\nfor fd in os.listdir('/proc/self/fd'): os.write(int(fd), b'0' * 32)",
        f"{ADD}input()",
        f"{ADD}import subprocess\nsubprocess.run(['true'])",
        f"{ADD}open('file', 'wb').write(bytes(10**8))",
        f"{ADD}bytes(10**10)",
        f"{ADD}import os\nassert 'A_SECRET' in os.environ",
        "\0",
        "'\ud800'",
    ],
)
def test_a_program_that_does_not_get_to_the_end_of_its_tests(program, monkeypatch):
    monkeypatch.setenv("A_SECRET", "hidden")
    assert score(program) == 0


def test_a_dataclass_finds_its_module():
    program = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    assert score(f"{program}@dataclass\nclass A:\n    x: int\n{ADD}") == 1


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(1000)",
        "while True: print('x' * 10**6)",
        "import os\nwhile True: os.fork()",
        # A process by a way that is not Python's own, which holds the pipe for the result open.
        f"{ADD}import ctypes, time\nctypes.CDLL(None).fork()\ntime.sleep(1000)",
    ],
)
def test_a_program_without_end_is_killed_with_what_it_started(program, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    started = time.perf_counter()
    assert score(program, timeout=1) == 0
    assert time.perf_counter() - started < 8
    assert list(tmp_path.iterdir()) == []
    time.sleep(0.1)  # a grandchild is its new parent's to wait for
    assert not [p for p in processes() if str(tmp_path) in p]


def test_folders_in_folders_beyond_any_depth_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = "import os\nfor n in range(3000):\n    os.mkdir('a')\n    os.chdir('a')\n"
    assert score(program + ADD) == 1
    assert list(tmp_path.iterdir()) == []


def test_whoever_is_interrupted_waits_for_no_program():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    started = time.perf_counter()
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        unit_tests(["while True: pass"] * 8, [TEST] * 8, timeout=60)
    assert time.perf_counter() - started < 20


def processes():
    """The working folders and states of all that run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.cwd())
        except psutil.Error:
            continue
    return found


def test_each_response_has_its_own_tests():
    tests = ["assert x == 1", "assert x == 2", None]
    assert unit_tests(["x = 1", "x = 1", "x = 1"], tests) == [1, 0, 0]


def test_no_program_is_no_process(monkeypatch):
    """A run asks so whether the tests of each row can be used."""
    monkeypatch.setattr("subprocess.Popen", None)
    assert unit_tests(["", "```python\n```"], ["assert 1", "assert 1"]) == [0, 0]


def test_a_time_limit_of_months_is_one():
    assert score(ADD, TEST, timeout=1e10) == 1


@pytest.mark.parametrize(
    ("tests", "arguments", "message"),
    [
        ("assert (", {}, r"'assert \(' .* are not valid Python"),
        ("A = {}\ndef check(f):\n    assert f(1, 1) == 3", {}, "only define what nobody calls"),
        ("class TestAdd(TestCase):\n    def test_add(self): ...", {}, "check nothing: .*unittest"),
        (3, {}, r"tests must be text .* 3 \(int\)"),
        ([3], {}, r"tests must be text"),
        (TEST, {"timeout": 0}, "timeout must be a number above 0, but is 0"),
        (TEST, {"memory": "1G"}, "memory must be a number above 0, but is '1G'"),
    ],
)
def test_mistakes_in_tests_and_limits(tests, arguments, message):
    with pytest.raises(UserError, match=message):
        score(ADD, tests, **arguments)


@pytest.mark.parametrize(
    ("limits", "told"),
    [({"memory": 1}, "memory=1 MiB"), ({"timeout": 1e-3}, "timeout=0.001 seconds")],
)
def test_limits_that_no_program_keeps_are_told_before_there_is_one(limits, told):
    with pytest.raises(UserError, match=f"no program ends within .*{told}"):
        unit_tests([], [], **limits)


def test_limits_are_tried_once(monkeypatch):
    assert unit_tests([], [], timeout=9) == []
    monkeypatch.setattr("subprocess.Popen", None)
    assert unit_tests([], [], timeout=9) == []
