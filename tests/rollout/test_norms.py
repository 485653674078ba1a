"""The norms of a model while it decodes: those that are one kernel, and what they give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import of_family
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ppo_engine.rollout.norms import Norms

IDS = torch.arange(12).view(2, 6)


def replaced(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "forward" in vars(module)]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "olmo2", "gpt2"])
def test_root_mean_square_norms_are_one_kernel_and_give_what_they_gave(family: str) -> None:
    """With the weights that the last `refresh` found."""
    model: Any = of_family(family)
    expected = [x for x in model.modules() if type(x).__name__.endswith("RMSNorm")]
    assert bool(expected) == (family != "gpt2")
    norms = Norms(model)
    for _ in range(2):
        for norm in expected:
            norm.weight += 0.5 * torch.randn_like(norm.weight)
        norms.refresh()
        logits = model(IDS).logits
        with norms.active():
            assert replaced(model) == expected
            torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)
        assert not replaced(model)


class TwiceRMSNorm(LlamaRMSNorm):  # a name that promises what it does not do
    def forward(self, hidden_states: Tensor) -> Tensor:
        return 2 * super().forward(hidden_states)


@torch.no_grad()
def test_norms_of_another_kind_or_that_something_has_replaced_stay_as_they_are() -> None:
    wrapped = LlamaRMSNorm(8)
    own = vars(wrapped)["forward"] = wrapped.forward
    model = nn.Sequential(TwiceRMSNorm(8), wrapped)
    norms = Norms(model)
    with norms.active():
        assert replaced(model) == [wrapped]
        assert vars(wrapped)["forward"] is own
    assert vars(wrapped)["forward"] is own
