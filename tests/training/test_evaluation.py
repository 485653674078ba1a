"""Evaluation on held-out prompts: what it measures, when it stops a run, what it keeps; and that
training is not affected."""

from __future__ import annotations

import io
import json
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from rollouts import script
from tiny import tiny_model_folder
from trainers import as_if_killed, good_on_trial, rows, same, untimed, weights

from ppo_engine.data.prompts import PromptExample
from ppo_engine.errors import UserError
from ppo_engine.run.progress import Progress
from ppo_engine.settings.schema import (
    EvaluationConfig,
    GenerationConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    PPOSettings,
    RewardConfig,
    RunConfig,
)
from ppo_engine.training.evaluation import (
    READ,
    Evaluation,
    Evaluator,
    anticipation,
    hold_out,
    values_along,
    win_shares,
)
from ppo_engine.training.ppo import PPOTrainer

pytestmark = pytest.mark.usefixtures("no_pictures")

PROMPTS = [f"Prompt {i}" for i in range(6)]
HELD_OUT = ["Why?", "A longer question", "And this one", "x y z", "Tell me more"]
LORA = LoraConfig(rank=4)


def letters(prompts: list[str], responses: list[str]) -> list[float]:
    """Few different scores, so that some tie."""
    return [sum(c.isalpha() for c in response) / 4 for response in responses]


def noisy(prompts: list[str], responses: list[str]) -> list[float]:
    """Draws from every generator there is."""
    noise = [random.random() + np.random.rand() + float(torch.rand(())) for _ in responses]
    return [score + x for score, x in zip(letters(prompts, responses), noise, strict=True)]


def config(
    output: Path, *, steps: int = 4, lora: LoraConfig | None = None, run: Any = (), **settings: Any
) -> PPOConfig:
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant")
    return PPOConfig(
        policy=ModelConfig(optimizer=optimizer, lora=lora),
        critic=ModelConfig(optimizer=optimizer),
        reward=RewardConfig(normalize=True, missing_eos_penalty=0.5),
        generation=GenerationConfig(max_new_tokens=6),
        ppo=PPOSettings(rollout_batch_size=4, mini_batch_size=2, micro_batch_size=2),
        evaluation=EvaluationConfig(**settings),
        run=RunConfig(output_dir=str(output), dtype="float32", sample_every=1, **dict(run)),
        steps=steps,
    )


def train_noisy(model: str, settings: PPOConfig, reward: Any = noisy) -> None:
    """From the same random states, those of Python and NumPy included, which a run leaves alone."""
    random.seed(1)
    np.random.seed(1)
    PPOTrainer(model, reward, PROMPTS, config=settings).train()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def held_out_file(tmp_path: Path) -> str:
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in HELD_OUT))
    return str(file)


def trained_evaluator(model: str, tmp_path: Path, **settings: Any) -> Evaluator:
    """An evaluator of a policy that has taken a few steps away from its reference."""
    run = {
        "seed": 1
    }  # with which no response has a pad token, where the library's class would stop
    trainer = PPOTrainer(model, letters, PROMPTS, config=config(tmp_path / "run", steps=3, run=run))
    trainer.train()
    engine = trainer.engine
    engine.config = replace(engine.config, evaluation=EvaluationConfig(**settings))
    return Evaluator(engine, [PromptExample(prompt) for prompt in HELD_OUT])


def evaluate(evaluator: Evaluator) -> Evaluation:
    with Progress(1, "", console=Console(file=io.StringIO())) as progress:
        return evaluator.evaluate(progress)


