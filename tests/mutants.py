"""`make mutants`: plants the bugs of `mutations` in `ppo_engine`, one at a time, and runs the tests
that could see each. Prints a line for each, the survivors with their explanation, and the share
that was caught; the exit status is 1 below 95 %, or where a survivor has no explanation.

The working tree stays as it is: a bug is planted in a copy of `ppo_engine/` that stands first on
the path. Importing torch and transformers takes seconds, so it is done once here, and each bug has
a fork of this process, which imports `ppo_engine` and its tests from its own copy. The test that
caught a bug is the first to run the next time (`build/mutants.json` remembers it).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent
GOAL = 0.95
_MEMORY = ROOT / "build" / "mutants.json"
# What tests import that is not ours, before any fork.
_HEAVY = (
    "pytest", "torch", "transformers", "transformers.generation.utils", "peft", "pydantic",
    "transformers.models.llama.modeling_llama", "transformers.trainer_pt_utils", "httpx2",
    "matplotlib.figure", "matplotlib.backends.backend_agg", "rich.live", "torch._dynamo",
    "ppo_kernels",
)  # fmt: skip
_LONGEST_HANG = 60.0  # seconds, beyond a multiple of what the tests take without a bug
_fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Job:
    """Tests to be run, on the code as it is or with a bug."""

    tests: tuple[Path, ...]
    limit: float  # seconds
    mutation: Mutation | None = None
    first: str = ""  # the test to begin with


@dataclass(frozen=True)
class Outcome:
    job: Job
    caught: str  # the first test that failed, or how else it showed; empty: all tests passed
    seconds: float
    log: str


def main() -> int:
    options = _options()
    mutations = [f for f in MUTATIONS if options.only in f"{f.file} {f.name}"]
    check(mutations)
    if options.list:
        for mutation in mutations:
            print(f"{mutation.file}: {mutation.name} ({', '.join(mutation.tests)})")
        return 0
    started = time.perf_counter()
    _import_heavy()
    seconds = _seconds_without_a_bug(mutations, options.jobs)
    known = json.loads(_MEMORY.read_text(encoding="utf-8")) if _MEMORY.exists() else {}
    jobs = []
    for mutation in mutations:
        tests = tuple(map(find_test, mutation.tests))
        limit = _LONGEST_HANG + 4 * sum(seconds[file] for file in tests)
        jobs.append(Job(tests, limit, mutation, known.get(_key(mutation), "")))
    outcomes = []
    for outcome in run(jobs, options.jobs):
        outcomes.append(outcome)
        _print_row(len(outcomes), len(jobs), outcome)
        if outcome.job.mutation:
            known[_key(outcome.job.mutation)] = outcome.caught
    _MEMORY.parent.mkdir(exist_ok=True)
    _MEMORY.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return _verdict(outcomes, time.perf_counter() - started)


def _seconds_without_a_bug(mutations: Sequence[Mutation], workers: int) -> dict[Path, float]:
    """What each file of tests takes; SystemExit where one is not green as the code is."""
    files = {find_test(name) for mutation in mutations for name in mutation.tests}
    seconds = {}
    for outcome in run([Job((file,), 600.0) for file in sorted(files)], workers):
        if outcome.caught:
            raise SystemExit(f"{outcome.log}{outcome.caught} fails without a bug: fix that first.")
        seconds[outcome.job.tests[0]] = outcome.seconds
    print(f"{len(files)} files of tests pass without a planted bug.\n")
    return seconds


def _key(mutation: Mutation) -> str:
    """The same wherever the file stands."""
    return f"{mutation.name}: {mutation.old}"


def check(mutations: Sequence[Mutation]) -> None:
    """Raise SystemExit unless every text stands exactly once in its file, and every test exists."""
    problems = [f"{mutation.file}: {mutation.name}: {problem}" for mutation in mutations
                for problem in _problems(mutation)]  # fmt: skip
    if problems:
        raise SystemExit("\n".join(problems))


def _problems(mutation: Mutation) -> Iterator[str]:
    file = ROOT / mutation.file
    if not file.is_file():
        yield "there is no such file"
        return
    text = file.read_text(encoding="utf-8")
    count = text.count(mutation.old)
    if count != 1:
        yield f"the text to be replaced stands there {count} times, not once: {mutation.old!r}"
    try:
        compile(text.replace(mutation.old, mutation.new), str(file), "exec")
    except SyntaxError as error:
        yield f"with the bug it is not Python: {error}"
    for name in mutation.tests:
        if len(list((ROOT / "tests").rglob(f"{name}.py"))) != 1:
            yield f"there is no test file {name}.py, or several"


def find_test(name: str) -> Path:
    """By name, in whatever folder it is."""
    [file] = (ROOT / "tests").rglob(f"{name}.py")
    return file


def run(jobs: Sequence[Job], workers: int) -> Iterator[Outcome]:
    """The outcome of each job, as they come; one copy of the code for each worker."""
    waiting = list(reversed(jobs))
    running: dict[Any, tuple[_Trial, Path]] = {}  # by what is ready when the process ends
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        free = [Path(folder) / str(worker) for worker in range(workers)]
        for home in free:
            shutil.copytree(
                ROOT / "ppo_engine", home / "ppo_engine", ignore=shutil.ignore_patterns("*.pyc")
            )
        while waiting or running:
            while waiting and free:
                home = free.pop()
                trial = _Trial(waiting.pop(), home)
                running[trial.process.sentinel] = trial, home
            ready = wait(list(running), timeout=1.0)
            late = [s for s, (trial, _) in running.items() if trial.late() and s not in ready]
            for sentinel in (*ready, *late):
                trial, home = running.pop(sentinel)
                yield trial.finish(in_time=sentinel in ready)
                free.append(home)


class _Trial:
    """One process that runs the tests of a job on the copy in `home`."""

    def __init__(self, job: Job, home: Path) -> None:
        self.job, self.home = job, home
        self.started = time.perf_counter()
        if job.mutation is not None:
            self._write(job.mutation.new)
        self.answer, theirs = _fork.Pipe(duplex=False)
        self.process = _fork.Process(target=_run_tests, args=(job, home, theirs))
        self.process.start()
        theirs.close()

    def late(self) -> bool:
        return time.perf_counter() - self.started > self.job.limit

    def finish(self, in_time: bool) -> Outcome:
        seconds = time.perf_counter() - self.started
        if in_time:
            try:
                caught = self.answer.recv()
            except EOFError:
                caught = "a crash of the process"
        else:
            self.process.kill()
            caught = "the time limit"
        self.process.join()
        if self.job.mutation is not None:
            self._write(self.job.mutation.old)
        return Outcome(self.job, caught, seconds, (self.home / "log").read_text(errors="replace"))

    def _write(self, new: str) -> None:
        mutation = self.job.mutation
        assert mutation is not None
        text = (ROOT / mutation.file).read_text(encoding="utf-8")
        file = self.home / mutation.file
        file.write_text(text.replace(mutation.old, new), encoding="utf-8")
        # Python knows stale bytecode by time and size, and a bug may change neither.
        Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)


class _FirstFailure:
    """A pytest plugin: which test failed first, and `begin_with` goes before the others."""

    def __init__(self, begin_with: str) -> None:
        self.begin_with, self.where = begin_with, ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: not _name(item.nodeid).startswith(self.begin_with))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.where = self.where or _name(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        self.pytest_runtest_logreport(report)


def _name(nodeid: str) -> str:
    """Of a test, without its file's folder."""
    path, colons, test = nodeid.partition("::")
    return f"{path.rpartition('/')[2]}{colons}{test}"


