"""A run is resumed on the rows that it was made of, whichever command it is: what was held out may
be trained on otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model_folder
from trainers import PROMPTS, config, planted_pairs

from ppo_engine.errors import UserError
from ppo_engine.settings.schema import (
    EvaluationConfig,
    PreferenceDataConfig,
    RewardModelConfig,
    RunConfig,
    SFTConfig,
)
from ppo_engine.training.ppo import PPOTrainer
from ppo_engine.training.reward import RewardModelTrainer
from ppo_engine.training.sft import SFTTrainer

pytestmark = pytest.mark.usefixtures("no_pictures")

Rows = list[dict[str, Any]]


@pytest.fixture
def model(tmp_path: Path) -> str:
    return tiny_model_folder(tmp_path)


def numbers(prompts: Any, responses: Any, number: Any) -> list[float]:
    return [float(n) for n in number]


def ppo(model: str, folder: Path, data: Path, held_out: str | None, **run: Any) -> PPOTrainer:
    evaluation = EvaluationConfig(path=held_out, prompts=0 if held_out else 2)
    settings = replace(config(folder / "run", steps=1, **run), evaluation=evaluation)
    return PPOTrainer(model, numbers, str(data), config=settings)


def sft(model: str, folder: Path, data: Path, held_out: str | None, **run: Any) -> SFTTrainer:
    settings = SFTConfig(run=RunConfig(output_dir=str(folder / "run"), dtype="float32", **run))
    settings = replace(settings, data=replace(settings.data, eval_path=held_out))
    return SFTTrainer(model, str(data), settings)


def reward(
    model: str, folder: Path, data: Path, held_out: str | None, **run: Any
) -> RewardModelTrainer:
    settings = RewardModelConfig(
        data=PreferenceDataConfig(eval_path=held_out),
        run=RunConfig(output_dir=str(folder / "run"), dtype="float32", **run),
    )
    return RewardModelTrainer(model, str(data), settings)


ROWS: dict[Callable[..., Any], Rows] = {
    ppo: [{"prompt": prompt, "number": n} for n, prompt in enumerate(PROMPTS)],
    sft: [{"prompt": prompt, "response": "yes"} for prompt in PROMPTS],
    reward: planted_pairs(6),
}
UNIT = {ppo: "prompts", sft: "examples", reward: "preferences"}


def write(file: Path, rows: Rows, between: str = "\n") -> Path:
    file.write_text("".join(json.dumps(row) + between for row in rows))
    return file


def changed(rows: Rows, key: str, value: Any) -> Rows:
    return [*rows[:3], rows[3] | {key: value}, *rows[4:]]


def backwards_and_one_more(make: Any) -> Rows:
    return [ROWS[make][0] | {"prompt": "One more"}, *ROWS[make][::-1]]


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (ppo, backwards_and_one_more(ppo)),
        (ppo, ROWS[ppo][::-1]),
        (ppo, changed(ROWS[ppo], "number", 99)),
        (ppo, changed(ROWS[ppo], "number", 3.5)),
        (sft, backwards_and_one_more(sft)),
        (sft, changed(ROWS[sft], "response", "no")),
        (reward, changed(ROWS[reward], "margin", 0.5)),
    ],
)
@pytest.mark.parametrize("which", ["training", "held out"])
def test_other_rows_are_refused(
    model: str, tmp_path: Path, make: Any, rows: Rows, which: str
) -> None:
    data, held_out = (write(tmp_path / name, ROWS[make]) for name in ("a.jsonl", "b.jsonl"))
    make(model, tmp_path, data, str(held_out)).train()
    metrics = (tmp_path / "run/metrics.jsonl").read_text()
    write(data if which == "training" else held_out, rows)
    with pytest.raises(UserError, match=f"^The {UNIT[make]} are not those of the run in") as caught:
        make(model, tmp_path, data, str(held_out), resume=True).train()
    first = str(caught.value).split("\n")[1]
    assert first.startswith(f"  - {which}: 6 rows, digest ") and f"{len(rows)} rows" in first
    assert (tmp_path / "run/metrics.jsonl").read_text() == metrics


def test_prompts_that_were_held_out_are_not_trained_on(model: str, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", ROWS[ppo])
    ppo(model, tmp_path, data, None).train()
    write(data, backwards_and_one_more(ppo))
    with pytest.raises(UserError, match="held-out ones may have been trained on"):
        ppo(model, tmp_path, data, None, resume=True).train()


@pytest.mark.parametrize("make", [ppo, sft, reward])
def test_the_same_rows_are_the_same_in_another_place_and_template(
    model: str, tmp_path: Path, make: Any
) -> None:
    """As of a file with other blank lines, and a template that says what day it is."""
    asked = [[{"role": "user", "content": f"Question {n}"}] for n in range(6)]
    rows = [row | {"prompt": chat} for row, chat in zip(ROWS[make], asked, strict=True)]
    data = write(tmp_path / "data.jsonl", rows)
    make(model, tmp_path, data, None).train()
    write(data, rows, between="\n\n")
    template = Path(model) / "chat_template.jinja"
    template.write_text("{{ 'Today is Monday.' }}" + template.read_text())
    again = make(model, tmp_path, data, None, resume=True)
    again.train()
    assert again.step > 0 and not any("no checkpoint" in note for note in again.notes)


def test_a_template_that_makes_another_number_of_examples_is_another_order(
    model: str, tmp_path: Path
) -> None:
    talk = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
    data = write(tmp_path / "data.jsonl", [*ROWS[sft], {"messages": talk}])
    sft(model, tmp_path, data, None).train()
    template = Path(model) / "chat_template.jinja"
    first = "{% if loop.last or message['role'] != 'assistant' %}"
    shown = template.read_text().replace("<|im_start|>{{ message", first + "<|im_start|>{{ message")
    bare = "<|im_end|>\n{% else %}{{ message['content'] }}{% endif %}{% endfor"
    template.write_text(shown.replace("<|im_end|>\n{% endfor", bare))
    with pytest.raises(UserError, match=r"examples made of the training rows: \d then, \d now"):
        sft(model, tmp_path, data, None, resume=True).train()
