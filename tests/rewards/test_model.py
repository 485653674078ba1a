"""Reward models: by text and by token ids, their limits, and whose tokens they share."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model_folder, tiny_tokenizer
from tokenizers import pre_tokenizers

from ppo_engine.errors import UserError
from ppo_engine.models.budget import Budget
from ppo_engine.models.reader import Limit
from ppo_engine.models.value_model import load_value_model
from ppo_engine.pretrained.loading import save_model
from ppo_engine.rewards.model import RewardModel, load_reward_model
from ppo_engine.text.renderer import Renderer
from ppo_engine.text.tokenizer import same_tokenizer

CPU, FP32 = torch.device("cpu"), torch.float32
PROMPTS = ["Say a.", [{"role": "user", "content": "Say b, at some length."}], "Say c."]
RESPONSES = ["a", "bbbbbbbb", "ccc"]
FINISHED = [True, False, True]


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = tiny_tokenizer()
    model = load_value_model(tiny_model_folder(folder), tokenizer, device=CPU)
    save_model(model, tokenizer, folder / "model")
    return str(folder / "model")


@pytest.fixture(scope="module")
def reward_model(reward_folder) -> RewardModel:
    return load_reward_model(reward_folder, device=CPU, dtype=FP32, budget=Budget(Limit(999, 2)))


def test_text_and_tokens_get_the_same_score_whatever_the_micro_batch(reward_model, reward_folder):
    by_text = reward_model(PROMPTS, RESPONSES, FINISHED)
    tokenizer = tiny_tokenizer()
    renderer = Renderer(tokenizer)
    written = [
        (renderer.prompt(prompt), tokenizer(response)["input_ids"] + [tokenizer.eos_token_id] * end)
        for prompt, response, end in zip(PROMPTS, RESPONSES, FINISHED, strict=True)
    ]
    by_tokens = reward_model(PROMPTS, RESPONSES, FINISHED, {}, written)
    torch.testing.assert_close(by_tokens, by_text)
    # One row at a time, in the order given.
    single = load_reward_model(reward_folder, device=CPU, dtype=FP32, budget=Budget(Limit(1)))
    torch.testing.assert_close(single(PROMPTS, RESPONSES, FINISHED), by_text)
    assert len(set(by_text.tolist())) == 3 and not by_text.requires_grad


def test_the_same_response_has_the_same_score(reward_model, monkeypatch):
    """Whatever the shape of the batch that it stands in does to the products."""
    read = []

    def noisy(model, reader, rows):
        read.extend(rows.counts)
        generator = torch.Generator().manual_seed(len(read))
        return torch.randn(len(rows.counts), generator=generator)

    monkeypatch.setattr("ppo_engine.rewards.model.read_values", noisy)
    prompts = [PROMPTS[i] for i in (0, 1, 0, 2, 1, 0)]
    responses = ["same", "other", "same", "third", "other", "different"]
    found = reward_model(prompts, responses, [True] * 6)
    assert found[0] == found[2] and found[1] == found[4]
    assert len(read) == len(set(found.tolist())) == 4


def test_each_response_has_its_own_score_in_its_place(reward_model):
    """As plain transformers scores each alone."""
    expected = []
    for prompt, response, finished in zip(PROMPTS, RESPONSES, FINISHED, strict=True):
        ids = reward_model.renderer.scored(prompt, response, max_tokens=999, finished=finished)
        expected.append(reward_model.model(torch.tensor([ids])).logits.item())
    found = reward_model(PROMPTS, RESPONSES, FINISHED)
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert not any(p.requires_grad for p in reward_model.model.parameters())


def test_an_unfinished_response_is_scored_without_eos(reward_model):
    done, cut = reward_model(["Say a.", "Say a."], ["aa", "aa"], [True, False])
    assert done != cut


def test_a_reward_model_keeps_to_its_token_limit(reward_model):
    short = RewardModel(
        reward_model.model, reward_model.tokenizer, device=CPU, dtype=FP32, max_tokens=4
    )
    scores = short(["left out " * 9, "xx"], ["abc", "abc"], [True, True])
    assert scores[0] == pytest.approx(scores[1].item())
    assert scores[0] != pytest.approx(reward_model(["xx"], ["abc"], [True]).item())
    written = [([1, 2, 3], [4, 5, 6])]  # of tokens too it reads the last
    last = reward_model(["x"], ["x"], [False], {}, [([3], [4, 5, 6])])
    torch.testing.assert_close(short(["x"], ["x"], [False], {}, written), last)
    assert last != reward_model(["x"], ["x"], [False], {}, written)


def test_a_tokenizer_that_pads_with_eos_is_given_a_pad_token(reward_model):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    made = RewardModel(reward_model.model, tokenizer, device=CPU, dtype=FP32)
    assert tokenizer.pad_token == "<|pad|>" and made.model.config.pad_token_id == 256


def test_a_language_model_is_no_reward_model(tmp_path):
    with pytest.raises(UserError, match="no score head"):
        load_reward_model(tiny_model_folder(tmp_path), device=CPU, dtype=FP32)


def test_same_tokenizer_looks_at_vocabulary_and_template():
    assert same_tokenizer(tiny_tokenizer(), tiny_tokenizer())
    assert not same_tokenizer(tiny_tokenizer(), tiny_tokenizer(chat_template=False))
    larger = tiny_tokenizer()
    larger.add_tokens(["<new>"])
    assert not same_tokenizer(tiny_tokenizer(), larger)
    other_end = tiny_tokenizer()
    other_end.eos_token = "<|im_start|>"
    assert not same_tokenizer(tiny_tokenizer(), other_end)
    other_words = tiny_tokenizer()
    other_words.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert other_words.get_vocab() == tiny_tokenizer().get_vocab()
    assert not same_tokenizer(tiny_tokenizer(), other_words)
