"""`sample`, against torch.multinomial, and cumulative sum and search in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.case import Case, Cost, Inputs, Outputs, Size, compiled, normal
from ppo_kernels import sample

# (size, rows, vocabulary, dtypes): a token each of so many sequences. SmolLM2's vocabulary on a
# CPU, Qwen2.5's on a GPU.
_SHAPES: dict[str, list[tuple[Size, int, int, list[torch.dtype]]]] = {
    "cpu": [
        ("small", 8, 64, [torch.float32]),
        ("medium", 16, 49152, [torch.float32, torch.bfloat16]),
        ("large", 64, 49152, [torch.float32, torch.bfloat16]),
    ],
    "cuda": [
        ("small", 8, 64, [torch.float32]),
        ("medium", 64, 151936, [torch.float32]),
        ("large", 1024, 151936, [torch.float32]),
    ],
}


def cases(device: str) -> list[Case]:
    return [
        _case(device, size, rows, vocab, dtype, top_p)
        for size, rows, vocab, dtypes in _SHAPES[device]
        for dtype in dtypes
        for top_p in (1.0, 0.9)
    ]


def _case(device: str, size: Size, rows: int, vocab: int, dtype: torch.dtype, top_p: float) -> Case:
    def inputs(on: torch.device) -> Inputs:
        generator = torch.Generator(on).manual_seed(3)
        return {
            "logits": normal(rows, vocab, device=on, dtype=dtype, seed=2, scale=3.0),
            "uniform": torch.rand(rows, 1, device=on, generator=generator),
        }

    def ours(x: Inputs, impl: str) -> Outputs:
        _, logprobs = sample(x["logits"], top_p=top_p, seed=1, offset=0, impl=impl)
        return (_likely(logprobs),)

    def log_softmax(x: Inputs) -> Tensor:
        z = x["logits"].float()  # cumulative sums of bfloat16 would stop at 2^-8 of what they are
        if top_p < 1:
            descending, order = z.sort(dim=-1, descending=True)
            p = descending.softmax(-1)
            z = z.scatter(-1, order, descending.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf))
        return z.log_softmax(-1)

    def plain(x: Inputs) -> Outputs:
        log_p = log_softmax(x)
        tokens = torch.searchsorted(log_p.exp().cumsum(-1), x["uniform"])
        return (_likely(log_p.gather(-1, tokens.clamp(max=vocab - 1)).squeeze(-1)),)

    def multinomial(x: Inputs) -> Outputs:
        log_p = log_softmax(x)
        return (_likely(log_p.gather(-1, log_p.exp().multinomial(1)).squeeze(-1)),)

    return Case(
        op="sample",
        variant="top-p" if top_p < 1 else "",
        size=size,
        shape=f"{rows}x{vocab}",
        dtype=dtype,
        device=device,
        inputs=inputs,
        ours=ours,
        alternatives={
            "softmax + cumsum, plain": plain,
            "the same, compiled": compiled(plain),
            "softmax + multinomial": multinomial,
        },
        costs={"fwd": Cost(dtype.itemsize * rows * vocab, 0, 4 * rows * vocab)},
    )


def _likely(logprobs: Tensor) -> Tensor:
    """What is the same for all, whatever their random numbers: nothing impossible was drawn."""
    return (logprobs > -50).to(logprobs.dtype)
