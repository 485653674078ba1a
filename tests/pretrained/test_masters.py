"""Weights in bf16 with their fp32 masters: what has which dtype, and what is made of masters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import of_family
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.value_model import make_critic, score_head, value_model_from_policy
from ppo_engine.pretrained.architecture import decoder_layers
from ppo_engine.pretrained.loading import save_model
from ppo_engine.pretrained.masters import computing_in_fp32, master, set_master, to_compute_dtype
from ppo_engine.pretrained.storage import in_fp32
from ppo_engine.rewards.model import RewardModel
from ppo_engine.settings.schema import LoraConfig, ModelConfig

CPU, F32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16


def open_policy(model: Any = None, **settings: Any) -> LanguageModel:
    return LanguageModel.open(
        model or tiny_model(), ModelConfig(**settings), device=CPU, dtype=BF16,
        tokenizer=tiny_tokenizer(),
    )  # fmt: skip


def masters_of(model: Any) -> dict[str, Tensor]:
    return {name: master(x) for name, x in model.named_parameters()}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[x], theirs[x]) for x in ours)


def test_training_starts_from_the_weights_as_they_are_stored() -> None:
    expected = masters_of(tiny_model())
    policy = open_policy()
    assert {x.dtype for x in policy.model.parameters()} == {BF16}
    assert equal(masters_of(policy.model), expected)
    # Frequencies are made in fp32, and not saved.
    assert {x.dtype for x in policy.model.buffers()} == {F32}
    assert equal(masters_of(in_fp32(policy.model)), expected)
    assert {x.dtype for x in policy.model.parameters()} == {F32}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "mamba", "gemma3_text"])
def test_bf16_weights_compute_in_fp32_a_layer_at_a_time(family: str) -> None:
    model = of_family(family).bfloat16()
    expected = copy.deepcopy(model).float()(torch.arange(20)[None]).logits
    layers = decoder_layers(model)
    before = {name: x.data_ptr() for name, x in model.named_parameters()}
    seen: list[list[set[torch.dtype]]] = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: seen.append([*map(dtypes, layers)]))
    with computing_in_fp32(model):
        assert torch.equal(model(torch.arange(20)[None]).logits, expected)
        with pytest.raises(TypeError):
            layers[0]()
        assert dtypes(layers[0]) == {BF16}
    assert seen[:2] == [[{F32}, {BF16}], [{BF16}, {F32}]]
    assert {name: x.data_ptr() for name, x in model.named_parameters()} == before


def dtypes(module: torch.nn.Module) -> set[torch.dtype]:
    return {x.dtype for x in module.parameters()}


def test_what_is_frozen_has_no_master() -> None:
    policy = open_policy(trainable_layers=1)
    for parameter in policy.model.parameters():
        assert parameter.dtype == BF16
        assert hasattr(parameter, "master_remainder") == parameter.requires_grad
    frozen = to_compute_dtype(policy.model.requires_grad_(False), BF16)
    assert not any(hasattr(x, "master_remainder") for x in frozen.parameters())


def test_a_head_and_what_a_family_keeps_stay_fp32() -> None:
    model = value_model_from_policy(tiny_model(), tiny_tokenizer(), seed=0)
    model._keep_in_fp32_modules_strict = {"model.norm"}
    model._keep_in_fp32_modules = {"mlp"}  # in float16 only
    model.model.layers[0].register_buffer("saved", torch.ones(2))
    to_compute_dtype(model, BF16)
    kept = {name for name, x in model.named_parameters() if x.dtype == F32}
    assert kept == {"score.weight", "model.norm.weight"}
    assert model.model.layers[0].saved.dtype == BF16


def test_a_master_that_is_set_is_what_is_read() -> None:
    parameter = next(open_policy().model.parameters())
    weights, rest = parameter.data_ptr(), parameter.master_remainder.data_ptr()
    values = torch.randn(parameter.shape)
    set_master(parameter, values)
    assert torch.equal(master(parameter), values)
    assert (parameter.data_ptr(), parameter.master_remainder.data_ptr()) == (weights, rest)


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
def test_masters_are_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    """In fp16 rounded once; in bf16 the weights as they are."""
    policy = open_policy()
    expected = masters_of(policy.model)
    policy.save(tmp_path, str(dtype).removeprefix("torch."))
    found = load_file(tmp_path / "model.safetensors")
    weights = dict(policy.model.named_parameters())
    for name, x in found.items():
        assert x.dtype == dtype
        assert torch.equal(x, weights[name] if dtype == BF16 else expected[name].to(dtype))


def test_adapters_are_merged_into_masters(tmp_path: Path) -> None:
    """In fp32: in bf16 a small change of a weight would be lost."""
    pytest.importorskip("peft")
    policy = open_policy(lora=LoraConfig(rank=2, target_modules=["q_proj"]))
    layer = policy.model.get_base_model().model.layers[0].self_attn.q_proj
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    assert {x.dtype for x in policy.model.parameters()} == {BF16}
    set_master(up, torch.full(up.shape, 1e-5))
    policy.save(tmp_path, "float32")
    found = load_file(tmp_path / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    expected = layer.base_layer.weight.float() + layer.scaling["default"] * (
        master(up) @ master(down)
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert not torch.equal(found, expected.bfloat16().float())


def test_a_critic_starts_from_the_policys_masters(tmp_path: Path) -> None:
    policy = open_policy()
    critic = make_critic(
        ModelConfig(), policy.tokenizer, device=CPU, dtype=BF16, policy=policy.model
    )
    expected = masters_of(policy.model.model)
    assert equal(masters_of(critic.model), expected)
    assert score_head(critic).weight.dtype == F32
    save_model(critic, policy.tokenizer, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["model.norm.weight"], expected["norm.weight"])


def test_a_critic_is_the_reward_model_as_it_computes() -> None:
    policy = open_policy()
    judge = value_model_from_policy(tiny_model(), policy.tokenizer, seed=0)
    reward = RewardModel(copy.deepcopy(judge), policy.tokenizer, device=CPU, dtype=BF16)
    critic = make_critic(
        ModelConfig(), policy.tokenizer, device=CPU, dtype=BF16, policy=policy.model,
        reward_model=reward.model,
    )  # fmt: skip
    assert equal(masters_of(critic), masters_of(reward.model))
    assert torch.equal(score_head(critic).weight, score_head(judge).weight)
    assert all(hasattr(x, "master_remainder") == (x.dtype == BF16) for x in critic.parameters())
