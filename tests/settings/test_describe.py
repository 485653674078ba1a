"""Every setting has one description, and people find it wherever they look."""

from __future__ import annotations

import dataclasses
import pydoc
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ppo_engine import cli
from ppo_engine.errors import UserError
from ppo_engine.settings.describe import commented, help_settings, markdown, type_text
from ppo_engine.settings.files import load_config
from ppo_engine.settings.problems import keys, section_kinds, section_of
from ppo_engine.settings.schema import (
    DemoConfig,
    GenerateConfig,
    GRPOConfig,
    OptimizerConfig,
    PPOConfig,
    PPOSettings,
    RewardModelConfig,
    SFTConfig,
    resolved,
)
from ppo_engine.settings.schema.base import described

ROOT = Path(__file__).parents[2]
COMMANDS = [PPOConfig, GRPOConfig, RewardModelConfig, SFTConfig, GenerateConfig, DemoConfig]


@pytest.mark.parametrize("cls", COMMANDS)
def test_every_setting_has_a_description(cls: type) -> None:
    sections = {section_of(kind) for kind in keys(cls).values()} - {None}
    for section in (cls, *sections):
        texts = described(section)
        for field in dataclasses.fields(section):
            assert texts[field.name].endswith("."), (section, field.name)


def test_a_default_that_is_overridden_keeps_its_description() -> None:
    assert described(GRPOConfig)["ppo"] == described(PPOConfig)["ppo"] != ""


@pytest.mark.parametrize("cls", COMMANDS)
def test_a_dry_run_explains_and_reads_back_equal(cls: Any, tmp_path: Path) -> None:
    overrides = ["policy.lora.rank=4", f"policy.path='{'long # text ' * 20}'"]
    overrides += ["reward.sources=[{path: a}, {url: 'http://b'}]", "run.date=2026-11-27"]
    overrides += ["data.chat_template_kwargs={a: {b: [1, 'x\n  y']}}", "generation.stop=['\n', 3]"]
    config = load_config(cls, None, overrides if issubclass(cls, PPOConfig) else [])
    if issubclass(cls, PPOConfig):  # a separator of lines that is none of YAML's files
        config = replace(config, data=replace(config.data, system_prompt="one\u2028two"))
    text = commented(config)
    file = tmp_path / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    assert load_config(cls, str(file)) == resolved(config)
    comments = [line for line in text.splitlines() if line.lstrip().startswith("#")]
    assert comments and max(map(len, comments)) <= 100


def test_a_comment_stands_above_its_setting_once() -> None:
    text = commented(PPOConfig())
    assert "\n  # Responses to each prompt.\n  group_size: 1\n" in text
    assert text.count("# Train the last N decoder layers") == 1  # of the policy, not of the critic


def test_help_of_a_section_or_of_one_setting() -> None:
    assert help_settings(PPOConfig, "ppo.group_size") == (
        "ppo.group_size = 1   (integer > 0)\n    Responses to each prompt."
    )
    found = help_settings(GRPOConfig, "ppo")
    assert "ppo.group_size = 8   (" in found and "policy.path" not in found
    assert "ppo.adaptive_kl.target = 6.0   (number > 0)" in found  # of a section that is off
    whole = help_settings(PPOConfig)
    assert "policy.optimizer.learning_rate = null, here 1e-06   (" in whole
    assert "reward.sources[].url" in whole
    assert max(map(len, whole.splitlines())) <= 80
    with pytest.raises(UserError, match=r"ppo\.kl_coeff: unknown key; did you mean ppo\.kl_coef\?"):
        help_settings(PPOConfig, "ppo.kl_coeff")
    with pytest.raises(UserError, match=r"ppo\.kl: unknown key"):
        help_settings(PPOConfig, "ppo.kl")


@pytest.mark.parametrize("command", ["ppo", "grpo", "sft", "reward", "generate", "demo"])
def test_every_command_explains_its_settings(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, "--help-settings"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) >= 10 and " = " in shown
    assert cli.main([command, "--help-settings", "xyz"]) == 2
    assert "xyz: unknown key" in capsys.readouterr().err


def test_types_are_shown_with_their_bounds() -> None:
    shown = {name: type_text(kind) for name, kind in section_kinds(PPOSettings).items()}
    assert shown["gamma"] == "number >= 0 and <= 1"
    assert shown["clip_range"] == "number > 0 and < 1 | [number >= 0 and <= 1, number > 0]"
    assert shown["micro_batch_tokens"] == "integer > 0 | auto"
    assert shown["adaptive_kl"] == "section | null"
    assert type_text(section_kinds(OptimizerConfig)["learning_rate"]) == "number > 0 | null"


def test_pythons_help_describes_the_fields() -> None:
    shown = pydoc.plain(pydoc.render_doc(PPOConfig))
    assert "generation (GenerationConfig): How responses are sampled." in shown
    assert "steps: Rollout batches" in shown


def test_the_page_is_the_one_that_its_script_writes() -> None:
    page = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    assert page == markdown(), "run: python docs/settings.py"
    for cls in COMMANDS:
        for key in keys(cls):
            assert f"| `{key.rpartition('.')[2]}` |" in page


def test_the_page_has_the_default_rates() -> None:
    page = markdown()
    assert "| policy | `1e-6` | `1e-4` | DeepSeekMath" in page
    assert "| SFT | `2e-5` | `2e-4` | " in page


def test_help_needs_no_settings() -> None:
    """`ppo-engine --help` is instant: neither pydantic nor torch is loaded for it."""
    code = (
        "import sys; from ppo_engine.cli.parser import make_parser; make_parser().format_help();"
        "sys.exit('pydantic' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
