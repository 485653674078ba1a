"""The PPO loop: what it writes, what it refuses, and that a resumed run is the same run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny import tiny_model_folder
from trainers import PROMPTS, as_if_killed, config, good_on_trial, length_reward, rows, untimed
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ppo_engine.errors import UserError
from ppo_engine.settings.files import load_config
from ppo_engine.settings.schema import (
    EvaluationConfig,
    GenerationConfig,
    PPOConfig,
    PromptDataConfig,
    RewardConfig,
)
from ppo_engine.training.ppo import PPOTrainer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def test_a_run_leaves_its_folder(model, tmp_path):
    metrics = PPOTrainer(
        model, length_reward, PROMPTS, config=config(tmp_path / "run", sample_every=1)
    ).train()
    run = tmp_path / "run"
    logged = rows(run / "metrics.jsonl")
    assert [row["step"] for row in logged] == [1, 2]
    for name in (
        "objective/kl", "objective/scores", "objective/entropy", "policy/approx_kl",
        "policy/clip_fraction", "policy/ratio_max", "value/loss", "value/explained_variance",
        "time/generate", "time/score", "time/advantages", "time/update", "tokens_per_second",
        "memory/peak",
    ):  # fmt: skip
        assert name in logged[0] and name in metrics
    assert logged[0]["objective/kl"] == 0.0
    samples = rows(run / "samples.jsonl")
    assert {"step", "prompt", "response", "score", "finished"} <= samples[0].keys()
    assert samples[0]["rewards"] == {"length_reward": samples[0]["score"]}
    assert not any(name.startswith("rewards/") for name in metrics)  # objective/scores has it
    assert all((run / name).exists() for name in ("config.yaml", "report.png", "report.html"))
    policy = AutoModelForCausalLM.from_pretrained(run / "policy")
    start = AutoModelForCausalLM.from_pretrained(model)
    assert any(
        not torch.equal(a, b) for a, b in zip(policy.parameters(), start.parameters(), strict=True)
    )
    critic = AutoModelForSequenceClassification.from_pretrained(run / "critic")
    assert critic.config.num_labels == 1


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("estimator", "name"), [("td", "ppo"), ("dr_grpo", "dr_grpo")])
def test_a_folder_without_a_name_has_the_methods(model, tmp_path, monkeypatch, estimator, name):
    monkeypatch.chdir(tmp_path)
    settings = config(tmp_path, steps=1, ppo={"estimator": estimator, "group_size": 2})
    settings = replace(settings, run=replace(settings.run, output_dir=""))
    PPOTrainer(model, length_reward, PROMPTS, config=settings).train()
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"{name}-2") and (folder / "policy").exists()


def test_several_rewards_are_measured_apart_and_asked_once(model, tmp_path):
    calls = []

    def shortness(prompts, responses):
        calls.append(len(responses))
        return [-len(response) for response in responses]

    settings = config(tmp_path / "run", steps=1, sample_every=1, seed=1)
    settings = replace(settings, reward=RewardConfig(weights=[1, 0.5]))
    rewards = {"length": length_reward, "short": shortness}
    metrics = PPOTrainer(model, rewards, PROMPTS, config=settings).train()
    assert calls == [2, 4]  # on trial, then of the step
    [logged] = rows(tmp_path / "run" / "metrics.jsonl")
    for name in ("length", "short"):
        assert logged[f"rewards/{name}/std"] == metrics[f"rewards/{name}/std"] > 0
    total = logged["rewards/length/mean"] + 0.5 * logged["rewards/short/mean"]
    assert logged["objective/scores"] == pytest.approx(total)
    for sample in rows(tmp_path / "run" / "samples.jsonl"):
        letters = len(sample["response"])
        assert sample["rewards"] == pytest.approx({"length": letters / 10, "short": -letters})
        assert sample["score"] == pytest.approx(letters / 10 - letters / 2)


@pytest.mark.parametrize(
    "ppo", [{}, {"estimator": "grpo", "group_size": 2}, {"critic_warmup_steps": 3}], ids=str
)
def test_a_resumed_run_is_the_same_run(model, tmp_path, ppo):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    PPOTrainer(model, length_reward, PROMPTS, config=config(whole, steps=4, ppo=ppo)).train()
    calls = 0

    def failing_reward(prompts, responses):
        nonlocal calls
        calls += 1
        if calls == 5:  # the first is a trial
            raise RuntimeError("the power went off")
        return length_reward(prompts, responses)

    settings = {"steps": 4, "checkpoint_every": 2, "ppo": ppo}
    with pytest.raises(UserError, match="power"):
        PPOTrainer(model, failing_reward, PROMPTS, config=config(halves, **settings)).train()
    as_if_killed(halves)
    assert len(rows(halves / "metrics.jsonl")) == 3  # one more than the checkpoint knows of
    torch.manual_seed(99)  # what happens in between must not matter
    resumed = config(halves, resume=True, **settings)
    metrics = PPOTrainer(model, length_reward, PROMPTS, config=resumed).train()
    again = PPOTrainer(model, length_reward, PROMPTS, config=resumed).train()  # it is at its end
    assert again == metrics
    assert untimed(whole / "metrics.jsonl") == untimed(halves / "metrics.jsonl")


def test_a_run_without_critic(model, tmp_path):
    ppo = {"estimator": "grpo", "group_size": 2, "kl_in": "loss"}
    trainer = PPOTrainer(
        model, length_reward, PROMPTS, config=config(tmp_path / "run", ppo=ppo, sample_every=1)
    )
    assert len(trainer.batch(0)) == 2  # prompts, two responses to each
    metrics = trainer.train()
    assert {"policy/loss", "policy/kl", "objective/equal_groups"} <= metrics.keys()
    assert not any(name.startswith("value/") for name in metrics)
    assert not (tmp_path / "run" / "critic").exists()
    samples = rows(tmp_path / "run" / "samples.jsonl")
    assert samples[0]["prompt"] == samples[1]["prompt"] != samples[2]["prompt"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")


def test_a_run_that_goes_on_for_longer_follows_the_longer_schedule(model, tmp_path):
    folder = tmp_path / "run"
    PPOTrainer(model, length_reward, PROMPTS, config=config(folder, steps=2)).train()
    PPOTrainer(model, length_reward, PROMPTS, config=config(folder, steps=4, resume=True)).train()
    rates = [row["policy/learning_rate"] for row in rows(folder / "metrics.jsonl")]
    assert rates == pytest.approx([1e-3, 5e-4, 5e-4, 2.5e-4])


def of_the_answer(prompts, responses, answer):
    return [0.0 if expected is None else 1.0 for expected in answer]


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        (
            {"reward": lambda prompts, answer: [0.0] * 4},
            "column 'answer' in place of the responses",
        ),
        (
            {"reward": lambda responses, hint: [0.0] * 4},
            "asks for 'hint', but the prompts have 'an",
        ),
        ({"environment": lambda prompts, answer: [None] * 4}, "in place of the turns"),
    ],
)
def test_signatures_are_looked_at_before_anything_is_sampled(model, tmp_path, functions, message):
    prompts = [{"prompt": p, "answer": "x"} for p in PROMPTS]
    with pytest.raises(UserError, match=message):
        PPOTrainer(
            model,
            prompts=prompts,
            config=config(tmp_path),
            **{"reward": length_reward, **functions},
        )


def test_held_out_prompts_need_the_columns_too(model, tmp_path):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "Hello"}) + "\n")
    settings = replace(config(tmp_path / "run"), evaluation=EvaluationConfig(path=str(held_out)))
    prompts = [{"prompt": p, "answer": "x"} for p in PROMPTS]
    with pytest.raises(UserError, match="asks for 'answer', but the prompts have no other columns"):
        PPOTrainer(model, of_the_answer, prompts, config=settings)


def test_rows_of_a_batch_that_all_lack_a_column_have_none_there(model, tmp_path):
    prompts = [{"prompt": p} for p in PROMPTS] + [{"prompt": "Last", "answer": "x"}]
    settings = config(tmp_path / "run", sample_every=1, ppo={"estimator": "rloo", "group_size": 4})
    PPOTrainer(model, of_the_answer, prompts, config=settings).train()
    for row in rows(tmp_path / "run" / "samples.jsonl"):
        assert row["score"] == float(row["prompt"] == "Last")


def test_the_recorded_settings_name_what_was_trained(model, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    source = tmp_path / "rewards.py"
    source.write_text("def reward(prompts, responses):\n    return [0.5] * len(responses)\n")
    settings = config(tmp_path / "run", steps=1)
    PPOTrainer(model, f"{source}:reward", str(prompts), config=settings).train()
    recorded = load_config(PPOConfig, str(tmp_path / "run" / "config.yaml"), [])
    assert recorded.policy.path == model
    assert recorded.reward == replace(settings.reward, function=f"{source}:reward")
    assert recorded.data.path == str(prompts)


def test_a_prompt_leaves_room_for_its_response(model, tmp_path):
    with pytest.raises(UserError, match="context has only 2048 tokens"):
        PPOTrainer(
            model,
            length_reward,
            PROMPTS,
            config=PPOConfig(generation=GenerationConfig(max_new_tokens=2048)),
        )


def test_a_reward_that_fails_leaves_nothing(model, tmp_path):
    settings = config(tmp_path / "run")
    with pytest.raises(UserError, match=r"1 score for 2 .*trial call"):
        PPOTrainer(model, lambda prompts, responses: [1.0], PROMPTS, config=settings)
    trainer = PPOTrainer(model, good_on_trial(), PROMPTS, config=settings)
    with pytest.raises(UserError, match="1 score for 4"):
        trainer.train()
    assert not (tmp_path / "run").exists()


def test_columns_reach_the_reward(model, tmp_path):
    seen = []

    def reward(prompts, responses, target):
        seen.extend(zip(prompts, target, strict=True))
        return [0.0] * len(responses)

    data = [{"prompt": f"Prompt {i}", "target": i} for i in range(4)]
    PPOTrainer(model, reward, data, config=config(tmp_path / "run", steps=1)).train()
    assert seen[:2] == [("Prompt 0", 0), ("Prompt 1", 1)]  # on trial
    assert sorted(seen[2:]) == [(f"Prompt {i}", i) for i in range(4)]


def test_each_pass_over_the_prompts_is_a_fresh_permutation(model, tmp_path):
    trainer = PPOTrainer(model, length_reward, PROMPTS, config=config(tmp_path / "run"))
    drawn = [example.prompt for step in range(6) for example in trainer.batch(step)]
    passes = [drawn[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(p) == PROMPTS for p in passes)
    assert len({tuple(p) for p in passes}) > 1


@pytest.mark.parametrize(
    ("prompts", "message"),
    [("", "No prompts"), ([""], "prompt"), ("missing.jsonl", "missing.jsonl"), ([], "prompt")],
)
def test_bad_prompts_are_refused_before_anything(model, tmp_path, prompts, message):
    with pytest.raises(UserError, match=message):
        PPOTrainer(model, length_reward, prompts, config=config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_long_prompts_are_refused_or_counted(model, tmp_path):
    prompts = ["short", "long " * 50]
    strict = PPOConfig(data=PromptDataConfig(max_prompt_tokens=20))
    with pytest.raises(UserError, match="max_prompt_tokens"):
        PPOTrainer(model, length_reward, prompts, config=strict)
    lenient = PPOConfig(data=PromptDataConfig(max_prompt_tokens=20, on_bad_line="skip"))
    trainer = PPOTrainer(model, length_reward, prompts, config=lenient)
    assert len(trainer.examples) == 1
    assert any("prompt too long" in note for note in trainer.notes)
