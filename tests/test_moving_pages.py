"""docs/from-trl.md and docs/from-openrlhf.md: the settings that they name exist on both sides."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ppo_engine import PPOConfig, RewardModelConfig, SFTConfig

DOCS = Path(__file__).parents[1] / "docs"
OURS: dict[str, tuple[type, ...]] = {
    "Every trainer": (PPOConfig, RewardModelConfig, SFTConfig),
    "PPO": (PPOConfig,),
    "PPO and its relatives": (PPOConfig,),
    "GRPO": (PPOConfig,),
    "Reward model": (RewardModelConfig,),
    "SFT": (SFTConfig,),
}


def rows(page: str) -> Iterator[tuple[str, list[str]]]:
    """The section of each row of settings, and its cells."""
    section = ""
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| `") and section in OURS:
            yield section, [cell.strip() for cell in line[1:-1].split("|")]


def exists(cls: type, key: str) -> bool:
    """Whether `cls` has the setting `key`, also in a section that is None by default."""
    name, _, rest = key.partition(".")
    hint = typing.get_type_hints(cls).get(name)
    if hint is None or not rest:
        return hint is not None
    sections = [part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)]
    return any(exists(section, rest) for section in sections)


@pytest.mark.parametrize("page", ["from-trl.md", "from-openrlhf.md"])
def test_our_settings_exist(page: str) -> None:
    found = [(section, key) for section, cells in rows(page) for key in keys_of(cells)]
    assert len(found) > 60
    for section, key in found:
        for cls in OURS[section]:
            own = key if cls is PPOConfig else re.sub(r"^policy\.", "model.", key)
            assert exists(cls, own), f"{page}, {section}: {own}"


def keys_of(cells: list[str]) -> list[str]:
    """The settings in a row, wherever: what only looks like one begins with no section's name."""
    names = re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)*)(?:=[^`]*)?`", " ".join(cells[1:]))
    sections = {"policy", "critic", "model", "reward", "data", "generation", "ppo", "sft", "run",
                "environment", "evaluation"}  # fmt: skip
    return [name for name in names if name.split(".")[0] in sections or name == "steps"]


def test_settings_of_trl_exist_with_these_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="the optional group `bench` is not installed")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl import GRPOConfig as GRPO
    from trl import RewardConfig as Reward
    from trl import SFTConfig as SFT
    from trl.experimental.ppo import PPOConfig as PPO

    theirs: dict[str, tuple[Any, ...]] = {
        "Every trainer": (PPO, GRPO, Reward, SFT), "PPO": (PPO,), "GRPO": (GRPO,),
        "Reward model": (Reward,), "SFT": (SFT,),
    }  # fmt: skip
    for section, (name, default, *_) in rows("from-trl.md"):
        for cls in theirs[section]:
            defaults = {field.name: field.default for field in dataclasses.fields(cls)}
            assert name.strip("`") in defaults, f"{section}: {name}"
            if default:
                found = defaults[name.strip("`")]
                assert str(getattr(found, "value", found)) == default.strip("`"), name
