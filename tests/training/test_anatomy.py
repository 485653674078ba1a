"""A step's anatomy: what a profiled run writes, and that time is found where it was spent."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_model_folder, tiny_tokenizer

from ppo_engine import PPOEngine, cli, spans
from ppo_engine.models import language_model, optimizer
from ppo_engine.models.value_model import value_model_from_policy
from ppo_engine.ppo import critic, engine, estimators
from ppo_engine.pretrained import architecture
from ppo_engine.rewards.model import RewardModel
from ppo_engine.rollout import decoder, slots
from ppo_engine.settings.schema import (
    GenerationConfig,
    LoraConfig,
    ModelConfig,
    PPOConfig,
    PPOSettings,
)
from ppo_engine.settings.schema import RunConfig as Run
from ppo_engine.training import anatomy
from ppo_kernels import head, logprob, onednn

PROMPTS = ["One", "Number two", "3", "And four"]
PHASES = [
    "generate: packing", "generate: prefill", "generate: decode", "generate: attention",
    "generate: sampling", "generate: other", "score", "advantages: policy", "advantages: logprobs",
    "advantages: reference", "advantages: critic", "advantages: gae", "advantages: other",
    "update: policy", "update: losses", "update: backward", "update: optimizer", "update: critic",
    "update: other", "other",
]  # fmt: skip
PAUSE = 0.6  # seconds: more than all the rest of a tiny step


def length(prompts: list[str], responses: list[str]) -> list[float]:
    return [len(response) / 10 for response in responses]


def config(**policy: Any) -> PPOConfig:
    return PPOConfig(
        policy=ModelConfig(**policy),
        generation=GenerationConfig(max_new_tokens=4),
        ppo=PPOSettings(rollout_batch_size=4, mini_batch_size=4, old_logprobs="recompute"),
        run=Run(dtype="float32"),
    )


def step(engine: PPOEngine) -> None:
    rollout = engine.generate(PROMPTS)
    engine.update(engine.estimate_advantages(rollout, engine.score(rollout)))


def table(folder: Path) -> dict[str, dict[str, float]]:
    with open(folder / "anatomy.csv", newline="", encoding="utf-8") as file:
        return {row.pop("phase"): {k: float(v) for k, v in row.items()}
                for row in csv.DictReader(file)}  # fmt: skip


def dissect(engine: PPOEngine, folder: Path) -> dict[str, dict[str, float]]:
    with anatomy.recording(engine) as profile:
        step(engine)
    anatomy.write_profile(profile, folder, "A step")
    return table(folder)


def slowly(function: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(PAUSE)
        return function(*args, **kwargs)

    return slow


def pause(*_: Any) -> None:
    time.sleep(PAUSE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def run(model: str, folder: Path, *settings: str) -> None:
    data, reward = folder / "prompts.jsonl", folder / "reward.py"
    data.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    reward.write_text("def score(prompts, responses): return [len(r) / 10 for r in responses]\n")
    flags = ["--model", model, "--data", str(data), "--reward", f"{reward}:score"]
    small = ["ppo.rollout_batch_size=4", "generation.max_new_tokens=4", "run.dtype=float32",
             "ppo.old_logprobs=recompute"]  # fmt: skip
    assert cli.main(["ppo", *flags, *small, *settings]) == 0


def metrics(folder: Path) -> list[dict[str, float]]:
    timing = ("time/", "tokens_per_second", "memory/", "mfu/", "overhead/")
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith(timing)} for row in rows]


def test_a_profiled_run_writes_trace_and_table_and_trains_alike(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(model, tmp_path, "--profile", "steps=3", f"run.output_dir={tmp_path / 'profiled'}")
    printed = capsys.readouterr()
    run(model, tmp_path, "steps=3", f"run.output_dir={tmp_path / 'plain'}")
    assert metrics(tmp_path / "profiled") == metrics(tmp_path / "plain")
    assert not (tmp_path / "plain" / "profile").exists()

    folder = tmp_path / "profiled" / "profile"
    assert {file.name for file in folder.iterdir()} == {
        "trace.json.gz", "anatomy.csv", "anatomy.txt", "SHA256SUMS"
    }  # fmt: skip
    text = (folder / "anatomy.txt").read_text(encoding="utf-8")
    assert text.startswith("Anatomy of step 2,") and text.strip() in printed.out
    assert "Not the transformer: " in text
    phases = table(folder)
    assert list(phases) == PHASES
    assert sum(phase["share"] for phase in phases.values()) == pytest.approx(1, abs=1e-4)
    assert all(0 <= p["transformer_share"] <= p["share"] <= 1 for p in phases.values())
    with gzip.open(folder / "trace.json.gz", "rt", encoding="utf-8") as file:
        trace = json.load(file)
    found = {event["name"] for event in trace["traceEvents"]}
    spans = {name.split(": ")[-1].removesuffix(" backward") for name in PHASES} - {"other"}
    assert {f"ppo.{name}" for name in spans | {"step", "transformer", "update"}} <= found
    # The table is that of the trace, also when it is read back with all of its events.
    whole = anatomy.read_anatomy(trace)
    assert {p.name: p.seconds for p in whole.phases} == pytest.approx(
        {name: phase["seconds"] for name, phase in phases.items()}, abs=1e-6
    )


def test_the_only_step_is_profiled_and_a_resumed_run_may_be(model: str, tmp_path: Path) -> None:
    folder = f"run.output_dir={tmp_path / 'run'}"
    run(model, tmp_path, "--profile", "steps=1", folder)
    text = tmp_path / "run" / "profile" / "anatomy.txt"
    assert text.read_text(encoding="utf-8").startswith("Anatomy of step 1,")
    run(model, tmp_path, "profile=false", "steps=2", "run.resume=true", folder)
    assert text.read_text(encoding="utf-8").startswith("Anatomy of step 1,")
    run(model, tmp_path, "profile=true", "steps=5", "run.resume=true", folder)
    assert text.read_text(encoding="utf-8").startswith("Anatomy of step 4,")


def slow_layer(engine: PPOEngine, name: str) -> None:
    """The next pass through the last layer of a model pauses."""
    owner = getattr(engine, name)
    layers = architecture.decoder_layers(getattr(owner, "model", owner))
    handle = layers[-1].register_forward_pre_hook(lambda *_: (pause(), handle.remove())[0])


def slow_head(by: Callable[..., Any]) -> Callable[[PPOEngine, pytest.MonkeyPatch], None]:
    """The next product of the output layer takes long, `by` this one."""

    def plant(_: PPOEngine, patch: pytest.MonkeyPatch) -> None:
        product = head.Head._product

        def slow(*args: Any) -> None:
            patch.undo()
            end, x = time.perf_counter() + PAUSE, torch.ones(400, 400)
            while time.perf_counter() < end:
                by(x, x)
            product(*args)

        patch.setattr(head.Head, "_product", slow)

    return plant


def slow_layer_backward(engine: PPOEngine, patch: pytest.MonkeyPatch) -> None:
    def hook(_: Any, __: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(pause)

    engine.policy.model.model.layers[0].register_forward_hook(hook)


def slow_function(module: Any, name: str) -> Callable[[PPOEngine, pytest.MonkeyPatch], None]:
    return lambda _, patch: patch.setattr(module, name, slowly(getattr(module, name)))


def slow_text(engine: PPOEngine, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine.policy.tokenizer, "decode", slowly(engine.policy.tokenizer.decode))


def slow_reward(engine: PPOEngine, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine.rewards.by_name["length"], "function", slowly(length))


@pytest.mark.parametrize(
    ("plant", "phase", "transformer"),
    [
        (slow_text, "generate: other", False),
        (slow_function(decoder, "sample"), "generate: sampling", False),
        (slow_function(slots, "decode_attention"), "generate: attention", True),
        (lambda e, p: slow_layer(e, "policy"), "generate: prefill", True),
        (slow_reward, "score", False),
        (slow_head(torch.mm), "advantages: logprobs", True),
        (slow_head(onednn.product), "advantages: logprobs", True),
        (lambda e, p: slow_layer(e, "reference"), "advantages: reference", True),
        (lambda e, p: slow_layer(e, "critic"), "advantages: critic", True),
        (slow_function(estimators, "kl_shaped_gae"), "advantages: gae", False),
        (slow_function(engine, "shape_scores"), "advantages: other", False),
        (slow_function(logprob, "forward_of_tiles"), "advantages: logprobs", False),
        (slow_function(language_model, "linear_ppo_loss"), "update: losses", False),
        (slow_function(critic, "ppo_value_loss"), "update: losses", False),
        (slow_layer_backward, "update: backward", True),
        (slow_function(logprob, "backward"), "update: losses", False),
        (slow_function(optimizer, "clip_factor"), "update: optimizer", False),
        (slow_function(engine, "objective_metrics"), "update: other", False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_time_is_found_where_it_was_spent(
    plant: Callable[[PPOEngine, pytest.MonkeyPatch], None],
    phase: str,
    transformer: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = PPOEngine(tiny_model(), length, config=config(), tokenizer=tiny_tokenizer())
    step(engine)  # the first of a process takes long by itself
    plant(engine, monkeypatch)
    phases = dissect(engine, tmp_path / "profile")
    assert max(phases, key=lambda name: phases[name]["share"]) == phase
    found = phases[phase]
    assert found["seconds"] >= PAUSE
    own = found["transformer_share"] / found["share"]
    assert own > 0.9 if transformer else own < 0.5


def test_a_reward_model_is_a_transformer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    scorer = value_model_from_policy(tiny_model(seed=1), tokenizer, seed=0)
    reward = RewardModel(scorer, tokenizer, device=torch.device("cpu"), dtype=torch.float32)
    found = dissect(
        PPOEngine(tiny_model(), reward, config=config(), tokenizer=tokenizer), tmp_path / "profile"
    )
    assert 0 < found["score"]["transformer_share"] < found["score"]["share"]


def test_adapters_and_checkpointing(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    settings = config(lora=LoraConfig(rank=2), gradient_checkpointing=True)
    engine = PPOEngine(tiny_model(), length, config=settings, tokenizer=tiny_tokenizer())
    # Other processes may stop this one anywhere, for longer than a phase takes: not each time.
    tries = [dissect(engine, tmp_path / f"profile {number}") for number in range(3)]
    for name in (
        "generate: prefill",
        "advantages: reference",
        "update: policy",
        "update: backward",
    ):
        own = [found[name]["transformer_share"] / found[name]["share"] for found in tries]
        assert max(own) > 0.3, name
    assert all(sorted(found) == sorted(PHASES) for found in tries)


def test_without_a_profiler_a_span_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(name: str) -> None:
        raise AssertionError(f"{name} was recorded")

    monkeypatch.setattr(spans, "record_function", record)
    engine = PPOEngine(tiny_model(), length, config=config(), tokenizer=tiny_tokenizer())
    step(engine)
    with pytest.raises(AssertionError, match="was recorded"), torch.profiler.profile():
        step(engine)


def test_a_step_that_fails_leaves_no_hook(tmp_path: Path) -> None:
    engine = PPOEngine(tiny_model(), length, config=config(), tokenizer=tiny_tokenizer())

    def hooks() -> int:
        trained = (engine.policy.model, engine.critic.model)
        return sum(
            len(part._forward_hooks) + len(part._forward_pre_hooks)
            for module in trained
            for part in module.modules()
        )

    before = hooks()
    with pytest.raises(KeyboardInterrupt), anatomy.recording(engine):
        assert hooks() > before
        raise KeyboardInterrupt
    assert hooks() == before
    assert not torch.autograd.profiler._is_profiler_enabled


def test_the_profiler_does_not_write_over_the_display() -> None:
    # In a process of its own: the library reads its log level once.
    code = """
