"""Supervised fine-tuning: its loss is the plain formula's, packing changes nothing, it learns,
resumes, and saves its result."""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path
from typing import Any

import ops
import pytest
import torch
from reading import spied
from rich.console import Console
from tiny import tiny_model, tiny_model_folder, tiny_tokenizer
from trainers import as_if_killed
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from ppo_engine import RewardModelTrainer, SFTConfig, SFTTrainer
from ppo_engine.errors import UserError
from ppo_engine.models.reader import Reader
from ppo_engine.models.token_rows import predicting
from ppo_engine.settings.schema import (
    DemonstrationDataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RewardModelConfig,
    RunConfig,
    SFTSettings,
)
from ppo_engine.training.supervised import mean_by_cluster


def examples(count: int = 32) -> list[dict[str, Any]]:
    """Prompts that hold a letter, answered by that letter, again and again; some as chats."""
    rng = random.Random(0)
    rows: list[dict[str, Any]] = []
    for index in range(count):
        letters = rng.choices("abcd", k=2)
        asked = [f"Case {index}, letter {letter}?" for letter in letters]
        answers = [letter * rng.randrange(3, 9) for letter in letters]
        if index % 3:
            rows.append({"prompt": asked[0], "response": answers[0]})
        else:
            turns = [("user", asked[0]), ("assistant", answers[0]), ("user", asked[1]),
                     ("assistant", answers[1])]  # fmt: skip
            rows.append({"messages": [{"role": r, "content": text} for r, text in turns]})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def trainer(
    model: Any, output_dir: Any = "", rows: Any = None, *, rate=1e-2, sft=None, data=None,
    settings=None, **run: Any,
) -> SFTTrainer:  # fmt: skip
    config = SFTConfig(
        model=ModelConfig(optimizer=OptimizerConfig(learning_rate=rate), **(settings or {})),
        data=DemonstrationDataConfig(**{"eval_fraction": 0.25, "max_tokens": 128, **(data or {})}),
        sft=SFTSettings(**{"batch_size": 8, "micro_batch_size": 2, **(sft or {})}),
        run=RunConfig(output_dir=str(output_dir), **{"device": "cpu", "dtype": "float32", **run}),
    )
    tokenizer = None if isinstance(model, str) else tiny_tokenizer()
    return SFTTrainer(model, rows or examples(), config, tokenizer, Console(file=io.StringIO()))


def plain_nll(model: Any, batch: Any) -> list[list[float]]:
    """-log pi of each learned token of each example, alone, from the model's logits in fp64."""
    found = []
    with torch.no_grad():
        for example in batch:
            logits = model(input_ids=torch.tensor([example.ids])).logits[0].double()
            logprobs = logits.log_softmax(-1)
            found.append(
                [-logprobs[t - 1, example.ids[t]].item()
                 for t, learned in enumerate(example.trained) if learned]
            )  # fmt: skip
    return found


def bloom() -> BloomForCausalLM:
    """It takes no position ids, so its examples cannot share a row."""
    config = BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0,
                         bos_token_id=1, eos_token_id=258)  # fmt: skip
    return BloomForCausalLM(config).eval()


def model_without_positions() -> Any:
    """It takes position ids and ignores them."""
    config = GPT2Config(vocab_size=259, n_positions=256, n_embd=32, n_layer=2, n_head=4,
                        bos_token_id=None, eos_token_id=258)  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    inner = model.transformer.forward
    model.transformer.forward = lambda *args, position_ids=None, **kwargs: inner(*args, **kwargs)
    return model


def model_that_shifts_its_logits() -> Any:
    """Only the model itself knows how."""
    model = tiny_model()
    inner = model.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        output.logits = output.logits * torch.linspace(0.5, 2, output.logits.shape[-1])
        return output

    model.forward = shifted
    return model


def model_that_rounds_by_the_shape_of_a_batch() -> Any:
    """As products in bf16 and in 8 bits do, and by so much."""
    model = tiny_model()
    inner = model.model.forward

    def rounded(position_ids: Any = None, **kwargs: Any) -> Any:
        output = inner(position_ids=position_ids, **kwargs)
        states = output.last_hidden_state
        torch.manual_seed(states.numel())
        output.last_hidden_state = states * (1 + 0.004 * torch.randn_like(states))
        return output

    model.model.forward = rounded
    return model


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (tiny_model, True),
        (lambda: tiny_model().bfloat16(), True),
        (model_that_rounds_by_the_shape_of_a_batch, True),
        (model_without_positions, False),
        (bloom, False),
    ],
)
def test_packing_is_for_models_whose_texts_do_not_see_each_other(make: Any, expected: bool) -> None:
    assert Reader(make()).packs is expected


