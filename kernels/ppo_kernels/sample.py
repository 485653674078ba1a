"""Sampling of tokens, with their log-probs from the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_kernels import checks, dispatch, reference

OP = "sample"


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int,
    offset: int | Tensor,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Tokens drawn from softmax(logits / temperature), and their log-probs.

    Row i draws with the random number that Philox4x32-10 makes of the key `seed` and the counter
    `offset` + i: the same arguments give the same tokens, whatever runs (but where a cumulative
    probability rounds across the random number). With `top_k` and `top_p`, only the top_k most
    likely tokens, and of these only the fewest that have a probability of at least top_p together
    (Holtzman et al. 2020, arXiv:1904.09751), can be drawn; tokens as likely as the last of them
    can, too. The log-probs are of the distribution that was drawn from.

    Args:
        logits: `[..., V]`, any floating dtype; -inf is allowed. No gradient flows.
        temperature: positive.
        top_k: 0 (all) or more.
        top_p: in (0, 1]; 1 is all.
        seed: 0 to 2^63 - 1.
        offset: 0 or more; or a 0-dim integer tensor, which a CUDA graph reads when it is replayed.
            For the next call, add the number of rows.
        impl: "auto", or one of `implementations()["sample"]`.

    Returns:
        (tokens, logprobs), shaped like the logits without V: int64, and float32 (float64 for
        float64 logits).

    Raises:
        ValueError, TypeError: for shapes, dtypes or values that do not fit.
        RuntimeError: for an `impl` that cannot run, with the reason.
    """
    checks.tensor(OP, "logits", logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{OP}: logits must be [..., V], V > 0, but has {tuple(logits.shape)}")
    checks.number(OP, "temperature", temperature, gt=0.0)
    checks.number(OP, "top_p", top_p, gt=0.0, le=1.0)
    for name, x in (("top_k", top_k), ("seed", seed)):
        if not isinstance(x, int) or isinstance(x, bool):
            raise TypeError(f"{OP}: {name} must be an int, but is {x!r}")
        checks.number(OP, name, x, ge=0, lt=2**63)
    first = checks.scalar(OP, "offset", offset, like=("logits", logits), ge=0)
    offset = first if isinstance(first, Tensor) else int(first)
    impl = dispatch.resolve(OP, impl, logits.device)
    with torch.no_grad():
        if impl == "reference":
            return reference.sample(
                logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
                offset=offset,
            )  # fmt: skip
        tokens = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        logprobs = dispatch.empty_like(tokens, dispatch.accumulator(logits.dtype))
        dispatch.triton_kernels("sample").sample(
            logits, temperature, top_k, top_p, seed, offset, tokens, logprobs
        )
    return tokens, logprobs
