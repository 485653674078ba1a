"""What `--dry-run` finds without weights, and what a run is resumed with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_files import write
from tiny import tiny_model, tiny_model_folder, tiny_tokenizer
from trainers import length_reward

from ppo_engine import PPOTrainer, cli
from ppo_engine.errors import UserError
from ppo_engine.run.directory import check_output
from ppo_engine.settings.files import load_config
from ppo_engine.settings.schema import PPOConfig

REWARD = """
def length(prompts, responses): return [float(len(r)) for r in responses]
def right(prompts, responses, answer): return [float(a in r) for a, r in zip(answer, responses)]
"""
PROMPTS = [{"prompt": f"Case {n}"} for n in range(4)]
PAIRS = [{"prompt": f"Case {n}?", "chosen": "good", "rejected": "bad"} for n in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """The working folder: data of every kind, rewards, and the model without its weights."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, *PROMPTS, name="prompts.jsonl")
    write(tmp_path, *PAIRS, name="pairs.jsonl")
    write(
        tmp_path, {"prompt": "2?", "answer": 2}, {"prompt": "b", "answer": "b"}, name="sums.jsonl"
    )
    write(tmp_path, {"prompt": "Case 1", "response": "a"}, "broken", name="broken.jsonl")
    twice = {"prompt": "Case?", "responses": ["a", "a", "b"], "ranks": [0, 1, 2]}
    write(tmp_path, *[{**twice, "prompt": f"Case {n}?"} for n in range(8)], name="ranked.jsonl")
    write(tmp_path, {"prompt": "long " * 500}, *PROMPTS, name="long.jsonl")
    write(tmp_path, {"prompt": "2?", "answers": 2}, name="near.jsonl")
    Path("rewards.py").write_text(REWARD)
    for folder in ("policy", "scorer", "labels"):
        Path(folder).mkdir()
        for file in Path(model).iterdir():
            if file.suffix != ".safetensors":
                Path(folder, file.name).write_bytes(file.read_bytes())
    for folder, labels in (("scorer", 1), ("labels", 3)):
        config = json.loads(Path("policy/config.json").read_text())
        config["architectures"] = ["LlamaForSequenceClassification"]
        config["id2label"] = {str(n): f"LABEL_{n}" for n in range(labels)}
        Path(folder, "config.json").write_text(json.dumps(config))


