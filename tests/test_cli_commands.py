"""The commands for real, on a tiny model: results where they go, and what stops them before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from data_files import BLUE, USER
from families import of_family
from tiny import tiny_model_folder, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ppo_engine import (
    GenerationConfig,
    PPOConfig,
    PPOEngine,
    PPOSettings,
    PPOTrainer,
    RewardModelTrainer,
    RunConfig,
    SFTTrainer,
    cli,
)
from ppo_engine.errors import DEBUG_VARIABLE, UserError
from ppo_engine.rewards.best_of_n import expected_best

PAIRS = [
    {"prompt": f"Question {n}?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(8)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(DEBUG_VARIABLE, raising=False)


def write(name: str, *rows: object) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return name


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").split("\n")[:-1]]


def test_generate_writes_responses(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(
        "prompts.jsonl", {"prompt": "One", "k": 1}, {"prompt": "Two", "responses": "old ones"}
    )
    flags = ["--model", model, "--data", data, "--n", "3", "generation.max_new_tokens=4"]
    assert cli.main(["generate", *flags, "batch_size=2", "--out", "deep/out.jsonl"]) == 0
    rows = read("deep/out.jsonl")
    assert [row["prompt"] for row in rows] == ["One", "Two"]
    assert all(len(row["responses"]) == len(row["finished"]) == 3 for row in rows)
    assert rows[0]["k"] == 1
    assert [file.name for file in Path("deep").iterdir()] == ["out.jsonl"]
    shown = capsys.readouterr()
    noted = " ".join(shown.err.split())
    assert "2 of 2 prompts are plain text" in noted and "data.as_chat=true" in noted
    assert "nothing reads" not in noted  # every column is in the output
    assert shown.out == ""

    assert cli.main(["generate", *flags, "--out", "deep/out.jsonl"]) == 2
    assert "exists" in capsys.readouterr().err

    assert cli.main(["generate", *flags, "batch_size=2"]) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]
    assert again == rows  # the same seed
    assert cli.main(["generate", *flags, "batch_size=2", "--seed", "1", "--output-dir", "d"]) == 0
    assert read("d/responses.jsonl") != rows

    data = write("same.jsonl", {"prompt": "One"}, {"prompt": "One"})  # in a batch of its own each
    flags = ["--model", model, "--data", data, "generation.max_new_tokens=4", "batch_size=1"]
    assert cli.main(["generate", *flags, "--out", "same.out"]) == 0
    assert len({str(row) for row in read("same.out")}) == 2


def test_generate_asks_text_as_a_chat_when_told_to(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write("prompts.jsonl", {"question": "One"}, {"messages": [USER, BLUE]})
    flags = ["--model", model, "--data", data, "generation.max_new_tokens=2", "data.as_chat=true"]
    assert cli.main(["generate", *flags]) == 0
    shown = capsys.readouterr()
    rows = [json.loads(line) for line in shown.out.split("\n")[:-1]]
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": "One"}], [USER]]
    assert rows[0]["question"] == "One" and rows[1]["messages"] == [USER, BLUE]
    noted = " ".join(shown.err.split())
    assert "plain text" not in noted and "answer at a conversation's end is cut" in noted
    # Also where the one prompt that is given could not be a chat.
    raw = tiny_model_folder(Path("raw"), chat_template=False)
    assert cli.main(["generate", "--model", raw, "--prompt", "One", "data.as_chat=true"]) == 2
    assert "data.as_chat=true needs a chat template" in capsys.readouterr().err


def test_generate_says_why_it_is_slow(capsys: pytest.CaptureFixture[str]) -> None:
    of_family("rwkv").save_pretrained("rwkv")
    tiny_tokenizer().save_pretrained("rwkv")
    flags = ["--model", "rwkv", "--prompt", "One", "generation.max_new_tokens=2"]
    assert cli.main(["generate", *flags]) == 0
    noted = " ".join(capsys.readouterr().err.split())
    assert "Only prompts of the same length" in noted and "without a cache" in noted


def test_generate_scores_and_shows_the_best_of_n(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write("prompts.jsonl", {"prompt": "One", "k": 1}, {"prompt": "Two", "k": 2})
    write(
        "reward.py",
        "def a(prompts, responses, k): return [100 * n + len(r) for n, r in zip(k, responses)]",
        "def b(prompts, responses): return [r.count(' ') for r in responses]",
    )
    flags = ["generate", "--model", model, "--data", data, "--n", "5", "batch_size=12"]
    flags += ["generation.max_new_tokens=8", "--reward", "reward.py:a", "--reward", "reward.py:b"]
    assert cli.main([*flags, "reward.weights=[1,-2]", "--out", "out.jsonl"]) == 0
    rows = read("out.jsonl")
    for row in rows:
        expected = [100 * row["k"] + len(r) - 2 * r.count(" ") for r in row["responses"]]
        assert row["scores"] == expected
    shown = capsys.readouterr().err
    assert "Scores of 2 prompts, 5 responses each" in shown
    table = torch.tensor([row["scores"] for row in rows])
    for n, label in ((1, "1 (mean)"), (2, "2"), (4, "4"), (5, "5")):
        best = expected_best(table, n)
        error = best.std().item() / 2**0.5
        line = next(line for line in shown.split("\n") if line.startswith(f"│ {label} "))
        assert f"{best.mean():+.3f} ± {error:.3f}" in line
    assert "at most 0.19 nats" in shown

    # Without a reward the rows are the same but for the scores; one prompt has no standard error.
    assert cli.main([*flags[:-4], "--out", "plain.jsonl"]) == 0
    assert read("plain.jsonl") == [{k: v for k, v in row.items() if k != "scores"} for row in rows]
    assert "Scores" not in capsys.readouterr().err
    flags = ["generate", "--model", model, "--prompt", "One", "generation.max_new_tokens=2"]
    assert cli.main([*flags, "--reward", "reward.py:b"]) == 0
    shown = capsys.readouterr()
    assert "±" not in shown.err.split("Scores of 1 prompt, 1 response each")[1]
    assert json.loads(shown.out)["prompt"] == [{"role": "user", "content": "One"}]  # a chat model


# Its third call after a trial fails, where there is a file "broken".
BREAKS = """
import os, random
calls = []
def reward(prompts, responses):
    calls.append(responses)
    if len(calls) == 4 and os.path.exists("broken"):
        os.remove("broken")
        raise {error}
    return [len(response) + random.random() for response in responses]
