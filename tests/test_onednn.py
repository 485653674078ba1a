"""`ppo_kernels.onednn`: values and gradients of torch's own products, and who uses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import of_family
from torch import Tensor

from ppo_engine.models.fused import Fused
from ppo_kernels import head, linear_logprobs, linear_ppo_loss, onednn


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of what oneDNN multiplies, on whichever CPU."""
    product, found = onednn.product, []

    def counted(x: Tensor, *args: Any) -> Tensor:
        found.append(x.shape)
        return product(x, *args)

    try:
        product(torch.ones(2, 3), torch.ones(4, 3))
    except (RuntimeError, AttributeError, TypeError):
        pytest.skip("torch does not have the operator")
    monkeypatch.setattr(onednn, "product", counted)
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    return found


def results(linear: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """The product and its gradients, in the order of the arguments."""
    leaves = [y.detach().requires_grad_() for y in (x, weight, bias) if y is not None]
    found = linear(*leaves)
    # Of no simple strides, as after a transposition.
    upstream = torch.linspace(-1, 1, found.numel()).view(found.mT.shape).mT
    return [found.detach(), *torch.autograd.grad(found, leaves, upstream)]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 24), (3, 40, 24), (2, 2, 33, 24)], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_values_and_gradients(
    shape: tuple[int, ...], has_bias: bool, strided: bool, products: list[torch.Size]
) -> None:
    x, weight = torch.randn(shape), torch.randn(10, 24)
    bias = torch.randn(10) if has_bias else None
    if strided:
        x, weight = torch.randn(*shape[:-1], 48)[..., ::2], torch.randn(24, 10).t()
    found = results(onednn.linear, x, weight, bias)
    assert len(products) == 3  # forward, and two gradients
    exact_bias = None if bias is None else bias.double()
    expected = results(F.linear, x.double(), weight.double(), exact_bias)
    for y, exact in zip(found, expected, strict=True):
        assert (y - exact).norm() <= 4e-7 * exact.norm()


def test_only_gradients_that_something_needs_are_made(products: list[torch.Size]) -> None:
    x, weight = torch.randn(64, 24), torch.randn(10, 24, requires_grad=True)
    onednn.linear(x, weight).sum().backward()
    assert products == [(64, 24), (10, 64)]


def test_few_rows_and_other_dtypes_are_torchs(products: list[torch.Size]) -> None:
    for rows, dtype in ((63, torch.float32), (64, torch.bfloat16), (64, torch.float64)):
        x, weight = torch.randn(rows, 24).to(dtype), torch.randn(10, 24).to(dtype)
        assert torch.equal(onednn.linear(x, weight), F.linear(x, weight))
    assert not products


def test_nothing_to_add_up_is_torchs(products: list[torch.Size]) -> None:
    """oneDNN refuses it."""
    assert torch.equal(onednn.linear(torch.ones(100, 0), torch.ones(7, 0)), torch.zeros(100, 7))
    assert not products


def test_it_is_torchs_where_it_is_not_faster(
    products: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "is_faster", lambda: False)
    x, weight, bias = torch.randn(64, 24), torch.randn(10, 24), torch.randn(10)
    assert torch.equal(onednn.linear(x, weight, bias), F.linear(x, weight, bias))
    assert not products


@pytest.mark.parametrize("told", ["AuthenticAMD", "GenuineIntel", None])
def test_it_is_for_cpus_of_amd(
    told: str | None, products: list[torch.Size], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the question itself
    if told:
        (tmp_path / "cpuinfo").write_text(f"vendor_id : {told}")
    monkeypatch.setattr(onednn, "_CPU_INFO", tmp_path / "cpuinfo")
    for avx512 in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda avx512=avx512: avx512)
        # Past the cache.
        assert onednn.is_faster.__wrapped__() == (avx512 and told == "AuthenticAMD")


@torch.no_grad()
def test_passes_of_a_float32_model_use_it(products: list[torch.Size]) -> None:
    model: Any = of_family("qwen2")  # some of its layers have a bias
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    ids = torch.arange(80).view(2, 40)
    logits = model(ids).logits
    with Fused(model, torch.float32, products=False).active():
        model(ids)
    assert not products
    with Fused(model, torch.float32).active():
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4)
    linear = [x for x in model.modules() if isinstance(x, torch.nn.Linear)]
    assert len(products) == len(linear)
    with Fused(model.bfloat16(), torch.bfloat16).active():
        assert not any("forward" in vars(x) for x in linear)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("tokens", [63, 300])
def test_the_heads_products_are_its_where_tokens_are_enough(
    tokens: int, has_bias: bool, products: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_TILE_BYTES", 256 * 40 * 4)  # a chunk's logits are several tiles
    hidden, weight = torch.randn(tokens, 16), torch.randn(100, 16)
    bias = torch.randn(100) if has_bias else None
    targets, advantages = torch.randint(100, (tokens,)), torch.randn(tokens)

    def results(dtype: torch.dtype) -> list[Tensor]:
        given = (hidden, weight, bias)
        leaves = [None if x is None else x.to(dtype).requires_grad_() for x in given]
        loss, _ = linear_ppo_loss(
            leaves[0], leaves[1], targets, None, advantages.to(dtype), bias=leaves[2]
        )
        return [loss, *torch.autograd.grad(loss, [x for x in leaves if x is not None])]

    found, expected = results(torch.float32), results(torch.float64)
    assert len(products) == (0 if tokens < 64 else 2 * (2 + 1))  # of two chunks
    for x, exact in zip(found, expected, strict=True):
        assert (x - exact).norm() <= 1e-6 * exact.norm()
    linear_logprobs(hidden, weight, targets, bias=bias)
    assert (len(products) > 8) == (tokens >= 64)
