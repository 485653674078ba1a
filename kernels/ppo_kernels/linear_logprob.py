"""Log-probs and entropy from hidden states, without ever holding all logits.

A chunk of tokens at a time (`head.py`): one matrix product computes its logits, the kernels of
`token_logprobs` read them and overwrite them with their gradient, and two products turn that into
the gradients of hidden states and weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ppo_kernels import checks, dispatch, logprob, ppo_loss, reference
from ppo_kernels.head import Head
from ppo_kernels.once import once_differentiable
from ppo_kernels.reference import IGNORED_TARGET

OP = "linear_logprobs"


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: Literal[False] = False,
    impl: str = "auto",
) -> Tensor: ...


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]: ...


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` of logits = hidden @ weight.T + bias, without ever holding all logits.

    With a softcap c, of c tanh(logits / c). Differentiable, once, in `hidden`, `weight` and `bias`:
    the backward pass recomputes the logits, a chunk at a time (8 N V H operations in all;
    `linear_ppo_loss` takes 6). Extra memory: the logits of one chunk, 256 tokens on a CPU (512 in
    16 bits) and 4,096 on a GPU (fewer where memory is short; without gradients a CPU needs 4 MiB),
    the gradients as they are summed, in float32 but for those of `head.weight_gradient_dtype`, and
    on a GPU under autocast the weight in its dtype.

    For several sets of hidden states under one head (a policy and its reference with equal heads,
    or with an adapter on and off), stack them: `[2, N, H]` with targets `[2, N]` reads the weight
    once.

    Args:
        hidden: `[..., H]`, any floating dtype and strides.
        weight: `[V, H]`, of the same dtype; under autocast of any. May be tied to the embedding. A
            sharded one (DTensor, as FSDP2 has it outside the forward pass of the module that it
            wraps) is gathered once; its gradient is summed over the ranks.
        targets: `[...]` int32 or int64, 0 to V - 1; or -100, which is ignored: its hidden state is
            not read, its log-prob and entropy are 0.
        bias: `[V]`, of the weight's dtype.
        temperature: positive.
        softcap: positive; None is none.
        return_entropy: whether to return the entropy too, in nats.
        impl: "auto", or one of `implementations()["linear_logprobs"]`.

    Returns:
        logprobs, or (logprobs, entropy), shaped like the targets, float32 (float64 for float64).

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or values that do not fit, and, on the
            CPU, for a target that is no class.
        RuntimeError: for an `impl` that cannot run, with the reason.
    """
    weight, bias = whole(weight), whole(bias)
    dtype = check_head(OP, hidden, weight, targets, bias)
    impl = dispatch.resolve(OP, impl, hidden.device)
    if impl == "reference":
        if not torch.compiler.is_compiling():
            check_values(OP, targets, len(weight), temperature, softcap)
        return reference.linear_logprobs(
            hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap,
            return_entropy=return_entropy,
        )  # fmt: skip
    tensors = (hidden, weight, bias, targets)
    if not dispatch.eager(*tensors):
        traced = ppo_loss.traced_numbers(temperature, softcap)
        logprobs, entropy = _logprobs_op(*tensors, traced, dtype, impl)
    else:
        numbers = check_values(OP, targets, len(weight), temperature, softcap)
        logprobs, entropy = _LinearLogprobs.apply(*tensors, numbers, dtype, impl)
    return (logprobs, entropy) if return_entropy else logprobs


def whole(x: Any) -> Any:
    """The full tensor of one sharded over ranks; each rank's gradient is a part of the sum."""
    if not hasattr(x, "full_tensor"):
        return x
    from torch.distributed.tensor import Partial

    return x.full_tensor(grad_placements=[Partial()] * x.device_mesh.ndim)


def check_head(
    op: str, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None
) -> torch.dtype:
    """Check the inputs of the logits; returns the dtype of the products."""
    checks.tensor(op, "hidden", hidden)
    checks.tensor(op, "weight", weight, like=("hidden", hidden))
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{op}: hidden must be [..., H] and weight [V, H], but have shapes "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    checks.tensor(
        op, "targets", targets, checks.INDEX_DTYPES, shape=tuple(hidden.shape[:-1]),
        like=("hidden", hidden),
    )  # fmt: skip
    if bias is not None:
        checks.tensor(op, "bias", bias, shape=(len(weight),), like=("hidden", hidden))
    kind = hidden.device.type
    has_autocast = torch.amp.is_autocast_available(kind)  # not on the meta device
    if has_autocast and torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of hidden, {_name(hidden.dtype)}, but has "
                f"{_name(x.dtype)}; convert one of them, or call under torch.autocast"
            )
    return hidden.dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_values(
    op: str, targets: Tensor, vocab: int, temperature: float, softcap: float | None
) -> tuple[float, float]:
    """(temperature, softcap) as the kernels take them: infinite stands for None."""
    logprob.check_targets(op, targets, vocab)
    return (
        checks.number(op, "temperature", temperature, gt=0.0),
        math.inf if softcap is None else checks.number(op, "softcap", softcap, gt=0.0),
    )


# --- Chunk by chunk -------------------------------------------------------------------------------

# From a chunk's slice, log-probs and entropy to the gradients of these two.
Slopes = Callable[[slice, Tensor, Tensor], tuple[Tensor | None, Tensor | None]]


