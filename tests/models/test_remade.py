"""Outputs that a pass does not keep for its gradients: those are the same bits."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from families import of_family
from torch import Tensor

from ppo_engine.models.reader import Reader
from ppo_engine.models.remade import Remade
from ppo_engine.models.token_rows import scored
from ppo_engine.pretrained.adapters import add_lora
from ppo_engine.pretrained.architecture import checkpoint_gradients
from ppo_engine.settings.schema import LoraConfig
from ppo_kernels import swiglu

TEXTS = [scored(list(range(3, 3 + length))) for length in (11, 7, 12)]


def gradients(model: Any, *, twice: bool) -> list[Tensor]:
    """Of a pass, or of it and of the same once more."""
    reader = Reader(model)
    model.zero_grad()
    loss = reader.read(reader.stack(TEXTS)).last_hidden_state.float().logsumexp(-1).sum()
    loss.backward(retain_graph=twice)
    if twice:
        loss.backward()
    return [x.grad.clone() for x in model.parameters() if x.grad is not None]


@pytest.mark.parametrize("kind", ["whole", "lora", "checkpointed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "bloom"])
def test_gradients_of_a_model_are_the_same_bits(
    family: str, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = of_family(family)
    if kind == "lora":
        target = "query_key_value" if family == "bloom" else "q_proj"
        model = add_lora(model, LoraConfig(target_modules=[target]), "CAUSAL_LM")
    elif kind == "checkpointed":
        checkpoint_gradients(model)
    model.to(dtype).train()
    twice = kind != "checkpointed"  # whose layers can be run again once
    found = gradients(model, twice=twice)
    made: list[Tensor] = []
    monkeypatch.setattr(
        Remade, "__call__", lambda self, kernel, *x: made.append(kernel(*x)) or made[-1]
    )
    assert len(found) and all(map(torch.equal, found, gradients(model, twice=twice)))
    assert bool(made) == (family != "bloom")


def halves() -> tuple[Tensor, ...]:
    return torch.randn(3, 4, 8, requires_grad=True).unbind()


def test_an_output_that_only_products_keep_is_let_go_and_made_once_for_all_of_them() -> None:
    gate, up, weight = (x.detach().requires_grad_() for x in halves())
    expected = torch.autograd.grad(
        sum((swiglu(gate, up) @ x).exp().sum() for x in (weight.T, weight.T[:, :2])),
        (gate, up, weight),
    )
    remade = Remade()
    made: list[weakref.ref[Tensor]] = []

    def counted(*halves: Tensor) -> Tensor:
        found = swiglu(*halves)
        made.append(weakref.ref(found))
        return found

    with remade.active():
        output = remade(counted, gate, up)
        loss = (output @ weight.T).exp().sum() + (output[1:] @ weight.T[:, :2]).exp().sum()
        loss = loss + (output[:1] @ weight.T[:, :2]).exp().sum()
        del output
    assert [x() for x in made] == [None]
    found = torch.autograd.grad(loss, (gate, up, weight), retain_graph=True)
    assert [x() for x in made] == [None, None]  # though `loss` keeps the graph
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_memory_that_something_else_has_now_is_not_taken_for_the_output() -> None:
    gate, up, weight = (x.detach().requires_grad_() for x in halves())
    remade = Remade()
    with remade.active():
        for _ in range(1000):
            address = remade(swiglu, gate, up).data_ptr()
            other = torch.full((4, 8), 2.0)
            if other.data_ptr() == address:
                break
        else:
            pytest.skip("memory was not used again")
        (other @ weight.T).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.full((4, 8), 8.0))
    assert not remade._outputs


def test_outside_and_without_gradients_nothing_is_kept_of_it() -> None:
    remade = Remade()
    gate, up, _ = halves()
    outside = remade(swiglu, gate, up)
    with torch.no_grad(), remade.active():
        within = remade(swiglu, gate, up)
        assert not remade._outputs
    assert torch.equal(outside, within)


def test_a_pass_whose_gradients_nobody_makes_leaves_nothing() -> None:
    x = torch.ones(3, requires_grad=True)
    with Remade().active():
        y = x.exp()  # which keeps what it gives
    there = weakref.ref(y)
    del y
    assert there() is None


@pytest.mark.parametrize("changed", ["input", "output", "another"])
def test_what_is_changed_in_its_place_is_noticed(changed: str) -> None:
    """An output that was changed is kept as it is then, as without this."""
    gate, up, weight = (x.detach().requires_grad_() for x in halves())
    remade = Remade()
    with remade.active():
        inner = 2 * gate
        output = remade(swiglu, inner, up)
        if changed == "output":
            output.mul_(3)
        factor = weight.exp()
        loss = ((output @ weight.T) @ factor).sum()
        with torch.no_grad():
            if changed == "input":
                inner.add_(1)
            elif changed == "another":
                factor.add_(1)
    if changed == "output":
        [found] = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            output = 3 * swiglu(2 * gate, up)
        loss = ((output @ weight.T) @ weight.exp()).sum()
        torch.testing.assert_close(found, *torch.autograd.grad(loss, weight))
    else:
        with pytest.raises(RuntimeError, match=r"changed in its place"):
            loss.backward()
