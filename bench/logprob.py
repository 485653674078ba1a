"""`token_logprobs` from logits, against log_softmax and its relatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Cost, Inputs, Outputs, Run, Size, compiled, normal
from ppo_kernels import token_logprobs

TRL_TRITON = "TRL 1.16, Triton"

# (size, tokens, vocabulary, dtypes); SmolLM2's vocabulary on a CPU, Qwen2.5's on a GPU.
_SHAPES: dict[str, list[tuple[Size, int, int, list[torch.dtype]]]] = {
    "cpu": [
        ("small", 8, 64, [torch.float32]),
        ("medium", 256, 49152, [torch.float32, torch.bfloat16]),
        ("large", 2048, 49152, [torch.float32, torch.bfloat16]),
    ],
    "cuda": [
        ("small", 8, 64, [torch.bfloat16]),
        ("medium", 1024, 151936, [torch.bfloat16]),
        ("large", 8192, 151936, [torch.bfloat16, torch.float32]),
    ],
}


def cases(device: str) -> list[Case]:
    return [
        _case(device, size, tokens, vocab, dtype, entropy)
        for size, tokens, vocab, dtypes in _SHAPES[device]
        for dtype in dtypes
        for entropy in (False, True)
    ]


def _case(
    device: str, size: Size, tokens: int, vocab: int, dtype: torch.dtype, entropy: bool
) -> Case:
    def inputs(on: torch.device) -> Inputs:
        generator = torch.Generator(on).manual_seed(3)
        found = {
            "logits": normal(tokens, vocab, device=on, dtype=dtype, seed=2, scale=3.0),
            "targets": torch.randint(vocab, (tokens,), device=on, generator=generator),
            "grad_logprobs": normal(tokens, device=on, dtype=torch.float32, seed=4),
        }
        if entropy:
            found["grad_entropy"] = normal(tokens, device=on, dtype=torch.float32, seed=5)
        return found

    def ours(x: Inputs, impl: str) -> Outputs:
        found = token_logprobs(x["logits"], x["targets"], return_entropy=entropy, impl=impl)
        return found if isinstance(found, tuple) else (found,)

    if entropy:
        alternatives: dict[str, Run] = {
            "log_softmax + gather + entropy": _log_softmax_and_entropy,
            "the same, compiled": compiled(_log_softmax_and_entropy),
            "TRL: selective, then entropy": _selective_and_entropy,
        }
        if device == "cuda":
            alternatives[TRL_TRITON] = _trl_and_entropy
    else:
        alternatives = {
            "log_softmax + gather": _log_softmax,
            "the same, compiled": compiled(_log_softmax),
            "TRL: selective_log_softmax": _selective,
            "F.cross_entropy": _cross_entropy,
        }
        if device == "cuda":
            alternatives["liger cross-entropy"] = _liger
            alternatives[TRL_TRITON] = _trl
    if device == "cuda" and size == "large":  # a launch for each row: some 500 times slower
        alternatives = {k: run for k, run in alternatives.items() if not k.startswith("TRL: ")}
    size_of = tokens * vocab * dtype.itemsize
    flops = 4 * tokens * vocab
    return Case(
        op="token_logprobs",
        variant="entropy" if entropy else "",
        size=size,
        shape=f"{tokens}x{vocab}",
        dtype=dtype,
        device=device,
        inputs=inputs,
        ours=ours,
        alternatives=alternatives,
        costs={"fwd": Cost(size_of, 0, flops), "bwd": Cost(size_of, size_of, flops)},
        trained=("logits",),
        upstream=("grad_logprobs", "grad_entropy") if entropy else ("grad_logprobs",),
        chunk=256,
    )


# --- What one would use instead ------------------------------------------------------------------


def _chosen(x: Tensor, targets: Tensor) -> Tensor:
    return x.gather(-1, targets[:, None]).squeeze(-1)


def _log_softmax(x: Inputs) -> Outputs:
    return (_chosen(F.log_softmax(x["logits"], dim=-1), x["targets"]),)


def _log_softmax_and_entropy(x: Inputs) -> Outputs:
    log_p = F.log_softmax(x["logits"], dim=-1)
    return _chosen(log_p, x["targets"]), -(log_p.exp() * log_p).sum(-1)


def _selective(x: Inputs) -> Outputs:
    """Row by row, so that no second tensor of the logits' size exists; half precision needs the
    whole log_softmax of a row, as its logsumexp is too coarse."""
    logits, targets = x["logits"], x["targets"]
    if logits.dtype in (torch.float32, torch.float64):
        log_norm = torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
        return (_chosen(logits, targets) - log_norm,)
    rows = [F.log_softmax(row, dim=-1)[y] for row, y in zip(logits, targets, strict=True)]
    return (torch.stack(rows),)


def _selective_and_entropy(x: Inputs) -> Outputs:
    """TRL and verl make the entropy apart: log sum exp(z) - sum p z."""
    logits = x["logits"]
    p = torch.softmax(logits, dim=-1)
    return *_selective(x), torch.logsumexp(logits, dim=-1) - (p * logits).sum(-1)


def _trl_and_entropy(x: Inputs) -> Outputs:
    """Both in one kernel, from TRL 1.16 on; its GRPO on GPUs has the entropy in any case."""
    from trl.kernels import selective_log_softmax_and_entropy

    logprobs, entropy = selective_log_softmax_and_entropy(x["logits"], x["targets"])
    return logprobs, entropy


def _trl(x: Inputs) -> Outputs:
    return _trl_and_entropy(x)[:1]


def _cross_entropy(x: Inputs) -> Outputs:
    return (-F.cross_entropy(x["logits"], x["targets"], reduction="none"),)


def _liger(x: Inputs) -> Outputs:
    """Makes the gradient in its forward pass, in place of the logits: these are given a copy."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    logits = x["logits"].clone()
    return (-liger_cross_entropy(logits, x["targets"], reduction="none"),)
