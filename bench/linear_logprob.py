"""`linear_logprobs` and `linear_ppo_loss`, against logits that are all there, and against others'.

The floor is the bare matrix products, timed in turn: one forward, three with gradients.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.case import Case, Cost, Inputs, Mode, Outputs, Run, Size, compiled, normal
from bench.logprob import TRL_TRITON
from bench.timing import Call
from ppo_kernels import linear_logprobs, linear_ppo_loss
from ppo_kernels.head import multiplies

CLIP_RANGE = 0.2
_CHUNK = {"cpu": 256, "cuda": 4096}  # of those alternatives that take one
_TRL_VOCABULARY = 32768  # of a tile of TRL's, as its trainers set it

# (size, tokens, hidden size, vocabulary); SmolLM2's on a CPU, Qwen2.5-7B's (rounded) on a GPU.
_SHAPES: dict[str, list[tuple[Size, int, int, int]]] = {
    "cpu": [
        ("small", 8, 16, 64),
        ("medium", 256, 576, 49152),
        ("large", 1024, 576, 49152),
    ],
    "cuda": [
        ("small", 8, 16, 64),
        ("medium", 1024, 4096, 151936),
        ("large", 8192, 4096, 151936),
    ],
}
_DTYPES = {"cpu": [torch.float32, torch.bfloat16], "cuda": [torch.bfloat16]}


def cases(device: str) -> list[Case]:
    return [
        make(device, *shape, dtype)
        for make in (_logprobs_case, _loss_case)
        for dtype in _DTYPES[device]
        for shape in _SHAPES[device]
    ]


def _logprobs_case(
    device: str, size: Size, tokens: int, width: int, vocab: int, dtype: torch.dtype
) -> Case:
    def ours(x: Inputs, impl: str) -> Outputs:
        found = linear_logprobs(
            x["hidden"], x["weight"], x["targets"], return_entropy=True, impl=impl
        )
        return tuple(found)

    alternatives: dict[str, Run] = {"eager": _eager, "eager, compiled": compiled(_eager)}
    if device == "cuda":
        alternatives[TRL_TRITON] = _trl
    return Case(
        op="linear_logprobs",
        size=size,
        shape=f"{tokens}x{width}x{vocab}",
        dtype=dtype,
        device=device,
        inputs=partial(_inputs, tokens, width, vocab, dtype),
        ours=ours,
        alternatives=_that_can(alternatives, device, size, dtype),
        costs={"fwd": _cost(tokens, width, vocab, dtype, 1)},
        shared=("weight",),
        chunk=256,
        least=_products,
    )


def _loss_case(
    device: str, size: Size, tokens: int, width: int, vocab: int, dtype: torch.dtype
) -> Case:
    def ours(x: Inputs, impl: str) -> Outputs:
        loss, _ = linear_ppo_loss(
            x["hidden"], x["weight"], x["targets"], x["old_logprobs"], x["advantages"],
            clip_range=CLIP_RANGE, normalizer=float(tokens), impl=impl,
        )  # fmt: skip
        return (loss,)

    alternatives: dict[str, Run] = {
        "eager": partial(_eager_loss, tokens),
        "eager, compiled": compiled(partial(_eager_loss, tokens)),
        "chunks, checkpointed": partial(_chunked_loss, tokens, _CHUNK[device]),
    }
    in_its_dtype = device == "cpu" and multiplies(dtype, torch.device(device))
    of_weight = dtype.itemsize if in_its_dtype else 4  # bytes of its gradient
    if device == "cuda":
        alternatives["liger GRPO, sequences of 1"] = partial(_liger, tokens)
        alternatives["CCE, then the loss"] = partial(_cce_loss, tokens)
        alternatives[f"{TRL_TRITON}, then the loss"] = partial(_trl_loss, tokens)
    return Case(
        op="linear_ppo_loss",
        size=size,
        shape=f"{tokens}x{width}x{vocab}",
        dtype=dtype,
        device=device,
        inputs=partial(_inputs, tokens, width, vocab, dtype),
        ours=ours,
        alternatives=_that_can(alternatives, device, size, dtype),
        costs={"both": _cost(tokens, width, vocab, dtype, 3)},
        trained=("hidden", "weight"),
        shared=("weight",),
        chunk=256,
        least=_products,
        kept={"both": width * (4 * tokens + of_weight * vocab)},
    )


def _inputs(tokens: int, width: int, vocab: int, dtype: torch.dtype, on: torch.device) -> Inputs:
    """Of a model that is fairly sure of some tokens; old log-probs near the new ones."""
    hidden = normal(tokens, width, device=on, dtype=torch.float32, seed=2)
    weight = normal(vocab, width, device=on, dtype=torch.float32, seed=3, scale=3 * width**-0.5)
    generator = torch.Generator(on).manual_seed(4)
    found = {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "targets": torch.randint(vocab, (tokens,), device=on, generator=generator),
    }
    logprobs = linear_logprobs(found["hidden"], found["weight"], found["targets"])
    change = normal(tokens, device=on, dtype=torch.float32, seed=5, scale=0.2)
    found["old_logprobs"] = logprobs + change
    found["advantages"] = normal(tokens, device=on, dtype=torch.float32, seed=6)
    return found


def _cost(tokens: int, width: int, vocab: int, dtype: torch.dtype, products: int) -> Cost:
    factors = (tokens + vocab) * width * dtype.itemsize
    return Cost(factors, factors * (products > 1), 2 * products * tokens * width * vocab)


def _products(x: Inputs, mode: Mode) -> list[Call]:
    """Into memory that is there. In the dtype of the inputs where the device multiplies in it;
    where it does not, in float32, many times as fast."""
    dtype, device = x["hidden"].dtype, x["hidden"].device
    dtype = dtype if multiplies(dtype, device) else torch.float32
    hidden, weight = x["hidden"].to(dtype), x["weight"].to(dtype)
    logits = hidden.new_empty(len(hidden), len(weight))
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def products() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        if mode != "fwd":
            torch.mm(logits, weight, out=grad_hidden)
            torch.mm(logits.t(), hidden, out=grad_weight)

    return [products]


def _that_can(
    alternatives: dict[str, Run], device: str, size: Size, dtype: torch.dtype
) -> dict[str, Run]:
    """Products of halves take a CPU without instructions for them minutes: there, in float32."""
    if size == "small" or multiplies(dtype, torch.device(device)):
        return alternatives
    return {f"{name}, in float32": partial(_widened, run) for name, run in alternatives.items()}


def _widened(run: Run, x: Inputs) -> Outputs:
    return run(x | {"hidden": x["hidden"].float(), "weight": x["weight"].float()})


# --- What one would use instead ------------------------------------------------------------------


def _eager(x: Inputs) -> Outputs:
    log_p = F.log_softmax((x["hidden"] @ x["weight"].T).float(), dim=-1)
    logprobs = log_p.gather(-1, x["targets"][:, None]).squeeze(-1)
    return logprobs, -(log_p.exp() * log_p).sum(-1)


def _logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    log_p = F.log_softmax((hidden @ weight.T).float(), dim=-1)
    return log_p.gather(-1, targets[:, None]).squeeze(-1)


def _loss_of(tokens: int, logprobs: Tensor, x: Inputs) -> Outputs:
    ratio = (logprobs - x["old_logprobs"]).exp()
    clipped = ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)
    loss = torch.maximum(-x["advantages"] * ratio, -x["advantages"] * clipped)
    return (loss.sum() / tokens,)


def _eager_loss(tokens: int, x: Inputs) -> Outputs:
    return _loss_of(tokens, _logprobs(x["hidden"], x["weight"], x["targets"]), x)


def _chunked_loss(tokens: int, chunk: int, x: Inputs) -> Outputs:
    """The logits of some tokens at a time, made again in the backward pass."""
    logprobs = [
        checkpoint(_logprobs, hidden, x["weight"], targets, use_reentrant=False)
        for hidden, targets in zip(x["hidden"].split(chunk), x["targets"].split(chunk), strict=True)
    ]
    return _loss_of(tokens, torch.cat(logprobs), x)


def _trl(x: Inputs) -> Outputs:
    """Tiles of logits by cuBLAS, each read once by a kernel; from TRL 1.16 on."""
    from trl.kernels import ChunkedLogProbFunction

    no_bias, temperature, no_softcap, scale = None, 1.0, None, 1.0
    logprobs, entropy, *_ = ChunkedLogProbFunction.apply(
        x["hidden"], x["weight"], no_bias, x["targets"], temperature, _TRL_VOCABULARY,
        no_softcap, scale, ("entropy",),
    )  # fmt: skip
    return logprobs, entropy


def _trl_loss(tokens: int, x: Inputs) -> Outputs:
    return _loss_of(tokens, _trl(x)[0], x)


def _cce_loss(tokens: int, x: Inputs) -> Outputs:
    from cut_cross_entropy import linear_cross_entropy

    losses = linear_cross_entropy(x["hidden"], x["weight"], x["targets"], reduction="none")
    return _loss_of(tokens, -losses, x)


def _liger(tokens: int, x: Inputs) -> Outputs:
    """It takes an advantage for each sequence: these have one token."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, chunk_size=1024, loss_type="bnpo"
    )
    found, *_ = loss(
        x["hidden"][:, None], x["weight"], x["targets"][:, None],
        torch.ones(tokens, 1, device=x["hidden"].device), x["advantages"],
        old_per_token_logps=x["old_logprobs"][:, None],
    )  # fmt: skip
    return (found,)
