"""`ppo-engine generate` for a person: text in a terminal, lines of JSON alone everywhere else."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from screen import Terminal, open_terminal
from tiny import tiny_model_folder

from ppo_engine import cli
from ppo_engine.rewards.weighted import Rewards
from ppo_engine.rollout import generation
from ppo_engine.rollout.batch import Rollout
from ppo_engine.run.progress import printable

REWARD = """
print("loaded")
calls = []
def reward(prompts, responses):
    print("scoring")
    calls.append(responses)
    if len(calls) == 3:  # the trial call is the first
        raise ValueError("no more")
    return [0.5] * len(responses)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def flags(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    Path("reward.py").write_text(REWARD)
    rows = [{"prompt": "One\x1b[2J"}, {"prompt": [{"role": "user", "content": "Two"}]}]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["generate", "--model", model, "generation.max_new_tokens=3"]


def answers(capsys: pytest.CaptureFixture[str], flags: list[str]) -> list[list[str]]:
    assert cli.main(flags) == 0
    return [json.loads(line)["responses"] for line in capsys.readouterr().out.splitlines()]


def test_one_prompt_in_a_terminal_gets_its_answer_after_the_display(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags += ["--prompt", "One"]
    [[answer]] = answers(capsys, flags)
    terminal = open_terminal(monkeypatch)
    assert cli.main(flags) == 0
    assert terminal.screen[-2].startswith("generate step 1/1 ━")
    assert terminal.screen[-1] == f"{printable(answer)} [cut at generation.max_new_tokens=3]"
    assert not [line for line in terminal.screen if line.startswith("step")]  # says nothing
    # The display is on standard error alone.
    monkeypatch.setattr("sys.stderr", errors := Terminal())
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    assert cli.main(flags) == 0
    assert len(terminal.screen) == 1 and errors.screen[-1].startswith("generate step 1/1 ━")


def test_prompts_of_a_file_stand_above_their_answers(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags += ["--data", "prompts.jsonl", "--n", "2"]
    found = answers(capsys, flags)
    terminal = open_terminal(monkeypatch)
    assert cli.main([*flags, "--reward", "reward.py:reward"]) == 0
    cut = "[score +0.500, cut at generation.max_new_tokens=3]"
    expected = [
        line
        for prompt, both in zip(("One [2J", "Two"), found, strict=True)
        for line in (
            f"Prompt: {prompt}",
            *(f"Answer {n} of 2: {printable(text)} {cut}" for n, text in enumerate(both, start=1)),
        )
    ]
    shown = terminal.screen
    start = shown.index(expected[0])
    assert shown[start : start + 6] == expected
    assert shown[start - 1].startswith("generate step 1/1 ━")
    assert shown[start + 6].startswith("Scores of 2 prompts")


def test_what_a_failure_leaves_is_shown(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flags += ["--data", "prompts.jsonl", "batch_size=1", "--reward", "reward.py:reward"]
    terminal = open_terminal(monkeypatch)
    assert cli.main(flags) == 2
    shown = terminal.screen
    assert "Prompt: One [2J" in shown and "Prompt: Two" not in shown
    assert shown.index("Prompt: One [2J") < next(
        i for i, x in enumerate(shown) if x[:6] == "error:"
    )


@pytest.mark.parametrize("what", ["log-probs", "scores"])
def test_an_answer_by_numbers_that_are_not_finite_is_refused(
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
) -> None:
    sample = generation.generate

    def respond(*given: Any, **named: Any) -> Rollout:
        rollout = sample(*given, **named)
        return replace(rollout, logprobs=torch.full(rollout.mask.shape, math.nan))

    if what == "log-probs":
        monkeypatch.setattr(generation, "generate", respond)
    else:
        monkeypatch.setattr(Rewards, "total", lambda self, scores: torch.tensor([math.nan]))
    out = tmp_path / "out.jsonl"
    given = [*flags, "--reward", "reward.py:reward", "--out", str(out), "--prompt", "Hi"]
    assert cli.main(given) == 2
    said = capsys.readouterr().err
    assert "error: In an answer to" in said and f"{what} are not finite" in said
    assert not out.exists()


@pytest.mark.parametrize("display", [True, False], ids=["live", "plain"])
def test_rows_alone_reach_a_pipe(
    flags: list[str],
    display: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither what a reward function prints, nor what a live display makes of standard output."""
    pipe = sys.stdout
    terminal = open_terminal(monkeypatch) if display else None
    monkeypatch.setattr("sys.stdout", pipe)
    assert cli.main([*flags, "--data", "prompts.jsonl", "--reward", "reward.py:reward"]) == 0
    shown = capsys.readouterr()
    assert [json.loads(line)["scores"] for line in shown.out.splitlines()] == [[0.5], [0.5]]
    told = terminal.getvalue() if terminal else shown.err
    assert "loaded" in told and "scoring" in told