@pytest.mark.parametrize("each", [1, 3])
def test_metrics_are_what_they_say(model, tmp_path, monkeypatch, each):
    evaluator = trained_evaluator(model, tmp_path, prompts=5, best_of=each)
    engine, seen = evaluator.engine, {False: [], True: []}
    respond = evaluator._respond

    def spy(batch, by_reference):
        seen[by_reference].append(respond(batch, by_reference))
        return seen[by_reference][-1]

    monkeypatch.setattr(evaluator, "_respond", spy)
    found = evaluate(evaluator).metrics

    scores, lengths, finished, kls, ref_nlls, values, shaped = [], [], [], [], [], [], []
    critic = engine.critic.model
    for rollout in seen[False]:
        for index in range(len(rollout)):
            ids = rollout.response_ids[index].tolist()
            ended = engine.policy.tokenizer.eos_token_id in ids
            length = ids.index(engine.policy.tokenizer.eos_token_id) + 1 if ended else len(ids)
            prompt = rollout.prompt_ids[index][rollout.prompt_mask[index]].tolist()
            whole = torch.tensor([prompt + ids[:length]])
            with torch.no_grad():
                kl = 0.0
                for lm, sign in ((engine.policy.model, 1), (engine.reference.model, -1)):
                    logprobs = lm(whole).logits.double().log_softmax(-1)[0]
                    of_tokens = [logprobs[len(prompt) - 1 + t, ids[t]] for t in range(length)]
                    kl += sign * float(sum(of_tokens))
                ref_nlls.append(-float(sum(of_tokens)))
                # The score that the library's class gives to the text up to there.
                at = [len(prompt) + math.ceil(p * length / 100) - 1 for p in READ]
                values.append([critic(whole[:, :end]).logits.item() for end in at])
            [score] = letters([""], [rollout.responses[index]])
            scores.append(score)
            normal = engine.normalizer
            std = math.sqrt(normal.m2 / normal.count)
            shaped.append((score - normal.mean) / std - (0.0 if ended else 0.5))
            lengths.append(length)
            finished.append(ended)
            kls.append(kl)
    said = [response for rollout in seen[False] for response in rollout.responses]
    theirs = [x for rollout in seen[True] for x in letters([], rollout.responses)]
    groups = [scores[i : i + each] for i in range(0, len(scores), each)]
    their_groups = [theirs[i : i + each] for i in range(0, len(theirs), each)]
    wins = [
        statistics.mean((a > b) + (a == b) / 2 for a in ours for b in others)
        for ours, others in zip(groups, their_groups, strict=True)
    ]
    means = [statistics.mean(group) for group in groups]
    shaped_means = [statistics.mean(shaped[i : i + each]) for i in range(0, len(scores), each)]
    kl_means = [statistics.mean(kls[i : i + each]) for i in range(0, len(scores), each)]
    root = math.sqrt(len(HELD_OUT))
    expected = {
        "eval/scores": statistics.mean(scores),
        "eval/scores_se": statistics.stdev(means) / root,
        "eval/win_rate": statistics.mean(wins),
        "eval/win_rate_se": statistics.stdev(wins) / root,
        "eval/shaped_scores": statistics.mean(shaped),
        "eval/shaped_scores_se": statistics.stdev(shaped_means) / root,
        "eval/kl": statistics.mean(kls),
        "eval/kl_se": statistics.stdev(kl_means) / root,
        "eval/ref_perplexity": math.exp(sum(ref_nlls) / sum(lengths)),
        "eval/response_length": statistics.mean(lengths),
        "eval/finished": statistics.mean(finished),
        "eval/distinct": len(set(said)) / len(said),
    }
    if each > 1:
        expected[f"eval/best_of_{each}"] = statistics.mean(max(group) for group in groups)
    for percent, at in zip(READ, np.array(values).T, strict=True):
        left = np.var(np.array(shaped) - at) / np.var(shaped)
        expected[f"value/explained_variance_{percent}"] = 1 - left
        expected[f"value/anticipation_{percent}"] = np.corrcoef(at, shaped)[0, 1]
    assert found.keys() == expected.keys()
    assert abs(expected["eval/kl"]) > 0.01 and expected["eval/scores_se"] > 0
    assert len(scores) == len(theirs) == len(HELD_OUT) * each
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([[1.0], [1.0], [1.0]], [[0.0], [1.0], [2.0]], [1.0, 0.5, 0.0]),
        ([[1.0, 2.0]], [[1.0, 3.0]], [(0.5 + 0 + 1 + 0) / 4]),
        ([[0.0, 0.0, 9.0]], [[0.0]], [(0.5 + 0.5 + 1) / 3]),
    ],
    ids=["one response", "all pairs", "more of ours"],
)
def test_ties_count_half(ours, theirs, expected):
    ours, theirs = torch.tensor(ours), torch.tensor(theirs)
    exact = torch.zeros_like(ours)
    assert win_shares(ours, theirs, exact).tolist() == pytest.approx(expected)
    # Equal answers, scored in batches of other shapes: no more than rounding is between them.
    assert win_shares(ours + 1e-6, theirs, exact + 2e-6).tolist() == pytest.approx(expected)


