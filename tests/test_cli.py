"""The command line: settings from every side, errors without tracebacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ppo_engine import cli
from ppo_engine.errors import DEBUG_VARIABLE, UserError
from ppo_engine.settings.files import load_config
from ppo_engine.settings.schema import (
    DemoConfig,
    GenerateConfig,
    PPOConfig,
    PPOSettings,
    RewardConfig,
    RewardModelConfig,
    RewardSource,
    SFTConfig,
    resolved,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(DEBUG_VARIABLE, raising=False)


def of_dry_run(cls: type, capsys: pytest.CaptureFixture[str], *arguments: str) -> object:
    """What --dry-run prints, read back; of inputs that are not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ppo_engine.cli.inputs.check_inputs", lambda config: [])
        assert cli.main([*arguments, "--dry-run"]) == 0
    Path("resolved.yaml").write_text(capsys.readouterr().out)
    return load_config(cls, "resolved.yaml")


def ppo(**settings: Any) -> PPOSettings:
    """With what the unset ones come to."""
    return resolved(PPOConfig(ppo=PPOSettings(**settings))).ppo


def test_flags_become_settings(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "1e-5", "--data", "p.jsonl", "--output-dir", "out: 1", "--seed", "7"]
    config = of_dry_run(PPOConfig, capsys, "ppo", *flags, "--reward", "my reward/")
    assert isinstance(config, PPOConfig)
    assert (config.policy.path, config.data.path) == ("1e-5", "p.jsonl")  # taken literally
    assert (config.run.output_dir, config.run.seed) == ("out: 1", 7)
    assert (config.reward.path, config.reward.function) == ("my reward/", None)
    for cls, command in ((RewardModelConfig, "reward"), (SFTConfig, "sft")):
        config = of_dry_run(cls, capsys, command, *flags)
        assert isinstance(config, RewardModelConfig | SFTConfig)
        assert (config.model.path, config.data.path) == ("1e-5", "p.jsonl")


