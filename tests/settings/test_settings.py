"""Settings: YAML and overrides in, validated dataclasses out; all problems are reported at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppo_engine import PPOTrainer
from ppo_engine.errors import UserError
from ppo_engine.settings.checks import check_settings
from ppo_engine.settings.describe import dump_config
from ppo_engine.settings.files import as_dict, flatten, load_config
from ppo_engine.settings.schema import (
    AdaptiveKLConfig,
    GenerateConfig,
    GenerationConfig,
    PPOConfig,
    RewardConfig,
    RewardModelConfig,
    SFTConfig,
    resolved,
)


def write(tmp_path: Path, text: str) -> str:
    file = tmp_path / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_defaults_without_file_or_overrides() -> None:
    assert load_config(PPOConfig) == PPOConfig()
    assert load_config(RewardModelConfig) == RewardModelConfig()
    assert load_config(SFTConfig) == SFTConfig()


def test_defaults_are_those_of_the_field() -> None:
    """Real sampling, Adam's epsilon of PPO (Huang et al. 2022), and Ziegler's controller."""
    config = PPOConfig()
    sampling = config.generation
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 0, 1.0)
    for model in (config.policy, config.critic):
        assert (model.optimizer.eps, model.optimizer.schedule) == (1e-5, "linear")
    assert (AdaptiveKLConfig().target, AdaptiveKLConfig().horizon) == (6.0, 10_000)


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (PPOConfig, {"stepz": 3}, "stepz"),
        (AdaptiveKLConfig, {"goal": 3.0}, "goal"),
        (GenerationConfig, {"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_python_is_told_of_its_mistakes_too(
    cls: type, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        cls(**settings)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "ppo: {kl_coef: 0.5, gamma: 0.9}\nsteps: 7\n")
    config = load_config(PPOConfig, file, ["ppo.kl_coef=0.02"])
    assert (config.ppo.kl_coef, config.ppo.gamma, config.steps) == (0.02, 0.9, 7)


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "0.00001", "1E-05", "+1e-5"])
def test_scientific_notation_is_a_number(tmp_path: Path, text: str) -> None:
    # YAML 1.1 reads 1e-5 as a string.
    by_override = load_config(PPOConfig, None, [f"policy.optimizer.learning_rate={text}"])
    by_file = load_config(
        PPOConfig, write(tmp_path, f"policy: {{optimizer: {{learning_rate: {text}}}}}")
    )
    assert by_override.policy.optimizer.learning_rate == 1e-5
    assert by_file.policy.optimizer.learning_rate == 1e-5


def test_whole_number_in_scientific_notation_serves_an_integer() -> None:
    assert load_config(PPOConfig, None, ["ppo.adaptive_kl.horizon=2e4"]).ppo.adaptive_kl == (
        AdaptiveKLConfig(horizon=20_000)
    )


def test_null_lists_and_empty_text() -> None:
    config = load_config(
        PPOConfig,
        None,
        [
            "ppo.value_clip_range=null",
            "run.trackers=[wandb, tensorboard]",
            "run.output_dir=",
            "policy.lora.target_modules=[q_proj, v_proj]",
            "reward.function=rewards.py:score",
        ],
    )
    assert config.ppo.value_clip_range is None
    assert config.run.trackers == ["wandb", "tensorboard"]
    assert config.run.output_dir == ""
    assert config.policy.lora is not None
    assert config.policy.lora.target_modules == ["q_proj", "v_proj"]
    assert config.reward.function == "rewards.py:score"


def test_optional_section_comes_and_goes(tmp_path: Path) -> None:
    assert PPOConfig().ppo.adaptive_kl is None
    on = load_config(PPOConfig, None, ["ppo.adaptive_kl.target=3"])
    assert on.ppo.adaptive_kl == AdaptiveKLConfig(target=3.0)
    file = write(tmp_path, "ppo: {adaptive_kl: {target: 3}}")
    assert load_config(PPOConfig, file, ["ppo.adaptive_kl=null"]).ppo.adaptive_kl is None


def test_a_whole_section_keeps_what_it_does_not_name(tmp_path: Path) -> None:
    file = write(tmp_path, "run: {seed: 4}\nppo: {kl_coef: 0.5, adaptive_kl: {target: 3}}")
    given = ["run={device: cpu}", "ppo={epochs: 2, adaptive_kl: {horizon: 9}}"]
    config = load_config(PPOConfig, file, given)
    assert (config.run.seed, config.run.device) == (4, "cpu")
    assert (config.ppo.kl_coef, config.ppo.epochs) == (0.5, 2)
    assert config.ppo.adaptive_kl == AdaptiveKLConfig(target=3.0, horizon=9)
    assert load_config(PPOConfig, None, ["ppo.adaptive_kl={}"]).ppo.adaptive_kl is not None
    empty = load_config(PPOConfig, file, ["ppo.adaptive_kl={}", "run={}"])
    assert empty == load_config(PPOConfig, file)
    # What a dictionary holds that is no section is one value.
    arguments = [f"reward.arguments={{{key}: 1}}" for key in "ab"]
    assert load_config(PPOConfig, None, arguments).reward.arguments == {"b": 1}


def test_text_that_is_no_unicode() -> None:
    with pytest.raises(UserError, match=r"output_dir.*udce9.*: not UTF-8 text. Type it anew"):
        load_config(PPOConfig, None, ['run.output_dir="caf\\udce9"'])


def test_an_argument_that_no_file_can_hold() -> None:
    config = PPOConfig(reward=RewardConfig(function="a.py:b", arguments={"scale": np.float32(2)}))
    with pytest.raises(UserError, match=r"config\.yaml cannot: .*float32.*value\.item\(\)"):
        PPOTrainer("./gone", config=config)  # before the model is looked for


def test_section_with_every_line_commented_out(tmp_path: Path) -> None:
    assert load_config(PPOConfig, write(tmp_path, "ppo:\n  # kl_coef: 0.1\n")) == PPOConfig()
    assert load_config(PPOConfig, write(tmp_path, "")) == PPOConfig()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "ppo.adaptive_kl.target=3.25",
            "policy.lora.rank=4",
            "policy.optimizer.learning_rate=3e-7",
            "run.output_dir='1e-5'",  # text that looks like a number
            'data.path="a: b # ü \\u2028"',
            'data.system_prompt="next\\u0085line"',
            "run.trackers=[wandb]",
            "reward.missing_eos_score=-1",
            "reward.sources=[{path: a}, {url: 'http://b', name: c}]",
            "reward.weights=[1, 0.5]",
        ],
    ],
)
def test_dumped_settings_read_back_equal(tmp_path: Path, overrides: list[str]) -> None:
    config = load_config(PPOConfig, None, overrides)
    assert load_config(PPOConfig, write(tmp_path, dump_config(config))) == resolved(config)


def test_flatten_names_every_leaf() -> None:
    flat = flatten(as_dict(PPOConfig()))
    assert flat["policy.optimizer.eps"] == PPOConfig().policy.optimizer.eps
    assert flat["ppo.adaptive_kl"] is None and "ppo" not in flat


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("ppo.kl_coeff=0.1", "ppo.kl_coef"),
        ("kl_coef=0.1", "ppo.kl_coef"),
        ("policy.learning_rate=1", "policy.optimizer.learning_rate"),
        ("klcoef=0.1", "ppo.kl_coef"),
        ("stepz=1", "steps"),
        ("ppo.adaptive_kl.targett=1", "ppo.adaptive_kl.target"),
        ("pppo.kl_coef=1", "ppo.kl_coef"),
        ("reward.sources=[{path: a}, {nme: b}]", "reward.sources[1].name"),
        ("xyzzy.plugh=1", "policy, reward, critic"),
        ("xyzzy={}", "policy, reward, critic"),
    ],
)
def test_unknown_key_names_the_nearest(override: str, nearest: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(PPOConfig, None, [override])
    message = str(caught.value)
    assert override.split("=")[0] in message and "unknown key" in message and nearest in message


def test_dotted_key_in_a_file_says_how_to_write_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'kl_coef' inside the section 'ppo'"):
        load_config(PPOConfig, write(tmp_path, "ppo.kl_coef: 0.1"))


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(UserError) as caught:
        load_config(
            PPOConfig,
            None,
            [
                "ppo.gamma=1.5",
                "ppo.epochs=0",
                "ppo.kl_coef=yes",
                "policy.optimizer.schedule=step",
                "policy.lora.target_modules=3",
                "critic.lora=true",
                "run.trackers=wandb",
                "nonsense",
                "ppo=3",
                "run.sed=1",
                "steps=2.5",
            ],
        )
    text = str(caught.value)
    assert "nonsense" in text and "key=value" in text
    assert "ppo: should be a section of keys, such as ppo." in text
    assert "critic.lora: should be a section of keys, such as critic.lora.rank, got true" in text
    assert "run.trackers: should be a list, such as [a, b], got" in text
    assert "policy.optimizer.schedule: should be 'linear', 'cosine' or 'constant', got" in text
    assert text.count("policy.lora.target_modules") == 1
    assert "run.sed: unknown key; did you mean run.seed?" in text
    assert "steps: should be a valid integer" in text

    with pytest.raises(UserError, match="clip_range: should be a valid number or should have at "):
        load_config(PPOConfig, None, ["ppo.clip_range=[0.5]"])
    with pytest.raises(UserError) as caught:
        load_config(PPOConfig, None, ["ppo.gamma=1.5", "ppo.epochs=0", "ppo.kl_coef=yes"])
    lines = str(caught.value).split("\n")[1:]
    assert [line.split(":")[0].strip(" -") for line in lines] == [
        "ppo.epochs",
        "ppo.gamma",
        "ppo.kl_coef",
    ]
    assert lines[1].endswith("should be less than or equal to 1, got 1.5")
    assert lines[2].endswith("got true")


@pytest.mark.parametrize("value", [".nan", ".inf", "-1", "null", "text", "[1]"])
def test_bad_number_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"ppo\.kl_coef: "):
        load_config(PPOConfig, None, [f"ppo.kl_coef={value}"])


def test_broken_file_names_file_and_line(tmp_path: Path) -> None:
    file = write(tmp_path, "steps: 1\nppo:\n  kl_coef: [1\n")
    with pytest.raises(UserError, match=r"settings\.yaml:\d+: not valid YAML"):
        load_config(PPOConfig, file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", "settings must be"),
        ("steps: 1\nsteps: 2\n", r"settings\.yaml:2: .*'steps' is given twice"),
        ("steps: !!python/object/apply:os.system [id]\n", r"settings\.yaml:1"),
        ("[" * 5000, "nested too deeply"),
        ("run: {date: 2026-13-01}", "month must be in 1..12"),
    ],
)
def test_other_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(PPOConfig, write(tmp_path, text))


def test_missing_file_folder_and_binary(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_config(PPOConfig, str(tmp_path / "absent.yaml"))
    with pytest.raises(UserError, match="is a folder"):
        load_config(PPOConfig, str(tmp_path))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(PPOConfig, str(binary))


def test_override_with_broken_yaml() -> None:
    with pytest.raises(UserError, match=r"run\.trackers=\[wandb.*not valid YAML"):
        load_config(PPOConfig, None, ["run.trackers=[wandb"])


def test_a_least_length_leaves_room_for_an_end() -> None:
    check_settings(PPOConfig(generation=GenerationConfig(max_new_tokens=8, min_new_tokens=7)))
    with pytest.raises(UserError, match=r"generation.min_new_tokens=8 leaves no room for an end"):
        check_settings(PPOConfig(generation=GenerationConfig(max_new_tokens=8, min_new_tokens=8)))


@pytest.mark.parametrize("other", [SFTConfig(), RewardModelConfig(), GenerateConfig()])
def test_the_settings_of_another_command_are_known_as_such(tmp_path: Path, other: Any) -> None:
    command = {SFTConfig: "sft", RewardModelConfig: "reward", GenerateConfig: "generate"}
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(other))
    with pytest.raises(UserError) as caught:
        load_config(PPOConfig, str(file), ["steps=3"])
    message = str(caught.value)
    assert f"holds the settings of `ppo-engine {command[type(other)]}`" in message
    assert "did you mean" not in message and load_config(type(other), str(file)) == resolved(other)


def test_a_mistake_is_not_taken_for_another_command(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for text in ("model: {path: x}", "sft: {epochs: 2}\nppo: {lam: 0.5}"):  # of several, of none
        file.write_text(text)
        with pytest.raises(UserError, match="unknown key"):
            load_config(PPOConfig, str(file))


@pytest.mark.parametrize("text", ["Answer after #### only.", "[1, 2] # two", "# all of it", "3 #"])
def test_the_end_of_a_value_is_not_left_out_as_a_comment(text: str) -> None:
    with pytest.raises(UserError, match=r"is a comment there.* quote it for YAML too"):
        load_config(PPOConfig, None, [f"data.system_prompt={text}"])
    quoted = load_config(PPOConfig, None, [f"data.system_prompt='{text}'"])
    assert quoted.data.system_prompt == text
    assert load_config(PPOConfig, None, ["data.system_prompt=a#b"]).data.system_prompt == "a#b"
