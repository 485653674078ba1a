"""Which tokens end a text, and the generation config that is saved with a model."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
)

from ppo_engine.errors import UserError
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.rollout.generation import generate
from ppo_engine.rollout.sampling import Sampler
from ppo_engine.settings.schema import GenerationConfig as Sampling
from ppo_engine.settings.schema import ModelConfig

A, B, OTHER, PAD, EOS = 64, 65, 255, 256, 258  # the bytes a and b, and three that may end a text


def open_policy(model: Any) -> LanguageModel:
    tokenizer = None if isinstance(model, str) else tiny_tokenizer()
    return LanguageModel.open(
        model, ModelConfig(), device=torch.device("cpu"), dtype=torch.float32, tokenizer=tokenizer
    )


def writes(*tokens: int, **generation_config: Any) -> LlamaForCausalLM:
    """A model that writes `tokens`, each after the one before it, the first after an `a`."""
    model = tiny_model()
    model.generation_config = GenerationConfig(**generation_config)
    model.config.tie_word_embeddings = False
    embedding = model.model.embed_tokens.weight.detach()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(embedding))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding[PAD].normal_()  # it is 0 in a new model, which nothing can follow
        for last, following in pairwise((A, *tokens)):
            model.lm_head.weight[following] += 9 * embedding[last] / embedding[last].norm()
    return model


ENDS = {
    "the tokenizer's": ([B, EOS], {"eos_token_id": OTHER}),
    "the checkpoint's": ([B, OTHER], {"eos_token_id": OTHER}),
    "one of several": ([B, OTHER], {"eos_token_id": [EOS, OTHER]}),
    "one that is also the pad token": ([B, PAD], {"eos_token_id": [EOS, PAD]}),
    "the pad token alone": ([B, PAD], {"eos_token_id": PAD}),
}


@pytest.mark.parametrize(("text", "declared"), ENDS.values(), ids=ENDS)
def test_every_declared_end_ends_a_response_and_so_it_does_once_saved(
    tmp_path: Path, text: list[int], declared: dict[str, Any]
) -> None:
    policy = open_policy(writes(*text, **declared))
    rollout = generate(
        Sampler(policy), ["a", "longer, b"], Sampling(max_new_tokens=6, temperature=1e-3)
    )
    assert rollout.response_ids[0][rollout.mask[0]].tolist() == text and rollout.finished[0]

    policy.save(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    written = model.generate(**tokenizer("a", return_tensors="pt"), max_new_tokens=6)
    assert written[0].tolist() == [A, *text]
    batch = tokenizer(["a", "longer, a"], return_tensors="pt", padding=True)
    written = model.generate(**batch, max_new_tokens=6)
    assert written[:, batch["input_ids"].shape[1] :].tolist() == [text, text]


def test_a_policy_that_was_trained_generates_as_it_was_sampled_from(tmp_path: Path) -> None:
    """Without the habits that its checkpoint came with: a penalty would forbid the second a."""
    policy = open_policy(writes(A, A, EOS, repetition_penalty=50.0, top_k=1))
    sampling = Sampling(max_new_tokens=4, temperature=0.7, top_p=0.9)
    policy.save(tmp_path / "saved", sampling=sampling)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    found = model.generation_config
    assert (found.do_sample, found.temperature, found.top_k, found.top_p) == (True, 0.7, 0, 0.9)
    ids = AutoTokenizer.from_pretrained(tmp_path / "saved")("a", return_tensors="pt")
    rollout = generate(Sampler(policy), ["a"], sampling, greedy=True)
    written = model.generate(**ids, do_sample=False)
    assert written[0, 1:].tolist() == rollout.response_ids[0].tolist()
    assert policy.model.generation_config.repetition_penalty == 50.0  # as it was given


def test_a_trained_policy_ends_its_turns_as_in_training(tmp_path: Path) -> None:
    policy = open_policy(writes(PAD, B, PAD, eos_token_id=OTHER))
    sampling = Sampling(max_new_tokens=4, stop=(B, "a string"), min_new_tokens=1)
    policy.save(tmp_path / "saved", sampling=sampling)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    found = model.generation_config
    assert found.eos_token_id == sorted({B, *policy.renderer.end_ids})
    assert (found.min_new_tokens, found.stop_strings) == (1, None)
    ids = AutoTokenizer.from_pretrained(tmp_path / "saved")("a", return_tensors="pt")
    rollout = generate(Sampler(policy), ["a"], sampling, greedy=True)
    assert model.generate(**ids, do_sample=False)[0, 1:].tolist() == [PAD, B]
    assert rollout.response_ids.tolist() == [[PAD, B]]


def test_a_model_config_names_the_ends_where_no_generation_config_does() -> None:
    model = writes(B, OTHER, A)
    model.config.eos_token_id = [EOS, OTHER]
    assert open_policy(model).renderer.end_ids == [OTHER, EOS]
    model = writes(B, OTHER, A, eos_token_id=OTHER)
    model.config.eos_token_id = PAD  # overruled, as in transformers
    assert open_policy(model).renderer.end_ids == [OTHER, EOS]


def test_both_saved_configs_name_the_tokens_that_were_used(tmp_path: Path) -> None:
    model = writes(B, EOS, eos_token_id=OTHER, pad_token_id=0, bos_token_id=1)
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    policy = LanguageModel.open(
        model, ModelConfig(), device=torch.device("cpu"), dtype=torch.float32, tokenizer=tokenizer
    )
    policy.save(tmp_path / "once")
    open_policy(str(tmp_path / "once")).save(tmp_path / "twice")
    for folder in (tmp_path / "once", tmp_path / "twice"):
        for config in (
            AutoConfig.from_pretrained(folder),
            GenerationConfig.from_pretrained(folder),
        ):
            assert config.eos_token_id == [OTHER, EOS]
            assert (config.pad_token_id, config.bos_token_id) == (PAD, 257)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


IDLE = {
    "greedy": ({"do_sample": False, "repetition_penalty": 1.2}, {"temperature": 0.9, "top_k": 5}),
    "unset": ({"repetition_penalty": 1.2}, {"top_p": 0.5, "min_p": 0.1}),
    "one beam": ({"do_sample": True, "temperature": 0.9}, {"length_penalty": 2.0}),
    "no cache": ({"use_cache": False}, {"cache_implementation": "static"}),
    "tokens alone": ({"do_sample": True, "top_k": 5}, {"output_scores": True}),
}


@pytest.mark.parametrize(("kept", "idle"), IDLE.values(), ids=IDLE)
def test_a_generation_config_with_settings_of_no_effect_is_saved_without_them(
    tmp_path: Path, kept: dict[str, Any], idle: dict[str, Any]
) -> None:
    open_policy(writes(B, EOS, **idle, **kept)).save(tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved").to_dict()
    assert {name: saved[name] for name in kept} == kept
    assert all(saved.get(name) in (None, 50, 1.0, False) for name in idle)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"eos_token_id": [258, None]}, r"eos_token_id must be a token's id.* is \[258, None\]"),
        ({"eos_token_id": "2"}, "eos_token_id must be a token's id.* is '2'"),
        ({"stop_strings": 5}, "stop_strings must be text.* are 5"),
    ],
    ids=str,
)
def test_ends_that_are_none_are_told(declared: dict[str, Any], message: str) -> None:
    model = tiny_model()
    for name, value in declared.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(UserError, match=message):
        generate(Sampler(open_policy(model)), ["a"], Sampling(max_new_tokens=2))


def test_minus_one_stands_for_no_end() -> None:
    policy = open_policy(writes(B, A, eos_token_id=[-1, B]))
    assert -1 not in policy.renderer.end_ids
    [response] = generate(Sampler(policy), ["a"], Sampling(max_new_tokens=4)).response_ids.tolist()
    assert response[0] == B
