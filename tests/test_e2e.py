"""The end-to-end benchmarks: their floor, clock, table, and both sides of PPO and GRPO at work."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import e2e_models, e2e_ours, e2e_worker
from bench.e2e import PPO
from bench.e2e_compare import Side, compare, rows
from bench.e2e_floor import Pass, Shape, floors, forward, grpo_passes, passes, shared_base_passes
from bench.e2e_grpo import GRPO
from bench.e2e_models import Sizes, model_config, needed_bytes, prepare
from bench.e2e_run import Contest, main, reason_to_skip, versions
from bench.e2e_table import print_comparison, print_differences
from bench.e2e_worker import PHASES, PhaseClock, Work, read_report, report_step
from bench.machine import Ceilings
from ppo_engine import PPOEngine
from ppo_engine.errors import UserError
from ppo_engine.pretrained.architecture import unwrap

CPU = torch.device("cpu")
SHAPE = Shape(layer_weights=100, head_weights=10, attention=3, cache=2, parameters=0)
TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
TINY_SIZES = Sizes(prompts=8, new_tokens=64, micro_batch=4, prompt_tokens=5)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a model of the size of a test."""
    monkeypatch.setitem(e2e_models._RANDOM, "tiny", TINY)
    return "tiny"


def a_work(folder: Path, **changes: Any) -> Work:
    work = Work(
        folder=str(folder),
        prompts=["a", "b c"],
        prompt_ids=[[1], [2, 3]],
        new_tokens=4,
        epochs=2,
        micro_batch=2,
        steps=2,
        device="cpu",
        dtype="float32",
    )
    return replace(work, **changes)


def a_step(scale: float = 1.0, **changes: Any) -> dict[str, Any]:
    step = {
        "seconds": {"generate": 4 * scale, "score": scale, "advantages": 2 * scale, "update": 9.0},
        "prompt_tokens": 3,
        "response_tokens": 8,
        "peak_bytes": int(1e9 * scale),
        "threads": 1,
        "others": 0.0,
    }
    return step | changes


def test_shape_counts_the_matrices_of_a_model(tiny: str) -> None:
    shape = Shape.of(model_config(tiny))
    # q and o, k and v (half as many heads), three matrices of the MLP; in each of two layers.
    assert shape.layer_weights == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert shape.head_weights == 300 * 32
    assert shape.attention == 2 * 32
    assert shape.cache == 2 * 2 * 16
    norms, biases = 5 * 32, 2 * (32 + 16 + 16)
    assert shape.parameters == shape.layer_weights + shape.head_weights + norms + biases


def test_shapes_of_the_named_models_have_their_published_sizes() -> None:
    assert Shape.of(model_config("qwen2.5-1.5b")).parameters == 1_543_714_304
    assert Shape.of(model_config("qwen2.5-7b")).parameters == 7_615_616_512


def test_passes_are_those_of_the_docstring() -> None:
    # Two prompts, of 3 and 1 tokens; 2 new tokens each; one epoch.
    found = passes(SHAPE, [3, 1], new_tokens=2, epochs=1)
    prefill = Pass(2 * 100 * 4 + 4 * 3 * (6 + 1) + 2 * 10 * 2, 110)
    decode = Pass(2 * 110 * 2 + 4 * 3 * (4 + 2), 110)
    assert found["generate"] == [prefill, decode]
    assert found["score"] == [Pass(2 * 100 * 8 + 4 * 3 * (15 + 6), 100)]
    policy = Pass(2 * 100 * 6 + 4 * 3 * (10 + 3) + 2 * 10 * 4, 110)
    critic = Pass(2 * 100 * 6 + 4 * 3 * (10 + 3), 100)
    assert found["advantages"] == [policy, critic]
    assert found["update"] == [policy.times(3, 2), critic.times(3, 2)]
    assert len(passes(SHAPE, [3, 1], 2, epochs=3)["update"]) == 6


def test_a_group_reads_its_prompt_once_and_grpo_has_no_critic() -> None:
    found = grpo_passes(SHAPE, [3, 1], group=2, new_tokens=2, epochs=1)
    each = passes(SHAPE, [3, 3, 1, 1], new_tokens=2, epochs=1)
    prefill, decode = found["generate"]
    assert prefill == passes(SHAPE, [3, 1], new_tokens=2, epochs=1)["generate"][0]
    assert decode == each["generate"][1]
    assert found["score"] == [] and found["advantages"] == each["advantages"][:1]
    assert found["update"] == each["update"][:1]


