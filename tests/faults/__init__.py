"""Bugs to be planted in `ppo_engine`, one at a time; `mutants.py` plants them.

A bug is a text that stands exactly once in its file, and what takes its place. Those of a file
stand together, under the file's path and the tests that could see them.
"""

from __future__ import annotations

from faults import of_data, of_models, of_ppo, of_rewards, of_rollouts, of_runs, of_training
from faults.bug import Fault, InFile

_FILES: list[InFile] = [
    *of_ppo.FILES,
    *of_models.FILES,
    *of_rollouts.FILES,
    *of_rewards.FILES,
    *of_data.FILES,
    *of_training.FILES,
    *of_runs.FILES,
]

FAULTS: list[Fault] = [
    Fault(file.path, bug.name, bug.old, bug.new, tuple((bug.tests or file.tests).split()), bug.excuse)
    for file in _FILES
    for bug in file.bugs
]
