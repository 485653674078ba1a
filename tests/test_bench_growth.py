"""The benchmark of growing steps: its lengths, its rollout, its process, its verdicts."""

from __future__ import annotations

import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from test_e2e import TINY, a_step
from tiny import tiny_model, tiny_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import e2e_models, growth, growth_step, speed_page
from bench.e2e_compare import WorkerFailed
from bench.e2e_models import Sizes, prepare, save_models
from bench.e2e_ours import config_of
from bench.e2e_worker import read_report
from bench.growth import Scale, Size, judged, response_lengths, rows_of
from bench.growth_step import STEPS, Growth, random_rollout, warm_up
from bench.results import read_csv
from ppo_engine import PPOEngine
from ppo_engine.models.reader import Reader

SCALE = Scale("tiny", limit=9, pass_tokens=40, tokens=(20, 120))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a model of the size of a test."""
    monkeypatch.setitem(e2e_models._RANDOM, "tiny", TINY)
    return "tiny"


def a_growth(folder: Path, model: str) -> Growth:
    """Responses of 3, 1 and 2 tokens, of at most 3, in passes of 12 tokens."""
    work = prepare(
        model, Sizes(3, 3, prompt_tokens=4, epochs=1), folder, steps=STEPS, device="cpu",
        dtype="float32",
    )  # fmt: skip
    return Growth(**asdict(work), lengths=[3, 1, 2], pass_tokens=12)


def test_lengths_are_uniform_and_a_larger_step_begins_with_a_smaller() -> None:
    found = response_lengths(50_000, 100)
    assert sum(found) == 50_000 and {*found} == {*range(1, 101)}
    assert abs(statistics.mean(found) - 50.5) < 3
    few = response_lengths(500, 100)
    assert sum(few) == 500 and few[:-1] == found[: len(few) - 1] and few[-1] <= found[len(few) - 1]


@pytest.mark.parametrize(("lengths", "count"), [([9], 1), ([20, 19, 9], 3), ([20, 20, 9, 9], 2)])
def test_warm_up_fills_a_pass(lengths: list[int], count: int, tmp_path: Path, tiny: str) -> None:
    work = a_growth(tmp_path, tiny)
    assert warm_up(Growth(**asdict(work) | {"lengths": lengths, "pass_tokens": 40})) == count


def test_every_token_of_a_rollout_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a chat, answers that were equal as text would be read once."""
    save_models(tiny_model(), tiny_tokenizer(), tmp_path)
    prompts = [[{"role": "user", "content": "Hi"}]] * 3
    lengths = [70, 60, 80]
    work = Growth(
        folder=str(tmp_path), prompts=prompts, prompt_ids=[], new_tokens=80, epochs=1,
        micro_batch=1, steps=STEPS, device="cpu", dtype="float32", lengths=lengths, pass_tokens=500,
    )  # fmt: skip
    engine = PPOEngine(config=config_of(work))
    policy = engine.policy
    prompt_ids = [policy.renderer.prompt(prompt) for prompt in prompts]
    rollout = random_rollout(engine, replace(work, prompt_ids=prompt_ids))
    assert rollout.mask.sum(1).tolist() == lengths and rollout.mask.shape == (3, 80)
    pad, special = policy.tokenizer.pad_token_id, {*policy.tokenizer.all_special_ids}
    assert ((rollout.response_ids == pad) == ~rollout.mask).all()
    assert [prompt for prompt, _ in rollout.written] == prompt_ids
    assert not special & {token for _, response in rollout.written for token in response}
    read: list[Any] = []
    stack = Reader.stack
    monkeypatch.setattr(Reader, "stack", lambda self, rows: read.extend(rows) or stack(self, rows))
    engine.score(rollout)
    assert {tuple(row.ids) for row in read} == {tuple(p + r) for p, r in rollout.written}


