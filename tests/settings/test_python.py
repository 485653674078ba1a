"""Settings in Python: sections as classes or dictionaries, mistakes in the words of the command
line, and what follows from other settings."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ppo_engine
from ppo_engine.errors import DEBUG_VARIABLE, UserError, entry_point
from ppo_engine.settings.describe import commented, dump_config
from ppo_engine.settings.files import load_config
from ppo_engine.settings.schema import (
    AdaptiveKLConfig,
    GenerateConfig,
    GenerationConfig,
    GRPOConfig,
    GRPOSettings,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    PPOSettings,
    RewardConfig,
    RewardModelConfig,
    SFTConfig,
    derived,
    resolved,
    settings_of,
)

any_type: Any = lambda value: value  # noqa: E731  what a type checker would refuse


def test_a_dictionary_serves_for_a_section() -> None:
    assert PPOConfig(generation=any_type({"max_new_tokens": 16})) == PPOConfig(
        generation=GenerationConfig(max_new_tokens=16)
    )
    assert PPOConfig(policy=any_type({"lora": {"rank": 4}})).policy.lora == LoraConfig(rank=4)


@pytest.mark.parametrize(
    ("make", "lines"),
    [
        (lambda: PPOConfig(**{"stps": 3}), ["stps: unknown key; did you mean steps?"]),
        (
            lambda: PPOConfig(ppo={"kl_coeff": 3, "kl_coef": -1}),
            [
                "ppo.kl_coeff: unknown key; did you mean ppo.kl_coef?",
                "ppo.kl_coef: should be greater than or equal to 0, got -1",
            ],
        ),
        (lambda: PPOSettings(kl_coef="x"), ['kl_coef: should be a valid number, got "x"']),
        (
            lambda: AdaptiveKLConfig(**{"targett": 3}),
            ["targett: unknown key; did you mean target?"],
        ),
        (
            lambda: RewardConfig(sources=[{"nme": "a"}]),
            ["sources[0].nme: unknown key; did you mean sources[0].name?"],
        ),
        (
            lambda: GRPOConfig(ppo=PPOSettings()),
            ["ppo: should be a GRPOSettings (which has all of PPOSettings), or a dictionary of"],
        ),
        (
            lambda: PPOConfig(ppo=GenerationConfig()),
            ["ppo: should be a PPOSettings, or a dictionary of its keys, got GenerationConfig(…)"],
        ),
        (
            lambda: RewardModelConfig(3),
            ["model: should be a section of keys, such as model.path, got 3"],
        ),
        (lambda: replace(PPOConfig(), steps=0), ["steps: should be greater than 0, got 0"]),
    ],
)
def test_mistakes_are_told_as_on_the_command_line(
    make: Callable[[], Any], lines: list[str]
) -> None:
    with pytest.raises(UserError, match="Bad settings in ") as caught:
        make()
    found = str(caught.value).splitlines()[1:]
    assert len(found) == len(lines)
    assert all(line.startswith(f"  - {start}") for line, start in zip(found, lines, strict=True))
    assert caught.value.__suppress_context__  # of pydantic's own error


def test_the_settings_of_a_trainer_may_be_a_dictionary_too() -> None:
    given = {"steps": 3, "generation": {"max_new_tokens": 16}}
    for config in (given, PPOConfig(**any_type(given))):
        found = settings_of(PPOConfig, any_type(config))
        assert (found.steps, found.generation.max_new_tokens, found.run.seed) == (3, 16, 0)
    assert settings_of(SFTConfig, None) == SFTConfig()
    grpo = GRPOConfig()
    assert settings_of(PPOConfig, grpo) is grpo


@pytest.mark.parametrize(
    "make",
    [
        lambda config: ppo_engine.PPOEngine("x", len, config=config),
        lambda config: ppo_engine.PPOTrainer("x", len, ["a"], config=config),
        lambda config: ppo_engine.SFTTrainer("x", [], config),
        lambda config: ppo_engine.RewardModelTrainer("x", [], config),
    ],
)
def test_what_are_no_settings_of_a_trainer_is_told(make: Callable[[Any], Any]) -> None:
    with pytest.raises(UserError, match="runn: unknown key; did you mean run"):
        make({"runn": {}})
    with pytest.raises(UserError, match=r"should be a \w+Config, or a dictionary .*\(GenerationC"):
        make(GenerationConfig())


def test_a_users_dictionary_stays_as_it_is() -> None:
    given = {"kl_coeff": 3, "adaptive_kl": {"targett": 1}}
    with pytest.raises(UserError):
        PPOConfig(ppo=any_type(given))
    assert given == {"kl_coeff": 3, "adaptive_kl": {"targett": 1}}


def test_grpo_starts_from_its_papers_settings() -> None:
    """Shao et al. 2024, section 4.2, in smaller groups; what is set replaces only itself."""
    for config in (
        GRPOConfig(ppo=GRPOSettings(kl_coef=0.1)),
        GRPOConfig(ppo=any_type({"kl_coef": 0.1})),
        load_config(GRPOConfig, None, ["ppo.kl_coef=0.1"]),
    ):
        ppo = resolved(config).ppo
        assert (ppo.estimator, ppo.group_size, ppo.kl_in, ppo.kl_coef) == ("grpo", 8, "loss", 0.1)
        assert (ppo.kl_estimator, ppo.reduction, ppo.whiten_advantages) == (
            "k3",
            "sequence_mean",
            False,
        )
    assert GRPOSettings().kl_coef == 0.04 and isinstance(GRPOConfig(), PPOConfig)


def rates(config: Any) -> list[float]:
    config = resolved(config)
    names = [name for name in ("policy", "critic", "model") if hasattr(config, name)]
    return [getattr(config, name).optimizer.learning_rate for name in names]


def test_a_rate_for_each_use_unless_one_is_set() -> None:
    lora = ModelConfig(lora=LoraConfig())
    own = OptimizerConfig(learning_rate=3e-5)
    assert rates(PPOConfig()) == rates(GRPOConfig()) == [1e-6, 1e-5]
    assert rates(PPOConfig(policy=lora)) == [1e-4, 1e-5]
    assert rates(PPOConfig(critic=lora)) == [1e-6, 1e-4]
    assert rates(RewardModelConfig()) + rates(RewardModelConfig(model=lora)) == [9e-6, 1e-4]
    assert rates(SFTConfig()) + rates(SFTConfig(model=lora)) == [2e-5, 2e-4]
    assert rates(PPOConfig(policy=replace(lora, optimizer=own))) == [3e-5, 1e-5]
    assert OptimizerConfig().warmup_fraction == 0.03


def test_a_section_that_two_share_gets_a_rate_for_each() -> None:
    shared = ModelConfig()
    assert rates(PPOConfig(policy=shared, critic=shared)) == [1e-6, 1e-5]
    assert shared.optimizer.learning_rate is None


def test_the_rate_follows_what_is_replaced() -> None:
    config = PPOConfig()
    policy = replace(config.policy, lora=LoraConfig())
    assert rates(replace(config, policy=policy)) == [1e-4, 1e-5]
    optimizer = replace(policy.optimizer, eps=1e-8)
    assert rates(replace(config, policy=replace(policy, optimizer=optimizer))) == [1e-4, 1e-5]
    assert rates(SFTConfig(model=policy)) == [2e-4]
    chosen = replace(policy.optimizer, learning_rate=1e-6)  # the default's number, but chosen
    assert rates(replace(config, policy=replace(policy, optimizer=chosen))) == [1e-6, 1e-5]


@pytest.mark.parametrize("dump", [dump_config, commented])
def test_a_file_has_the_values_and_goes_on_following_where_it_says_null(
    dump: Callable[[Any], str], tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    settings = PPOConfig(critic=ModelConfig(optimizer=OptimizerConfig(1e-5)))
    file.write_text(dump(settings))
    assert load_config(PPOConfig, str(file)) == resolved(settings)
    null = [re.sub(": .*  # not set", ": null  # not set", x) for x in dump(settings).split("\n")]
    file.write_text("\n".join(null))
    assert load_config(PPOConfig, str(file)) == settings
    overrides = ["policy.lora.rank=4", "critic.lora.rank=4", "ppo.estimator=grpo"]
    config = load_config(PPOConfig, str(file), overrides)
    assert rates(config) == [1e-4, 1e-5]
    assert resolved(config).ppo.reduction == "sequence_mean"
    assert resolved(load_config(PPOConfig, str(file), ["ppo.kl_in=loss"])).ppo.kl_estimator == "k3"


@pytest.mark.parametrize("dump", [dump_config, commented])
def test_a_file_has_the_adapters_that_follow(dump: Callable[[Any], str], tmp_path: Path) -> None:
    settings = PPOConfig(policy=ModelConfig(lora=LoraConfig(rank=3)), share_base=True)
    text = dump(settings)
    assert re.search(r"\n  lora:  # not set: .*\n    rank: 3\n    alpha: 32\n", text)
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(PPOConfig, str(tmp_path / "config.yaml")) == resolved(settings)


def test_what_unset_settings_come_to_stands_behind_them() -> None:
    config = PPOConfig(ppo=PPOSettings(reduction="sum"))
    for text in (dump_config(config), commented(config)):
        assert "    learning_rate: 1.0e-06  # not set: null lets it follow from other" in text
        assert "  whiten_advantages: true  # not set" in text
        assert "  reduction: sum\n" in text
    assert derived(resolved(config)) == {} and resolved(resolved(config)) == resolved(config)
    assert resolved(GenerateConfig()) == GenerateConfig()


def test_what_is_replaced_in_python_goes_on_following() -> None:
    for changed, name, value in (
        ({"estimator": "grpo"}, "reduction", "sequence_mean"),
        ({"estimator": "grpo"}, "whiten_advantages", False),
        ({"kl_in": "loss"}, "kl_estimator", "k3"),
    ):
        settings = replace(PPOSettings(), **any_type(changed))
        assert getattr(resolved(PPOConfig(ppo=settings)).ppo, name) == value


def test_all_settings_classes_are_exported() -> None:
    from ppo_engine.settings import schema

    classes = {name for name in schema.__all__ if name[0].isupper() and not name.isupper()}
    assert classes <= set(ppo_engine.__all__)
    for name in ppo_engine.__all__:
        assert getattr(ppo_engine, name).__name__ == name
    assert set(ppo_engine.__all__) <= set(dir(ppo_engine))


def run_python(code: str) -> str:
    """What a script prints on stderr."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr


