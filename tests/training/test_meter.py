"""What a step achieves: the work that is counted is what models read, and its metrics by hand."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from engines import PROMPTS, make_engine
from families import of_family
from tiny import tiny_model_folder, tiny_tokenizer
from trainers import config, length_reward, planted_pairs, rows

from ppo_engine import GenerationConfig, RewardModelConfig, RunConfig, SFTConfig
from ppo_engine.models import rates
from ppo_engine.models.flop import Attention, Costs, Span
from ppo_engine.models.work import Work, counting, current_work, passing
from ppo_engine.ppo.engine import PPOEngine
from ppo_engine.rollout.decoder import Decoder
from ppo_engine.training import meter
from ppo_engine.training.ppo import PPOTrainer
from ppo_engine.training.reward import RewardModelTrainer
from ppo_engine.training.sft import SFTTrainer

CPU = torch.device("cpu")
COSTS = Costs(weights=100, attention=(Attention(3, trained=3),), head=10, trained=100, passed=100,
              head_trained=True, head_passed=True)  # fmt: skip
PHASES = ("generate", "score", "advantages", "update")


def work_of(call):
    """What is counted in the call, and what it gives."""
    work = Work(CPU)
    with counting(work):
        found = call()
    assert current_work() is None and work.seconds > 0
    return work, found


def test_all_phases_are_counted_by_real_lengths():
    engine = make_engine(ppo={"kl_in": "reward", "epochs": 2, "old_logprobs": "recompute"})
    assert not engine.sampler.notes  # which probes: passes that are not of the step
    costs = engine.policy.reader.costs
    work, rollout = work_of(lambda: engine.generate(PROMPTS))
    prompts, written = rollout.prompt_mask.sum(1).tolist(), rollout.mask.sum(1).tolist()
    # The last token of a prompt is read where the first is written, and the last that is written
    # by nobody.
    spans = [Span(0, n - 1) for n in prompts]
    steps = [Span(n - 1, m) for n, m in zip(prompts, written, strict=True)]
    tokens = sum(written)
    assert work.flop == costs.flop(spans, 0) + costs.flop(steps, tokens)
    assert work.read - work.padding == sum(prompts) - len(prompts) + tokens

    work, experience = work_of(lambda: engine.estimate_advantages(rollout, [0.0] * len(rollout)))
    texts = [Span(0, n + m - 1) for n, m in zip(prompts, written, strict=True)]
    critic = engine.critic.reader.costs
    assert critic == replace(costs, head=0, head_trained=False)
    reference = replace(costs, trained=0, passed=0)
    of_policy = costs.flop(texts, tokens)
    assert work.flop == of_policy + reference.flop(texts, tokens) + critic.flop(texts, 0)
    assert work.padding == 0 and work.read == 3 * sum(span.new for span in texts)

    work, _ = work_of(lambda: engine.update(experience))
    once = costs.flop(texts, tokens, gradients=True) + critic.flop(texts, 0, gradients=True)
    assert work.flop == pytest.approx(2 * once, rel=1e-12) and work.padding == 0
    assert once == pytest.approx(3 * (of_policy + critic.flop(texts, 0)), rel=1e-12)


def test_copies_of_a_prompt_are_read_once_and_rows_that_are_done_are_padding(monkeypatch):
    engine = make_engine(
        ppo={"estimator": "grpo", "group_size": 16, "rollout_batch_size": 32},
        generation=GenerationConfig(max_new_tokens=12, stop=[*range(0, 256, 5)]),
    )
    assert not engine.sampler.notes
    steps, write = [], Decoder.write
    monkeypatch.setattr(
        Decoder,
        "write",
        lambda self, rows, n, draw: (steps.append(rows * n), write(self, rows, n, draw))[1],
    )
    work, rollout = work_of(lambda: engine.generate(["Tell me", "Ask him"]))
    tokens = int(rollout.mask.sum())
    assert tokens < sum(steps) <= rollout.mask.numel()  # some end early
    assert work.read == 2 * (rollout.prompt_mask.shape[1] - 1) + sum(steps)
    assert work.padding == sum(steps) - tokens


@pytest.mark.parametrize("family", ["bloom", "rwkv"])
def test_a_family_that_is_padded_has_padding(family):
    model = of_family(family)
    settings = replace(make_engine().config, generation=GenerationConfig(max_new_tokens=12))
    engine = PPOEngine(model, length_reward, config=settings, tokenizer=tiny_tokenizer())
    work, rollout = work_of(lambda: engine.generate(PROMPTS))
    assert work.flop > 0 and 0 <= work.padding < work.read
    work, _ = work_of(lambda: engine.estimate_advantages(rollout, [0.0] * len(rollout)))
    texts = [len(row.ids) for row in rollout.rows]
    passes = work.read // (len(texts) * max(texts))
    assert work.padding == passes * (len(texts) * max(texts) - sum(texts)) > 0


def test_metrics_by_hand(monkeypatch):
    monkeypatch.setattr(meter, "_rate", lambda *_: 1000.0)
    monkeypatch.setattr(meter, "begin_peak", lambda _: False)  # of memory is test_memory
    clock = iter([0.0, 1.0, 3.0, 10.0, 20.0, 21.0, 22.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    measured = meter.Meter(CPU, torch.float32)
    with measured.phase("update"):  # from 0 to 10
        with passing():  # from 1 to 3
            pass
        current_work().add(COSTS, [Span(0, 3), Span(0, 1)], 2, read=5, gradients=True)
    with measured.phase("score"):  # from 20 to 22, by a function
        assert current_work().read == 0
        next(clock)
    flop = 3 * (2 * 100 * 4 + 4 * 3 * (6 + 1) + 2 * 10 * 2)
    assert measured.metrics(tokens=6, seconds=16.0) == pytest.approx(
        {
            "tokens_per_second/update": 0.6,
            "tokens_per_second/score": 3.0,
            "mfu/update": flop / 10 / 1000,
            "padding/update": 0.2,
            "overhead/update": 0.8,
            "mfu/step": flop / 16 / 1000,
            "padding/step": 0.2,
            "overhead/step": 1 - 2 / 16,
        }
    )
    assert measured.metrics(tokens=6, seconds=1.0) == {}  # of the next step


def test_a_phase_ends_when_the_device_is_done(monkeypatch):
    order = []

    @contextmanager
    def phase():
        with meter.Meter(CPU, torch.float32).phase("update"):
            yield
        order.append("end")

    monkeypatch.setattr(rates, "wait", lambda device: order.append(device))
    monkeypatch.setattr(meter, "_rate", lambda *_: 1.0)
    with phase():
        order.append("told")
    assert order == ["told", CPU, "end"]


def test_the_rate_is_that_of_products_and_draws_nothing(monkeypatch):
    monkeypatch.setitem(rates._SIZE, "cpu", 64)
    monkeypatch.setattr(rates, "best_seconds", lambda device, call: call().numel() / 2**20)
    before = torch.get_rng_state()
    assert rates.matrix_rate(CPU, torch.float32) == 2 * 64**3 * 2**20 / 64**2
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def test_every_step_of_a_run_has_them(folder, tmp_path):
    pairs = planted_pairs(24)

    def run(name):
        return RunConfig(output_dir=str(tmp_path / name), dtype="float32")

    RewardModelTrainer(folder, pairs, RewardModelConfig(run=run("reward"))).train()
    examples = [{"prompt": row["prompt"], "response": row["chosen"]} for row in pairs]
    SFTTrainer(folder, examples, SFTConfig(run=run("sft"))).train()
    model = str(tmp_path / "reward" / "reward_model")
    PPOTrainer(folder, model, PROMPTS, config=config(tmp_path / "ppo")).train()
    for name, phases in (("reward", ["update"]), ("sft", ["update"]), ("ppo", PHASES)):
        for row in rows(tmp_path / name / "metrics.jsonl"):
            if row["step"]:
                for phase in (*phases, "step"):
                    assert 0 < row[f"mfu/{phase}"] < 1.5 and 0 < row[f"overhead/{phase}"] < 1
                    assert row[f"padding/{phase}"] == 0 or phase in ("generate", "step")
                for phase in phases:
                    speed = row[f"tokens_per_second/{phase}"]
                    assert speed >= row["tokens_per_second"] * (len(phases) > 1)
