"""The products of a decoding step: what a model says with them is what it says without."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import of_family
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ppo_engine.models.precision import rounding
from ppo_engine.pretrained.adapters import add_lora
from ppo_engine.pretrained.masters import to_compute_dtype
from ppo_engine.rollout import products
from ppo_engine.rollout.products import Products
from ppo_engine.settings.schema import LoraConfig
from ppo_kernels import can_pack

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
IDS = torch.arange(15).view(3, 5) * 7 % 199
FAMILIES = ["llama", "gpt2", "qwen2", "gemma2", "phi3", "gpt_neox", "lora"]


def model_of(family: str, dtype: torch.dtype = FP32) -> Any:
    if family != "lora":
        model = of_family(family)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
    else:
        pytest.importorskip("peft", reason="the optional package peft is not installed")
        config = LoraConfig(rank=3, target_modules=["q_proj", "v_proj", "o_proj"])
        model = add_lora(of_family("llama"), config, "CAUSAL_LM").eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
    return to_compute_dtype(model, dtype)


pytestmark = pytest.mark.skipif(not can_pack(FP32), reason="this CPU does not pack weights")
DTYPES = pytest.mark.parametrize("dtype", [d for d in (FP32, BF16) if can_pack(d)], ids=str)


def taken(model: nn.Module, dtype: torch.dtype = FP32) -> Products:
    found = Products(model, device=CPU, dtype=dtype)
    found.refresh()
    return found


def logits(model: Any, of: Products | None = None) -> Tensor:
    with torch.no_grad():
        if of is None:
            return model(input_ids=IDS).logits
        with of.active():
            return model(input_ids=IDS).logits


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of columns of each product, as they are computed."""
    widths: list[int] = []

    def counting(multiply: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def multiplied(*operands: Any) -> Tensor:
            found = multiply(*operands)
            widths.append(found.shape[-1])
            return found

        return multiplied

    monkeypatch.setattr(products, "packed_linear", counting(products.packed_linear))
    return widths


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_says_the_same(family, dtype):
    model = model_of(family, dtype)
    expected = logits(model)
    found = logits(model, taken(model, dtype))
    assert found.dtype == expected.dtype == dtype
    assert (found - expected).float().norm() <= 2 * rounding(dtype) * expected.float().norm()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gpt2", True), ("gemma2", True)])
@DTYPES
def test_an_optimizers_step_is_seen_after_refresh(family, tied, dtype):
    """Of an output layer that is the embedding, too."""
    model = model_of(family, dtype)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    ours = taken(model, dtype)
    before = logits(model, ours)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1).add_(0.02)
    ours.refresh()
    expected = logits(model)
    distance = (logits(model, ours) - expected).float().norm()
    assert distance <= 2 * rounding(dtype) * expected.float().norm()
    assert distance < 0.1 * (before - expected).float().norm()


@DTYPES
def test_a_gpus_weights_are_used_as_they_are(dtype):
    """As those of a CPU that cannot pack: nothing is replaced, nothing copied."""
    model = model_of("qwen2", dtype)
    assert taken(model, dtype).packed
    ours = Products(model, device=torch.device("cuda"), dtype=dtype)
    assert not ours.packed
    ours.refresh()
    with ours.active():
        assert not any("forward" in vars(module) for module in model.modules())
        assert not torch.is_grad_enabled()


def test_weights_of_another_dtype_stay_as_they_are():
    """Such as those that a family keeps in fp32."""
    model = Branches()
    model.two.bfloat16()
    assert [product.layers for product in taken(model)._products] == [[model.one]]


@pytest.mark.parametrize(
    ("family", "layer"),
    [("llama", [64, 32, 128, 32]), ("gpt2", [96, 32, 128, 32]), ("cohere", [192, 32, 32])],
)
def test_layers_of_one_input_are_one_product(family, layer, monkeypatch):
    """Query, key, value; gate, up; all five where attention and MLP are parallel."""
    model = model_of(family)
    ours = taken(model)
    widths = counted(monkeypatch)
    logits(model, ours)
    assert widths == [*layer, *layer, 259]


@DTYPES
def test_an_adapter_goes_along_with_its_base(dtype, monkeypatch):
    """Query, its A, key, value, its A, then the two Bs; the output projection and its A, its B."""
    model = model_of("lora", dtype)
    ours = taken(model, dtype)
    widths = counted(monkeypatch)
    logits(model, ours)
    assert sorted(widths) == sorted([70, 32, 16, 35, 32, 128, 32] * 2 + [259])


class Branches(nn.Module):
    """Two layers that read the same tensor, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 3), nn.Linear(8, 5, bias=False)
        self.config = None

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Tensor:
        x = input_ids[..., None].expand(*input_ids.shape, 8).float()
        return torch.cat((self.one(x), self.two(x.to(self.two.weight.dtype))), -1)


def test_each_layer_multiplies_the_input_it_gets():
    """Whatever the pass was like by which they were found to share it: another tensor, the same
    one twice or overwritten, the second layer first, or alone."""
    model = Branches()
    one, two = model.one, model.two
    x, y = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    ours = taken(model)

    def close(found: Tensor, layer: nn.Linear, x: Tensor) -> bool:
        expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
        return found.shape == expected.shape and torch.allclose(found, expected, 1e-5, 1e-5)

    with ours.active():
        for first, second in ((one, two), (two, one)):
            for layer, read in ((first, x), (second, y), (second, y), (first, y), (second, x)):
                assert close(layer(read), layer, read)
            made = first(x)
            x.mul_(-3)
            assert close(second(x), second, x) and not close(made, first, x)
        assert close(one(x[:, ::2, :]), one, x[:, ::2, :])


def test_nothing_outlives_the_input():
    """What was computed for a layer that does not ask for it goes with the tensor."""
    model = Branches()
    ours = taken(model)
    x = torch.randn(2, 8)
    with ours.active():
        model.one(x)
        ((_, waiting),) = [found for name, found in vars(x).items() if "product" in name]
        alive = [weakref.ref(x), *(weakref.ref(part) for part in waiting.values())]
        assert len(alive) == 2
        del x, waiting
        assert not any(ref() is not None for ref in alive)


def test_outside_and_after_an_error_the_model_is_untouched():
    model = model_of("llama")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    ours = taken(model)
    with pytest.raises(ZeroDivisionError), ours.active():
        assert "forward" in vars(model.lm_head)
        assert not torch.is_grad_enabled()
        1 / 0  # noqa: B018
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert torch.is_grad_enabled() and model(input_ids=IDS).logits.requires_grad
    ours.release()
    with pytest.raises(RuntimeError, match="refresh"), ours.active():
        pass
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_what_is_more_than_a_matrix_stays_as_it_is():
    """A class of its own, a forward that was replaced, a weight that is computed."""
    model = model_of("llama")
    layers = model.model.layers
    odd = Doubling(64, 32, bias=False)
    odd.weight = layers[0].mlp.down_proj.weight
    layers[0].mlp.down_proj = odd
    replaced = layers[1].mlp.down_proj
    replaced.forward = hooked = lambda x: -nn.Linear.forward(replaced, x)
    parametrize.register_parametrization(layers[1].mlp.up_proj, "weight", nn.Tanh())
    expected = logits(model)
    ours = taken(model)
    found = logits(model, ours)
    assert (found - expected).norm() <= rounding(FP32) * expected.norm()
    assert replaced.forward is hooked
    assert sum(len(product.layers) for product in ours._products) == 2 * 7 + 1 - 3
