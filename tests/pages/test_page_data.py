"""What a run's page has of its folder: curves, notes, held-out answers, rollouts; bounded, and also
where files are missing, cut short or damaged."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import END, held_out_rows, made_record, made_run, metrics_row, write_rows

from ppo_engine.pages.report.collect import collect
from ppo_engine.pages.report.curves import POINTS, curves, panels, sections
from ppo_engine.pages.report.held_out import PAIRS, before_and_after
from ppo_engine.pages.report.rollouts import FIRST, NEWEST, rollouts
from ppo_engine.pages.report.texts import shown_prompt, shown_text
from ppo_engine.run.rollout_record import recorded_steps
from ppo_engine.settings.schema import (
    PPOConfig,
    RewardConfig,
    RewardModelConfig,
    SFTConfig,
)


def unpacked(text: str, kind: str) -> list[Any]:
    return np.frombuffer(base64.b64decode(text), dtype=kind).tolist()


def test_curves_have_their_own_steps_and_gaps() -> None:
    rows = [
        {"step": 0, "eval/scores": 1},
        {"step": 1, "policy/loss": None, "time/x": 2.0},
        {"step": 2, "policy/loss": 1 / 3, "never": None, "text": "a", "flag": True},
    ]
    assert curves(rows) == {
        "eval/scores": {"x": [0], "y": [1]},
        "policy/loss": {"x": [1, 2], "y": [None, 0.3333333]},
        "time/x": {"x": [1], "y": [2.0]},
    }


def test_a_long_curve_keeps_its_peaks_and_ends() -> None:
    values = [0.0] * 10_000
    values[4321], values[7001] = 50.0, -50.0
    values[0], values[-1] = 1.0, 2.0
    rows = [{"step": step, "a": value} for step, value in enumerate(values)]
    rows[17]["b"], rows[9_000]["b"] = 3.0, 4.0  # a rare metric stays whole
    found = curves(rows)
    a = found["a"]
    assert POINTS / 4 < len(a["x"]) <= POINTS + 2 and a["x"] == sorted(set(a["x"]))
    assert dict(zip(a["x"], a["y"], strict=True))[4321] == 50.0
    assert (min(a["y"]), max(a["y"])) == (-50.0, 50.0)
    assert (a["x"][0], a["y"][0], a["x"][-1], a["y"][-1]) == (0, 1.0, 9_999, 2.0)
    assert found["b"] == {"x": [17, 9_000], "y": [3.0, 4.0]}


def test_a_band_has_the_points_of_its_curve() -> None:
    draw = random.Random(0)
    rows = [
        {"step": step, **{name: draw.random() for name in ("a", "a_se", "objective/scores")}}
        for step in range(10_000)
    ]
    for row in rows[5:]:
        row["objective/scores_std"] = draw.random()
    found = curves(rows)
    assert found["a_se"]["x"] == found["a"]["x"]
    steps = found["objective/scores"]["x"]
    assert found["objective/scores_std"]["x"] == [step for step in steps if step >= 5]


def test_sections_hold_every_metric_once_and_no_band() -> None:
    names = {*metrics_row(1), "eval/scores", "eval/scores_se", "eval/kl", "eval/kl_se", "mine"}
    names -= {"step"}
    found = {section["title"]: section["metrics"] for section in sections(names)}
    assert found["Objective"][0] == "objective/scores"  # those of report.png first
    assert found["Held-out prompts"] == ["eval/scores", "eval/kl"]
    assert found["Other"] == ["mine"] and "Fine-tuning" not in found
    listed = [name for metrics in found.values() for name in metrics]
    bands = {"objective/scores_std", "eval/scores_se", "eval/kl_se"}
    assert sorted(listed) == sorted(names - bands)
    drawn = panels(names)
    assert drawn["objective/scores"]["band"] == "objective/scores_std"
    assert drawn["eval/kl"]["band"] == "eval/kl_se" and "mine" not in drawn


def test_a_run_as_the_page_has_it(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", records=[made_record(1), made_record(20)])
    found = collect(run, 10_000)
    json.dumps(found, allow_nan=False)
    assert (found["method"], found["step"], found["steps"]) == ("gae", 20, 20)
    assert found["curves"]["objective/scores"]["x"] == list(range(1, 21))
    assert found["settings"]["ppo.kl_coef"] == 0.05
    assert found["settings"]["policy.optimizer.learning_rate"] == 1e-6  # what it came to
    assert (found["notes"], found["problems"], found["thinned"]) == ([], [], None)
    assert [step["step"] for step in found["rollouts"]["steps"]] == [1, 20]
    assert found["held_out"]["after"] == "after step 20"


def test_what_looks_wrong_is_told_with_what_to_try(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", objective__entropy=0.01, objective__finished=None)
    [note] = collect(run, 1)["notes"]
    assert note["what"].startswith("the policy's entropy is near 0")
    assert "ppo.kl_coef" in note["advice"]
    assert (note["when"], note["lasts"]) == ("Steps 1 to 3", True)
    assert (note["shown"], note["of"]) == (20, 20)


@pytest.mark.parametrize(
    ("config", "method"), [(SFTConfig(), "sft"), (RewardModelConfig(), "reward")]
)
def test_runs_of_other_commands(tmp_path: Path, config: Any, method: str) -> None:
    run = made_run(tmp_path / "run", config=config)
    write_rows(
        run / "metrics.jsonl",
        [
            {"step": 0, "eval/loss": 2.0},
            {"step": 1, f"{method}/loss": 1.0, f"{method}/grad_norm": 0.0},
            {"step": 2, f"{method}/loss": 1.0, f"{method}/grad_norm": 1.0, "eval/loss": 2.0},
        ],
    )
    found = collect(run, 1)
    assert (found["method"], found["steps"], found["step"]) == (method, None, 2)
    assert [(note["when"], note["lasts"]) for note in found["notes"]] == [
        ("Step 1", False),
        ("Step 2", True),
    ]


def test_secrets_of_addresses_stay_out(tmp_path: Path) -> None:
    url = "https://me:hush@host/score?key=hush"
    config = PPOConfig(reward=RewardConfig(url=url))
    run = made_run(tmp_path / "run", config=config)
    found = json.dumps(collect(run, 1))
    assert "hush" not in found and "host/score" in found


def test_a_folder_with_next_to_nothing(tmp_path: Path) -> None:
    found = collect(tmp_path, 1)
    assert (found["curves"], found["settings"], found["step"]) == ({}, {}, 0)
    assert found["held_out"] is None
    assert found["rollouts"] == {"steps": [], "left_out": 0}
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).touch()
    assert collect(tmp_path, 1)["problems"] == []


def test_a_line_that_is_being_written_is_not_missed(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    file = run / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 21, "obj')
    found = collect(run, 1)
    assert (found["step"], found["problems"]) == (20, [])
    file.write_text("torn\n" + file.read_text())
    [problem] = collect(run, 1)["problems"]
    assert problem.startswith("metrics.jsonl: 2 skipped")


def test_what_is_damaged_is_told_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", records=[made_record(1), made_record(2)])
    (recorded_steps(run)[1] / "rollout.json").write_text("{}")
    (run / "config.yaml").write_text("ppo: {kl_coef: -1}\n")
    found = collect(run, 10_000)
    assert [step["step"] for step in found["rollouts"]["steps"]] == [2]
    assert "step-000001" in found["problems"][1] and "kl_coef" in found["problems"][0]
    assert (found["settings"], found["method"]) == ({}, "")
    assert found["curves"]


def test_a_rollout_token_by_token(tmp_path: Path) -> None:
    record = made_record(7)
    [step] = rollouts(made_run(tmp_path / "run", records=[record]), [], 10_000)["steps"]
    assert (step["step"], step["method"], step["total"]) == (7, "PPO", 8)
    assert step["pieces"] == record.pieces and step["bounds"][:3] == [0, 12, 24]
    packed = step["packed"]
    for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns", "ratio"):
        assert unpacked(packed[name], "<f4") == record.arrays[name].tolist()
    assert unpacked(packed["tokens"], "<i4") == record.arrays["tokens"].tolist()
    own = unpacked(packed["own"], "u1")
    assert [place for place, mine in enumerate(own) if not mine] == [14, 15]
    special = unpacked(packed["special"], "u1")
    assert special == [int(token == END) for token in record.arrays["tokens"]]
    assert unpacked(packed["clipped"], "u1") == record.arrays["clipped"].astype(int).tolist()
    assert list(step["scores"]) == ["score"]
    assert step["kl"] == record.kl and step["prompts"][0][0]["role"] == "user"


def test_a_rollout_without_a_critic_and_with_several_rewards(tmp_path: Path) -> None:
    record = made_record(1, critic=False, group_size=4)
    arrays = {name: x for name, x in record.arrays.items() if name != "ref_logprobs"}
    several = {"a": record.score, "b": [float("nan")] * 8}
    for name, value in {"arrays": arrays, "rewards": several, "shaped": [0.0] * 8}.items():
        object.__setattr__(record, name, value)
    object.__setattr__(record, "rewards", {"a": record.score, "b": [1.0] * 8})
    [step] = rollouts(made_run(tmp_path / "run", records=[record]), [], 10_000)["steps"]
    assert not {"values", "returns", "ref_logprobs"} & step["packed"].keys()
    assert list(step["scores"]) == ["score", "shaped", "a", "b"]
    assert step["kl"] is None and step["group"] == [0] * 4 + [1] * 4


def test_rollouts_are_the_first_and_the_newest_and_bounded(tmp_path: Path) -> None:
    kept = FIRST + NEWEST
    run = made_run(tmp_path / "run", records=[made_record(step) for step in range(1, kept + 4)])
    found = rollouts(run, [], kept * 30)
    assert [step["step"] for step in found["steps"]] == [1, 2, 6, 7, 8, 9]
    assert found["left_out"] == 3
    for step in found["steps"]:  # 30 tokens hold two responses of 12
        assert len(step["pieces"]) == len(step["prompts"]) == 2 and step["total"] == 8
        assert len(unpacked(step["packed"]["ratio"], "<f4")) == step["bounds"][-1] == 24
    [step] = rollouts(made_run(tmp_path / "one", records=[made_record(1)]), [], 5)["steps"]
    assert len(step["pieces"]) == 1  # rather one that is too long than none
    [step] = rollouts(tmp_path / "one", [], 10**9)["steps"]
    assert len(step["pieces"]) == 8


def test_without_a_record_there_are_the_samples(tmp_path: Path) -> None:
    samples = [
        {"step": step, "prompt": "p", "response": f"r{step}", "score": 0.5, "finished": True}
        for step in range(1, 10)
    ]
    found = rollouts(tmp_path, [*samples, *held_out_rows(9, ["q"], "a")], 100)
    assert [step["step"] for step in found["steps"]] == [1, 2, 6, 7, 8, 9]
    assert found["steps"][-1]["texts"] == ["r9"] and found["left_out"] == 3


def test_held_out_answers_before_and_after() -> None:
    prompts = ["a", [{"role": "user", "content": "b"}]]
    rows = held_out_rows(0, prompts, "old") + held_out_rows(5, prompts, "mid")
    rows += held_out_rows(9, prompts, "new")
    found = before_and_after(rows)
    assert found is not None
    assert (found["before"], found["after"]) == ("before training", "after step 9")
    assert found["total"] == 2
    first, second = found["pairs"]
    assert (first["before"]["text"], first["after"]["text"]) == ("old 0", "new 0")
    assert (second["before"]["score"], second["after"]["score"]) == (0.5, 9.5)
    assert second["after"]["finished"] is False
    assert second["prompt"] == [{"role": "user", "content": "b"}]
    found = before_and_after(held_out_rows(3, prompts, "now"))
    assert found is not None and found["before"] == "the reference"
    assert found["pairs"][0]["before"] == {"text": "reference 0", "score": -1.0, "finished": None}
    assert before_and_after([{"step": 1, "response": "x"}]) is None
    many = before_and_after(held_out_rows(0, [str(n) for n in range(PAIRS + 6)], "x"))
    assert many is not None and (len(many["pairs"]), many["total"]) == (PAIRS, PAIRS + 6)


def test_long_texts_are_cut_and_odd_prompts_shown() -> None:
    assert shown_text("x" * 20_000) == "x" * 20_000
    assert shown_text("x" * 1_000_000).endswith("x… (980,000 more characters)")
    assert shown_prompt("p") == [{"role": "", "content": "p"}]
    assert shown_prompt(["p", {"content": None}]) == [
        {"role": "", "content": "p"},
        {"role": "", "content": "None"},
    ]