def test_a_score_that_is_not_finite_wins_and_loses_nothing():
    ours = torch.tensor([[1.0], [math.nan], [1.0]])
    theirs = torch.tensor([[math.nan], [0.0], [0.0]])
    found = win_shares(ours, theirs, torch.zeros_like(ours))
    assert found.isnan().tolist() == [True, True, False] and found[2] == 1


def test_parts_are_counted_in_real_tokens():
    """Of 10 tokens, of one, and of 3 with a turn of the environment's in between."""
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[0, :10] = True
    mask[1, 0] = True
    mask[2, [0, 7, 11]] = True
    values = torch.arange(12.0).expand(3, 12).masked_fill(~mask, float("nan"))
    found = values_along(values, mask)
    assert found[0].tolist() == list(range(10))
    assert found[1].tolist() == [0] * 10
    assert found[2].tolist() == [0, 0, 0, 7, 7, 7, 11, 11, 11, 11]


@pytest.mark.parametrize(
    ("values", "scores", "names"),
    [
        ([[0.1], [0.2]], [0.3, 0.3], set()),
        ([[0.1]], [0.3], set()),
        ([[0.1], [0.1]], [0.3, 0.4], {"explained_variance"}),
        ([[0.1], [0.2]], [0.3, 0.4], {"explained_variance", "anticipation"}),
    ],
    ids=["constant scores", "one response", "constant values", "both vary"],
)
def test_nothing_is_said_of_what_does_not_vary(values, scores, names):
    many = torch.tensor(values, dtype=torch.float64).expand(-1, 10)
    found = anticipation(many, torch.tensor(scores, dtype=torch.float64))
    assert found.keys() == {f"value/{name}_{percent}" for name in names for percent in READ}
    assert all(math.isfinite(value) for value in found.values())


def test_one_prompt_has_no_standard_error(model, tmp_path):
    evaluator = trained_evaluator(model, tmp_path, prompts=1)
    evaluator.examples = evaluator.examples[:1]
    found = evaluate(evaluator).metrics
    assert {"eval/scores", "eval/win_rate", "eval/kl"} <= found.keys()
    assert not [name for name in found if name.endswith("_se")]


@pytest.mark.parametrize(("estimator", "group_size"), [("grpo", 2), ("remax", 1)])
def test_without_a_critic_nothing_is_said_of_it(
    model, tmp_path, held_out_file, estimator, group_size
):
    """Nor does an evaluation sample groups, or greedy responses."""
    asked: list[int] = []

    def reward(prompts, responses):
        asked.append(len(responses))
        return letters(prompts, responses)

    settings = config(tmp_path / "run", steps=1, path=held_out_file)
    chosen = replace(settings.ppo, estimator=estimator, group_size=group_size)
    PPOTrainer(model, reward, PROMPTS, config=replace(settings, ppo=chosen)).train()
    assert asked.pop(0) == 2 * group_size  # a trial
    assert asked[:4] == asked[-2:] * 2 == [4, 1, 4, 1]  # reference and policy; the policy again
    for row in rows(tmp_path / "run" / "metrics.jsonl"):
        assert "eval/scores" in row and not any(name.startswith("value/") for name in row)
    assert not (tmp_path / "run" / "critic.jsonl").exists()


def test_a_conversation_is_measured_in_the_policys_tokens(model, tmp_path, monkeypatch):
    def say(policy, rows):
        ids = [*policy.tokenizer("four")["input_ids"], policy.tokenizer.eos_token_id]
        return [(ids, True) for _ in rows]

    def environment(prompts, turns):
        return ["Go on." if len(turn) == 1 else None for turn in turns]

    script(monkeypatch, say)
    settings = config(tmp_path / "run", prompts=3)
    trainer = PPOTrainer(model, letters, PROMPTS, config=settings, environment=environment)
    found = evaluate(trainer.evaluator)
    assert found.metrics["eval/response_length"] == 2 * 5
    assert found.metrics["eval/kl"] == 0.0 and found.metrics["eval/win_rate"] == 0.5
    assert all("Go on." in row["response"] for row in found.samples)