def _run_tests(job: Job, home: Path, answer: Connection) -> None:
    """In a process of its own: say the first test that failed, or nothing."""
    log = os.open(home / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for path in (ROOT, ROOT / "kernels", home):
        sys.path.insert(0, str(path))
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for tests that start processes
    import ppo_engine

    assert ppo_engine.__file__ == str(home / "ppo_engine" / "__init__.py"), ppo_engine.__file__
    import pytest

    first = _FirstFailure(job.first)
    options = ["-x", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", "--tb=short"]
    status = pytest.main(
        [*options, f"--basetemp={home / 'tmp'}", *map(str, job.tests)], plugins=[first]
    )
    if status == pytest.ExitCode.OK:
        answer.send("")
    else:
        answer.send(first.where or f"pytest ended with {status!r}")


def _import_heavy() -> None:
    sys.path.insert(0, str(ROOT / "kernels"))
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # as conftest.py says, before the kernels are imported
    torch.set_num_threads(1)
    for name in _HEAVY:
        try:
            importlib.import_module(name)
        except ImportError:
            continue  # an optional package: the tests that need it are skipped
    import pytest

    # Of other packages, which cost a second each time.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    with tempfile.TemporaryDirectory() as nothing:  # pytest's own modules
        pytest.main([f"--rootdir={nothing}", "-q", "-q", nothing])
    ours = [name for name in sys.modules if name.partition(".")[0] == "ppo_engine"]
    assert not ours, f"imported before the fork: {ours}"


def _print_row(done: int, total: int, outcome: Outcome) -> None:
    mutation = outcome.job.mutation
    assert mutation is not None
    found = f"caught by {outcome.caught}" if outcome.caught else "SURVIVED"
    tests = ", ".join(mutation.tests)
    print(f"{done:>3}/{total}  {mutation.file}: {mutation.name}\n"
          f"         {found}  ({outcome.seconds:.1f} s; {tests})", flush=True)  # fmt: skip


def _verdict(outcomes: Sequence[Outcome], seconds: float) -> int:
    survivors = [o.job.mutation for o in outcomes if not o.caught and o.job.mutation]
    if survivors:
        print("\nSurvivors:")
    for mutation in survivors:
        print(f"  {mutation.file}: {mutation.name}")
        print(f"    {mutation.excuse or 'NOT EXPLAINED: add a test.'}")
    for outcome in outcomes:
        if outcome.caught and outcome.job.mutation and outcome.job.mutation.excuse:
            print(f"\n{outcome.job.mutation.name}: is caught, so take its excuse out.")
    caught = len(outcomes) - len(survivors)
    share = caught / max(1, len(outcomes))
    print(f"\n{caught} of {len(outcomes)} planted bugs caught: {share:.1%} "
          f"({seconds / 60:.1f} minutes)")  # fmt: skip
    return int(share < GOAL or any(not mutation.excuse for mutation in survivors))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="bugs whose file or name has it")
    parser.add_argument("--list", action="store_true", help="say what would be planted, and stop")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="at a time; default 2")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