def test_a_process_steps_and_then_samples(
    tmp_path: Path, tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    stack = Reader.stack

    def counted(self: Reader, rows: Any) -> Any:
        passes.append(sum(len(row.ids) for row in rows))
        return stack(self, rows)

    engines: list[PPOEngine] = []

    def opened(config: Any) -> PPOEngine:
        engines.append(PPOEngine(config=config))
        return engines[0]

    monkeypatch.setattr(Reader, "stack", counted)
    monkeypatch.setattr(growth_step, "PPOEngine", opened)
    growth_step.main(a_growth(tmp_path, tiny))
    reports = [read_report(line) for line in capsys.readouterr().out.splitlines()]
    first, step, *rollouts = [report for report in reports if report is not None]
    assert (step["prompt_tokens"], step["response_tokens"]) == (12, 6)
    assert step["seconds"]["generate"] == 0 < min(step["seconds"][p] for p in growth._TRAINED)
    assert first["response_tokens"] == 6  # all of them do not fill a pass
    for rollout in rollouts:  # 6 tokens are two responses of 3
        assert (rollout["prompt_tokens"], rollout["response_tokens"]) == (8, 6)
        assert rollout["seconds"]["generate"] > 0 == rollout["seconds"]["update"]
    assert len(rollouts) == 2 and max(passes) <= 12
    assert not engines[0].policy.renderer.end_ids  # so that they have all their tokens


def a_size(tokens: int, *scales: float) -> Size:
    steps = [a_step(scale, response_tokens=tokens) for scale in scales]
    return Size(tokens, steps, [a_step(2 * scale, response_tokens=tokens) for scale in scales])


def test_rows_have_the_medians_of_the_rounds() -> None:
    row, failed = rows_of([a_size(1000, 1.0, 3.0, 8.0), Size(2000, skipped="no memory")])
    assert row["score_ms_per_token"] == pytest.approx(3.0)
    assert row["step_ms_per_token"] == pytest.approx(3 + 6 + 9)
    assert row["generate_ms_per_token"] == pytest.approx(4 * 6)
    assert (row["peak_bytes"], row["sampling_peak_bytes"], row["rounds"]) == (8e9, 16e9, 3)
    assert failed["status"] == "no memory" and failed["step_ms_per_token"] is None
    assert row.keys() == failed.keys()


def test_only_peaks_of_full_passes_are_judged() -> None:
    def a_row(tokens: int, time: float, peak: float) -> dict[str, Any]:
        return {"tokens": tokens, "step_ms_per_token": time, "peak_bytes": peak}

    rows = [a_row(1, 10.0, 1.0), a_row(8, 11.0, 100.0), a_row(16, 11.4, 104.0)]
    assert [line.rpartition(" ")[2] for line in judged(rows, 4)] == ["met", "met"]
    rows[0]["step_ms_per_token"], rows[2]["peak_bytes"] = 9.9, 106.0
    time, peak = judged(rows, 4)
    assert "1.152" in time and time.endswith("MISSED")
    assert "1.060" in peak and peak.endswith("MISSED")
    assert len(judged(rows[:2], 4)) == 1  # one peak alone is constant


def test_from_the_command_line(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Growth] = []

    def reports(script: str, work: Growth) -> list[dict[str, Any]]:
        assert script == "growth_step.py" and Growth.load(work.folder) == work
        asked.append(work)
        if sum(work.lengths) == 160:
            raise WorkerFailed("no memory is left")
        return [a_step(s, response_tokens=sum(work.lengths)) for s in (99.0, 1.0, 99.0, 1.0)]

    monkeypatch.setattr(growth, "reports", reports)
    monkeypatch.setitem(growth.SCALES, "cpu", SCALE)
    monkeypatch.setattr(growth, "MODELS", ("tiny",))
    out = tmp_path / "growth.csv"
    arguments = ["--rounds", "2", "--out", str(out), "--plot"]
    monkeypatch.setattr(sys, "argv", ["growth.py", *arguments])
    assert growth.main() == 0
    assert [sum(work.lengths) for work in asked] == [20, 120, 20, 120]
    work = asked[1]
    assert len(work.prompts) == len(work.prompt_ids) == len(work.lengths) > 16
    assert (work.pass_tokens, work.new_tokens, work.epochs) == (40, 9, 1)
    assert work.prompts[16] == work.prompts[0] and max(work.lengths) <= 9
    assert out.with_suffix(".png").stat().st_size > 1000
    command, rows = read_csv(out)
    assert [(row["tokens"], row["rounds"], row["status"]) for row in rows] == [
        ("20", "2", "ok"), ("120", "2", "ok"),
    ]  # fmt: skip
    assert (rows[0]["score_ms_per_token"], rows[0]["generate_ms_per_token"]) == ("50", "200")
    said = capsys.readouterr().out
    assert "time a token, the most by the least: 6.000, target <= 1.15: MISSED" in said
    assert speed_page._growth(command, rows).count("\n| ") == 4  # two of them are the head

    monkeypatch.setattr(sys, "argv", ["growth.py", "--tokens", "20", "160"])
    assert growth.main() == 1
    assert "160 not measured: no memory is left" in capsys.readouterr().out
