"""The benchmark of rollouts: its cases, its floor, its rounds, its ratios, its profile."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from torch.autograd import DeviceType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import e2e_models, rollout, rollout_cases, rollout_compare, speed_page
from bench.e2e_floor import Pass, Shape
from bench.machine import Ceilings
from bench.results import read_csv
from bench.rollout_cases import CASES, EARLY, Case, Target, early_ends, prompt_rows
from bench.rollout_compare import RATIOS, Result, check_work, compare, rows_of
from bench.rollout_floor import decode, floor
from bench.rollout_profile import HOST, OTHER, PHASES, Part, _kernels, _operations, divide, profiled
from bench.rollout_sides import SIDES, Sides, until_end
from bench.rollout_table import judged
from ppo_engine.errors import UserError
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.settings.schema import ModelConfig

CPU = torch.device("cpu")
SHAPE = Shape(layer_weights=100, head_weights=10, attention=3, cache=2, parameters=0)
CEILINGS = Ceilings(read=1e3, write=1.0, copy=1.0, matmul={torch.float32: 1e4}, call=0.0)
CASE = Case("a", "tiny", responses=4, new_tokens=6, group=2)
ROWS = [[65, 66, 67], [65, 66, 67], [70], [70]]


def a_policy(dtype: torch.dtype = torch.float32) -> LanguageModel:
    return LanguageModel.open(
        tiny_model(), ModelConfig(), device=CPU, dtype=dtype, tokenizer=tiny_tokenizer()
    )


def test_cases_are_whole_and_their_targets_can_be_judged() -> None:
    for case in (case for cases in CASES.values() for case in cases):
        assert case.responses % case.group == 0 and set(case.sides) <= set(SIDES), case
        for target in case.targets.values():
            assert bool(target.beside) != bool(target.most), case
            assert target.beside == "" or (target.beside in case.sides and target.beside in RATIOS)


@pytest.mark.parametrize("name", ["64x32", "64x32-groups", "1.5b-groups"])
def test_prompts_come_in_groups(name: str) -> None:
    [case] = [case for cases in CASES.values() for case in cases if case.name == name]
    rows = prompt_rows(case, a_policy())
    groups = [rows[i : i + case.group] for i in range(0, len(rows), case.group)]
    assert len(rows) == case.responses and all(row == g[0] for g in groups for row in g)
    assert len({tuple(group[0]) for group in groups}) == case.responses // case.group
    if case.prompt_tokens:
        assert {len(row) for row in rows} == {case.prompt_tokens}


def test_more_groups_than_prompts_are_an_error() -> None:
    with pytest.raises(UserError, match="9999"):
        prompt_rows(Case("a", "smollm2", 9999, 1), a_policy())


def test_ends_are_tokens_that_come_early_but_not_at_once() -> None:
    pads = [8, 7, 8, 7, 8, 7, 8, 7]
    written = [[8, 7, 1], [7, 8, 2, 1], [5, 8, 3], [5, 7, 6, *pads, 1], [7, 8, *pads, 3]]
    # 1 ends two early and one late, 3 one and one, 2 and 6 one and none, 5 two at once.
    assert early_ends(written, share=0.4) == [1]
    assert early_ends(written, share=0.6) == [1, 6]
    assert early_ends(written, share=0.8) == [1, 6, 3]


def test_the_floor_is_that_of_the_docstring() -> None:
    # Prompts of 3 and 1 tokens; 4 and 2 new ones, so 3 and 1 steps.
    seen = (3 * 3 + 6) + (1 + 1)
    flop = 2 * 110 * 4 + 4 * 3 * seen
    assert decode(SHAPE, [3, 1], [4, 2], rows=2) == Pass(flop, 110 * 3 + 2 * seen)
    assert decode(SHAPE, [3, 1], [4, 2], rows=1) == Pass(flop, 110 * 4 + 2 * seen)
    assert decode(SHAPE, [3, 1], [4, 4], rows=2).elements == 110 * 3 + 2 * (15 + 9)


def test_a_prompt_is_read_once_for_its_group() -> None:
    found = partial(floor, SHAPE, written=[1, 1], rows=2, ceilings=CEILINGS, dtype=torch.float32)
    one = found([[1, 2, 3], [4, 5, 6]]) - found([[1, 2, 3], [1, 2, 3]])
    # One pass more of FLOP, while the bytes of the weights decide.
    assert one == 0
    fast = Ceilings(read=1e9, write=1.0, copy=1.0, matmul={torch.float32: 1e3}, call=0.0)
    found = partial(floor, SHAPE, written=[1, 1], rows=2, ceilings=fast, dtype=torch.float32)
    one = found([[1, 2, 3], [4, 5, 6]]) - found([[1, 2, 3], [1, 2, 3]])
    assert one == pytest.approx((2 * 100 * 3 + 4 * 3 * 6 + 2 * 10) / 1e3)


class Clock:
    """Rounds take the seconds that the sides say."""

    now = 0.0

    def __init__(self, device: torch.device) -> None:
        self.seconds = {"generate": 0.0}

    def start(self, phase: str) -> None:
        self.since = Clock.now

    def switch(self, phase: str) -> None:
        self.seconds[phase] = Clock.now - self.since

    def others(self) -> float:
        return 0.25


def some_sides(seconds: dict[str, list[float]], log: list[str]) -> Any:
    """Sides that take those seconds in their rounds, or fail where there are none left."""
    policy = a_policy()
    left = {name: list(times) for name, times in seconds.items()}

    def run(name: str, rows: Any) -> list[list[int]]:
        log.append(f"{name} {next(policy.model.parameters())._version}")
        if not left[name]:
            raise RuntimeError("no memory is left\nand more")
        Clock.now += left[name].pop(0)
        return [[1] * CASE.new_tokens for _ in rows]

    return SimpleNamespace(policy=policy, ends=[], run=lambda name, case: partial(run, name))


def test_sides_take_turns_after_an_update_and_the_first_round_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rollout_compare, "PhaseClock", Clock)
    log: list[str] = []
    sides = some_sides({"ours": [9, 1, 2], "generate": [9, 3, 8], "continuous": [9.0]}, log)
    results = [Result(name) for name in ("ours", "generate", "continuous")]
    compare(results, CASE, sides, ROWS, repeats=2)
    names, versions = zip(*(line.split() for line in log), strict=True)
    assert names == ("ours", "generate", "continuous") * 2 + ("ours", "generate")
    assert len(set(versions)) == len(versions)  # the weights were written before each
    assert [result.seconds for result in results] == [[1, 2], [3, 8], []]
    assert results[2].skipped == "no memory is left" and not results[0].skipped

    rows = {row["side"]: row for row in rows_of(results, CASE, ROWS, sides.policy, CEILINGS)}
    ours, base, failed = rows["ours"], rows["generate"], rows["continuous"]
    assert (ours["seconds"], ours["seconds_min"], ours["seconds_max"]) == (1.5, 1, 2)
    assert ours["x_generate"] == (3 / 1 + 8 / 2) / 2 and base["x_generate"] == 1
    assert ours["x_no_refill"] is None and ours["others"] == 0.25 and ours["early"] == 1
    assert ours["tokens_per_second"] == 24 / 1.5
    assert ours["x_floor"] == pytest.approx(1.5 / ours["floor_seconds"])
    assert failed["status"] == "no memory is left" and failed["seconds"] is None
    assert ours.keys() == failed.keys()


def test_other_work_is_not_compared() -> None:
    whole = [[1] * 6, [2, 9], [9], [3] * 6]
    assert check_work("ours", CASE, [9], whole) == [6, 2, 1, 6]
    for wrong in (whole[1:], [*whole[:3], [3] * 5], [*whole[:3], []], [*whole[:3], [9] * 7]):
        with pytest.raises(UserError, match="did not do the same work"):
            check_work("ours", CASE, [9], wrong)


@pytest.mark.parametrize(
    ("target", "verdict"),
    [
        (Target(2.2, "generate"), "2.50x generate, target >= 2.2: met"),
        (Target(3.0, "generate"), "2.50x generate, target >= 3: MISSED"),
        (Target(1.8, "no refill"), ""),
        (Target(most=0.45, of="seconds", on="H200"), "0.5 seconds, target <= 0.45: MISSED"),
        (Target(most=0.45, of="seconds", on="H100"), ""),
        (Target(most=1 / 0.6, of="floors"), "1.5 floors, target <= 1.67: met"),
        (None, ""),
    ],
)
def test_targets_are_judged(target: Target | None, verdict: str) -> None:
    ours = {"side": "ours", "seconds": 0.5, "x_floor": 1.5, "x_generate": 2.5, "x_no_refill": None}
    assert judged([ours], target, "NVIDIA H200") == verdict
    assert judged([ours | {"seconds": None}], target, "NVIDIA H200") == ""


@pytest.mark.parametrize("name", ["ours", "generate", "no refill"])
def test_every_side_ends_where_it_is_told(name: str) -> None:
    sides = Sides(a_policy(torch.bfloat16))
    shipped = sides.policy.model.generation_config
    case = Case("a", "tiny", 4, 40, 2, rows=2, varied=True)
    run = sides.run(name, case)
    assert [len(tokens) for tokens in run(ROWS)] == [40] * 4
    sides.end_with(list(range(40)))
    lengths = check_work(name, case, sides.ends, sides.run(name, case)(ROWS))
    assert min(lengths) < 40  # of 259 tokens, 40 end
    assert sides.policy.model.generation_config is shipped


def test_a_batch_has_as_many_rows_as_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sides, seen = Sides(a_policy()), []
    monkeypatch.setattr(sides, "write", lambda new, rows: seen.append(rows) or [[1]] * len(rows))
    found = sides.run("no refill", Case("a", "tiny", 4, 6, rows=3))(ROWS)
    assert seen == [ROWS[:3], ROWS[3:]] and len(found) == 4


def test_until_end() -> None:
    assert until_end([5, 9, 5, 8], [8, 9]) == [5, 9]
    assert until_end([5, 6], [9]) == [5, 6]


def test_the_outermost_phase_takes_all_within() -> None:
    parts = [
        Part(["bench.prefill", "aten::linear", "aten::addmm"], 1e6),
        Part(["aten::scaled_dot_product_attention", "aten::bmm"], 2e6),
        Part(["aten::linear", "aten::to"], 3e6),
        Part(["aten::add"], 4e6),
        Part(["ppo.packing", "aten::copy_"], 5e6),
        Part(["ppo.sampling of something else", "aten::mul"], 6e6),
        Part(["nvjet_tst_64x8_splitK"], 7e6),
    ]
    found = divide(parts, 30e6, HOST)
    assert found == {"prefill": 1, "packing": 5, "attention": 2, "sampling": 0, "products": 10,
                     OTHER: 10, HOST: 2}  # fmt: skip


def test_operations_of_the_thread_that_samples() -> None:
    def event(name: str, above: Any = None, own: float = 1.0) -> Any:
        return SimpleNamespace(name=name, cpu_parent=above, self_cpu_time_total=own)

    whole = event("bench.rollout")
    prefill, step = event("bench.prefill", whole), event("ppo.generate", whole)
    linear = event("aten::linear", step)
    events = [whole, prefill, step, event("aten::mm", event("aten::linear", prefill)), linear,
              event("aten::mm", linear, own=3.0), event("aten::mm")]  # fmt: skip
    assert [*_operations(events, whole)] == [
        Part(["bench.prefill"], 1.0),
        Part(["bench.prefill", "aten::linear", "aten::mm"], 1.0),
        Part(["ppo.generate", "aten::linear"], 1.0),
        Part(["ppo.generate", "aten::linear", "aten::mm"], 3.0),
    ]


def test_kernels_within_a_prefill() -> None:
    def event(name: str, start: float, end: float, device: DeviceType = DeviceType.CUDA) -> Any:
        span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(name=name, device_type=device, time_range=span)

    events = [
        event("bench.rollout", 0, 90), event("bench.prefill", 10, 20), event("gemm", 12, 25),
        event("gemm", 20, 23), event("aten::linear", 20, 24, DeviceType.CPU),
    ]  # fmt: skip
    assert [*_kernels(events, None)] == [Part(["bench.prefill", "gemm"], 13), Part(["gemm"], 3)]


def test_every_moment_of_a_rollout_is_in_one_phase() -> None:
    sides = Sides(a_policy())
    run = partial(sides.run("generate", CASE), ROWS)
    found = profiled(run, sides.policy.model, CPU)
    assert found.keys() == {*PHASES, OTHER, HOST}
    assert all(found[name] > 0 for name in (*PHASES, OTHER, HOST) if name != "packing")
    assert 0.001 < sum(found.values()) < 60


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    monkeypatch.setitem(e2e_models._RANDOM, "tiny", tiny)
    cases = (
        Case("flat", "tiny", 4, 3, 2, 5, sides=("generate",),
             targets={"float32": Target(1e9, "generate")}),
        Case("varied", "tiny", 16, 20, 8, 5, rows=8, varied=True, sides=("no refill",)),
    )  # fmt: skip
    monkeypatch.setitem(rollout_cases.CASES, "cpu", cases)
    first: list[list[list[int]]] = []
    monkeypatch.setattr(rollout, "early_ends", lambda w: first.append(w) or list(range(150)))
    monkeypatch.setattr(rollout.machine, "measure_ceilings", lambda *_: CEILINGS)
    out = tmp_path / "rollout.csv"
    arguments = ["--dtype", "fp32", "--repeats", "1", "--profile", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["rollout.py", *arguments])
    assert rollout.main() == 0
    said = capsys.readouterr().out
    assert said.count("under the profiler") == 3 and "target >= 1e+09: MISSED" in said
    command, rows = read_csv(out)
    assert command.startswith("python bench/rollout.py --dtype fp32")
    measured = [(row["case"], row["side"]) for row in rows]
    assert measured == [("flat", "ours"), ("flat", "generate"), ("varied", "ours"),
                        ("varied", "no refill")]  # fmt: skip
    assert all(row["status"] == "ok" and float(row["x_floor"]) > 0 for row in rows)
    assert [[len(tokens) for tokens in written] for written in first] == [[2 * EARLY] * 16]
    assert float(rows[2]["early"]) > 0 and rows[0]["written"] == "12"
    table = speed_page._rollout(command, rows).splitlines()[2:]
    assert len(table) == 4 and table[2].startswith("| 4 x 3 in groups of 2 | tiny, float32 |")
    assert "in groups of 8, memory for 8 |" in table[3] and "| no refill |" in table[3]