@pytest.mark.parametrize(
    ("cls", "arguments", "expected"),
    [
        (PPOConfig, ["ppo", "--profile"], {"profile": True, "ppo": ppo()}),
        (PPOConfig, ["ppo"], {"profile": False}),
        (
            PPOConfig,
            ["grpo", "ppo.kl_coef=0.5"],
            {"ppo": ppo(estimator="grpo", group_size=8, kl_in="loss", kl_coef=0.5)},
        ),
        (DemoConfig, ["demo", "--smoke"], {"smoke": True, "algorithm": "ppo"}),
        (
            DemoConfig,
            ["demo", "--algorithm", "grpo", "--seed", "3", "--output-dir", "d", "--model", "m"],
            {"smoke": False, "algorithm": "grpo", "seed": 3, "output_dir": "d", "model": "m"},
        ),
        (
            GenerateConfig,
            ["generate", "--n", "3", "--prompt", "x"],
            {"responses": 3, "prompt": "x"},
        ),
        (
            GenerateConfig,
            ["generate", "--output-dir", "d", "--prompt", "x"],
            {"output": "d/responses.jsonl"},
        ),
    ],
)
def test_switches_become_settings(
    cls: type, arguments: list[str], expected: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = of_dry_run(cls, capsys, *arguments)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        (["some/folder/my.py:f"], RewardConfig(function="some/folder/my.py:f")),
        (["organization/model-7b"], RewardConfig(path="organization/model-7b")),
        (["http://localhost/score"], RewardConfig(url="http://localhost/score")),
        (
            ["runs/reward/model", "my.py:f"],
            RewardConfig(
                sources=[RewardSource(path="runs/reward/model"), RewardSource(function="my.py:f")]
            ),
        ),
    ],
)
def test_reward_names_one_or_several_in_place_of_those_in_the_file(
    rewards: list[str], expected: RewardConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [flag for reward in rewards for flag in ("--reward", reward)]
    for file in ("{path: a}", "{function: b.py:c}", "{url: 'http://d'}", "{sources: [{path: e}]}"):
        Path("settings.yaml").write_text(f"reward: {file}\n")
        config = of_dry_run(PPOConfig, capsys, "ppo", "--config", "settings.yaml", *flags)
        assert isinstance(config, PPOConfig) and config.reward == expected
    weights = "reward.weights=[1, 0.5]"
    config = of_dry_run(PPOConfig, capsys, "ppo", weights, *flags)
    assert isinstance(config, PPOConfig) and config.reward.weights == [1, 0.5]


def test_file_then_flags_then_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    Path("settings.yaml").write_text("run: {seed: 1}\nsteps: 5\nppo: {kl_coef: 0.3}\n")
    config = of_dry_run(
        PPOConfig, capsys, "ppo", "steps=6", "--config", "settings.yaml", "--seed", "2", "ppo.lam=1"
    )
    assert isinstance(config, PPOConfig)
    assert (config.steps, config.run.seed) == (6, 2)
    assert (config.ppo.kl_coef, config.ppo.lam) == (0.3, 1.0)


def test_a_file_goes_before_what_grpo_starts_from(capsys: pytest.CaptureFixture[str]) -> None:
    Path("settings.yaml").write_text("ppo: {group_size: 4, kl_coef: 0.3}\n")
    config = of_dry_run(PPOConfig, capsys, "grpo", "--config", "settings.yaml", "ppo.kl_coef=0.2")
    assert isinstance(config, PPOConfig)
    expected = ppo(estimator="grpo", group_size=4, kl_in="loss", kl_coef=0.2)
    assert config.ppo == expected


def test_settings_go_before_flags_and_are_checked_together(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = of_dry_run(PPOConfig, capsys, "ppo", "run.seed=3", "--seed", "2")
    assert isinstance(config, PPOConfig) and config.run.seed == 3
    assert cli.main(["ppo", "ppo.estimator=rloo", "--dry-run"]) == 2
    assert "set ppo.group_size to 2 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ppo", "kl_coef=1"], "did you mean ppo.kl_coef?"),
        (["ppo", "--seed", "x"], "run.seed: should be a valid integer"),
        (["ppo", "--config", "absent.yaml"], "'absent.yaml' does not exist"),
        (["ppo"], "No prompts were given: --data"),
        (["ppo", "--data", "d"], "No reward was given: --reward"),
        (
            ["ppo", "--model", "m", "--data", "d", "reward.path=a", "reward.url=b"],
            "reward.path and reward.url are set",
        ),
        (["reward"], "No preferences were given: --data"),
        (["sft"], "No examples were given: --data"),
        (["sft", "batch_size=1"], "did you mean sft.batch_size?"),
        (["sft", "--model", "./absent", "--data", "d"], "'./absent' does not exist"),
        (["reward", "--model", "./absent", "--data", "d"], "'./absent' does not exist"),
        (
            ["generate", "--prompt", "x", "--out", "a.jsonl", "--output-dir", "d"],
            "--out and --output-dir say two places",
        ),
        (["generate", "--model", "m"], "prompts (--data FILE) or one prompt (--prompt TEXT)"),
        (["generate", "--model", "./absent", "--prompt", "x"], "'./absent' does not exist"),
        (["sft", "run.resume=true", "--output-dir", "runs/x"], "x has no run to resume"),
        (["generate", "--n", "0", "--prompt", "x"], "responses: should be greater than 0"),
        (["doctor", "a=1"], "no settings"),
    ],
)
def test_mistakes_are_one_message_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and message in shown.err
    assert "Traceback" not in shown.err and shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_grpo_is_not_run_as_ppo_by_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    """Which has every setting of the run that wrote it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ppo_engine.cli.inputs.check_inputs", lambda config: [])
        assert cli.main(["ppo", "--dry-run"]) == 0
        Path("s.yaml").write_text(capsys.readouterr().out)
        assert cli.main(["grpo", "--config", "s.yaml", "--dry-run"]) == 2
        said = capsys.readouterr().err
        assert "ppo.estimator=gae, which is PPO with a critic: run it with `ppo-engine ppo`" in said
        again = ["grpo", "--config", "s.yaml", "--dry-run", "ppo.estimator=grpo"]
        assert cli.main([*again, "ppo.group_size=4"]) == 0


def test_where_settings_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("s.yaml").write_text("stepz: 3\n")
    assert cli.main(["ppo", "--config=~/s.yaml"]) == 2
    assert "did you mean steps?" in capsys.readouterr().err
    Path("run").mkdir()
    assert cli.main(["ppo", "--config", "run"]) == 2
    assert "'run' is a folder.\n" in capsys.readouterr().err
    Path("run/config.yaml").touch()
    assert cli.main(["ppo", "--config", "run"]) == 2
    assert "'run' is a folder. Did you mean 'run/config.yaml'?" in capsys.readouterr().err
    assert cli.main(["ppo", "--output-dir", "run/config.yaml", "run.resume=true"]) == 2
    assert "Did you mean" not in capsys.readouterr().err


def test_a_demo_says_at_once_where_it_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    Path("d").mkdir()
    Path("d/config.yaml").touch()
    for more in ([], ["--dry-run"]):
        assert cli.main(["demo", "--smoke", "--output-dir", "d", *more]) == 2
        said = capsys.readouterr().err
        assert "d is not empty: choose another output_dir, or remove the folder." in said
        assert cli.main(["demo", "--smoke", "--output-dir", "e", "--model", "nope/", *more]) == 2
        assert "nope" in capsys.readouterr().err and not Path("e").exists()


@pytest.mark.parametrize("argument", ["--learning-rate=1", "stray", "--dry", "-x"])
def test_unknown_arguments(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["ppo", "steps=1", argument])
    assert stopped.value.code == 2 and argument in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "near"),
    [
        ("ppo --resume run", "run.resume=true --output-dir FOLDER?"),
        ("sft --resume_from_checkpoint=run", "run.resume=true --output-dir FOLDER?"),
        ("ppo --lr 1e-5", "policy.optimizer.learning_rate=… or critic.optimizer.learning_rate=…?"),
        ("sft --learning_rate=1e-5", "model.optimizer.learning_rate=…?"),
        ("reward --num-train-epochs 2", "reward.epochs=…?"),
        ("grpo --epochs 2", "ppo.epochs=…?"),
        ("ppo --batch-size 4", "ppo.rollout_batch_size=…?"),
        ("sft --batch_size 4", "sft.batch_size=…?"),
        ("sft --output_dir x", "run.output_dir=…?"),
        ("generate --max-new-tokens 4", "generation.max_new_tokens=…?"),
        ("grpo --beta 0", "ppo.kl_coef=…?"),
        ("ppo --model_name_or_path x", "--model?"),
        ("ppo --modle x", "--model?"),
        ("inspect --dataset_name x", "--data?"),
        ("demo --sede 3", "--seed?"),
        ("demo --resume", ""),
        ("ppo --zzz", ""),
    ],
)
def test_an_option_of_another_trainer(
    line: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(line.split())
    option = line.split()[1]
    told = f"{option!r}. Did you mean {near} Settings" if near else f"{option!r}. Settings"
    assert told in capsys.readouterr().err


def test_debug_variable_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    with pytest.raises(UserError):
        cli.main(["ppo"])


def test_interruption_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = KeyboardInterrupt()

    def interrupted(*_: object) -> None:
        raise error

    monkeypatch.setattr("ppo_engine.settings.files.load_config", interrupted)
    assert cli.main(["ppo"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    error.add_note("Step 3 is kept.")
    assert cli.main(["ppo"]) == 130
    assert capsys.readouterr().err == "interrupted\nStep 3 is kept.\n"


def test_help_and_settings_load_no_torch() -> None:
    code = (
        "import sys; from ppo_engine.cli import main\n"
        "for line in (['--help'], ['ppo', '--help'], ['--version']):\n"
        "    try: main(line)\n"
        "    except SystemExit as stop: assert stop.code == 0\n"
        "assert main(['demo', '--dry-run']) == 0\n"
        "assert main(['ppo', '--dry-run']) == 2\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "smoke: false" in done.stdout and "No prompts were given" in done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ppo --data gone.jsonl --reward last_number", "gone.jsonl does not exist"),
        ("ppo --data d --reward last_number --model ./gone", "Model folder './gone' does not"),
        ("ppo --data d --reward last_number --output-dir .", "Run folder . is not empty"),
        ("grpo --data d --reward gone.py:f", "file 'gone.py' does not exist"),
        ("grpo --data d --reward ./gone", "Model folder './gone' does not exist"),
        ("ppo --data d --reward last_number evaluation.path=gone", "gone does not exist"),
        ("ppo --data d --reward last_number environment.function=gone.py:f", "'gone.py' does not"),
        ("sft --data d data.eval_path=gone", "gone does not exist"),
        ("reward --data gone", "gone does not exist"),
        ("generate --data gone", "gone does not exist"),
        ("generate", "Give either prompts"),
        ("generate --data d --out d", "d exists; remove it or choose another --out"),
        ("inspect --data gone", "gone does not exist"),
        ("demo --model ./gone", "Model folder './gone' does not exist"),
    ],
)
def test_what_is_not_there_is_told_before_torch_is_loaded(
    line: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("d").touch()

    def loaded() -> None:
        raise AssertionError("torch would be imported here")

    for module in ("commands", "inputs"):
        monkeypatch.setattr(f"ppo_engine.cli.{module}.set_up_libraries", loaded)
    assert cli.main(line.split()) == 2
    assert message in capsys.readouterr().err


def test_a_missing_file_loads_no_torch() -> None:
    """What the checks before that import."""
    code = (
        "import sys; from ppo_engine.cli import main\n"
        "assert main('ppo --data gone --reward last_number'.split()) == 2\n"
        "assert main('generate --prompt p --out README.md'.split()) == 2\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "gone does not exist" in done.stderr, done.stderr


def test_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ppo_engine", "ppo", "stepz=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == ("error: Bad settings:\n  - stepz: unknown key; did you mean steps?\n")
