"""`sample`, against softmax, cumulative sum and search in plain PyTorch. On GPUs only, so far."""

from __future__ import annotations

import torch

from bench.case import Case, Cost, Inputs, Outputs, Size, compiled, normal
from ppo_kernels import sample

# (size, rows, vocabulary): a token each of so many sequences, Qwen2.5's vocabulary.
_SHAPES: dict[str, list[tuple[Size, int, int]]] = {
    "cpu": [],
    "cuda": [("small", 8, 64), ("medium", 64, 151936), ("large", 1024, 151936)],
}


def cases(device: str) -> list[Case]:
    return [_case(device, *shape, top_p) for shape in _SHAPES[device] for top_p in (1.0, 0.9)]


def _case(device: str, size: Size, rows: int, vocab: int, top_p: float) -> Case:
    def inputs(on: torch.device) -> Inputs:
        generator = torch.Generator(on).manual_seed(3)
        return {
            "logits": normal(rows, vocab, device=on, dtype=torch.float32, seed=2, scale=3.0),
            "uniform": torch.rand(rows, 1, device=on, generator=generator),
        }

    def ours(x: Inputs, impl: str) -> Outputs:
        _, logprobs = sample(x["logits"], top_p=top_p, seed=1, offset=0, impl=impl)
        return (_likely(logprobs),)

    def plain(x: Inputs) -> Outputs:
        z = x["logits"]
        if top_p < 1:
            descending, order = z.sort(dim=-1, descending=True)
            p = descending.softmax(-1)
            z = z.scatter(-1, order, descending.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf))
        log_p = z.log_softmax(-1)
        tokens = torch.searchsorted(log_p.exp().cumsum(-1), x["uniform"])
        return (_likely(log_p.gather(-1, tokens.clamp(max=vocab - 1)).squeeze(-1)),)

    return Case(
        op="sample",
        variant="top-p" if top_p < 1 else "",
        size=size,
        shape=f"{rows}x{vocab}",
        dtype=torch.float32,
        device=device,
        inputs=inputs,
        ours=ours,
        alternatives={"softmax + cumsum, plain": plain, "the same, compiled": compiled(plain)},
        costs={"fwd": Cost(4 * rows * vocab, 0, 4 * rows * vocab)},
    )


def _likely(logprobs: torch.Tensor) -> torch.Tensor:
    """What is the same for all, whatever their random numbers: nothing impossible was drawn."""
    return (logprobs > -50).to(logprobs.dtype)