def test_a_wrong_name_is_told_the_near_one() -> None:
    shown = run_python("from ppo_engine import PPOTrianer")
    assert "ImportError: ppo_engine has no 'PPOTrianer': did you mean 'PPOTrainer'?" in shown
    assert "During handling" not in shown
    with pytest.raises(AttributeError, match="has no 'PPOConfg': did you mean 'PPOConfig'"):
        _ = ppo_engine.PPOConfg
    assert not hasattr(ppo_engine, "PPOTrianer") and not hasattr(ppo_engine, "xyzzy")
    from ppo_engine import doctor  # a module, whatever is near

    assert doctor.__name__ == "ppo_engine.doctor"


def test_a_mistake_in_a_script_ends_in_a_few_lines() -> None:
    shown = run_python("from ppo_engine import PPOConfig\nPPOConfig(ppo={'kl_coeff': 1})")
    assert len(shown.splitlines()) <= 7 and "pydantic" not in shown
    assert shown.endswith("  - ppo.kl_coeff: unknown key; did you mean ppo.kl_coef?\n")
    shown = run_python("from ppo_engine import PPOTrainer\nPPOTrainer('./absent', prompts=['a'])")
    assert len(shown.splitlines()) <= 7 and "UserError: " in shown and "During" not in shown


def test_a_traceback_ends_where_people_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def below() -> None:
        raise UserError("x") from ValueError("y")

    called = entry_point(lambda: below())
    with pytest.raises(UserError) as caught:
        called()
    assert [entry.name for entry in caught.traceback][1:] == ["entered"]
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    with pytest.raises(UserError) as caught:
        called()
    assert caught.traceback[-1].name == "below" and caught.value.__cause__ is not None
