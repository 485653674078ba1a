"""Log-probs of chosen tokens, and the entropy, from logits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ppo_kernels import checks, dispatch, reference
from ppo_kernels.fused_loss import without_none
from ppo_kernels.once import once_differentiable
from ppo_kernels.reference import IGNORED_TARGET

OP = "token_logprobs"


@overload
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: Literal[False] = False,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> Tensor: ...


@overload
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at the targets, and the entropy of that distribution.

    log p_y = z_y / T - log sum_j exp(z_j / T),  H = -sum_j p_j log p_j; one read of the logits.
    Both are differentiable in the logits, which are kept for the backward pass (one read of them
    and one write of their gradient). A row whose incoming gradients are all 0 gets a gradient of 0
    without being read.

    Args:
        logits: `[..., V]`, any floating dtype. Read in place if the last dimension is
            contiguous, whatever the strides of the others; copied if not. -inf is allowed
            (a masked vocabulary): probability 0.
        targets: `[...]` int32 or int64, 0 to V - 1; or -100, which is ignored: its row is not
            read, its log-prob and entropy are 0.
        temperature: positive.
        return_entropy: whether to return the entropy too, in nats.
        inplace_backward: whether the backward pass may write the gradient over the logits, which
            saves a tensor of their size. Whatever needs them afterwards (another backward pass, or
            the op they came from) gets autograd's error of an in-place modification. Has no effect
            on a leaf or a view of one, on logits that are not contiguous, on "reference" and under
            torch.compile.
        impl: "auto", or one of `implementations()["token_logprobs"]`.

    Returns:
        logprobs, or (logprobs, entropy), shaped like the targets, float32 (float64 for float64
        logits).

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or values that do not fit, and, on the
            CPU, for a target that is no class.
        RuntimeError: for an `impl` that cannot run, with the reason.
    """
    checks.tensor(OP, "logits", logits)
    if logits.dim() == 0:
        raise ValueError(f"{OP}: logits must be [..., V], but has no dimension")
    checks.tensor(
        OP, "targets", targets, checks.INDEX_DTYPES, shape=tuple(logits.shape[:-1]),
        like=("logits", logits),
    )  # fmt: skip
    impl = dispatch.resolve(OP, impl, logits.device)
    if impl == "reference":
        if not torch.compiler.is_compiling():
            checks.number(OP, "temperature", temperature, gt=0.0)
            check_targets(OP, targets, logits.shape[-1])
        return reference.token_logprobs(
            logits, targets, temperature=temperature, return_entropy=return_entropy
        )
    if not dispatch.eager(logits, targets):
        logprobs, entropy, _ = _forward_op(
            logits, targets, dispatch.traced(temperature), return_entropy, impl
        )
    elif logits.requires_grad and torch.is_grad_enabled():
        logprobs, entropy = _TokenLogprobs.apply(
            logits, targets, temperature, return_entropy, inplace_backward, impl
        )
    else:
        logprobs, entropy, _ = forward(logits, targets, temperature, return_entropy, False, impl)
    return (logprobs, entropy) if return_entropy else logprobs


def check_targets(op: str, targets: Tensor, vocab: int) -> None:
    """Raise ValueError for the first that is not a class; trusted where not on the CPU."""
    if targets.device.type == "cpu":
        wrong = ((targets < 0) & (targets != IGNORED_TARGET)) | (targets >= vocab)
        if wrong.any():
            raise _no_class(op, targets, int(wrong.flatten().int().argmax()), vocab)


def _no_class(op: str, targets: Tensor, at: int, vocab: int) -> ValueError:
    place = [int(i) for i in torch.unravel_index(torch.tensor(at), targets.shape)]
    value = int(targets.flatten()[at])
    return ValueError(
        f"{op}: targets{place or ''} is {value}, but must be a class, 0 to {vocab - 1}, or -100 "
        "to be ignored"
    )


# --- C++ on the CPU: csrc/cpu/logprob.cpp; Triton on a GPU: triton/logprob.py ---------------------