def test_perplexity_is_of_all_tokens_alike(model, tmp_path, monkeypatch):
    """However long the response that they stand in is."""
    evaluator = trained_evaluator(model, tmp_path, prompts=5)

    def answer(row: list[int]) -> list[int]:
        return [40 + len(row)] * (1 + 3 * (len(row) % 4))

    script(monkeypatch, lambda policy, rows: [(answer(row), False) for row in rows])
    found = evaluate(evaluator).metrics
    nlls = []
    for prompt in HELD_OUT:
        asked = evaluator.engine.policy.tokenizer(prompt)["input_ids"]
        ids = [*asked, *answer(asked)]
        with torch.no_grad():
            logprobs = evaluator.engine.reference.model(torch.tensor([ids])).logits.log_softmax(-1)
        nlls.append([-logprobs[0, t - 1, ids[t]].item() for t in range(len(asked), len(ids))])
    total = sum(map(sum, nlls)) / sum(map(len, nlls))
    assert abs(total - statistics.mean(map(statistics.mean, nlls))) > 0.001
    assert found["eval/ref_perplexity"] == pytest.approx(math.exp(total), rel=1e-5)


@pytest.mark.parametrize("lora", [None, LORA], ids=["copy", "adapter off"])
def test_the_reference_answers_as_the_policy_did_before(model, tmp_path, lora):
    settings = config(tmp_path / "run", steps=2, lora=lora)
    trainer = PPOTrainer(model, letters, PROMPTS, config=settings)
    examples = [PromptExample(prompt) for prompt in HELD_OUT]

    def responses(by_reference: bool) -> list[str]:
        torch.manual_seed(3)
        return list(trainer.evaluator._respond(examples, by_reference).responses)

    before = responses(by_reference=False)
    trainer.train()
    assert responses(by_reference=True) == before
    assert responses(by_reference=False) != before


@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "adapters"])
def test_training_does_not_notice_it(model, tmp_path, held_out_file, lora):
    plain, evaluated = tmp_path / "plain", tmp_path / "evaluated"
    train_noisy(model, config(plain, lora=lora))
    train_noisy(model, config(evaluated, lora=lora, path=held_out_file, every=1, best_of=2))
    extra = ("eval/", "value/anticipation", "value/explained_variance_")
    assert rows(evaluated / "metrics.jsonl")[0]["step"] == 0
    assert untimed(plain / "metrics.jsonl") == [
        {k: v for k, v in row.items() if not k.startswith(extra)}
        for row in untimed(evaluated / "metrics.jsonl")[1:]
    ]
    for name in ("policy", "critic"):
        assert same(weights(plain / name), weights(evaluated / name))


def test_a_resumed_run_evaluates_the_same(model, tmp_path, held_out_file):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    settings = {"steps": 6, "path": held_out_file, "every": 2}
    run = {"seed": 4}  # with which the best is after the last checkpoint before the crash
    train_noisy(model, config(whole, run=run, **settings))
    assert json.loads((whole / "best" / "best.json").read_text())["step"] == 4
    calls = 0

    def failing(prompts, responses):
        nonlocal calls
        calls += 1
        # A trial; five held-out prompts are two batches. Reference and policy before the first
        # step, the policy after the second and the fourth: it fails in the fifth.
        if calls == 1 + 4 + 4 + 2 * 2 + 1:
            raise RuntimeError("the power went off")
        return noisy(prompts, responses)

    once = config(halves, run={"checkpoint_every": 3, **run}, **settings)
    with pytest.raises(UserError, match="power"):
        train_noisy(model, once, {"noisy": failing})
    as_if_killed(halves)
    assert len(rows(halves / "metrics.jsonl")) == 5  # steps 0 to 4, one more than the checkpoint
    torch.manual_seed(99)  # what happens in between must not matter
    random.seed(99)
    again = replace(once, run=replace(once.run, resume=True))
    PPOTrainer(model, noisy, PROMPTS, config=again).train()
    assert untimed(whole / "metrics.jsonl") == untimed(halves / "metrics.jsonl")
    for name in ("samples.jsonl", "critic.jsonl", "best/best.json"):
        assert (whole / name).read_text() == (halves / name).read_text(), name
    assert same(weights(whole / "best"), weights(halves / "best"))


