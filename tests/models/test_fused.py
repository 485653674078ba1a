"""The operations of a model around its products: which are kernels, and what they give."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from families import of_family
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from ppo_engine.models import fused
from ppo_engine.models.fused import Fused
from ppo_kernels import rotary_embedding

IDS = torch.arange(12).view(2, 6)


def replaced(model: nn.Module, kind: str = "") -> list[nn.Module]:
    """Modules whose class's name ends with `kind`."""
    named = (module for module in model.modules() if type(module).__name__.endswith(kind))
    return [module for module in named if "forward" in vars(module)]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "olmo2", "gpt2"])
def test_root_mean_square_norms_are_one_kernel_and_give_what_they_gave(family: str) -> None:
    """With the weights that they have then."""
    model: Any = of_family(family)
    expected = [x for x in model.modules() if type(x).__name__.endswith("RMSNorm")]
    assert bool(expected) == (family != "gpt2")
    prepared = Fused(model, torch.float32)
    for _ in range(2):
        for norm in expected:
            norm.weight += 0.5 * torch.randn_like(norm.weight)
        logits = model(IDS).logits
        with prepared.active():
            assert replaced(model, "RMSNorm") == expected
            torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)
        assert not replaced(model)


def logits_and_gradients(model: Any) -> list[Tensor]:
    model.zero_grad()
    logits = model(IDS).logits
    logits.float().logsumexp(-1).mean().backward()
    return [logits.detach(), *(x.grad.clone() for x in model.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_gated_layers_are_one_kernel_and_give_what_they_gave(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, so that no other kernel rounds."""
    model: Any = of_family(family, tie_word_embeddings=False).to(dtype)
    monkeypatch.setattr(fused, "_added", lambda *_: None)
    monkeypatch.setattr(fused, "_rotates", lambda _: False)
    expected = logits_and_gradients(model)
    with Fused(model, dtype, products=False).active():
        assert replaced(model) == [layer.mlp for layer in model.model.layers]
        found = logits_and_gradients(model)
    assert not replaced(model)
    for x, y in zip(found, expected, strict=True):
        assert (x - y).float().norm() <= 32 * torch.finfo(dtype).eps * y.float().norm()


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_a_layer_with_another_activation_is_left_alone(activation: str) -> None:
    model = of_family("llama", hidden_act=activation)
    with Fused(model, torch.float32).active():
        assert bool(replaced(model, "MLP")) == (activation == "silu")


class TwiceRMSNorm(LlamaRMSNorm):  # a name that promises what it does not do
    def forward(self, hidden_states: Tensor) -> Tensor:
        return 2 * super().forward(hidden_states)


@torch.no_grad()
def test_norms_of_another_kind_or_that_something_has_replaced_stay_as_they_are() -> None:
    wrapped = LlamaRMSNorm(8)
    own = vars(wrapped)["forward"] = wrapped.forward
    model = nn.Sequential(TwiceRMSNorm(8), wrapped)
    prepared = Fused(model, torch.float32)
    with prepared.active():
        assert replaced(model) == [wrapped]
        assert vars(wrapped)["forward"] is own
    assert vars(wrapped)["forward"] is own


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3", "gpt_neox", "gpt_oss"])
def test_the_rotary_embedding_is_one_kernel_where_it_is_the_same(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = of_family(family)
    module = sys.modules[type(model).__module__]
    own = module.apply_rotary_pos_emb
    calls = []

    def counted(*given: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(given)
        return rotary_embedding(*given)

    logits = model(IDS).logits
    prepared = Fused(model, torch.float32)
    monkeypatch.setattr(fused, "rotary_embedding", counted)
    with prepared.active():
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)
        # Its cosines are of half a head.
        assert len(calls) == (0 if family == "gpt_oss" else model.config.num_hidden_layers)
        q, k = torch.randn(2, 3, 6, 2, 8).unbind()
        cos, sin = torch.randn(2, 3, 6, 8).unbind()
        if family != "gpt_oss":  # the heads behind the tokens
            for x, y in zip(
                module.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2),
                own(q, k, cos, sin, unsqueeze_dim=2),
                strict=True,
            ):
                assert torch.equal(x, y)
    assert module.apply_rotary_pos_emb is own


def test_a_function_that_rotates_the_other_way_is_left_alone() -> None:
    assert fused._rotates(apply_rotary_pos_emb)
    assert not fused._rotates(lambda q, k, cos, sin: apply_rotary_pos_emb(q, k, cos, -sin))