def sweep(
    head: Head,
    temperature: float,
    softcap: float,
    impl: str,
    slopes: Slopes | None = None,
) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy). With `slopes`, what follows from it is added to the gradients of `head`,
    which must not be tiled then."""
    logprobs = torch.empty_like(head.targets, dtype=dispatch.accumulator(head.dtype))
    entropy = torch.empty_like(logprobs)
    for place in head.chunks():
        hidden, targets = head.states(place), head.targets[place]
        if head.tiled:
            logprob.forward_of_tiles(
                head.logit_tiles(hidden), head.vocab, targets, temperature, softcap,
                logprobs[place], entropy[place],
            )  # fmt: skip
            continue
        logits = head.logits(hidden)
        log_p, h, state = logprob.forward(
            logits, targets, temperature, True, slopes is not None, impl, softcap
        )
        assert h is not None
        logprobs[place], entropy[place] = log_p, h
        if slopes is not None:
            assert state is not None
            g, g_h = slopes(place, log_p, h)
            logprob.backward(
                g, g_h, logits, targets, log_p, h, state, temperature, impl, True, softcap
            )
            head.add_gradients(place, hidden, logits)
    return head.spread(logprobs), head.spread(entropy)


@contextmanager
def in_own_dtypes(device: torch.device) -> Iterator[None]:
    """Without autograd, and without autocast, which has been applied already."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    numbers: tuple[float, float],
    dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor]:
    with in_own_dtypes(hidden.device):
        head = Head(hidden, weight, bias, targets, dtype, tiled=impl == "cpp")
        return sweep(head, *numbers, impl)


def _logprobs_backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    numbers: tuple[float, float],
    dtype: torch.dtype,
    impl: str,
    want: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias, in their dtypes."""
    incoming = [grad_logprobs, grad_entropy]
    with in_own_dtypes(hidden.device):
        idle = torch.stack([g == 0 for g in incoming if g is not None]).all(0)
        targets = targets.masked_fill(idle, IGNORED_TARGET)  # which needs no logits
        head = Head(hidden, weight, bias, targets, dtype, want)
        g, g_h = (None if x is None else head.pick(x) for x in incoming)

        def slopes(place: slice, *_: Tensor) -> tuple[Tensor | None, Tensor | None]:
            return None if g is None else g[place], None if g_h is None else g_h[place]

        sweep(head, *numbers, impl, slopes)
        return tuple(
            None if x is None or made is None else made.to(x.dtype)
            for x, made in zip((hidden, weight, bias), head.gradients(), strict=True)
        )


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        numbers: tuple[float, float],
        dtype: torch.dtype,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.settings = numbers, dtype, impl
        ctx.set_materialize_grads(False)
        return _logprobs(hidden, weight, bias, targets, numbers, dtype, impl)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 7
        hidden, weight, bias, targets = ctx.saved_tensors
        numbers, dtype, impl = ctx.settings
        found = _logprobs_backward(
            grad_logprobs, grad_entropy, hidden, weight, bias, targets, numbers, dtype, impl,
            ctx.needs_input_grad[:3],
        )  # fmt: skip
        return *found, None, None, None, None


# --- The same under torch.compile -----------------------------------------------------------------


def untraced_numbers(
    op: str, targets: Tensor, weight: Tensor, numbers: Tensor
) -> tuple[float, float]:
    """Temperature and softcap of a custom op."""
    temperature, softcap = numbers[:2].tolist()
    return check_values(op, targets, len(weight), temperature, ppo_loss.untraced(softcap))


@torch.library.custom_op(
    "ppo_kernels::linear_logprobs", mutates_args=(), device_types=dispatch.DEVICES
)
def _logprobs_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    numbers: Tensor,
    dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor]:
    checked = untraced_numbers(OP, targets, weight, numbers)
    return _logprobs(hidden, weight, bias, targets, checked, dtype, impl)


@_logprobs_op.register_fake
def _(hidden, weight, bias, targets, numbers, dtype, impl):  # type: ignore[no-untyped-def]
    logprobs = dispatch.empty_like(targets, dispatch.accumulator(dtype))
    return logprobs, torch.empty_like(logprobs)


@torch.library.custom_op(
    "ppo_kernels::linear_logprobs_backward", mutates_args=(), device_types=dispatch.DEVICES
)
def _logprobs_backward_op(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    numbers: Tensor,
    dtype: torch.dtype,
    impl: str,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    found: Any = _logprobs_backward(
        grad_logprobs, grad_entropy, hidden, weight, bias, targets,
        untraced_numbers(OP, targets, weight, numbers), dtype, impl,
        (want_hidden, want_weight, want_bias),
    )  # fmt: skip
    return tuple(hidden.new_empty(0) if g is None else g for g in found)  # type: ignore


@_logprobs_backward_op.register_fake
def _(grad_logprobs, grad_entropy, hidden, weight, bias, targets, numbers, dtype, impl, *want):  # type: ignore[no-untyped-def]
    return tuple(
        dispatch.empty_like(x, x.dtype) if wants and x is not None else hidden.new_empty(0)
        for x, wants in zip((hidden, weight, bias), want, strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, dtype, impl = inputs
    ctx.settings = dtype, impl
    ctx.save_for_backward(*tensors)


def _backward_of_op(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
) -> tuple[Tensor | None, ...]:
    want = ctx.needs_input_grad[:3]
    found = _logprobs_backward_op(
        grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.settings, *want
    )
    gradients = (g if wants else None for g, wants in zip(found, want, strict=True))
    return *gradients, None, None, None, None


_logprobs_op.register_autograd(_backward_of_op, setup_context=_save)
