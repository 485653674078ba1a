"""What a run says of data that are too few for its batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model_folder
from trainers import config, length_reward, planted_pairs

from ppo_engine import PPOTrainer, RewardModelTrainer
from ppo_engine.settings.schema import (
    PPOSettings,
    PreferenceDataConfig,
    RewardModelConfig,
    RewardModelSettings,
)
from ppo_engine.training.batch_notes import batch_notes


@pytest.mark.parametrize(
    ("rollout", "mini", "group", "prompts", "notes"),
    [
        (8, 4, 1, 8, []),
        (8, 8, 2, 4, []),
        (
            8,
            16,
            2,
            4,
            ["mini_batch_size=16 is more than ppo.rollout_batch_size=8: each epoch is one"],
        ),
        (8, 4, 2, 3, ["3 prompts for 4 in each rollout: prompts repeat"]),
        (8, 4, 1, 7, ["7 prompts for 8 in each rollout: prompts repeat"]),
        (8, 3, 1, 8, ["each epoch is 3 optimizer steps, the last of 2 responses only."]),
        (9, 4, 1, 1, ["1 prompt for 9", "the last of 1 response only."]),
    ],
)
def test_notes_on_rollouts(rollout: int, mini: int, group: int, prompts: int, notes: Any) -> None:
    settings = PPOSettings(rollout_batch_size=rollout, mini_batch_size=mini, group_size=group)
    found = batch_notes(settings, prompts)
    assert len(found) == len(notes)
    assert all(text in note for text, note in zip(notes, found, strict=True))


def test_trainers_note_them(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path)
    settings = config(tmp_path / "run")
    ppo = PPOTrainer(model, length_reward, ["One", "Two"], config=settings)
    assert "2 prompts for 4" in " ".join(ppo.notes)
    settings = RewardModelConfig(
        data=PreferenceDataConfig(eval_fraction=0), reward=RewardModelSettings(batch_size=4)
    )
    for count, epochs, steps in ((4, 1, "1 optimizer step"), (8, 1, "2 optimizer steps")):
        chosen = replace(settings, reward=replace(settings.reward, epochs=epochs))
        notes = " ".join(RewardModelTrainer(model, planted_pairs(count), chosen).notes)
        assert f"The run is {steps} in all: {count} preferences in batches of 4." in notes
        assert "lower reward.batch_size" in notes
    notes = " ".join(RewardModelTrainer(model, planted_pairs(9), settings).notes)
    assert "in all" not in notes
