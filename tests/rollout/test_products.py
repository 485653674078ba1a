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
from transformers import AttentionInterface

from ppo_engine.models.precision import rounding
from ppo_engine.pretrained.adapters import add_lora
from ppo_engine.rollout import products
from ppo_engine.rollout.products import Products
from ppo_engine.settings.schema import LoraConfig
from ppo_kernels import can_pack

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
IDS = torch.arange(15).view(3, 5) * 7 % 199
FAMILIES = ["llama", "gpt2", "qwen2", "gemma2", "phi3", "gpt_neox", "lora"]


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:
    """In the values' dtype, as autocast does: rotated queries and keys are fp32."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.to(value.dtype).repeat_interleave(groups, 1) for x in (key, value))
    found = torch.nn.functional.scaled_dot_product_attention(
        query.to(value.dtype), key, value, is_causal=True, scale=given["scaling"]
    )
    return found.transpose(1, 2).contiguous(), None


AttentionInterface.register("values_dtype", _attend)


def model_of(family: str) -> Any:
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
    model.set_attn_implementation("values_dtype")
    return model


@pytest.fixture(params=["packed", "plain"])
def packed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Weights packed, and not: what a GPU does, and a CPU that cannot pack."""
    if request.param == "plain":
        monkeypatch.setattr(products, "can_pack", lambda dtype: False)
    elif not products.can_pack(FP32):
        pytest.skip("this CPU does not pack weights")
    return request.param == "packed"


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

    for place, name in ((products, "packed_linear"), (products.F, "linear")):
        monkeypatch.setattr(place, name, counting(getattr(place, name)))
    return widths


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_says_the_same(family, packed):
    model = model_of(family)
    expected = logits(model)
    found = logits(model, taken(model))
    assert found.dtype == FP32
    assert (found - expected).norm() <= rounding(FP32) * expected.norm()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_it_says_what_it_does_under_autocast(family, packed):
    model = model_of(family)
    with torch.autocast("cpu", dtype=BF16):
        expected = logits(model)
    found = logits(model, taken(model, BF16))
    assert found.dtype == expected.dtype == BF16
    assert (found - expected).float().norm() <= 2 * rounding(BF16) * expected.float().norm()


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gpt2", True), ("gemma2", True)])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_an_optimizers_step_is_seen_after_refresh(family, tied, dtype, packed):
    """Of an output layer that is the embedding, too."""
    model = model_of(family)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    ours = taken(model, dtype)
    before = logits(model, ours)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1).add_(0.02)
    ours.refresh()
    with torch.autocast("cpu", dtype=BF16, enabled=dtype == BF16):
        expected = logits(model)
    distance = (logits(model, ours) - expected).float().norm()
    assert distance <= 2 * rounding(dtype) * expected.float().norm()
    assert distance < 0.1 * (before - expected).float().norm()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_cpu_packs_what_it_can(dtype):
    assert taken(model_of("qwen2"), dtype).packed == can_pack(dtype)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_on_a_gpu_copies_keep_their_addresses():
    """A captured graph reads them, also after `release`. (The tensors of this GPU are a CPU's.)"""
    ours = Products(model_of("qwen2"), device=torch.device("cuda"), dtype=BF16)
    assert not ours.packed
    ours.refresh()

    def addresses() -> list[int]:
        copies = [x for product in ours._products for x in (product._weight, product._bias)]
        return [x.data_ptr() for x in copies if x is not None]

    before = addresses()
    ours.release()
    with ours.active():
        assert addresses() == before
    ours.refresh()
    assert addresses() == before


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_weights_of_the_compute_dtype_are_not_copied(dtype, monkeypatch):
    monkeypatch.setattr(products, "can_pack", lambda dtype: False)
    model = model_of("gpt2").to(dtype)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert all(p._weight.data_ptr() in own for p in taken(model, dtype)._products)


@pytest.mark.parametrize(
    ("family", "layer"),
    [("llama", [64, 32, 128, 32]), ("gpt2", [96, 32, 128, 32]), ("cohere", [192, 32, 32])],
)
def test_layers_of_one_input_are_one_product(family, layer, packed, monkeypatch):
    """Query, key, value; gate, up; all five where attention and MLP are parallel."""
    model = model_of(family)
    ours = taken(model, BF16)
    widths = counted(monkeypatch)
    logits(model, ours)
    assert widths == [*layer, *layer, 259]


def test_an_adapter_goes_along_with_its_base(packed, monkeypatch):
    """Query, its A, key, value, its A, then the two Bs. The A of the output projection reads a
    cast of what its base reads, which in bf16 is another tensor."""
    model = model_of("lora")
    ours = taken(model, BF16)
    widths = counted(monkeypatch)
    logits(model, ours)
    assert sorted(widths) == sorted([70, 32, 16, 32, 3, 32, 128, 32] * 2 + [259])


def test_weights_that_would_not_be_copied_are_not_copied_for_one_product(monkeypatch):
    monkeypatch.setattr(products, "can_pack", lambda dtype: False)
    model = model_of("llama")
    ours = taken(model)
    widths = counted(monkeypatch)
    logits(model, ours)
    assert widths == [32, 16, 16, 32, 64, 64, 32] * 2 + [259]


class Branches(nn.Module):
    """Two layers that read the same tensor, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 3), nn.Linear(8, 5, bias=False)
        self.config = None

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Tensor:
        x = input_ids[..., None].expand(*input_ids.shape, 8).float()
        return torch.cat((self.one(x), self.two(x)), -1)


def test_each_layer_multiplies_the_input_it_gets(packed):
    """Whatever the pass was like by which they were found to share it: another tensor, the same
    one twice or overwritten, the second layer first, or alone."""
    model = Branches()
    one, two = model.one, model.two
    x, y = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    ours = taken(model, BF16)

    def close(found: Tensor, layer: nn.Linear, x: Tensor) -> bool:
        expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
        return found.shape == expected.shape and torch.allclose(found.float(), expected, 0, 0.05)

    with ours.active():
        for first, second in ((one, two), (two, one)):
            for layer, read in ((first, x), (second, y), (second, y), (first, y), (second, x)):
                assert close(layer(read), layer, read)
            made = first(x)
            x.mul_(-3)
            assert close(second(x), second, x) and not close(made, first, x)
        assert close(one(x[:, ::2, :]), one, x[:, ::2, :])


def test_nothing_outlives_the_input(packed):
    """What was computed for a layer that does not ask for it goes with the tensor."""
    model = Branches()
    ours = taken(model, BF16)
    x = torch.randn(2, 8)
    with ours.active():
        model.one(x)
        ((_, waiting),) = [found for name, found in vars(x).items() if "product" in name]
        alive = [weakref.ref(x), *(weakref.ref(part) for part in waiting.values())]
        assert len(alive) == 2
        del x, waiting
        assert not any(ref() is not None for ref in alive)


def test_outside_and_after_an_error_the_model_is_untouched(packed):
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


def test_what_is_more_than_a_matrix_stays_as_it_is(packed):
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
