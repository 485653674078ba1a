"""What people do to ops beside calling them as the examples do: it works, or it is told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import ppo_kernels
from ppo_kernels import (
    adamw,
    decode_attention,
    gae,
    kl_shaped_gae,
    linear_logprobs,
    linear_ppo_loss,
    pack_weight,
    packed_linear,
    pairwise_loss,
    ppo_policy_loss,
    ppo_value_loss,
    rms_norm,
    sample,
    swiglu,
    token_logprobs,
)

WIDTH, VOCAB = 8, 11


def made(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def targets(*shape: int) -> Tensor:
    return torch.randint(0, VOCAB, shape)


def _differentiable() -> dict[str, tuple[Callable[..., Tensor], Tensor]]:
    """Of an op the sum of what it gives, by `impl`, and what that is differentiated in."""
    logits, hidden, x = made(3, 4, VOCAB), made(3, 4, WIDTH), made(3, 4)
    weight, tokens, other = torch.randn(VOCAB, WIDTH), targets(3, 4), torch.randn(3, 4)
    return {
        "token_logprobs": (lambda i: token_logprobs(logits, tokens, impl=i).sum(), logits),
        "linear_logprobs": (
            lambda i: linear_logprobs(hidden, weight, tokens, impl=i).sum(), hidden,
        ),
        "linear_ppo_loss": (
            lambda i: linear_ppo_loss(hidden, weight, tokens, other, other, impl=i)[0], hidden,
        ),
        "ppo_policy_loss": (lambda i: ppo_policy_loss(x, other, other, impl=i)[0], x),
        "ppo_value_loss": (lambda i: ppo_value_loss(x, other, other, impl=i)[0], x),
        "pairwise_loss": (lambda i: pairwise_loss(x[0], x[1], impl=i)[0], x),
        "rms_norm": (lambda i: rms_norm(x, torch.ones(4), eps=1e-6, impl=i).sum(), x),
        "swiglu": (lambda i: swiglu(x, other, impl=i).sum(), x),
    }  # fmt: skip


DIFFERENTIABLE = _differentiable()


@pytest.mark.parametrize("op", DIFFERENTIABLE)
@pytest.mark.parametrize("impl", ["cpp"] if ppo_kernels.dispatch.cpu else [])
def test_second_derivatives_are_refused_and_not_left_out(op: str, impl: str) -> None:
    """As of a gradient penalty, on top of a gradient that came in as the constant 1; and where it
    is asked for by name, beside terms that have one."""
    value, x = DIFFERENTIABLE[op]

    def loss(impl: str) -> Tensor:
        return value(impl) + (x**3).sum()

    [gradient] = torch.autograd.grad(loss(impl), x, create_graph=True)
    [of_reference] = torch.autograd.grad(loss("reference"), x, create_graph=True)
    torch.testing.assert_close(gradient, of_reference, rtol=1e-4, atol=1e-5)
    for function in (gradient.square().sum(), gradient.sum()):
        with pytest.raises(RuntimeError, match=r"differentiated once.*impl='reference'"):
            torch.autograd.grad(function, x, retain_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            (loss(impl) + function).backward(retain_graph=True)
    (loss("reference") + of_reference.square().sum()).backward()


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_many_gradients_at_a_time_are_refused(op: str) -> None:
    value, x = DIFFERENTIABLE[op]
    with pytest.raises(RuntimeError, match="one gradient at a time"):
        torch.autograd.grad(value("auto"), x, torch.ones(3), is_grads_batched=True)


@pytest.mark.skipif(not ppo_kernels.dispatch.cpu, reason="no compiled kernels")
@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, torch.func.jacrev])
def test_transforms_of_functions_are_refused(transform: Callable[..., Any]) -> None:
    x, other = torch.randn(3, 4), torch.ones(3, 4)
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda x: gae(x, other)[0].sum(),
        lambda x: rms_norm(x, torch.ones(4), eps=1e-6).sum(),
        lambda x: ppo_policy_loss(x, other, other)[0],
    ]
    if transform is torch.func.vmap:
        x = torch.randn(2, 3, 4)
    for call in calls:
        with pytest.raises(RuntimeError, match=r"vmap.*impl='reference'"):
            transform(call)(x)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: token_logprobs(x, targets(3), impl="cpp"),
        lambda x: rms_norm(x, torch.ones(VOCAB), eps=1e-6, impl="cpp"),
        lambda x: swiglu(x, torch.ones(3, VOCAB), impl="cpp"),
        lambda x: ppo_policy_loss(x, x, x, impl="cpp"),
    ],
)
@pytest.mark.skipif(not ppo_kernels.dispatch.cpu, reason="no compiled kernels")
def test_forward_mode_is_refused_and_not_left_out(call: Callable[[Tensor], Any]) -> None:
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.randn(3, VOCAB), torch.ones(3, VOCAB))
        with pytest.raises(RuntimeError, match="forward-mode"):
            call(x)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x, s: ppo_policy_loss(x, None, x), "old_logprobs"),
        (lambda x, s: ppo_policy_loss(x, x, None), "advantages"),
        (lambda x, s: ppo_value_loss(x, None, x), "old_values"),
        (lambda x, s: ppo_value_loss(x, x, None), "returns"),
        (lambda x, s: gae(None, x), "rewards"),
        (lambda x, s: gae(x, None), "values"),
        (lambda x, s: kl_shaped_gae(s, x, None, x, kl_coef=0.1), "ref_logprobs"),
        (lambda x, s: kl_shaped_gae(s, x, x, None, kl_coef=0.1), "values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_missing_is_named(call: Callable[..., Any], name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a tensor, but is NoneType"):
        call(torch.randn(3, 4), torch.randn(3))


class Subclass(Tensor):
    """Whose memory is not for everybody to read, as a DTensor's."""