from types import SimpleNamespace
import torch
from ppo_engine.training import anatomy
from contextlib import nullcontext
anatomy._transformer_spans = nullcontext
with anatomy.recording(SimpleNamespace(device=torch.device("cpu"))):
    torch.ones(2).sum()
"""
    environment = {k: v for k, v in os.environ.items() if k != "KINETO_LOG_LEVEL"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout + result.stderr == ""


def mark(name: str, start: float, end: float) -> dict[str, Any]:
    return {"ph": "X", "cat": "user_annotation", "name": f"ppo.{name}", "tid": 1, "args": {},
            "ts": start, "dur": end - start}  # fmt: skip


def kernel(launched: float, start: float, end: float, number: int) -> list[dict[str, Any]]:
    arguments = {"correlation": number}
    launch = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "tid": 1,
              "ts": launched, "dur": 1.0, "args": arguments}  # fmt: skip
    run = {"ph": "X", "cat": "kernel", "name": "gemm", "tid": 7, "ts": start, "dur": end - start,
           "args": arguments}  # fmt: skip
    return [launch, run]


def test_on_a_gpu_a_kernel_belongs_to_its_launch_and_idle_time_to_the_host() -> None:
    trace = {
        "traceEvents": [
            mark("step", 0, 100e6),
            mark("generate", 10e6, 30e6),
            mark("transformer", 12e6, 20e6),
            mark("score", 40e6, 90e6),
            # Launched in the transformer; runs on while the host is elsewhere.
            *kernel(13e6, 15e6, 35e6, 1),
            # On another stream at the same time: no moment is counted twice.
            *kernel(25e6, 30e6, 37e6, 2),
            # Of a launch before the step.
            *kernel(-5e6, 96e6, 120e6, 3),
        ]
    }
    found = anatomy.read_anatomy(trace)
    phases = {phase.name: (phase.seconds, phase.transformer) for phase in found.phases}
    # Host in generate, GPU idle: 10 to 15, of it transformer from 12; kernels 15 to 35, 35 to 37.
    assert phases["generate"] == pytest.approx((27.0, 23.0))
    assert phases["score"] == pytest.approx((50.0, 0.0))
    assert phases["other"] == pytest.approx((23.0, 0.0))  # 0-10, 37-40, 90-100
    assert found.seconds == pytest.approx(100.0)
    assert found.gpu_seconds == pytest.approx(26.0)