def test_one_base_is_read_once_below_the_adapters_and_has_no_gradient() -> None:
    shape = replace(SHAPE, layer_weights=120, attention=12, layers=4)
    found = shared_base_passes(shape, 1, [3, 1], new_tokens=2, epochs=2)
    last = replace(SHAPE, layer_weights=30, attention=3)
    assert found["generate"] == passes(shape, [3, 1], 2, 1)["generate"]
    below = Pass(2 * 90 * 8 + 4 * 9 * (15 + 6), 90)
    assert found["score"] == [below, forward(last, [5, 3])]
    policy, critic = found["advantages"]
    assert policy == forward(last, [4, 2], logits=4) and critic == forward(last, [4, 2])
    assert found["update"] == [policy.times(2, 2), critic.times(2, 2)] * 2


def test_a_pass_takes_the_longer_of_products_and_reads() -> None:
    ceilings = Ceilings(read=10.0, write=1.0, copy=1.0, matmul={torch.bfloat16: 4.0}, call=0.0)
    assert Pass(flop=80, elements=10).seconds(ceilings, torch.bfloat16) == 20
    assert Pass(flop=4, elements=10).seconds(ceilings, torch.bfloat16) == 2  # 20 bytes at 10/s


def test_the_step_is_the_sum_of_its_phases() -> None:
    ceilings = Ceilings(read=1e3, write=1.0, copy=1.0, matmul={torch.float32: 1e3}, call=0.0)
    found = floors(passes(SHAPE, [3, 1], 2, 2), ceilings, torch.float32)
    assert found["step"] == pytest.approx(sum(found[phase] for phase in PHASES))
    assert found["score"] == pytest.approx(forward(SHAPE, [5, 3]).flop / 1e3)


def test_every_moment_of_a_step_is_in_one_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(e2e_worker.time, "perf_counter", lambda: now[0])
    clock = PhaseClock(CPU)

    def later(seconds: float) -> None:
        now[0] += seconds

    clock.start("generate")
    later(1)
    clock.switch("advantages")
    later(2)
    with clock.within("score"):
        later(4)
    later(8)
    clock.switch("update")
    later(16)
    clock.switch("update")
    assert clock.seconds == {"generate": 1, "score": 4, "advantages": 10, "update": 16}


