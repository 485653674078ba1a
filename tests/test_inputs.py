"""Settings and data that no program would write: read, or refused with a message, at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from faults.inputs import configuration, data_file, whole_configurations
from tiny import tiny_tokenizer

from ppo_engine.data.preferences import load_preferences
from ppo_engine.errors import UserError
from ppo_engine.models.precision import choose_device
from ppo_engine.settings.files import load_config
from ppo_engine.settings.schema import PPOConfig

# Each line holds the one before nine times.
LAUGHS = "a: &a [1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdef", "bcdefg", strict=True)
)


def test_mutated_settings(tmp_path: Path) -> None:
    assert whole_configurations(tmp_path) == [0] * 5
    assert not [one.ending for n in range(100) if (one := configuration(n, tmp_path)).wrong]


def test_mutated_data(tmp_path: Path) -> None:
    assert not [one.ending for n in range(200) if (one := data_file(n, tmp_path)).wrong]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reward:\n  weights: &s [*s]\n", "an anchor .* holds itself"),
        ("ppo: &p\n  gamma: *p\n", "an anchor .* holds itself"),
        ("ppo: &p\n  ppo: *p\n", "an anchor .* holds itself"),
        (LAUGHS, "or too much"),
        ("? [a, b]\n: 1\n", ":1: not valid YAML: a key must be a name"),
        ("ppo:\n  ? {a: b}\n  : 1\n", ":2: not valid YAML: a key must be a name"),
        ("run: {seed: 18446744073709551616}\n", r"run\.seed: should fit into 64 bits"),
        ("steps: 99999999999999999999\n", "steps: should fit into 64 bits"),
        ("generation: {temperature: 1e-300}\n", "temperature: should be greater than or equal"),
        ("generation: {temperature: 1e300}\n", "temperature: should fit into a float32"),
        ("ppo: {kl_coef: 1e308}\n", r"ppo\.kl_coef: should fit into a float32 \(up to 3\.4e\+38\)"),
        ("reward: {weights: [1e39]}\n", r"reward\.weights: should fit into a float32"),
    ],
)  # fmt: skip
def test_settings_beyond_all_bounds(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(PPOConfig, str(file), [])


def test_anchors_of_values_and_keys_may_be_used_again(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("ppo: {gamma: &g 0.5, lam: *g}\nrun: {seed: 18446744073709551615}\n")
    config = load_config(PPOConfig, str(file), [])
    assert (config.ppo.gamma, config.ppo.lam, config.run.seed) == (0.5, 0.5, 2**64 - 1)


@pytest.mark.parametrize("name", ["meta", "privateuseone", "hpu", "mps", "nowhere", "cuda:99"])
def test_a_device_that_computes_nothing_here(name: str) -> None:
    with pytest.raises(UserError, match=f"^Device '{name}' cannot be used: ") as caught:
        choose_device(name)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("margin", ["1e300", "-1e39", "1" + "0" * 400])
def test_a_margin_that_no_float32_holds(tmp_path: Path, margin: str) -> None:
    """Its loss would be infinite."""
    row = json.dumps({"prompt": "Q", "chosen": "a", "rejected": "b"})[:-1]
    (tmp_path / "data.jsonl").write_text(f'{row}, "margin": {margin}}}\n')
    with pytest.raises(UserError, match=r"'margin' (is too large: |must be a finite number)"):
        load_preferences(tmp_path / "data.jsonl", tokenizer=tiny_tokenizer())
