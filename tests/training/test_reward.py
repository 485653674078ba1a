"""Reward model training: it learns a planted preference, adds up exactly, resumes, and refuses."""

from __future__ import annotations

import io
import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reading import spied
from rich.console import Console
from tiny import tiny_model_folder, tiny_tokenizer
from trainers import as_if_killed, planted_pairs
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from ppo_engine.errors import UserError
from ppo_engine.settings.schema import (
    ModelConfig,
    OptimizerConfig,
    PreferenceDataConfig,
    RewardModelConfig,
    RewardModelSettings,
    RunConfig,
)
from ppo_engine.training.reward import RewardModelTrainer

HH = Path(__file__).parents[2] / "../shared/data/hh-rlhf/preferences.jsonl.gz"
GOOD, BAD = ("fine", "nice", "good", "kind"), ("vile", "poor", "sour", "grim")
DULL = ("ok", "so-so")


def planted_rankings(count: int) -> list[dict[str, Any]]:
    """Two to five answers, their words good, dull or bad: ties, answers left unranked, and the
    better a word the lower the rank."""
    rng = random.Random(1)
    rankings = []
    for index in range(count):
        ranks = [0, 2, *rng.choices((0, 1, 1, 2, -1), k=rng.randrange(4))]
        rng.shuffle(ranks)
        words = [rng.choice((GOOD, DULL, BAD)[rank]) for rank in ranks]
        answers = [f"{''.join(rng.choices('abcdefgh ', k=rng.randrange(1, 6)))} {w}" for w in words]
        rankings.append(
            {"prompt": f"How is it, case {index}?", "responses": answers, "ranks": ranks}
        )
    return rankings