@pytest.mark.parametrize(("busy", "share"), [(3.0, 0.15), (-0.1, 0.0), (50.0, 1.0)])
def test_the_share_of_other_processes_is_of_the_whole_machine(
    monkeypatch: pytest.MonkeyPatch, busy: float, share: float
) -> None:
    """Less than none is the noise of two clocks; more than all, of a step of less than a tick."""
    now, others = [0.0], [100.0]
    monkeypatch.setattr(e2e_worker.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(e2e_worker, "_cpu_seconds_of_others", lambda: others[0])
    monkeypatch.setattr(e2e_worker.os, "cpu_count", lambda: 2)
    clock = PhaseClock(CPU)
    clock.start("generate")
    now[0] += 10
    others[0] += busy
    clock.switch("update")
    assert clock.others() == pytest.approx(share)


def test_a_report_is_found_among_other_lines(capsys: pytest.CaptureFixture[str]) -> None:
    clock = PhaseClock(CPU)
    clock.start("generate")
    print("half a line of a library", end="")
    report_step(clock, prompt_tokens=5, response_tokens=7)
    found = [read_report(line) for line in capsys.readouterr().out.splitlines()]
    steps = [step for step in found if step is not None]
    assert len(steps) == 1
    assert (steps[0]["prompt_tokens"], steps[0]["response_tokens"]) == (5, 7)
    assert steps[0]["seconds"].keys() == set(PHASES)
    assert steps[0]["peak_bytes"] > 10 * 2**20
    assert 0 <= steps[0]["others"] <= 1


def _script(folder: Path, name: str, steps: list[dict[str, Any]], ending: str = "") -> str:
    """A worker that says its name to a log, reports `steps` and ends as told."""
    file = folder / f"{name}.py"
    reports = [f"print('e2e-report ' + {json.dumps(json.dumps(step))})" for step in steps]
    log = f"open({str(folder / 'log')!r}, 'a').write({name + ' '!r})"
    file.write_text("\n".join([log, *reports, ending]), encoding="utf-8")
    return str(file)


def test_sides_take_turns_and_the_first_step_does_not_count(tmp_path: Path) -> None:
    warm_up = a_step(100.0)
    sides = [
        Side(name, _script(tmp_path, name, [warm_up, step]))
        for name, step in (("ours", a_step(1.0)), ("TRL", a_step(2.0)))
    ]
    compare(a_work(tmp_path), sides, repeats=2)
    assert (tmp_path / "log").read_text() == "ours TRL ours TRL "
    assert [side.seconds("generate") for side in sides] == [[4, 4], [8, 8]]
    assert [side.median("step") for side in sides] == [16, 23]


def test_a_side_runs_in_the_environment_that_is_its_own(tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nIS_OTHER=yes exec {sys.executable} "$@"\n')
    other.chmod(0o755)
    told = "import os; assert os.environ['IS_OTHER'] == 'yes'"
    side = Side("TRL", _script(tmp_path, "TRL", [a_step(), a_step()], told), str(other))
    compare(a_work(tmp_path), [side], repeats=1)
    assert not side.skipped


def test_a_side_that_fails_says_why_and_leaves_the_other(tmp_path: Path) -> None:
    steps = [a_step(), a_step()]
    broken = _script(tmp_path, "TRL", steps[:1], "raise SystemExit('no memory is left')")
    sides = [Side("ours", _script(tmp_path, "ours", steps)), Side("TRL", broken)]
    compare(a_work(tmp_path), sides, repeats=2)
    assert (tmp_path / "log").read_text() == "ours TRL ours "
    assert len(sides[0].steps) == 2
    assert sides[1].failed and not sides[1].steps
    assert "no memory is left\nexit status 1 after 1 of 2 steps" in sides[1].skipped


def test_a_process_that_stops_early_has_failed(tmp_path: Path) -> None:
    side = Side("ours", _script(tmp_path, "ours", [a_step()]))
    compare(a_work(tmp_path), [side], repeats=1)
    assert side.failed and "exit status 0 after 1 of 2 steps" in side.skipped


@pytest.mark.parametrize(("group", "asked"), [(1, "3 and 8"), (2, "6 and 16")])
def test_other_work_is_not_compared(tmp_path: Path, group: int, asked: str) -> None:
    steps = [a_step(), a_step(response_tokens=7)]
    side = Side("ours", _script(tmp_path, "ours", steps))
    with pytest.raises(UserError, match=f"read 3 and wrote 7 tokens where {asked} were asked for"):
        compare(a_work(tmp_path, group=group), [side], repeats=1)


def test_rows_have_medians_and_floors(tmp_path: Path) -> None:
    side = Side("ours", versions={"torch": "2"}, steps=[a_step(1.0), a_step(2.0), a_step(6.0)])
    floor = dict.fromkeys((*PHASES, "step"), 2.0)
    found = {row["phase"]: row for row in rows([side], floor, a_work(tmp_path), {"model": "m"})}
    assert list(found) == [*PHASES, "step"]
    generate, step = found["generate"], found["step"]
    assert (generate["seconds"], generate["seconds_min"], generate["seconds_max"]) == (8, 4, 24)
    assert generate["x_floor"] == 4 and generate["peak_bytes"] is None
    assert step["seconds"] == 7 * 2 + 9 and step["steps"] == 3 and step["model"] == "m"
    assert step["torch"] == "2"
    assert step["tokens_per_second"] == pytest.approx(2 * 4 / 23)
    assert step["peak_bytes"] == 6_000_000_000
    floor["score"] = 0.0  # a function's
    assert rows([side], floor, a_work(tmp_path), {})[1]["x_floor"] is None


def test_the_table_leaves_out_what_was_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = a_work(tmp_path)
    floor = dict.fromkeys((*PHASES, "step"), 0.5)
    print_comparison("PPO", [Side("ours", steps=[a_step()]), Side("TRL")], floor, work)
    alone = capsys.readouterr().out
    assert "16" in alone and "32.00" in alone and "Other processes" not in alone
    sides = [Side("ours", steps=[a_step()]), Side("TRL", steps=[a_step(3.0, others=0.4)])]
    print_comparison("GRPO", sides, floor | {"score": 0.0}, work)
    both = capsys.readouterr().out
    assert "One GRPO step" in both
    assert "1.88" in both  # (3·7 + 9) / (7 + 9)
    assert "Other processes took up to 40%" in both


@pytest.mark.parametrize("contest", [PPO, GRPO], ids=lambda contest: contest.what)
def test_mixed_precision_is_named_where_it_differs(
    contest: Contest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for dtype, named in (("float32", False), ("bfloat16", True)):
        work = a_work(tmp_path, dtype=dtype)
        print_differences(contest.same(work), contest.different(work), contest.trl)
        printed = capsys.readouterr().out
        assert ("fp32 master" in printed) is named and f"TRL {contest.trl}" in printed


def test_memory_is_counted_for_each_side() -> None:
    ppo, grpo = {"trained": 2, "frozen": 2}, {"trained": 1, "frozen": 1}
    assert needed_bytes(1, "ours", torch.float32, **ppo) == 36
    assert needed_bytes(1, "ours", torch.bfloat16, **ppo) == 30
    assert needed_bytes(1, "TRL", torch.float32, **ppo) == 40
    assert needed_bytes(1, "TRL", torch.bfloat16, **ppo) == 20
    assert needed_bytes(1, "ours", torch.bfloat16, **grpo) == 16
    assert needed_bytes(1, "TRL", torch.bfloat16, **grpo) == 10


@pytest.mark.parametrize("found", ["", "1.13.0"])
def test_without_the_right_trl_one_reads_what_to_install(found: str) -> None:
    def reason(name: str, only: str | None = None) -> str:
        side = Side(name, versions={"trl": found} if found else {})
        return reason_to_skip(PPO, side, only, SHAPE, CPU, torch.float32)

    assert "pip install trl==1.12.0" in reason("TRL") and (found or "none") in reason("TRL")
    assert reason("ours") == ""
    assert reason("ours", "trl") == "--only trl."


def test_a_version_is_that_of_another_environment(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho \'{"torch": "2.11.0", "trl": "1.16.0"}\'\n')
    python.chmod(0o755)
    assert versions(str(python)) == {"torch": "2.11.0", "trl": "1.16.0"}
    assert versions(str(tmp_path / "none")) == {}
    assert versions(sys.executable)["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "qwen2.5-7b"], "qwen2.5-7b is for a GPU: add --device cuda"),
        (["--prompts", "12"], "--prompts 12 must be a multiple of 8"),
        (["--trl", "nowhere"], "none is installed for nowhere: pip install trl==1.12.0"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["e2e.py", *arguments, "--only", "trl"])
    assert main(PPO, "") == 1
    assert message in capsys.readouterr().out


def test_a_random_model_and_its_prompts_are_as_long_as_asked(tiny: str, tmp_path: Path) -> None:
    work = prepare(tiny, TINY_SIZES, tmp_path, steps=2, device="cpu", dtype="float32")
    assert [len(ids) for ids in work.prompt_ids] == [5] * 8
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    assert [tokenizer(prompt)["input_ids"] for prompt in work.prompts] == work.prompt_ids
    reward = AutoConfig.from_pretrained(tmp_path / "reward")
    assert reward.num_labels == 1 and reward.architectures == ["Qwen2ForSequenceClassification"]


def test_ours_may_hold_one_base(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(e2e_models, "ADAPTED_LAYERS", 1)
    monkeypatch.setattr(e2e_ours, "ADAPTED_LAYERS", 1)
    work = prepare(tiny, TINY_SIZES, tmp_path, steps=2, device="cpu", dtype="float32")
    e2e_models.save_reward_adapters(tmp_path)
    engine = PPOEngine(config=e2e_ours.config_of(replace(work, share_base=True)))
    [scorer] = engine.rewards.models
    shared = {x.data_ptr() for x in engine.policy.model.parameters() if not x.requires_grad}
    for model in (engine.critic.model, scorer.model):
        assert {x.data_ptr() for x in unwrap(model).model.layers[0].parameters()} <= shared


@pytest.mark.slow
@pytest.mark.parametrize("side", ["ours", "TRL"])
@pytest.mark.parametrize("contest", [PPO, GRPO], ids=lambda contest: contest.what)
def test_a_side_does_the_whole_work(tiny: str, contest: Contest, side: str, tmp_path: Path) -> None:
    if side == "TRL" and versions(sys.executable).get("trl") != contest.trl:
        pytest.skip(f"TRL {contest.trl} has an environment of its own, or is in the group `bench`")
    size = replace(TINY_SIZES, prompts=2, group=4, epochs=1) if contest is GRPO else TINY_SIZES
    work = prepare(tiny, size, tmp_path, steps=2, device="cpu", dtype="float32")
    one = Side(side, contest.scripts[side])
    compare(work, [one], repeats=1)
    assert not one.skipped, one.skipped
    (step,) = one.steps  # `compare` has checked its tokens
    assert all(step["seconds"][phase] > 0 for phase in PHASES)