def forward(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    want_entropy: bool,
    want_state: bool,
    impl: str,
    softcap: float = math.inf,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(logprobs, entropy, state for `backward`), None where not wanted. An infinite `softcap` means
    none."""
    checks.number(OP, "temperature", temperature, gt=0.0)
    logits, targets = dispatch.side_by_side(logits), targets.to(torch.int64).contiguous()
    dtype = dispatch.accumulator(logits.dtype)
    logprobs = dispatch.empty_like(targets, dtype)
    entropy = torch.empty_like(logprobs) if want_entropy else None
    state = logprobs.new_empty((2, *targets.shape)) if want_state else None
    if impl == "triton":
        check_targets(OP, targets, logits.shape[-1])
        dispatch.triton_kernels("logprob").token_logprobs(
            logits, targets, temperature, softcap, logprobs, entropy, state
        )
        return logprobs, entropy, state
    vocab = logits.shape[-1]
    wrong = dispatch.cpu.token_logprobs(
        logits, targets, temperature, softcap, logprobs, entropy, state, None, 0, vocab,
        torch.get_num_threads(),
    )  # fmt: skip
    if wrong >= 0:
        raise _no_class(OP, targets, wrong, vocab)
    return logprobs, entropy, state


def forward_of_tiles(
    tiles: Iterable[tuple[int, Tensor]],
    vocab: int,
    targets: Tensor,
    temperature: float,
    softcap: float,
    logprobs: Tensor,
    entropy: Tensor,
) -> None:
    """The same in C++ for logits `[n, …]` that come in tiles of the `vocab` classes, each with the
    index of its first class; fills the last two arguments. The targets have been checked
    already."""
    sums = logprobs.new_empty(*targets.shape, 4, dtype=torch.float64)
    for first, logits in tiles:
        dispatch.cpu.token_logprobs(
            logits, targets, temperature, softcap, logprobs, entropy, None, sums, first, vocab,
            torch.get_num_threads(),
        )  # fmt: skip


def backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    logprobs: Tensor,
    entropy: Tensor | None,
    state: Tensor,
    temperature: float,
    impl: str,
    inplace: bool = False,
    softcap: float = math.inf,
) -> Tensor:
    """The gradient of the logits, contiguous; with `inplace`, written over them."""
    logits, targets = dispatch.side_by_side(logits), targets.to(torch.int64).contiguous()
    if grad_logprobs is not None:
        grad_logprobs = grad_logprobs.contiguous()
    if grad_entropy is not None:
        grad_entropy = grad_entropy.contiguous()
    grad_logits = logits.detach() if inplace else dispatch.empty_like(logits, logits.dtype)
    arguments = (
        logits, targets, temperature, softcap, grad_logprobs, grad_entropy, logprobs, entropy,
        state, grad_logits,
    )  # fmt: skip
    if impl == "triton":
        dispatch.triton_kernels("logprob").token_logprobs_backward(*arguments)
    else:
        dispatch.cpu.token_logprobs_backward(*arguments, torch.get_num_threads())
    return grad_logits


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        want_entropy: bool,
        inplace: bool,
        impl: str,
    ) -> tuple[Tensor, Tensor | None]:
        logprobs, entropy, state = forward(logits, targets, temperature, want_entropy, True, impl)
        ctx.save_for_backward(logits, targets, logprobs, entropy, state)
        ctx.temperature, ctx.impl = temperature, impl
        whole = logits if logits._base is None else logits._base
        ctx.inplace = inplace and logits.is_contiguous() and not whole.is_leaf
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 6
        logits, targets, logprobs, entropy, state = ctx.saved_tensors
        grad = backward(
            grad_logprobs, grad_entropy, logits, targets, logprobs, entropy, state,
            ctx.temperature, ctx.impl, ctx.inplace,
        )  # fmt: skip
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        return grad, None, None, None, None, None


# --- The same under torch.compile -----------------------------------------------------------------


@torch.library.custom_op(
    "ppo_kernels::token_logprobs", mutates_args=(), device_types=dispatch.DEVICES
)
def _forward_op(
    logits: Tensor, targets: Tensor, temperature: Tensor, want_entropy: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    return without_none(forward(logits, targets, temperature.item(), want_entropy, True, impl))


@_forward_op.register_fake
def _(logits, targets, temperature, want_entropy, impl):  # type: ignore[no-untyped-def]
    dtype = dispatch.accumulator(logits.dtype)
    return (
        dispatch.empty_like(targets, dtype),
        logits.new_empty(targets.shape if want_entropy else (0,), dtype=dtype),
        logits.new_empty((2, *targets.shape), dtype=dtype),
    )


@torch.library.custom_op(
    "ppo_kernels::token_logprobs_backward", mutates_args=(), device_types=dispatch.DEVICES
)
def _backward_op(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    state: Tensor,
    temperature: Tensor,
    impl: str,
) -> Tensor:
    return backward(
        grad_logprobs, grad_entropy, logits, targets, logprobs, entropy, state, temperature.item(),
        impl,
    )  # fmt: skip


@_backward_op.register_fake
def _(grad_logprobs, grad_entropy, logits, *rest):  # type: ignore[no-untyped-def]
    return dispatch.empty_like(logits, logits.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, temperature, ctx.want_entropy, ctx.impl = inputs
    ctx.save_for_backward(logits, targets, *output, temperature)


def _backward_of_op(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, None, None, None, None]:
    grad_entropy = grad_entropy if ctx.want_entropy else None
    grad = _backward_op(grad_logprobs, grad_entropy, *ctx.saved_tensors, ctx.impl)
    return grad, None, None, None, None


_forward_op.register_autograd(_backward_of_op, setup_context=_save)