@pytest.mark.parametrize(
    ("make", "packed", "note"),
    [
        (tiny_model, True, ""),
        (bloom, False, "padded, not packed"),
        (model_without_positions, False, "padded, not packed"),
        (model_that_shifts_its_logits, True, "Logits are the model's own"),
    ],
)
def test_the_loss_is_the_mean_over_learned_tokens(make: Any, packed: bool, note: str) -> None:
    made = trainer(make())
    [of_text, *notes] = made.notes
    assert made.policy.reader.packs == packed and "plain text" in of_text
    assert len(notes) == bool(note) and note in " ".join(notes)
    batch = made.mini_batch(0)
    of_tokens = [x for example in plain_nll(made.policy.model, batch) for x in example]
    held_out = plain_nll(made.policy.model, made.held_out)
    found = made.evaluate()
    sums, counts = [sum(x) for x in held_out], [len(x) for x in held_out]
    loss = sum(sums) / sum(counts)
    spread = sum((s - loss * n) ** 2 for s, n in zip(sums, counts, strict=True))
    error = math.sqrt(spread * len(sums) / (len(sums) - 1))
    assert found["eval/loss"] == pytest.approx(loss, rel=1e-5)
    assert found["eval/loss_se"] == pytest.approx(error / sum(counts), rel=1e-3)
    assert found["eval/perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    step = made.train_step(batch)
    assert step["sft/loss"] == pytest.approx(sum(of_tokens) / len(of_tokens), rel=1e-5)


def test_the_error_of_the_loss_is_that_of_prompts() -> None:
    rows = [{"prompt": f"Q{n // 4}", "response": "a" * (n + 1)} for n in range(32)]
    made = trainer(tiny_model(), rows=rows, data={"eval_fraction": 0.5})
    sums, counts = [0.0] * 4, [0] * 4
    for place, nll in enumerate(plain_nll(made.policy.model, made.held_out)):
        sums[place // 4] += sum(nll)
        counts[place // 4] += len(nll)
    loss = sum(sums) / sum(counts)
    spread = sum((s - loss * n) ** 2 for s, n in zip(sums, counts, strict=True))
    error = math.sqrt(spread * 4 / 3) / sum(counts)
    assert made.evaluate()["eval/loss_se"] == pytest.approx(error, rel=1e-3)


def gradients_of_a_step(made: SFTTrainer) -> list[torch.Tensor]:
    made.learner.optimizer.zero_grad = lambda set_to_none: None  # type: ignore[method-assign,assignment]
    made.config.model.optimizer.__dict__["max_grad_norm"] = 1e9
    made.train_step(made.mini_batch(0))
    return [p.grad for p in made.policy.model.parameters()]


def test_packing_and_micro_batches_change_no_gradient(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for packed, tokens, passes in ((False, 9999, 1), (False, 1, 8), (True, 9999, 1), (True, 1, 8)):
        made = trainer(folder, sft={"micro_batch_size": None, "micro_batch_tokens": tokens})
        made.policy.reader.packs = packed
        read = spied(made.policy.reader, monkeypatch)
        found.append(gradients_of_a_step(made))
        assert len(read) == passes and all((x.segments is not None) == packed for x in read)
    for other in found[1:]:
        for expected, gradient in zip(found[0], other, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_an_example_does_not_see_the_others_of_its_row(folder: str) -> None:
    made = trainer(folder)
    batch = made.mini_batch(0)[:3]
    changed = type(batch[0])([(t + 1) % 256 for t in batch[0].ids], batch[0].trained)
    losses = []
    with torch.no_grad():
        for first in (batch[0], changed):
            texts = [predicting(example.ids, example.trained) for example in [first, *batch[1:]]]
            rows = made.policy.reader.stack(texts)
            assert rows.segments is not None
            losses.append([x.sum().item() for x in made.policy.nll(rows).split([*rows.counts])])
    assert losses[0][0] != losses[1][0]
    assert losses[0][1:] == losses[1][1:]


def test_logits_of_all_tokens_are_never_there(folder: str) -> None:
    rows = [{"prompt": f"{n}", "response": "word " * 24} for n in range(64)]
    made = trainer(folder, rows=rows, data={"eval_fraction": 0.0, "max_tokens": 1024},
                   sft={"batch_size": 64})  # fmt: skip
    batch = made.mini_batch(0)
    tokens, vocabulary = sum(sum(example.trained) for example in batch), 259
    assert tokens == 64 * 121
    with ops.Watch(width=vocabulary) as watch:
        made.train_step(batch)
    assert 0 < watch.largest <= tokens * vocabulary / 4


def test_it_learns_and_the_reward_model_starts_from_its_result(folder: str, tmp_path: Path) -> None:
    found = trainer(folder, tmp_path / "run", examples(64), sft={"epochs": 3}).train()
    assert found["eval/loss"] < found["eval_before/loss"] - 1
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [*range(19)]
    assert {"eval/loss", "eval/loss_se", "eval/perplexity"} <= {*lines[0]} & {*lines[-1]}
    assert {"sft/loss", "sft/grad_norm", "sft/learning_rate", "tokens_per_second",
            "time/update"} <= {*lines[1]}  # fmt: skip
    names = {file.name for file in (tmp_path / "run").iterdir()}
    files = {"config.yaml", "metrics.jsonl", "report.png", "report.html"}
    assert names == {*files, "checkpoints", "policy"}

    result = str(tmp_path / "run/policy")
    again = trainer(result, rows=examples(64))
    assert again.evaluate()["eval/loss"] == pytest.approx(found["eval/loss"], rel=1e-5)
    pairs = [{"prompt": f"Q{n}", "chosen": "good", "rejected": "bad"} for n in range(8)]
    run = RunConfig(output_dir=str(tmp_path / "reward"), device="cpu", dtype="float32")
    quiet = Console(file=io.StringIO())
    reward = RewardModelTrainer(result, pairs, RewardModelConfig(run=run), console=quiet)
    trained = AutoModelForCausalLM.from_pretrained(result)
    ours = dict(reward.model.model.named_parameters())
    for name, parameter in trained.model.named_parameters():
        assert torch.equal(ours[name], parameter)
    assert reward.train()["reward/loss"] > 0


def test_a_resumed_run_ends_with_the_very_same_weights(folder: str, tmp_path: Path) -> None:
    whole = trainer(folder, tmp_path / "whole", sft={"epochs": 2})
    expected = whole.train()

    class Killed(Exception):
        pass

    killed = trainer(folder, tmp_path / "cut", sft={"epochs": 2}, checkpoint_every=2)
    train_step = killed.train_step

    def dies_at_step_4(batch: Any) -> dict[str, float]:
        if killed.step == 3:
            raise Killed
        return train_step(batch)

    killed.train_step = dies_at_step_4  # type: ignore[method-assign]
    with pytest.raises(Killed):
        killed.train()
    as_if_killed(tmp_path / "cut")
    assert not (tmp_path / "cut/policy").exists()
    torch.manual_seed(123)  # another process would stand elsewhere
    resumed = trainer(folder, tmp_path / "cut", sft={"epochs": 2}, checkpoint_every=2, resume=True)
    found = resumed.train()
    assert resumed.notes[0].startswith(
        f"The run goes on after step 2 of {resumed.total_steps}, from "
    )
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for name in ("sft/loss", "eval/loss", "eval_before/loss"):
        assert found[name] == expected[name]


@pytest.mark.parametrize("rows", [examples(40), examples(31), examples()[::-1]])
def test_a_run_is_not_resumed_on_other_data(folder: str, tmp_path: Path, rows: Any) -> None:
    data = tmp_path / "data.jsonl"

    def made(rows: Any, **run: Any) -> SFTTrainer:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return trainer(folder, tmp_path / "run", str(data), **run)

    made(examples()).train()
    metrics = (tmp_path / "run/metrics.jsonl").read_text()
    with pytest.raises(
        UserError, match=r"examples are not those of the run in .*, so held-out ones"
    ):
        made(rows, resume=True).train()
    assert (tmp_path / "run/metrics.jsonl").read_text() == metrics
    assert made(examples(), resume=True).train()["eval/loss"] > 0


def test_nor_with_other_held_out_examples(folder: str, tmp_path: Path) -> None:
    held_out = tmp_path / "held_out.jsonl"

    def made(answer: str, **run: Any) -> SFTTrainer:
        held_out.write_text(json.dumps({"prompt": "Q", "response": answer}) + "\n")
        data = {"eval_path": str(held_out)}
        return trainer(folder, tmp_path / "run", examples(8), data=data, **run)

    made("one").train()
    with pytest.raises(UserError, match="are not those"):
        made("two", resume=True).train()


def test_clusters_without_observations_are_none() -> None:
    """Two of them, of mean 1: sqrt(2/1 (1 + 1)) / 4."""
    found = mean_by_cluster(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([2.0, 2.0, 0.0]))
    assert found == pytest.approx((1.0, 0.5))
    mean, error = mean_by_cluster(torch.tensor([3.0, 0.0]), torch.tensor([2.0, 0.0]))
    assert mean == 1.5 and math.isnan(error)


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({"trainable_layers": 1}, "layers.1."),
        ({"lora": LoraConfig(rank=4)}, "lora_"),
        ({"gradient_checkpointing": True}, ""),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_of_a_model_are_trained_in_either_dtype(
    folder: str, tmp_path: Path, settings: dict[str, Any], trained: str, dtype: str
) -> None:
    if "lora" in settings:
        pytest.importorskip("peft")
    made = trainer(folder, tmp_path / "run", settings=settings, dtype=dtype, rate=3e-3)
    before = {name: p.clone() for name, p in made.model.named_parameters()}
    found = made.train()
    assert found["eval/loss"] < found["eval_before/loss"]
    moved = {name for name, p in made.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(trained in name or name.endswith("model.norm.weight") for name in moved)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run/policy").eval()
    of_tokens = [x for example in plain_nll(saved, made.held_out) for x in example]
    assert found["eval/loss"] == pytest.approx(sum(of_tokens) / len(of_tokens), rel=2e-2)


def test_long_examples_are_cut_and_counted(folder: str) -> None:
    rows = examples()
    rows[1]["prompt"] = "long " * 100
    rows[2]["response"] = "long " * 100
    made = trainer(folder, rows=rows, data={"max_tokens": 64, "eval_fraction": 0.0})
    assert f"of {len(rows)} training examples were truncated to 64 tokens" in " ".join(made.notes)
    assert max(map(len, made.training)) == 64
    assert all(any(example.trained) and not example.trained[0] for example in made.training)


def test_no_more_tokens_are_kept_than_the_model_has_positions() -> None:
    config = GPT2Config(vocab_size=259, n_positions=96, n_embd=32, n_layer=1, n_head=2,
                        bos_token_id=None, eos_token_id=258)  # fmt: skip
    rows = examples()
    rows[1]["response"] = "long " * 100
    made = trainer(GPT2LMHeadModel(config), rows=rows, data={"eval_fraction": 0.0})
    assert max(map(len, made.training)) == 96
    assert made.train_step(made.training)["sft/loss"] > 0


def test_examples_without_a_common_prompt_stay_apart(folder: str) -> None:
    rows = [{"prompt": f"Q{n // 4}", "response": f"a{n}"} for n in range(32)]
    made = trainer(folder, rows=rows)
    prompts = [{tuple(e.ids[: e.trained.index(True)]) for e in part}
               for part in (made.training, made.held_out)]  # fmt: skip
    assert not prompts[0] & prompts[1] and len(made.held_out) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/no/such/model"}, "/no/such/model"),
        ({"model": ""}, "No model was given"),
        ({"rows": [{"prompt": "a"}]}, r"demonstrations\[0\]: no column 'response'"),
        ({"rows": [{"prompt": "a", "response": "b"}]}, "too few for a held-out set"),
        ({"rows": "absent.jsonl"}, "absent.jsonl does not exist"),
        ({"trackers": ["wandb"]}, "wandb"),
        ({"settings": {"trainable_layers": 9}}, "trainable_layers is 9"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    folder: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        trainer(output_dir=tmp_path / "run", **{"model": folder, **changes}).train()
    assert not (tmp_path / "run").exists()


def test_an_example_holds_more_than_one_token(folder: str) -> None:
    with pytest.raises(UserError, match="max_tokens"):
        trainer(folder, data={"max_tokens": 1})
    made = trainer(folder, data={"max_tokens": 2})
    assert made.train_step(made.mini_batch(0))["sft/loss"] > 0


def test_a_refused_conversation_is_named_or_skipped(folder: str) -> None:
    template = (
        "{% for m in messages %}{% if 'no' in m['content'] %}{{ raise_exception('never') }}"
        "{% endif %}{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    rows = [*examples(9)[::3], {"messages": [{"role": "user", "content": "no"},
            {"role": "assistant", "content": "x"}]}]  # fmt: skip
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    data = DemonstrationDataConfig(eval_fraction=0.0)
    with pytest.raises(UserError, match=r"demonstrations\[3\]: refused .*never"):
        SFTTrainer(tiny_model(), rows, SFTConfig(data=data), tokenizer)
    data = DemonstrationDataConfig(eval_fraction=0.0, on_bad_line="skip")
    made = SFTTrainer(tiny_model(), rows, SFTConfig(data=data), tokenizer)
    assert len(made.training) == 3 and "1 skipped" in " ".join(made.notes)


def test_evaluating_without_held_out_examples_says_how_to_get_some(folder: str) -> None:
    with pytest.raises(UserError, match="eval_fraction"):
        trainer(folder, data={"eval_fraction": 0.0}).evaluate()


def test_a_model_object_needs_its_tokenizer() -> None:
    with pytest.raises(UserError, match="tokenizer"):
        SFTTrainer(tiny_model(), examples())