def test_tensors_without_memory_of_their_own_are_refused() -> None:
    strange = torch.randn(4, 8).as_subclass(Subclass)
    packed = pack_weight(torch.randn(6, 8), dtype=torch.float32)
    query, keys = torch.randn(2, 2, 8), torch.randn(2, 1, 3, 8)
    lengths = torch.tensor([1, 2])
    weights = [torch.randn(4, 8)]
    moments = [[torch.zeros(4, 8)] for _ in range(2)]
    for call in (
        lambda: packed_linear(strange, packed),
        lambda: decode_attention(query.as_subclass(Subclass), keys, keys, lengths, scale=1.0),
        lambda: adamw(
            weights, [strange], *moments, step=1, learning_rate=1e-3, betas=(0.9, 0.99), eps=1e-8,
            weight_decay=0.0,
        ),
        lambda: make_fx(lambda x: packed_linear(x, packed), tracing_mode="fake")(torch.randn(4, 8)),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="must be a plain tensor, but is"):
            call()
    with pytest.raises(TypeError, match="weight must be a PackedWeight, of pack_weight, but is Te"):
        packed_linear(torch.randn(4, 8), torch.randn(6, 8))


def test_graphs_that_are_recorded_hold_the_ops() -> None:
    """And not the empty tensors that kernels fill."""
    x, again, other = torch.randn(3, 4), torch.randn(3, 4), torch.ones(3, 4)
    packed = pack_weight(torch.randn(6, 4), dtype=torch.float32)
    for op in (
        lambda x: gae(x, other)[0],
        lambda x: rms_norm(x, torch.ones(4), eps=1e-6),
        lambda x: ppo_policy_loss(x, other, other)[0],
    ):
        for graph in (make_fx(op)(x), torch.jit.trace(op, x, check_trace=False)):
            torch.testing.assert_close(graph(again), op(again))
    slots, length = torch.randn(3, 1, 2, 4), torch.tensor([2, 1, 2])

    def stepped(x: Tensor, impl: str) -> Tensor:
        given: Any = {"step": 1, "learning_rate": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
        weights, moments = other.clone(), (torch.zeros(3, 4), torch.zeros(3, 4))
        adamw([weights], [x], *[[m] for m in moments], weight_decay=0.0, **given, impl=impl)
        return weights

    alone: list[Callable[[Tensor, str], Tensor]] = [
        stepped,
        lambda x, impl: packed_linear(x, packed, impl=impl),
        lambda x, impl: decode_attention(x[:, None], slots, slots, length, scale=1.0, impl=impl),
    ]
    for call in alone:
        with pytest.raises(TypeError, match="make_fx"):
            make_fx(partial(call, impl="cpp"))(x)
        with pytest.raises(TypeError, match=r"jit\.trace"):
            torch.jit.trace(lambda x, call=call: call(x, "cpp"), x)
    graph = make_fx(partial(alone[1], impl="reference"))(x)
    torch.testing.assert_close(graph(again), alone[1](again, "reference"))


def test_a_gradient_that_keeps_its_graph_in_a_checkpoint() -> None:
    """Which lets what is saved be read once."""
    x, weight = made(3, 4), torch.ones(4)

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(lambda x: rms_norm(x, weight, eps=1e-6), x, use_reentrant=False)

    [found] = torch.autograd.grad(checkpointed(x).square().sum(), x, create_graph=True)
    [expected] = torch.autograd.grad(rms_norm(x, weight, eps=1e-6).square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_a_view_that_is_negated_when_it_is_read() -> None:
    z = torch.randn(3, 4, dtype=torch.complex64)
    x = z.conj().imag
    assert x.is_neg()
    tokens = torch.tensor([0, 3, 1])
    for op in (
        lambda x: gae(x, x)[0],
        lambda x: swiglu(x, x),
        lambda x: token_logprobs(x, tokens),
    ):
        torch.testing.assert_close(op(x), op(x.resolve_neg().clone()))


def test_log_probs_can_be_written_to() -> None:
    hidden, weight, tokens = made(3, 4, WIDTH), made(VOCAB, WIDTH), targets(3, 4)
    mask = torch.rand(3, 4) > 0.5
    logprobs = linear_logprobs(hidden, weight, tokens)
    logprobs[~mask] = 0
    logprobs.sum().backward()
    expected = linear_logprobs(hidden, weight, tokens)[mask].sum()
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(expected, hidden)[0])


def test_a_gradient_that_is_changed_in_place_changes_no_graph_that_stays() -> None:
    x, other = made(3, 4), torch.randn(3, 4)
    loss = ppo_policy_loss(x, other, other)[0]
    [first] = torch.autograd.grad(loss, x, retain_graph=True)
    expected = first.clone()
    first.mul_(5)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


def test_samples_of_logits_that_require_a_gradient_in_a_graph() -> None:
    layer = torch.nn.Linear(WIDTH, VOCAB)

    def drawn(x: Tensor) -> tuple[Tensor, Tensor]:
        return sample(layer(x), seed=1, offset=0)

    x = torch.randn(4, WIDTH)
    tokens, logprobs = torch.compile(drawn, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(tokens, drawn(x)[0]) and not logprobs.requires_grad


def test_shapes_without_numbers() -> None:
    hidden, weight = torch.randn(3, 4, 0, requires_grad=True), torch.randn(VOCAB, 0)
    found = linear_logprobs(hidden, weight, targets(3, 4))
    torch.testing.assert_close(found, torch.full((3, 4), -torch.tensor(float(VOCAB)).log().item()))
    on_meta = {"hidden": hidden.to("meta"), "weight": weight.to("meta")}
    assert linear_logprobs(**on_meta, targets=targets(3, 4).to("meta")).shape == (3, 4)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_torchs_default_dtype_changes_nothing(impl: str) -> None:
    """Where it is bfloat16, as people set it to make a model."""
    mixing = sys.modules["ppo_kernels.adamw"]._mixing  # which keeps what it was asked for
    x, other, tokens = made(3, 4), torch.randn(3, 4), targets(3, 4)
    hidden, weight = made(3, 4, WIDTH), made(VOCAB, WIDTH)

    def stepped(bits: int) -> list[Tensor]:
        weights, grads = [other.clone()], [x.detach()]
        moments: Any = ([torch.zeros_like(other)], [torch.zeros_like(other)])
        if bits == 8:
            moments = [[part] for part in ppo_kernels.zero_moments(other)]
        scales = {"moment_scales": moments[2]} if bits == 8 else {}
        for step in range(1, 4):
            adamw(
                weights, grads, *moments[:2], **scales, step=step, learning_rate=1e-2,
                betas=(0.8125, 0.998), eps=1e-8, weight_decay=0.1, impl=impl,
            )  # fmt: skip
        return [*weights, *(part[0].float() for part in moments)]

    calls: list[Callable[[], Any]] = [
        lambda: gae(x.detach(), other, impl=impl),
        lambda: token_logprobs(hidden, tokens % WIDTH, return_entropy=True, impl=impl),
        lambda: linear_ppo_loss(hidden, weight, tokens, other, other, impl=impl),
        lambda: ppo_policy_loss(x, other, other, clip_range=[0.2, 0.3], dual_clip=3.0, impl=impl),
        lambda: pairwise_loss(x[0], x[1], impl=impl),
        lambda: sample(weight.detach(), seed=3, offset=1, top_p=0.9, impl=impl),
        lambda: rms_norm(hidden, torch.ones(WIDTH), eps=1e-6, impl=impl),
        lambda: stepped(32),
        lambda: stepped(8),
    ]
    mixing.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [call() for call in calls]
    finally:
        torch.set_default_dtype(torch.float32)
        mixing.cache_clear()
    for call, given in zip(calls, found, strict=True):
        torch.testing.assert_close(given, call(), rtol=0, atol=0)