"""


@pytest.mark.parametrize(("error", "status"), [("ValueError", 2), ("KeyboardInterrupt", 130)])
def test_generate_goes_on_where_it_failed(
    model: str, error: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write("prompts.jsonl", *({"prompt": f"Prompt {n}", "n": n} for n in range(5)))
    flags = ["generate", "--model", model, "--data", data, "--n", "2", "batch_size=4"]
    flags += ["generation.max_new_tokens=4"]
    write("whole.py", BREAKS.format(error=error))
    write("reward.py", BREAKS.format(error=error))
    assert cli.main([*flags, "--reward", "whole.py:reward", "--out", "whole.jsonl"]) == 0
    table = capsys.readouterr().err.partition("Scores of")[2]
    flags += ["--reward", "reward.py:reward", "--out", "o/out.jsonl"]
    write("broken", "")
    assert cli.main(flags) == status
    note = "4 rows in o/out.jsonl.partial: the same command with --resume goes on from there."
    assert capsys.readouterr().err.endswith(f"\n{note}\n")
    assert read("o/out.jsonl.partial") == read("whole.jsonl")[:4]

    assert cli.main(flags) == 2  # what was made is not written over
    assert "o/out.jsonl.partial has rows of a command that failed" in capsys.readouterr().err
    assert cli.main([*flags, "--resume", "seed=1"]) == 2
    assert "seed: 0 then, 1 now" in capsys.readouterr().err
    rows = [{"prompt": f"Prompt {n}", "n": n} for n in range(5)]
    write("prompts.jsonl", *rows[:4], rows[4] | {"n": 5})
    assert cli.main([*flags, "--resume"]) == 2
    assert "was made of other prompts (5 rows, digest " in capsys.readouterr().err

    write("prompts.jsonl", *rows)
    assert cli.main([*flags, "--resume"]) == 0
    assert Path("o/out.jsonl").read_text() == Path("whole.jsonl").read_text()
    assert [file.name for file in Path("o").iterdir()] == ["out.jsonl"]
    assert capsys.readouterr().err.partition("Scores of")[2] == table


def test_generate_without_anything_to_go_on_with(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write("prompts.jsonl", {"prompt": "One"})
    write(
        "reward.py",
        "calls = []",
        "def reward(prompts, responses):",
        "    calls.append(1)",
        "    return [1.0 / (2 - len(calls))] * len(responses)",  # on trial, and then not
    )
    flags = ["generate", "--model", model, "--data", data, "--reward", "reward.py:reward"]
    assert cli.main([*flags, "--resume"]) == 2
    assert "--resume needs --out" in capsys.readouterr().err
    assert cli.main([*flags, "--out", "o/out.jsonl", "--resume"]) == 2
    assert "There is nothing to go on with" in capsys.readouterr().err
    assert cli.main([*flags, "--out", "o/out.jsonl", "generation.max_new_tokens=2"]) == 2
    assert "--resume" not in capsys.readouterr().err and not list(Path("o").iterdir())


@pytest.mark.parametrize(("error", "status"), [("ValueError", 2), ("KeyboardInterrupt", 130)])
def test_ppo_goes_on_where_it_failed(
    model: str, error: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write("prompts.jsonl", *({"prompt": f"Prompt {n}"} for n in range(4)))
    write("reward.py", BREAKS.format(error=error))
    flags = ["ppo", "--model", model, "--data", data, "--reward", "reward.py:reward", "steps=4"]
    flags += ["generation.max_new_tokens=2", "ppo.rollout_batch_size=2", "--output-dir", "run"]
    write("broken", "")
    assert cli.main(flags) == status
    shown = capsys.readouterr().err
    assert "Step 2 is kept in run/checkpoints/step-000002.\nThe same run with " in shown
    again = shown.partition("The same run with ")[2].partition(" goes on")[0].split()
    assert again == ["run.output_dir=run", "run.resume=true"]
    assert cli.main([*flags, *again]) == 0
    told = capsys.readouterr().out
    assert "The run goes on after step 2 of 4, from run/checkpoints/step-000002.\n" in told
    assert [row["step"] for row in read("run/metrics.jsonl")] == [1, 2, 3, 4]


def test_generate_looks_at_a_rewards_parameters_before_it_samples(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ppo_engine.generate._respond", lambda *_: pytest.fail("it samples"))
    data = write("prompts.jsonl", {"prompt": "One", "answer": "x"})
    write("reward.py", "def score(prompts, answer): return [0.0] * len(prompts)")
    flags = ["generate", "--model", model, "--data", data, "--reward", "reward.py:score"]
    assert cli.main([*flags, "--out", "out.jsonl"]) == 2
    assert "takes the column 'answer' in place of the responses" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "x"', "prompts.jsonl:2: not valid JSON"),
        ({"text": "x"}, "prompts.jsonl:2: no column 'prompt'"),
        ({"prompt": " "}, "prompts.jsonl:2: empty prompt"),
        ({"prompt": "x" * 2000}, "prompts.jsonl:2: prompt too long: 2000 tokens"),
        ({"prompt": "x" * 1500}, "1500 tokens, more than data.max_prompt_tokens = 1024"),
    ],
)
def test_bad_prompts_stop_before_anything_is_written(
    model: str, row: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write("prompts.jsonl", {"prompt": "fine"}, row)
    flags = ["generate", "--model", model, "--data", data, "generation.max_new_tokens=2"]
    assert cli.main([*flags, "--output-dir", "out"]) == 2
    assert message in capsys.readouterr().err and not Path("out").exists()
    assert cli.main([*flags, "data.on_bad_line=skip"]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.strip().split("\n")) == 1 and "Prompts: 1 skipped" in shown.err


def test_sft_trains_on_examples_and_saves(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"Question {n}?", "completion": f"Answer {n}."} for n in range(7)]
    chat = [{"role": role, "content": "Hello."} for role in ("user", "assistant")]
    data = write("examples.jsonl", *rows, {"messages": chat})
    flags = ["sft", "--model", model, "--data", data, "sft.batch_size=3", "--output-dir", "run"]
    assert cli.main([*flags, "data.eval_fraction=0.25"]) == 0
    metrics = read("run/metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2]
    assert {"sft/loss", "eval/loss", "eval/perplexity"} <= {*metrics[0], *metrics[-1]}
    assert AutoModelForCausalLM.from_pretrained("run/policy").config.vocab_size == 259
    shown = capsys.readouterr().out
    assert "Supervised fine-tuning, 6 examples, 2 held out" in shown and "perplexity" in shown
    assert cli.main(["reward", "--model", "run/policy", "--data", write("pairs.jsonl", *PAIRS),
                     "--output-dir", "reward"]) == 0  # fmt: skip


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Q"}, "no column 'response'"),
        ({"messages": [{"role": "user", "content": "Q"}]}, "no message is the assistant's"),
        ("[]", "not a JSON object"),
    ],
)
def test_bad_examples_stop_before_anything_is_written(
    model: str, row: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write("examples.jsonl", {"prompt": "Q", "response": "A"}, row)
    assert cli.main(["sft", "--model", model, "--data", data, "--output-dir", "run"]) == 2
    assert f"examples.jsonl:2: {message}" in capsys.readouterr().err
    assert not Path("run").exists()


def test_reward_trains_on_pairs_and_saves(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = write("pairs.jsonl", *PAIRS)
    flags = ["reward", "--model", model, "--data", data, "reward.batch_size=4"]
    assert cli.main([*flags, "data.eval_fraction=0.25", "--output-dir", "run"]) == 0
    metrics = read("run/metrics.jsonl")
    assert {"reward/loss", "eval/accuracy", "eval/accuracy_se"} <= {*metrics[0], *metrics[-1]}
    saved = [folder.parent for folder in Path("run").glob("*/config.json")]
    loaded = AutoModelForSequenceClassification.from_pretrained(saved[0])
    assert loaded.config.num_labels == 1
    assert (Path("run") / "config.yaml").exists() and (Path("run") / "report.png").exists()
    capsys.readouterr()
    assert cli.main([*flags, "--output-dir", "run"]) == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"prompt": "Q", "chosen": "a"}, "no column 'rejected'"),
        ("not json", "not valid JSON"),
    ],
)
def test_bad_pairs_stop_before_anything_is_written(
    model: str, row: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write("pairs.jsonl", *PAIRS, row)
    assert cli.main(["reward", "--model", model, "--data", data, "--output-dir", "run"]) == 2
    assert f"pairs.jsonl:9: {message}" in capsys.readouterr().err
    assert not Path("run").exists()


PPO_FLAGS = [
    "steps=1",
    "ppo.rollout_batch_size=2",
    "ppo.mini_batch_size=2",
    "ppo.micro_batch_size=2",
    "generation.max_new_tokens=4",
]


def test_ppo_trains_against_a_function_in_a_file(model: str) -> None:
    data = write("prompts.jsonl", {"prompt": "One"}, {"prompt": "Two"})
    write("reward.py", "def score(prompts, responses): return [len(r) / 10 for r in responses]")
    flags = ["ppo", "--model", model, "--data", data, "--reward", "reward.py:score"]
    assert cli.main([*flags, *PPO_FLAGS, "--output-dir", "run"]) == 0
    [metrics] = read("run/metrics.jsonl")
    assert metrics["step"] == 1 and metrics["objective/kl"] == 0.0
    assert {"config.yaml", "policy", "report.png"} <= {file.name for file in Path("run").iterdir()}


@pytest.mark.parametrize("scores", ["[1.0]", "[float('nan')] * 2", "None", "['a', 'b']"])
def test_reward_function_with_wrong_scores_leaves_nothing(
    model: str, scores: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write("prompts.jsonl", {"prompt": "One"}, {"prompt": "Two"})
    write("reward.py", f"def score(prompts, responses): return {scores}")
    flags = ["ppo", "--model", model, "--data", data, "--reward", "reward.py:score"]
    assert cli.main([*flags, *PPO_FLAGS, "--output-dir", "run"]) == 2
    assert "error: " in capsys.readouterr().err and not Path("run").exists()


def test_a_folder_may_be_a_path_in_python(model: str) -> None:
    prompts = [{"prompt": "One"}, {"prompt": "Two"}]
    config = PPOConfig(
        steps=1,
        generation=GenerationConfig(max_new_tokens=2),
        ppo=PPOSettings(rollout_batch_size=2, mini_batch_size=2),
        run=RunConfig(output_dir="run"),
    )
    trainer = PPOTrainer(Path(model), lambda responses: [0.0, 1.0], prompts, config=config)
    assert trainer.config.policy.path == model
    examples = [{"prompt": f"Question {n}?", "response": "b"} for n in range(8)]
    assert SFTTrainer(Path(model), examples).config.model.path == model
    for make in (lambda: PPOEngine(3, vars), lambda: SFTTrainer(3.5, examples)):
        with pytest.raises(UserError, match=r"a folder or a loaded model, not 3"):
            make()


def test_rows_that_are_the_names_of_columns_are_refused(model: str) -> None:
    frame = type("DataFrame", (list,), {"iterrows": None})
    for wrong, message in (
        ({"train": ["One"], "test": ["Two"]}, r"a dictionary \(train, test\): .*data\['train'\]"),
        (frame(["prompt", "response"]), r"frame\.to_dict\('records'\)"),
    ):
        for make in (
            lambda wrong=wrong: PPOTrainer(model, vars, wrong),
            lambda wrong=wrong: SFTTrainer(model, wrong),
            lambda wrong=wrong: RewardModelTrainer(model, wrong),
        ):
            with pytest.raises(UserError, match=message):
                make()


def test_output_in_a_locale_that_has_not_every_character(model: str) -> None:
    """Help as far as it goes; rows whole, as JSON is UTF-8."""
    encoding = {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | encoding
    write("prompts.jsonl", {"prompt": "Say \u4f60\u597d"})

    def output(*arguments: str) -> bytes:
        command = [sys.executable, "-P", "-m", "ppo_engine", *arguments]
        return subprocess.run(command, env=environment, check=True, capture_output=True).stdout

    assert b"\\u2026" in output("ppo", "--help")
    flags = ["--model", model, "--data", "prompts.jsonl", "generation.max_new_tokens=2"]
    [line] = output("generate", *flags).decode().splitlines()
    assert json.loads(line)["prompt"] == "Say \u4f60\u597d"
