"""What is read from logits: log-probs, entropy, and tokens at random."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ppo_kernels.philox import uniform_numbers
from ppo_kernels.reference.common import accumulated, real

IGNORED_TARGET = -100


# log softmax(z / temperature)_y, and the entropy of the same distribution, H = -sum_j p_j log p_j.
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of `targets` `[...]` under `logits` `[..., V]`, and the entropy if wanted.

    A target of -100 is ignored: log-prob and entropy are 0 and its logits are not read.
    """
    (logits,) = accumulated(logits)
    wanted = targets != IGNORED_TARGET
    log_p = F.log_softmax(real(logits, wanted.unsqueeze(-1)) / temperature, dim=-1)
    index = real(targets, wanted).long().unsqueeze(-1)
    logprobs = real(log_p.gather(-1, index).squeeze(-1), wanted)
    if not return_entropy:
        return logprobs
    # p log p is 0 where p is 0, also for a logit of -inf.
    finite_log_p = torch.where(log_p == -torch.inf, 0.0, log_p)
    entropy = -(log_p.exp() * finite_log_p).sum(-1)
    return logprobs, real(entropy, wanted)


# The same of a language model's head, z = hidden weight^T + bias, capped: z <- c tanh(z / c).
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of `targets` `[...]` from hidden states `[..., H]` and a weight `[V, H]`.

    The product is in the dtype of its factors, as `torch.nn.Linear` makes it.
    """
    hidden = real(hidden, (targets != IGNORED_TARGET).unsqueeze(-1))
    (logits,) = accumulated(F.linear(hidden, weight, bias))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return token_logprobs(logits, targets, temperature=temperature, return_entropy=return_entropy)


# Sampling from softmax(z / T) of the top_k most likely tokens, and only the fewest of these that
# have a probability of at least top_p together (Holtzman et al. 2020, arXiv:1904.09751); tokens as
# likely as the last that is kept are kept too. The token is the first at which the cumulative
# probability, in the order of the vocabulary, exceeds a uniform number.
def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Tensor,
    offset: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """Tokens `[...]` (int64) from logits `[..., V]`, and their log-probs in what is kept.

    `offset` has the shape of the tokens, a counter each, or is a number (or 0-dim): row i then has
    the counter `offset` + i.
    """
    (logits,) = accumulated(logits)
    z = logits.reshape(-1, logits.shape[-1]) / temperature
    if 0 < top_k < z.shape[-1]:
        z = z.masked_fill(z < z.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    if top_p < 1:
        descending = z.sort(dim=-1, descending=True).values
        p = descending.softmax(-1)
        kept = p.cumsum(-1) - p < top_p
        lowest = descending.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
        z = z.masked_fill(z < lowest, -torch.inf)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    below = p.double().cumsum(-1)
    if isinstance(offset, Tensor) and offset.ndim:
        counters = offset.reshape(-1)
    else:
        counters = torch.arange(len(z), device=z.device) + offset
    uniform = uniform_numbers(seed, counters)[:, None] * below[:, -1:]
    last = (p > 0).long().cumsum(-1).argmax(-1)
    tokens = torch.minimum((below <= uniform).sum(-1), last)
    shape = logits.shape[:-1]
    return tokens.reshape(shape), log_p.gather(-1, tokens[:, None]).reshape(shape)