def test_a_run_that_failed_before_its_first_checkpoint_starts_anew(model, tmp_path, held_out_file):
    settings = config(tmp_path / "run", steps=1, path=held_out_file)
    calls = 0

    def failing(prompts, responses):
        nonlocal calls
        calls += 1
        if calls == 6:  # after a trial and the evaluation
            raise RuntimeError
        return letters(prompts, responses)

    with pytest.raises(UserError):
        PPOTrainer(model, failing, PROMPTS, config=settings).train()
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [0]
    again = replace(settings, run=replace(settings.run, resume=True))
    PPOTrainer(model, letters, PROMPTS, config=again).train()
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [0, 1]


def test_samples_stand_beside_the_references(model, tmp_path, held_out_file):
    out = io.StringIO()
    settings = config(tmp_path / "run", steps=2, path=held_out_file, every=2)
    PPOTrainer(
        model, letters, PROMPTS, config=settings, console=Console(file=out, force_terminal=False)
    ).train()
    found = [row for row in rows(tmp_path / "run" / "samples.jsonl") if row.get("held_out")]
    assert [(row["step"], row["prompt"]) for row in found] == [
        (step, prompt) for step in (0, 2) for prompt in HELD_OUT
    ]
    references = [row["reference_response"] for row in found]
    assert references[:5] == references[5:]  # sampled once
    assert references[:5] != [row["response"] for row in found[:5]]  # by other random numbers
    for row in found:
        for kind in ("", "reference_"):
            assert [row[f"{kind}score"]] == letters([], [row[f"{kind}response"]])
    shown = out.getvalue()
    assert (
        "held-out sample before training (score" in shown and "PPO, 6 prompts, 5 held out" in shown
    )
    assert shown.index("Held-out prompts before training") < shown.index("step 1/2")
    assert shown.index("before training | held-out score") < shown.index("step 1/2")
    assert "step 1/1" not in shown


@pytest.mark.parametrize(("every", "steps"), [(0, [0, 5]), (2, [0, 2, 4, 5]), (9, [0, 5])])
def test_when_it_comes(model, tmp_path, held_out_file, every, steps):
    settings = config(tmp_path / "run", steps=5, path=held_out_file, every=every)
    last = PPOTrainer(model, letters, PROMPTS, config=settings).train()
    logged = rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in logged if "eval/scores" in row] == steps
    assert last["eval/scores"] == logged[-1]["eval/scores"]
    assert last["time/evaluate"] > 0
    points = rows(tmp_path / "run" / "critic.jsonl")
    assert [row["step"] for row in points] == steps
    assert all(len(row["values"]) == len(row["scores"]) == len(HELD_OUT) for row in points)


def test_held_out_prompts_are_not_trained_on():
    data = [PromptExample(prompt, {"row": i}) for i, prompt in enumerate("abcabcdeaf")]
    training, held_out = hold_out(data, 3, seed=1)
    kept, left = [[x.prompt for x in part] for part in (held_out, training)]
    assert len(set(kept)) == len(kept) == 3
    assert set(kept) | set(left) == set("abcdef") and not set(kept) & set(left)
    assert len(left) == sum(x.prompt not in kept for x in data)
    assert hold_out(data, 3, seed=1) == (training, held_out)
    assert any(hold_out(data, 3, seed=seed)[1] != held_out for seed in range(5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": 6}, "6 different prompts"),
        ({"prompts": 99}, "leaves nothing to train on"),
        ({"path": "missing.jsonl"}, "missing.jsonl does not exist"),
        ({"path": "missing.jsonl", "prompts": 2}, "not both"),
        ({"every": 5}, "evaluation.every is set"),
        ({"patience": 5}, "evaluation.patience is set"),
        ({"best_of": 4}, "evaluation.best_of is set"),
        ({"prompts": 2, "patience": 5}, "set evaluation.every"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(model, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        PPOTrainer(model, letters, PROMPTS, config=config(tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_a_reward_that_fails_on_held_out_prompts_leaves_nothing(model, tmp_path):
    settings = config(tmp_path / "run", prompts=2)
    trainer = PPOTrainer(model, good_on_trial(), PROMPTS, config=settings)
    with pytest.raises(UserError, match="1 score for 2"):
        trainer.train()
    assert not (tmp_path / "run").exists()


def test_prompts_on_both_sides_are_told(model, tmp_path, held_out_file):
    settings = config(tmp_path / "run", path=held_out_file)
    trainer = PPOTrainer(model, letters, [*PROMPTS, *HELD_OUT[:2]], config=settings)
    assert any("2 of the 5 prompts" in note for note in trainer.notes)