@pytest.fixture(autouse=True)
def one_thread():
    """Several threads only wait for each other on models this small."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def trainer(folder, output_dir="", pairs=None, *, rate=1e-3, reward=None, data=None, **run):
    config = RewardModelConfig(
        model=ModelConfig(path=folder, optimizer=OptimizerConfig(learning_rate=rate)),
        data=PreferenceDataConfig(**{"eval_fraction": 0.25, **(data or {})}),
        reward=RewardModelSettings(**{"batch_size": 8, "micro_batch_size": 4, **(reward or {})}),
        run=RunConfig(output_dir=str(output_dir), device="cpu", dtype="float32", **run),
    )
    quiet = Console(file=io.StringIO())
    return RewardModelTrainer(None, pairs or planted_pairs(32), config, console=quiet)


def test_a_planted_preference_is_learned_and_saved(folder, tmp_path):
    found = trainer(
        folder, tmp_path / "run", planted_pairs(160), rate=1e-2, reward={"epochs": 2}
    ).train()
    assert 0.2 < found["eval_before/accuracy"] < 0.8
    assert found["eval/accuracy"] > 0.9
    p = found["eval/accuracy"]
    assert found["eval/accuracy_se"] == pytest.approx(math.sqrt(p * (1 - p) / 39))
    assert found["reward/loss"] < math.log(2)

    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [line["step"] for line in lines] == list(range(2 * 15 + 1))
    assert {"reward/loss", "reward/accuracy", "reward/margin", "reward/grad_norm",
            "reward/learning_rate", "tokens_per_second"} <= set(lines[1])  # fmt: skip
    assert lines[-1]["eval/accuracy"] == p

    # The folder alone, in plain transformers, judges as the trainer did.
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/reward_model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/reward_model")
    texts = [f"How is it, case 999?abc {word}{tokenizer.eos_token}" for word in ("good", "vile")]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        better, worse = model(**inputs).logits[:, 0]
    assert better > worse


@pytest.mark.parametrize(
    ("data", "center_coef"), [(planted_pairs(32), 0.1), (planted_rankings(32), 0.0)]
)
def test_passes_add_up_to_the_same_gradient(folder, data, center_coef, monkeypatch):
    gradients, metrics = [], []
    for size, tokens, packed, passes in (
        (8, 9999, True, 1), (3, 9999, True, 3), (8, 1, True, 8), (8, 9999, False, 1),
        (8, 1, False, 8),
    ):  # fmt: skip
        reward = {"micro_batch_size": size, "micro_batch_tokens": tokens}
        made = trainer(folder, pairs=data, reward={**reward, "center_coef": center_coef})
        made.reader.packs = packed
        read = spied(made.reader, monkeypatch)
        made.learner.optimizer.zero_grad = lambda set_to_none: None  # keeps the gradients
        metrics.append(made.train_step(made.mini_batch(0)))
        gradients.append([p.grad for p in made.model.parameters()])
        assert len(read) == passes and all((x.segments is not None) == packed for x in read)
    for other, found in zip(gradients[1:], metrics[1:], strict=True):
        for name in ("reward/loss", "reward/accuracy", "reward/margin", "reward/grad_norm"):
            assert found[name] == pytest.approx(metrics[0][name], rel=1e-4, abs=1e-6)
        for whole, parts in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def scored(made, rankings):
    """The score of each response that is ranked, one forward pass each, and its rank."""
    with torch.no_grad():
        return [
            [(made._forward([row]).double().item(), rank)
             for row, rank in zip(ranking.rows, ranking.ranks, strict=True)]
            for ranking in rankings
        ]  # fmt: skip


def test_the_loss_of_rankings_is_the_mean_over_prompts_of_the_mean_over_pairs(folder):
    made = trainer(folder, pairs=planted_rankings(32), reward={"micro_batch_size": 3})
    batch = made.mini_batch(0)
    assert {len(ranking.rows) for ranking in batch} > {2}
    losses, wins = [], []
    for ranking in scored(made, batch):
        ahead = [a - b for a, rank_a in ranking for b, rank_b in ranking if rank_a < rank_b]
        losses.append(sum(math.log1p(math.exp(-d)) for d in ahead) / len(ahead))
        wins += [d > 0 for d in ahead]
    found = made.train_step(batch)
    assert found["reward/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["reward/accuracy"] == pytest.approx(sum(wins) / len(wins), rel=1e-5)


def test_the_loss_of_pairs_by_hand(folder):
    """With margins and the centering in training; held-out figures have no centering."""
    pairs = planted_pairs(32)
    for index, pair in enumerate(pairs):
        pair.update({"margin": index / 8} if index % 3 else {})
    made = trainer(folder, pairs=pairs, reward={"micro_batch_size": 3, "center_coef": 0.3})
    with torch.no_grad():
        made.model.score.weight.mul_(20)  # scores far enough from 0 for each part to show

    def expected(rankings):
        found = [(a, b, ranking.margin or 0.0)
                 for ranking, [(a, _), (b, _)] in zip(rankings, scored(made, rankings), strict=True)
                 ]  # fmt: skip
        return (
            sum(math.log1p(math.exp(-(a - b - m))) for a, b, m in found) / len(found),
            sum((a + b) ** 2 for a, b, _ in found) / len(found),
            sum(a > b for a, b, _ in found) / len(found),
            sum(a - b for a, b, _ in found) / len(found),
        )

    loss, _, accuracy, margin = expected(made.held_out)
    found = made.evaluate()
    assert found["eval/loss"] == pytest.approx(loss, rel=1e-4)
    assert found["eval/accuracy"] == pytest.approx(accuracy)
    assert found["eval/margin"] == pytest.approx(margin, rel=1e-4)
    batch = made.mini_batch(0)
    assert len(batch) == 8 and {ranking.margin is None for ranking in batch} == {True, False}
    loss, squares, accuracy, margin = expected(batch)
    assert 0.3 * squares > 0.1
    found = made.train_step(batch)
    assert found["reward/loss"] == pytest.approx(loss + 0.3 * squares, rel=1e-4)
    assert found["reward/accuracy"] == pytest.approx(accuracy)
    assert found["reward/margin"] == pytest.approx(margin, rel=1e-4)


def test_the_learning_rate_falls_over_all_steps(folder, tmp_path):
    made = trainer(folder, tmp_path / "run", rate=2e-3, reward={"epochs": 2})
    assert (len(made.training), len(made.held_out)) == (24, 8)
    made.train()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    rates = [line["reward/learning_rate"] for line in lines[1:]]
    assert rates == pytest.approx([2e-3 * (6 - step) / 6 for step in range(6)])


def test_the_seed_says_what_is_held_out_and_in_which_order_the_rest_comes(folder):
    def texts(made, rankings):
        return [made.tokenizer.decode(ranking.rows[0]) for ranking in rankings]

    held_out, orders, heads = [], [], []
    for seed in (0, 0, 1, 2):
        made = trainer(folder, seed=seed)
        held_out.append(texts(made, made.held_out))
        heads.append(made.model.score.weight.tolist())
        whole = trainer(folder, seed=seed, data={"eval_fraction": 0.0})
        orders.append(texts(whole, whole.mini_batch(0)))
    for found in (held_out, orders, heads):
        assert found[0] == found[1]
        assert found[1] != found[2] != found[3] != found[1]


def test_speed_counts_every_token_that_is_read(folder, monkeypatch):
    made = trainer(folder)
    batch = made.mini_batch(0)
    clock = iter([1.0, 3.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    tokens = sum(len(row) for ranking in batch for row in ranking.rows)
    assert made.train_step(batch)["tokens_per_second"] == pytest.approx(tokens / 2)


def test_each_ranked_response_is_read_once(folder):
    made = trainer(folder, pairs=planted_rankings(32))
    read, forward = [], made._forward
    made._forward = lambda rows: read.extend(map(tuple, rows)) or forward(rows)
    batch = made.mini_batch(0)
    made.train_step(batch)
    assert sorted(read) == sorted(tuple(row) for ranking in batch for row in ranking.rows)


def test_rankings_are_learned(folder, tmp_path):
    found = trainer(
        folder, tmp_path / "run", planted_rankings(120), rate=1e-2, reward={"epochs": 2}
    ).train()
    assert 0.2 < found["eval_before/accuracy"] < 0.8 < found["eval/accuracy"]


def test_the_error_of_the_accuracy_is_that_of_prompts(folder):
    data = planted_rankings(40)
    data += [dict(row, responses=row["responses"][::-1], ranks=row["ranks"][::-1])
             for row in data[:20]]  # fmt: skip
    made = trainer(folder, pairs=data)
    found, right, pairs = made.evaluate(), {}, {}
    for encoded, ranking in zip(made.held_out, scored(made, made.held_out), strict=True):
        ahead = [a - b for a, rank_a in ranking for b, rank_b in ranking if rank_a < rank_b]
        right[encoded.group] = right.get(encoded.group, 0) + sum(d > 0 for d in ahead)
        pairs[encoded.group] = pairs.get(encoded.group, 0) + len(ahead)
    assert len(pairs) < len(made.held_out)  # some prompts are there twice
    accuracy = sum(right.values()) / sum(pairs.values())
    spread = sum((right[g] - accuracy * pairs[g]) ** 2 for g in pairs)
    error = math.sqrt(spread * len(pairs) / (len(pairs) - 1))
    assert found["eval/accuracy"] == pytest.approx(accuracy) and error > 1
    assert found["eval/accuracy_se"] == pytest.approx(error / sum(pairs.values()))


def test_one_prompt_alone_has_no_standard_error(folder, tmp_path):
    data = planted_pairs(8)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps(p | {"prompt": "Q"}) + "\n" for p in data[:3]))
    found = trainer(folder, tmp_path / "run", data, data={"eval_path": str(held_out)}).train()
    assert math.isnan(found["eval/accuracy_se"]) and found["eval/accuracy"] >= 0
    [first, *_] = (json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open())
    assert first["eval/accuracy_se"] is None


def test_a_response_that_was_cut_short_has_no_end(folder):
    rows = [
        {"prompt": "Q", "responses": ["a", "b"], "ranks": [0, 1], "finished": [True, False]},
        {"prompt": "Q", "responses": ["a", "b"], "ranks": [0, 1]},
    ]
    made = trainer(folder, None, rows, data={"eval_fraction": 0.0})
    end = made.tokenizer.eos_token_id
    ended = [[row[-1] == end for row in ranking.rows] for ranking in made.training]
    assert ended == [[True, False], [True, True]]
    assert made.training[0].rows[1] == made.training[1].rows[1][:-1]


def test_a_ranking_of_two_is_a_pair(folder):
    pairs = planted_pairs(32)
    as_rankings = [
        {"prompt": p["prompt"], "responses": [p["rejected"], p["chosen"]], "ranks": [1, 0]}
        for p in pairs
    ]
    made = [trainer(folder, pairs=data, reward={"center_coef": 0.1})
            for data in (pairs, as_rankings)]  # fmt: skip
    losses = [t.train_step(t.mini_batch(0))["reward/loss"] for t in made]
    assert losses[0] == losses[1]


def test_each_epoch_sees_every_pair_once_in_another_order(folder):
    made = trainer(folder, reward={"batch_size": 5, "epochs": 2})
    steps = made.steps_per_epoch
    assert steps == 5 and made.total_steps == 10  # 24 pairs
    epochs = [
        [tuple(pair.rows[0]) for step in range(start, start + steps)
         for pair in made.mini_batch(step)]
        for start in (0, steps)
    ]  # fmt: skip
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(tuple(p.rows[0]) for p in made.training)


def test_a_resumed_run_ends_with_the_very_same_weights(folder, tmp_path):
    whole = trainer(folder, tmp_path / "whole", reward={"epochs": 2})
    expected = whole.train()

    class Killed(Exception):
        pass

    killed = trainer(folder, tmp_path / "cut", reward={"epochs": 2}, checkpoint_every=2)
    train_step = killed.train_step

    def dies_at_step_4(pairs):
        if killed.step == 3:
            raise Killed
        return train_step(pairs)

    killed.train_step = dies_at_step_4
    with pytest.raises(Killed):
        killed.train()
    assert not (tmp_path / "cut/reward_model").exists()
    as_if_killed(tmp_path / "cut")
    assert [f.name for f in (tmp_path / "cut/checkpoints").iterdir()] == ["step-000002"]

    torch.manual_seed(123)  # another process would stand elsewhere
    resumed = trainer(
        folder, tmp_path / "cut", reward={"epochs": 2}, checkpoint_every=2, resume=True
    )
    found = resumed.train()
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert found["eval/accuracy"] == expected["eval/accuracy"]
    assert found["eval_before/loss"] == expected["eval_before/loss"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut/metrics.jsonl").open()]
    assert steps == list(range(7))

    again = trainer(folder, tmp_path / "cut", reward={"epochs": 2}, resume=True)  # at its end
    ended = again.train()
    assert ended["eval/accuracy"] == expected["eval/accuracy"]
    assert ended["reward/loss"] == found["reward/loss"] and "step" not in ended


def test_ties_count_half(folder):
    made = trainer(folder)
    with torch.no_grad():
        made.model.score.weight.zero_()
    found = made.evaluate()
    assert found["eval/accuracy"] == 0.5 and found["eval/loss"] == pytest.approx(math.log(2))


def test_margins_reach_the_loss(folder):
    plain = planted_pairs(32)
    with_margin = [pair | {"margin": 3.0} for pair in plain]
    losses = [trainer(folder, pairs=pairs).evaluate()["eval/loss"]
              for pairs in (plain, with_margin)]  # fmt: skip
    assert losses[1] > losses[0] + 1


def test_long_pairs_are_cut_and_counted(folder):
    pairs = planted_pairs(32)
    pairs[0]["prompt"] = "long " * 100
    pairs[1] = {"prompt": "Same start?", "chosen": "y" * 300 + "a", "rejected": "y" * 300 + "b"}
    made = trainer(folder, pairs=pairs, data={"max_tokens": 64})
    notes = " ".join(made.notes)
    assert "were truncated to 64 tokens" in notes and "with the same tokens" in notes
    encoded = [*made.training, *made.held_out]
    assert len(encoded) == 31
    assert max(map(len, encoded)) == 64
    eos = tiny_tokenizer().eos_token_id
    assert all(row[-1] == eos for pair in encoded for row in pair.rows)


def test_responses_that_are_cut_to_the_same_tokens_leave_a_ranking(folder):
    rankings = planted_rankings(32)
    answers = ["y" * 80 + "a", "y" * 80 + "b", "n"]
    rankings[0] = {"prompt": "Same start?", "responses": answers, "ranks": [0, 1, 2]}
    made = trainer(folder, pairs=rankings, data={"max_tokens": 64, "eval_fraction": 0.0})
    assert made.training[0].ranks == [0, 2]
    assert "with the same tokens" in " ".join(made.notes)


@pytest.mark.parametrize("pad", ["<|im_end|>", None])
def test_a_tokenizer_that_pads_with_eos_or_not_at_all_is_given_a_pad_token(folder, tmp_path, pad):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = pad
    config = RewardModelConfig(run=RunConfig(dtype="float32"))
    made = RewardModelTrainer(trainer(folder).model, planted_pairs(32), config, tokenizer)
    text = "How is it? Fine."
    with torch.no_grad():
        score = made._forward([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]).item()
        made._save_model(tmp_path)
        saved = AutoTokenizer.from_pretrained(tmp_path)(
            [text + tokenizer.eos_token, "Longer: " + text * 2], padding=True, return_tensors="pt"
        )
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert plain(**saved).logits[0, 0].item() == pytest.approx(score, rel=1e-3)


def test_no_more_tokens_are_kept_than_the_model_has_positions():
    config = GPT2Config(vocab_size=259, n_positions=64, n_embd=32, n_layer=1, n_head=2,
                        num_labels=1, bos_token_id=None, eos_token_id=258)  # fmt: skip
    pairs = planted_pairs(12)
    pairs[0]["prompt"] = "long " * 100
    settings = RewardModelConfig(data=PreferenceDataConfig(eval_fraction=0.0))
    made = RewardModelTrainer(
        GPT2ForSequenceClassification(config), pairs, settings, tiny_tokenizer()
    )
    assert made.train_step(made.training)["reward/loss"] > 0
    assert max(map(len, made.training)) == 64 and "truncated to 64 tokens" in " ".join(made.notes)


def test_a_chat_that_the_template_refuses_is_named_or_skipped(folder):
    chat = [{"role": "user", "content": "never"}]
    rows = [*planted_pairs(3), {"prompt": chat, "responses": ["a", "b"], "ranks": [0, 1]}]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"

    def made(on_bad_line, rows):
        data = PreferenceDataConfig(eval_fraction=0.0, on_bad_line=on_bad_line)
        settings = RewardModelConfig(ModelConfig(path=folder), data)
        return RewardModelTrainer(None, rows, settings, tokenizer)

    with pytest.raises(UserError, match=r"preferences\[3\]: refused .*no such role"):
        made("error", rows)
    skipping = made("skip", rows)
    assert len(skipping.training) == 3 and "1 skipped" in " ".join(skipping.notes)
    with pytest.raises(UserError, match=r"No training preference is left: .*1 skipped"):
        made("skip", rows[3:])


@pytest.mark.parametrize(("whole", "eval_fraction"), [(True, 0.25), (True, 0), (False, 0.25)])
def test_whole_texts_that_may_share_a_prompt_are_noted(folder, whole, eval_fraction):
    pairs = planted_pairs(8)
    for pair in pairs[:3] if whole else []:
        prompt = pair.pop("prompt")
        pair.update({name: f"{prompt} {text}" for name, text in pair.items()})
    made = trainer(folder, pairs=pairs, data={"eval_fraction": eval_fraction})
    noted = "3 preferences are whole texts" in " ".join(made.notes)
    assert noted == bool(whole and eval_fraction)


def test_a_sample_of_the_pairs(folder):
    data = {"max_pairs": 20, "eval_fraction": 0.0}
    made = trainer(folder, pairs=planted_pairs(32), data=data)
    assert len(made.training) == 20
    made = trainer(folder, pairs=planted_rankings(32), data=data)
    assert sum(len({*r.ranks}) > 1 for r in made.training) == len(made.training) < 20


def test_training_with_only_upper_layers_leaves_the_lower_ones_alone(folder):
    made = trainer(folder)
    config = replace(made.config, model=replace(made.config.model, trainable_layers=1))
    made = RewardModelTrainer(None, planted_pairs(32), config)
    before = [p.clone() for p in made.model.parameters()]
    made.train_step(made.mini_batch(0))
    moved = {
        name
        for (name, p), old in zip(made.model.named_parameters(), before, strict=True)
        if not torch.equal(p, old)
    }
    assert "score.weight" in moved
    assert {name.split(".")[2] for name in moved if ".layers." in name} == {"1"}
    assert "model.embed_tokens.weight" not in moved


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folder": "/no/such/model"}, "/no/such/model"),
        ({"folder": ""}, "No model was given"),
        ({"pairs": [{"prompt": "a", "chosen": "b", "rejected": "b"}]}, "are the same"),
        ({"pairs": [{"prompt": "a", "chosen": "b"}]}, "'rejected'"),
        (
            {
                "pairs": [{"prompt": "a", "chosen": "yyyyya", "rejected": "yyyyyb"}],
                "data": {"max_tokens": 4, "eval_fraction": 0.0},
            },
            "within 4 tokens .* of 1 are the same",
        ),
        ({"trackers": ["wandb"]}, "wandb"),
        (
            {"pairs": planted_rankings(32), "reward": {"center_coef": 0.1}},
            "reward.center_coef is defined for pairs only",
        ),
        (
            {"pairs": [*planted_rankings(32), {**planted_pairs(1)[0], "margin": 1.0}]},
            "A margin is defined for pairs only",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(folder, tmp_path, changes, message):
    arguments = {"folder": folder, "pairs": None, **changes}
    with pytest.raises(UserError, match=message):
        trainer(output_dir=tmp_path / "run", **arguments).train()
    assert not (tmp_path / "run").exists()


def test_evaluating_without_held_out_pairs_says_how_to_get_some(folder, tmp_path):
    made = trainer(folder, tmp_path / "run", data={"eval_fraction": 0.0})
    with pytest.raises(UserError, match="eval_fraction"):
        made.evaluate()
    assert "eval/accuracy" not in made.train()


def test_a_model_object_needs_its_tokenizer(folder):
    model = trainer(folder).model
    with pytest.raises(UserError, match="tokenizer"):
        RewardModelTrainer(model, planted_pairs(32))
    made = RewardModelTrainer(model, planted_pairs(32), tokenizer=tiny_tokenizer())
    assert made.model is model


@pytest.mark.skipif(not HH.exists(), reason="shared/data/hh-rlhf is not beside the checkout")
def test_real_preferences_train_a_step(folder):
    data = {"max_pairs": 40, "max_tokens": 128, "on_bad_line": "skip"}
    made = trainer(folder, pairs=str(HH), data=data)
    assert 0 < made.train_step(made.mini_batch(0))["reward/grad_norm"] < 1e3
    assert len(made.held_out) == 10
