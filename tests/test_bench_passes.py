"""The benchmark of an update pass: its sides, their gradients, its ratios."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import e2e_models, passes, passes_sides, speed_page
from bench.e2e_floor import Shape, forward
from bench.machine import Ceilings
from bench.passes_sides import COMPILE, LIGER, OURS, PLAIN, Sides, difference, reason_to_skip
from bench.results import read_csv
from bench.timing import Timing
from ppo_engine.models import fused
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.settings.schema import ModelConfig
from ppo_kernels import rms_norm, rotary_embedding, swiglu

CPU = torch.device("cpu")
CEILINGS = Ceilings(read=1e9, write=1.0, copy=1.0, matmul={torch.float32: 1e9}, call=0.0)
OPS = ("rms_norm", "rotary_embedding", "swiglu")


@pytest.fixture
def sides() -> Sides:
    """Of the tiny model, on three texts of 5 + 4 tokens."""
    policy = LanguageModel.open(
        tiny_model(), ModelConfig(), device=CPU, dtype=torch.float32, tokenizer=tiny_tokenizer()
    )
    assert policy.reader.packs
    return Sides(policy, 3, 5, 4)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, sides: Sides) -> list[str]:
    """The ops of ours that are called from now on."""
    log: list[str] = []

    def logged(name: str) -> Any:
        op = getattr(fused, name)
        return lambda *args, **kwargs: log.append(name) or op(*args, **kwargs)

    for name in OPS:
        monkeypatch.setattr(fused, name, logged(name))
    return log


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A stand-in for Liger, whose functions are ours under its names; what is called of it."""
    log: list[str] = []
    module = ModuleType("liger_kernel.transformers.functional")

    def liger_rms_norm(X: Tensor, W: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        log.append("rms_norm")
        return rms_norm(X, W, eps=eps, added=offset)

    def liger_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        log.append("rotary_embedding")
        return rotary_embedding(q, k, cos, sin)

    def liger_swiglu(a: Tensor, b: Tensor) -> Tensor:
        log.append("swiglu")
        return swiglu(a, b)

    for function in (liger_rms_norm, liger_rope, liger_swiglu):
        setattr(module, function.__name__, function)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield log


def test_a_pass_is_over_packed_rows_that_predict_responses(sides: Sides) -> None:
    assert sides.lengths == [8, 8, 8] and sides.targets == 12
    assert sides._rows.ids.shape == (1, 24) and sides._rows.counts == [4, 4, 4]
    assert sides._rows.places.tolist() == [b * 8 + t for b in range(3) for t in (4, 5, 6, 7)]


def test_only_ours_calls_our_ops(sides: Sides, called: list[str]) -> None:
    sides.call(PLAIN)()
    assert not called
    sides.call(OURS)()
    assert set(called) == set(OPS)


def test_liger_takes_the_places_of_our_ops(
    sides: Sides, called: list[str], liger: list[str]
) -> None:
    assert difference(sides.gradients(LIGER), sides.gradients(PLAIN)) < 1e-5
    assert not called and set(liger) == set(OPS)
    sides.call(OURS)()
    assert set(called) == set(OPS)  # they are back


def test_layers_are_compiled_once_and_for_their_side_alone(
    sides: Sides, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Any] = []
    compiled: list[Any] = []

    def compile_(layer: Any, **settings: Any) -> None:
        assert settings == {"dynamic": True}
        compiled.append(layer)
        plain = layer._call_impl
        layer._compiled_call_impl = lambda *a, **k: runs.append(layer) or plain(*a, **k)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    expected = sides.gradients(PLAIN)
    assert not compiled
    for _ in range(2):
        assert difference(sides.gradients(COMPILE), expected) == 0
    assert compiled == [*sides._layers] and runs == compiled * 2 and not called
    sides.call(PLAIN)()
    assert len(runs) == 2 * len(compiled)


def test_compiled_layers_have_the_gradients_of_plain(sides: Sides) -> None:
    """With dynamo and autograd of torch.compile, without its compiler, which takes long."""
    for layer in sides._layers:
        layer.compile(dynamic=True, backend="aot_eager")
    sides._compiled = [layer._compiled_call_impl for layer in sides._layers]
    assert difference(sides.gradients(COMPILE), sides.gradients(PLAIN)) < 1e-5


def test_gradients_are_dropped(sides: Sides) -> None:
    found = sides.gradients(PLAIN)
    assert found and all(x.isfinite().all() and x.any() for x in found.values())
    sides.call(OURS)()
    assert all(p.grad is None for p in sides._policy.model.parameters())


def test_the_difference_is_that_of_the_worst_kind_of_parameter() -> None:
    expected = {"layers.0.a": torch.tensor([3.0, 0.0]), "layers.1.a": torch.tensor([0.0, 4.0]),
                "b": torch.tensor([10.0])}  # fmt: skip
    found = {"layers.0.a": torch.tensor([3.0, 1.0]), "layers.1.a": torch.tensor([0.0, 4.0]),
             "b": torch.tensor([11.0])}  # fmt: skip
    assert difference(found, expected) == pytest.approx(0.2)
    assert difference(expected | {"b": torch.tensor([15.0])}, expected) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "device", "installed", "reason"),
    [
        (OURS, "cpu", False, ""),
        (LIGER, "cpu", True, "for GPUs"),
        (LIGER, "cuda", False, "not installed"),
        (LIGER, "cuda", True, ""),
    ],
)
def test_liger_needs_its_package_and_a_gpu(
    monkeypatch: pytest.MonkeyPatch, name: str, device: str, installed: bool, reason: str
) -> None:
    monkeypatch.setattr(
        passes_sides.importlib.util, "find_spec", lambda _: object() if installed else None
    )
    found = reason_to_skip(name, torch.device(device))
    assert reason in found and bool(found) == bool(reason)


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    monkeypatch.setitem(e2e_models._RANDOM, "tiny", tiny)
    monkeypatch.setattr(passes, "MODELS", ("tiny",))
    monkeypatch.setattr(passes.machine, "measure_ceilings", lambda *_: CEILINGS)
    seconds = {PLAIN: 3.0, OURS: 1.5}
    monkeypatch.setattr(
        passes, "time_in_turn",
        lambda _, calls, __: {name: Timing(1.0, seconds[name], 4.0) for name in calls},
    )  # fmt: skip
    gradients = Sides.gradients

    def broken(self: Sides, name: str) -> Any:
        if name == COMPILE:
            raise RuntimeError("no compiler is here\nand more")
        return gradients(self, name)

    monkeypatch.setattr(Sides, "gradients", broken)
    out = tmp_path / "passes.csv"
    arguments = ["--model", "tiny", "--dtype", "fp32", "--tokens", "100", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["passes.py", *arguments])
    assert passes.main() == 0
    said = capsys.readouterr().out
    assert "no compiler is here" in said and "and more" not in said and "for GPUs" in said
    command, rows = read_csv(out)
    assert command.startswith("python bench/passes.py --model tiny")
    plain, ours, compiled, liger = rows
    assert (plain["texts"], plain["tokens"]) == ("2", "94")
    work = forward(Shape.of(e2e_models.model_config("tiny")), [47, 47], logits=64).times(3, 2)
    assert float(ours["x_plain"]) == 2 and float(plain["x_plain"]) == 1
    assert float(ours["mfu"]) == pytest.approx(work.flop / 1.5 / 1e9, rel=1e-3)
    assert float(ours["x_floor"]) == pytest.approx(1.5 / (work.flop / 1e9), rel=1e-3)
    assert 0 < float(ours["difference"]) < 1e-5 and float(ours["peak_bytes"]) > 1e4
    assert compiled["ms_p50"] == liger["ms_p50"] == ""
    assert speed_page._passes(command, rows).count("\n| ") == 4  # two of them are the head

    monkeypatch.setattr(passes, "difference", lambda *_: 0.5)
    assert passes.main() == 1
    assert capsys.readouterr().out.count("wrong: gradients differ by 0.5") == 1
