"""A run that is killed in the middle of a save goes on to the bits of one that was not."""

from __future__ import annotations

from pathlib import Path

from faults import kills

from ppo_engine.run import directory


def test_a_run_that_is_killed_in_a_save_goes_on() -> None:
    points = [(directory, "seal"), (Path, "rename")]
    found = list(kills.tries(0, points, {"sft": kills.sft}))
    assert len(found) == 6 and not [one for one in found if one.wrong]
