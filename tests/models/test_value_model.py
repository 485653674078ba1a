"""Reward models and critics: the head, padding, and the round trip through plain Hugging Face."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from reading import sequence_scores, token_values
from tiny import tiny_model, tiny_model_folder, tiny_tokenizer
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from ppo_engine.errors import UserError
from ppo_engine.models.freezing import prepare_for_training
from ppo_engine.models.value_model import (
    init_head,
    load_value_model,
    make_critic,
    read_value_model,
    score_head,
)
from ppo_engine.pretrained.loading import save_model
from ppo_engine.settings.schema import LoraConfig, ModelConfig

CPU = torch.device("cpu")
TEXTS = ("Yes.", "A somewhat longer answer.", "No, thank you!")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: str):
    return load_value_model(folder, tiny_tokenizer(), device=CPU)


def batch(side: str, extra: int = 0) -> tuple[Tensor, Tensor]:
    """TEXTS as ids and mask, padded on `side`, `extra` columns wider than needed."""
    tokenizer = tiny_tokenizer()
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    width = max(map(len, rows)) + extra
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        real = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, real], mask[i, real] = torch.tensor(row), True
    return ids, mask


def test_saved_model_gives_the_same_scores_in_plain_transformers(folder, tmp_path):
    model = load_value_model(folder, tiny_tokenizer(), device=CPU, seed=3)
    with torch.no_grad():
        score_head(model).weight.add_(1.0)  # so that a head lost on the way would show
        scores = sequence_scores(model, *batch("right"))
    save_model(model, tiny_tokenizer(), tmp_path / "saved")

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved", padding_side="right")
    with torch.no_grad():
        together = plain(**tokenizer(list(TEXTS), padding=True, return_tensors="pt")).logits
        alone = [plain(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS]
        ids, mask = batch("left")
        left = plain(input_ids=ids, attention_mask=mask.long()).logits
    assert plain.config.num_labels == 1
    assert plain.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    for theirs in (together, torch.cat(alone), left):
        torch.testing.assert_close(theirs[:, 0], scores, atol=1e-5, rtol=1e-5)

    again = load_value_model(str(tmp_path / "saved"), tokenizer, device=CPU, seed=9)
    with torch.no_grad():
        # Not to the bit: matrix products round by where the loaded weights lie in memory.
        torch.testing.assert_close(
            sequence_scores(again, *batch("right")), scores, atol=1e-5, rtol=1e-6
        )


def test_adapters_are_merged_where_the_model_is_saved(folder, tmp_path):
    pytest.importorskip("peft", reason="the optional package peft is not installed")
    model = load_value_model(folder, tiny_tokenizer(), device=CPU)
    model = prepare_for_training(
        model, ModelConfig(lora=LoraConfig(rank=2)), "SEQ_CLS", torch.float32
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 if "lora" in name else 1.0)
        expected = sequence_scores(model, *batch("right"))
    save_model(model, tiny_tokenizer(), tmp_path / "saved")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    ids, mask = batch("right")
    with torch.no_grad():
        scores = plain(input_ids=ids, attention_mask=mask.long()).logits[:, 0]
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("side", "extra"), [("left", 0), ("left", 11), ("right", 11)])
def test_padding_changes_no_score(model, side, extra):
    with torch.no_grad():
        expected = sequence_scores(model, *batch("right"))
        got = sequence_scores(model, *batch(side, extra))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_values_are_the_scores_of_prefixes(model):
    ids, mask = batch("left")
    with torch.no_grad():
        values = token_values(model, ids, mask)
        assert values.shape == ids.shape and values.dtype == torch.float32
        for end in (ids.shape[1], ids.shape[1] - 2):
            scores = sequence_scores(model, ids[:, :end], mask[:, :end])
            torch.testing.assert_close(values[:, end - 1], scores, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(token_values(model, ids, mask, start=5), values[:, 5:])


def test_a_pad_token_inside_the_text_is_not_its_end(model):
    ids, mask = batch("right")
    ids[1, 4] = tiny_tokenizer().pad_token_id
    last = mask.sum(1) - 1
    with torch.no_grad():
        values = token_values(model, ids, mask)
        scores = sequence_scores(model, ids, mask)
    torch.testing.assert_close(scores, values[torch.arange(3), last])


def test_new_head_has_the_deviation_of_the_checklist():
    head = torch.nn.Linear(40_000, 1)
    init_head(head, seed=0)
    expected = 1 / math.sqrt(40_001)
    assert head.weight.std().item() == pytest.approx(expected, rel=0.02)  # 5 standard errors
    assert head.weight.mean().item() == pytest.approx(0, abs=5 * expected / 200)
    assert head.bias.item() == 0


def test_head_of_a_causal_checkpoint_is_new_and_made_from_the_seed(folder, model):
    hidden = score_head(model).in_features
    weights = [score_head(load_value_model(folder, tiny_tokenizer(), device=CPU, seed=s)).weight
               for s in (0, 0, 1)]  # fmt: skip
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    # The library's own initialisation has 0.02.
    assert weights[0].std().item() == pytest.approx(1 / math.sqrt(hidden + 1), rel=0.5)


def test_loading_prints_nothing(folder, capfd):
    load_value_model(folder, tiny_tokenizer(), device=CPU)
    assert capfd.readouterr() == ("", "")


def test_scores_stay_fp32_over_layers_in_bf16(model):
    ids, mask = batch("right")
    model = copy.deepcopy(model)
    model.base_model.bfloat16()
    with torch.no_grad():
        scores = sequence_scores(model, ids, mask)
        values = token_values(model, ids, mask)
    assert scores.dtype == values.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())  # not rounded to bf16 on the way


def test_critic_starts_as_the_reward_model_and_leaves_it_alone(folder):
    policy = tiny_model()
    reward_model = load_value_model(folder, tiny_tokenizer(), device=CPU, seed=7)
    reward_model.requires_grad_(False)
    critic = make_critic(
        ModelConfig(),
        tiny_tokenizer(),
        device=CPU,
        dtype=torch.float32,
        policy=policy,
        reward_model=reward_model,
    )
    before = score_head(reward_model).weight.clone()
    assert torch.equal(score_head(critic).weight, before)
    token_values(critic, *batch("left")).sum().backward()
    with torch.no_grad():
        score_head(critic).weight.sub_(score_head(critic).weight.grad)
    assert torch.equal(score_head(reward_model).weight, before)
    assert not torch.equal(score_head(critic).weight, before)


def test_critic_without_a_reward_model_is_the_policy_under_a_new_head(model):
    policy = tiny_model()  # the weights of the folder that `model` was loaded from
    critic = make_critic(
        ModelConfig(), tiny_tokenizer(), device=CPU, dtype=torch.float32, policy=policy, seed=0
    )
    with torch.no_grad():
        torch.testing.assert_close(
            sequence_scores(critic, *batch("left")), sequence_scores(model, *batch("left"))
        )
    theirs = dict(policy.named_parameters())["model.layers.1.mlp.up_proj.weight"]
    mine = dict(critic.named_parameters())["model.layers.1.mlp.up_proj.weight"]
    assert mine.requires_grad and mine.data_ptr() != theirs.data_ptr()


def test_only_the_upper_layers_and_the_head_are_trained(folder):
    model = load_value_model(folder, tiny_tokenizer(), device=CPU)
    prepare_for_training(model, ModelConfig(trainable_layers=1), "SEQ_CLS", torch.float32)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "score.weight" in trained and "model.norm.weight" in trained
    assert {name.split(".")[2] for name in trained if ".layers." in name} == {"1"}
    assert "model.embed_tokens.weight" not in trained


def test_gradient_checkpointing_changes_no_gradient(folder):
    gradients = []
    for checkpointing in (False, True):
        model = load_value_model(folder, tiny_tokenizer(), device=CPU)
        prepare_for_training(
            model, ModelConfig(gradient_checkpointing=checkpointing), "SEQ_CLS", torch.float32
        )
        sequence_scores(model, *batch("right")).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def bert(tokenizer, labels: int) -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, num_labels=labels, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def test_a_model_that_pools_elsewhere_is_refused(tmp_path):
    bert(tiny_tokenizer(), labels=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be made from BertForSequenceClassification"):
        load_value_model(str(tmp_path), tiny_tokenizer(), device=CPU)


def test_a_classifier_with_more_labels_is_refused(tmp_path):
    bert(tiny_tokenizer(), labels=3).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="3 labels"):
        load_value_model(str(tmp_path), tiny_tokenizer(), device=CPU)


def test_scoring_needs_a_head(folder):
    with pytest.raises(UserError, match="no score head"):
        read_value_model(folder, require_head=True)


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_value_model(str(tmp_path / "nowhere"), tiny_tokenizer(), device=CPU)


def test_the_probe_finds_a_pad_token_that_ends_responses(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(UserError, match="cannot be made"):
        load_value_model(folder, tokenizer, device=CPU)
