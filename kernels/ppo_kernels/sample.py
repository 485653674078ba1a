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
    seed: int | Tensor,
    offset: int | Tensor,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Tokens drawn from softmax(logits / temperature), and their log-probs.

    Each row draws with the random number that Philox4x32-10 makes of the key `seed` and a counter,
    by the inverse of the distribution function: the same arguments give the same tokens, whatever
    runs and whatever other rows there are (but where a cumulative probability rounds across the
    random number). With `top_k` and `top_p`, only the top_k most likely tokens, and of these only
    the fewest that have a probability of at least top_p together (Holtzman et al. 2020,
    arXiv:1904.09751), can be drawn; tokens as likely as the last of them can, too. The log-probs
    are of the distribution that was drawn from. A row that is none (NaN or infinity in it, or -inf
    alone) gives token 0 and NaN.

    Args:
        logits: `[..., V]`, any floating dtype; -inf is allowed. No gradient flows.
        temperature: positive.
        top_k: 0 (all) or more.
        top_p: in (0, 1]; 1 is all.
        seed: 0 to 2^63 - 1, an int or a 0-dim int64 tensor.
        offset: 0 to 2^63 - 1. An int, or a 0-dim int64 tensor: row i has the counter `offset` + i,
            and the next call takes up from `offset` + the number of rows. Or int64 `[...]`: the
            counter of each row.
        impl: "auto", or one of `implementations()["sample"]`.

    `seed` and `offset` on a GPU are read there, so that a CUDA graph draws anew when it is
    replayed; their values are not checked.

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
    if not isinstance(top_k, int) or isinstance(top_k, bool):
        raise TypeError(f"{OP}: top_k must be an int, but is {top_k!r}")
    impl = dispatch.resolve(OP, impl, logits.device)
    if not dispatch.eager(logits, *[x for x in (seed, offset) if isinstance(x, Tensor)]):
        numbers = torch.stack((dispatch.traced(temperature), dispatch.traced(top_p)))
        with torch.no_grad():
            found: tuple[Tensor, Tensor] = _sample_op(
                logits, numbers, top_k, _traced(seed), _traced(offset), impl
            )
        return found
    return _sample(logits, temperature, top_k, top_p, seed, offset, impl)


def _sample(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | Tensor,
    offset: int | Tensor,
    impl: str,
) -> tuple[Tensor, Tensor]:
    temperature = checks.number(OP, "temperature", temperature, gt=0.0)
    top_p = checks.number(OP, "top_p", top_p, gt=0.0, le=1.0)
    checks.number(OP, "top_k", top_k, ge=0, lt=2**63)
    like, rows = ("logits", logits), logits.shape[:-1]
    seed = checks.counter(OP, "seed", seed, like=like)
    offset = checks.counter(OP, "offset", offset, like=like, shape=rows)
    if impl == "reference":
        with torch.no_grad():
            return reference.sample(
                logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
                offset=offset,
            )  # fmt: skip
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = dispatch.empty_like(tokens, dispatch.accumulator(logits.dtype))
    number, counters = (0, offset) if isinstance(offset, Tensor) else (offset, None)
    counters = None if counters is None else counters.contiguous()
    if impl == "triton":
        dispatch.triton_kernels("sample").sample(
            logits, temperature, top_k, top_p, seed, number, counters, tokens, logprobs
        )
    else:
        dispatch.cpu.sample(
            dispatch.side_by_side(logits), temperature, top_k, top_p, seed, number, counters,
            tokens, logprobs, torch.get_num_threads(),
        )  # fmt: skip
    return tokens, logprobs


# --- The same under torch.compile -----------------------------------------------------------------


def _traced(value: int | Tensor) -> Tensor:
    """A number as a 0-dim int64 tensor; see `dispatch.traced`."""
    if isinstance(value, Tensor):
        return value
    return torch.ones((), dtype=torch.int64, device="cpu") * value


@torch.library.custom_op("ppo_kernels::sample", mutates_args=(), device_types=dispatch.DEVICES)
def _sample_op(
    logits: Tensor, numbers: Tensor, top_k: int, seed: Tensor, offset: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    temperature, top_p = numbers.tolist()
    return _sample(logits, temperature, top_k, top_p, seed, offset, impl)


@_sample_op.register_fake
def _(logits, numbers, top_k, seed, offset, impl):  # type: ignore[no-untyped-def]
    tokens = logits.new_empty(logits.shape[:-1], dtype=torch.int64)
    return tokens, dispatch.empty_like(tokens, dispatch.accumulator(logits.dtype))
