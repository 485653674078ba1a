"""The bugs that `make mutants` plants are still there to be planted."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import mutants
import pytest
from mutations import MUTATIONS


def test_every_text_to_be_replaced_stands_once_in_its_file() -> None:
    mutants.check(MUTATIONS)


def test_every_bug_has_a_name_of_its_own_in_its_file() -> None:
    names = Counter((mutation.file, mutation.name) for mutation in MUTATIONS)
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"file": "ppo_engine/gone.py"}, "there is no such file"),
        ({"old": "no such text"}, "stands there 0 times"),
        ({"old": "import"}, "times, not once"),
        ({"new": "def :"}, "it is not Python"),
        ({"tests": ("test_gone",)}, "there is no test file test_gone.py"),
    ],
)
def test_a_bug_that_cannot_be_planted_is_told(changes, problem) -> None:
    with pytest.raises(SystemExit, match=problem):
        mutants.check([replace(MUTATIONS[0], **changes)])


@pytest.mark.slow
def test_a_planted_bug_is_caught_in_a_copy() -> None:
    name = "the bound without its second term"
    [mutation] = [mutation for mutation in MUTATIONS if mutation.name == name]
    before = (mutants.ROOT / mutation.file).read_text()
    command = [sys.executable, mutants.__file__, "--only", name]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "1 of 1 planted bugs caught: 100.0%" in found.stdout
    assert "caught by test_best_of_n.py::test_the_kl_bound" in found.stdout
    assert (mutants.ROOT / mutation.file).read_text() == before
