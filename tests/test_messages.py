"""Near names for what is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppo_engine.messages import nearest_path


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("data/prompt.jsonl", " Did you mean '{0}/data/prompts.jsonl'?"),
        ("dta/prompts.jsonl", " Did you mean '{0}/data/prompts.jsonl'?"),
        ("dat", " Did you mean '{0}/data'?"),
        ("dta/other.jsonl", " There is no folder '{0}/dta'."),
        ("runs/one/policy", " There is no folder '{0}/runs'."),
        ("data/prompts.jsonl/x", ""),
        ("else", ""),
    ],
)
def test_the_nearest_path(tmp_path: Path, path: str, hint: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prompts.jsonl").touch()
    assert nearest_path(tmp_path / path) == hint.format(tmp_path)