def command(line: str) -> list[str]:
    """`M` is the model without weights, `P` the prompts, `R` a reward."""
    short = {"M": "--model policy", "P": "--data prompts.jsonl", "R": "--reward rewards.py:length"}
    return " ".join(short.get(word, word) for word in line.split()).split()


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("ppo M P R", "kl_coef: 0.05"),
        ("ppo M P --reward scorer --reward http://localhost:1/x", "url: http://localhost:1/x"),
        ("ppo M P --reward rewards.py:right data.columns.answer=prompt data.columns.prompt=prompt",
         "answer: prompt"),
        ("reward M --data pairs.jsonl", "center_coef"),
        ("sft M --data broken.jsonl data.on_bad_line=skip data.eval_fraction=0", "eval_fraction"),
        ("grpo M P --reward format_match reward.arguments.pattern=x", "format_match"),
        ("generate M P R", "batch_size"),
        ("generate M --prompt x", "batch_size"),
    ],
)  # fmt: skip
def test_a_dry_run_needs_no_weights_and_writes_nothing(
    line: str, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert cli.main([*command(line), "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert shown in printed.out
    # What a training run takes is no part of its settings.
    assert ("It fits:" in printed.err) == (not line.startswith("generate"))
    assert {*tmp_path.iterdir()} - {*before} <= {tmp_path / "__pycache__"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ppo", "No prompts were given"),
        ("ppo M P", "No reward was given"),
        ("ppo --model ./polcy P R", "'./polcy' does not exist or is not a folder. Did you mean"),
        ("ppo M --data prompt.jsonl R", "prompt.jsonl does not exist. Did you mean 'prompts.js"),
        ("ppo M --data broken.jsonl R", "broken.jsonl:2: not valid JSON"),
        ("ppo M P R evaluation.path=gone", "gone does not exist"),
        ("ppo M P --reward rewards.py:lenght", "Did you mean 'length'?"),
        ("ppo M P --reward reward.py:length", "Did you mean 'rewards.py'?"),
        ("ppo M P --reward rewards.py:right", "asks for 'answer', but the prompts have no other"),
        (
            "ppo M --data near.jsonl --reward last_number",
            "holds it (data.columns={answer: answers})",
        ),
        ("ppo M P --reward last_number", "holds it (data.columns={answer: …})"),
        ("grpo M P --reward last_number", "asks for 'answer', but the prompts have no other"),
        ("ppo M P --reward format_match", "needs an argument: set reward.arguments.pattern"),
        ("ppo M P --reward ./gone", "Model folder './gone' does not exist"),
        ("ppo M P --reward http://x:0/", "is not a valid URL"),
        ("ppo M P R critic.path=./gone", "Model folder './gone' does not exist"),
        ("ppo M P R environment.function=rewards.py:gone", "has no function 'gone'"),
        ("ppo M P R reward.weights=[1,2]", "reward.weights has 2 numbers for 1 reward; give"),
        ("ppo M --data sums.jsonl --reward last_number", "sums.jsonl:2: The reward function 'last"),
        ("ppo M P R --output-dir policy", "Run folder policy is not empty"),
        ("ppo M P R run.device=gpu", "Device 'gpu' cannot be used"),
        ("ppo M P R run.resume=true --output-dir run", "run has no run to resume"),
        ("ppo M P R run.resume=true", "run.resume needs run.output_dir"),
        ("reward M", "No preferences were given"),
        ("reward M --data prompts.jsonl", "no column 'chosen'"),
        ("sft M --data pairs.jsonl", "no column 'response'"),
        ("sft M --data broken.jsonl", "broken.jsonl:2: not valid JSON"),
        ("sft M --data pairs.jsonl data.columns.response=chosn", "Did you mean 'chosen'?"),
        ("ppo M P --reward policy", "'policy' has no score head"),
        ("ppo M P --reward labels", "'labels' is a classifier with 3 labels"),
        ("ppo M P R evaluation.prompts=4", "evaluation.prompts=4 leaves nothing to train on"),
        ("ppo M P R generation.max_new_tokens=100000", "the model's context has only"),
        ("ppo M P R data.max_prompt_tokens=2", "prompts.jsonl:1: prompt too long: "),
        ("ppo M --data long.jsonl R data.max_prompt_tokens=5000", "more than the context left = "),
        ("ppo M P R evaluation.path=long.jsonl", "long.jsonl:1: prompt too long"),
        ("reward M --data pairs.jsonl data.eval_fraction=0.99", "too few for a held-out set"),
        ("reward M --data ranked.jsonl data.max_pairs=0", "greater than 0"),
        ("generate M --data long.jsonl", "long.jsonl:1: prompt too long"),
        ("generate M P --reward policy", "'policy' has no score head"),
        ("generate M", "Give either prompts"),
        ("generate M P --reward rewards.py:right", "asks for 'answer'"),
        ("generate M P --out pairs.jsonl", "pairs.jsonl exists"),
        ("generate M P --out pairs.jsonl/x.jsonl", "pairs.jsonl is not a folder to write to"),
        ("ppo M P R policy.quantization=4bit", "needs lora"),
        ("ppo M P R run.offload=[reference]", "run.offload=['reference'] would have no effect"),
        ("generate M P --out rows.jsonl --resume", "rows.jsonl.partial"),
        ("generate M P reward.arguments.scale=2", "reward.arguments would have no effect"),
        ("generate M P reward.weights=[2]", "reward.weights would have no effect"),
    ],
)
def test_a_dry_run_finds_what_does_not_fit(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command(line), "--dry-run"]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.out == ""


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("reward M --data ranked.jsonl", "Preferences: of equal responses the one with the best"),
        ("reward M --data pairs.jsonl", "8 of 8 preferences are plain text"),
        ("sft M --data pairs.jsonl data.columns.response=chosen", "optimizer step in all: 7 exam"),
        ("ppo M --data long.jsonl R data.on_bad_line=skip", "Prompts: 1 skipped (1 prompt too lo"),
        ("ppo M P R evaluation.path=prompts.jsonl", "4 of the 4 prompts of evaluation.path are"),
        ("ppo M P R evaluation.prompts=2", "2 prompts for 64 in each rollout"),
    ],
)
def test_a_dry_run_says_what_a_run_would_say_of_the_data(
    line: str, note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command(line), "--dry-run"]) == 0
    assert note in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "ppo P R steps=1 ppo.rollout_batch_size=2",
        "generate --prompt x",
        "sft --data pairs.jsonl data.columns.response=chosen",
    ],
)
def test_a_command_without_a_model_takes_the_demos_and_says_so(
    line: str, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ppo_engine.demo.model.model_path", lambda: model)
    tokens = [] if line.startswith("sft") else ["generation.max_new_tokens=2"]
    assert cli.main([*command(line), *tokens]) == 0, capsys.readouterr().err
    assert (
        f"No model was given: {Path(model).name}, the demo's, is taken" in capsys.readouterr().err
    )


def test_settings_alone_reach_the_output_of_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    """It may become a settings file."""
    Path("loud.py").write_text(f"print('loading a judge')\n{REWARD}")
    assert cli.main([*command("ppo M P --reward loud.py:length"), "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "loading a judge" in shown.err and "loading a judge" not in shown.out


@pytest.mark.parametrize(
    ("line", "more"),
    [
        ("grpo P R steps=1 ppo.rollout_batch_size=8 generation.max_new_tokens=2 ppo.kl_coef=0.3",
         "steps=2"),
        ("reward --data pairs.jsonl reward.batch_size=4 reward.center_coef=0.1", ""),
        ("sft --data pairs.jsonl data.columns.response=chosen sft.batch_size=4", ""),
    ],
)  # fmt: skip
def test_a_run_is_resumed_by_its_folder_alone(
    model: str, line: str, more: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command(line), "--model", model, "--output-dir", "run"]) == 0
    resume = [line.split()[0], "run.resume=true", "--output-dir", "run", *more.split()]
    assert cli.main(resume) == 0, capsys.readouterr().err
    assert cli.main([*resume, "--dry-run"]) == 0
    for dry in ([], ["--dry-run"]):
        assert cli.main([*resume, "run.seed=1", *dry]) == 2
        assert "run.seed: 0 then, 1 now" in capsys.readouterr().err


def test_a_run_from_an_object_is_not_resumed_with_another_model(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though the settings name one, which might have the very same shape."""
    settings = {
        "policy": {"path": model},
        "ppo": {"rollout_batch_size": 4},
        "run": {"output_dir": "run"},
        "generation": {"max_new_tokens": 2},
        "steps": 1,
    }
    prompts = [row["prompt"] for row in PROMPTS]
    made = PPOTrainer(
        tiny_model(), length_reward, prompts, config=settings, tokenizer=tiny_tokenizer()
    )
    made.train()
    recorded = load_config(PPOConfig, "run/config.yaml")
    assert recorded.policy.path == recorded.data.path == ""
    resume = ["ppo", "run.resume=true", "--output-dir", "run", "steps=2"]
    assert cli.main([*resume, *command("P R")]) == 2
    assert "run was trained from a model that was given to Python" in capsys.readouterr().err
    # One from the command line may have had the demo's, with a file of settings that names none.
    text = Path("run/config.yaml").read_text()
    Path("run/config.yaml").write_text(text.replace("  path: ''", f"  path: {model}", 1))
    Path("mine.yaml").write_text("steps: 2")
    assert cli.main([*resume, "--config", "mine.yaml", *command("P R")]) == 2
    assert "policy.path: " in capsys.readouterr().err


def test_the_default_folder_is_looked_at_before_any_work() -> None:
    Path("runs").write_text("")
    with pytest.raises(UserError, match=r"runs is not a folder.*Choose a folder: run\.output_dir"):
        check_output("")


def test_a_typo_in_what_is_inspected_is_told_for_each_kind(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = "inspect M --data pairs.jsonl data.max_prompt_tokenss=3"
    assert cli.main(command(line)) == 2
    told = capsys.readouterr().err
    assert "As prompts: " in told and "did you mean data.max_prompt_tokens" in told
    assert cli.main([*command(line), "--as", "sft"]) == 2
    assert "As sft" not in capsys.readouterr().err
