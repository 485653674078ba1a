"""Every example runs as it stands, in its smoke form, and says what its page says of it."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ppo_engine.demo.tiny import save_tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch, tmp_path, capfd):
    """Runs an example in an empty folder, as `python examples/NAME.py --smoke` does; what it
    printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(name: str, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, "--smoke", *options])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capfd.readouterr().out

    return run


def test_all_are_on_the_page_and_tested_here():
    names = {file.stem for file in EXAMPLES.glob("*.py")} - {"common"}
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    here = Path(__file__).read_text(encoding="utf-8")
    assert {name for name in names if f"python examples/{name}.py" not in page} == set()
    assert {name for name in names if f'example("{name}"' not in here} == set()


def samples() -> list[dict]:
    [file] = Path("runs").glob("*/samples.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_own_reward_reads_its_column(example):
    assert "Held-out reward after training: 0." in example("own_reward")
    for row in samples():
        wanted = int(row["prompt"][0]["content"].split()[4])
        off = abs(len(row["response"].split()) - wanted) / wanted
        assert row["score"] == pytest.approx(max(0.0, 1 - off), abs=1e-6)


def test_several_rewards_are_weighted_and_shown_apart(example):
    out = example("several_rewards")
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["ends", "brief", "varied"]
    for row in samples():
        of = row["rewards"]
        assert row["score"] == pytest.approx(of["ends"] + of["brief"] / 2 + of["varied"] / 2)
        assert of["ends"] == row["finished"]


def test_own_loop_saves_what_it_trained(example):
    out = example("own_loop")
    assert out.splitlines()[-1] == "runs/own-loop/policy loads with from_pretrained"
    start, trained = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in ("runs/tiny-model", "runs/own-loop/policy")
    )
    assert any(not trained[name].equal(weight) for name, weight in start.items())


def test_lora_trains_few_weights_and_saves_them_merged(example):
    pytest.importorskip("peft", reason="the optional package peft is not installed")
    out = example("lora")
    assert "17,408 of 39,392 weights are trained" in out
    assert out.splitlines()[-1].endswith("/policy is a plain LlamaForCausalLM")


def test_calculator_answers_calls_alone(example):
    assert "Reward of the last step" in example("calculator")
    names = runpy.run_path(str(EXAMPLES / "calculator.py"))
    said = ("[12*11]", "It is [3 - 10]", "12", "[12*11] is", "[9/3]")
    turns = [[{"role": "assistant", "content": text}] for text in said]
    answers = names["calculator"](turns)
    assert [answer and answer["content"] for answer in answers] == ["132", "-7", None, None, None]
    asked = [*turns[0], {"role": "tool", "content": "132"}, {"content": "That is 132."}]
    assert names["right"]([asked, [{"content": "132"}], turns[0]], [132, 132, 132]) == [1.2, 1, 0]


def test_a_smoke_run_of_plain_pytorch_is_two_steps(example):
    assert re.findall(r"step +(\d+): A to M ", example("plain_pytorch")) == ["1", "2"]


def test_plain_pytorch_learns_its_toy_reward(monkeypatch, tmp_path, capfd):
    monkeypatch.syspath_prepend(EXAMPLES)
    folder = tmp_path / "model"
    save_tiny_model(folder, seed=0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # so large that the layers, which alone are trained, can tell words apart
        model.get_input_embeddings().weight *= 5
    model.save_pretrained(folder)
    monkeypatch.setattr(sys, "argv", ["plain_pytorch", "--model", str(folder)])
    runpy.run_path(str(EXAMPLES / "plain_pytorch.py"))["main"](rate=3e-2)
    shares = [int(x) for x in re.findall(r"step +\d+: A to M (\d+)%", capfd.readouterr().out)]
    assert len(shares) == 15
    assert sum(shares[-3:]) > sum(shares[:3]) + 60
