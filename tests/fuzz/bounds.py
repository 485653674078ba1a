"""How far a result may be from float64, beyond the error of plain PyTorch in the same dtype.

A few units in the last place of the terms that a result is made of: a function for each op says,
for each element of each result, how large these are. A sum is judged by the sum of its terms'
magnitudes: where terms cancel, it may err more than its own last place, and what other rows hold
makes no difference. What is 0 by definition, as all that is masked, has magnitude 0 and must be 0.

Float64 has errors too, of the definition and of sums: where the terms of either are larger than
those, a function gives their magnitude apart, and it counts in units of float64 in any dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ppo_kernels import reference
from ppo_kernels.reference import IGNORED_TARGET, MAX_LOG_RATIO, losses
from ppo_kernels.reference.common import token_mean
from ppo_kernels.sequences import sequence_sums, token_means

# Units in the last place, by the dtype that an op computes in. Plain PyTorch in float64 is float64
# itself, so that there all of the error has to fit.
ULPS = {torch.float32: 4.0, torch.float64: 64.0}
# Of a loss or a statistic. Kernels may take a sum of some 64 terms in float32 before they go on in
# float64: if equal terms are each rounded by half a unit, of a sum that is half done on average,
# these are 16 units.
ULPS_OF_SUM = {torch.float32: 16.0, torch.float64: 64.0}
# Kernels may take what is nearly subnormal for 0.
SMALLEST = {torch.float32: 1e-30, torch.float64: 1e-290}

Named = dict[str, Tensor]
Magnitudes = tuple[Named, Named]  # in units of the op's dtype, and more in units of float64


def tolerances(
    op: str, dtype: torch.dtype, arguments: dict[str, Any], exact: Named, upstream: Named
) -> Named:
    """For each result, as `ops.run` names it, how much it may err more than plain PyTorch.

    Args:
        op: its name.
        dtype: float32 or float64, what the op computes in.
        arguments, exact, upstream: in float64: the arguments, the results, and the gradients that
            came in at the outputs.
    """
    eps, in_double = torch.finfo(dtype).eps, ULPS[torch.float64] * torch.finfo(torch.float64).eps
    sizes, rough = _MAGNITUDES[op](arguments, exact, upstream)
    # In float64 there may be as many terms as there are tokens.
    summed = max(1.0, max(x.numel() for x in arguments.values() if isinstance(x, Tensor)) / 64)
    allowed = {}
    for name, x in sizes.items():
        extra = rough.get(name, 0.0) + (0.0 if name.startswith("gradient") else summed * x)
        ulps = ULPS if x.ndim else ULPS_OF_SUM
        tolerance = ulps[dtype] * eps * x + in_double * extra
        allowed[name] = torch.where(tolerance == 0, 0.0, tolerance + SMALLEST[dtype])
    return allowed


def _gae(a: dict[str, Any], exact: Named, upstream: Named) -> Magnitudes:
    rest = {name: a[name] for name in ("gamma", "lam", "mask", "cu_seqlens") if name in a}
    size = a["values"].abs()
    last = a["bootstrap"].abs() if "bootstrap" in a else None
    # As delta takes V away, with twice as much in the reward it is |r| + gamma |V'| + |V|.
    advantages, returns = reference.gae(
        a["rewards"].abs() + 2 * size, size, bootstrap=last, **rest
    )  # fmt: skip
    return {"output.0": advantages, "output.1": returns}, {}


def _kl_shaped_gae(a: dict[str, Any], exact: Named, upstream: Named) -> Magnitudes:
    mask, cu_seqlens = a.get("mask"), a.get("cu_seqlens")
    mask = torch.ones_like(a["values"], dtype=torch.bool) if mask is None else mask
    log_ratio = torch.where(mask, a["logprobs"] - a["ref_logprobs"], 0.0)
    kl = _kl_magnitude(log_ratio, a["kl_estimator"])
    size = a["values"].abs()
    absolute = {
        "scores": a["scores"].abs(),
        "logprobs": -(abs(a["kl_coef"]) * kl + 2 * size),  # see _gae
        "ref_logprobs": torch.zeros_like(size),
        "values": size,
        "kl_coef": 1.0,
        "kl_estimator": "k1",
    }
    if "bootstrap" in a:
        absolute["bootstrap"] = a["bootstrap"].abs()
    shaped = reference.kl_shaped_gae(**a | absolute)
    count, mean, m2 = exact["output.moments"]
    deviation = torch.where(mask, (exact["output.advantages"] - mean).abs(), 0.0)
    # (A - mean)^2 with an error of A, to second order.
    eps = torch.finfo(torch.float32).eps
    of_m2 = m2 + (2 * deviation * shaped.advantages + eps * shaped.advantages**2).sum()
    of_mean = shaped.advantages.sum() / count.clamp(min=1)
    # Sums are taken about some number: at worst, about the one that is farthest from the mean.
    farthest = deviation.max() if deviation.numel() else torch.zeros_like(mean)
    rough = torch.stack((torch.zeros_like(count), farthest, count * farthest * farthest))
    sizes = {
        "output.advantages": shaped.advantages,
        "output.returns": shaped.returns,
        "output.kl": sequence_sums(kl, cu_seqlens),
        "output.moments": torch.stack((torch.zeros_like(count), of_mean, of_m2)),
    }
    return sizes, {"output.moments": rough}


def _token_logprobs(a: dict[str, Any], exact: Named, upstream: Named) -> Magnitudes:
    wanted = a["targets"] != IGNORED_TARGET
    logits = torch.where(wanted[..., None], a["logits"], 0.0) / a["temperature"]
    log_p = logits.log_softmax(-1)
    p, surprise = log_p.exp(), torch.where(log_p == -torch.inf, 0.0, log_p).abs()
    entropy = (p * surprise).sum(-1)
    index = torch.where(wanted, a["targets"], 0).long()[..., None]
    log_py = log_p.gather(-1, index).squeeze(-1)
    rest = -log_py.expm1()  # 1 - p_y: the closer p_y is to 1, the smaller is an error of log p_y
    of_rest = rest - torch.xlogy(rest, rest)
    # An error of log p is one of p too, and one of the sum over the others one of all their log p.
    of_entropy = (p * surprise * (2 + surprise)).sum(-1) + rest
    of_logprob = of_rest + torch.where(rest == 0, 0.0, rest * log_py.abs()) + entropy
    # The definition has p_y, not 1 - p_y, and logits as they come, however far from 0.
    size = 1 + torch.where(logits.isinf(), 0.0, logits).abs().amax(-1)

    names = ("output.0", "output.1") if a["return_entropy"] else ("output",)
    of_outputs = (of_logprob, of_entropy)
    result = {n: torch.where(wanted, x, 0.0) for n, x in zip(names, of_outputs, strict=False)}
    rough = {n: torch.where(wanted, size * (1 + entropy), 0.0) for n in names}
    if "gradient of logits" in exact:
        g, g_entropy = (
            torch.where(wanted, upstream[n].abs(), 0.0)[..., None]
            if n in upstream else torch.zeros_like(p[..., :1])
            for n in (names[0], "output.1")
        )  # fmt: skip
        entropy = entropy[..., None]
        of_p = g.expand_as(p).scatter(-1, index, 0.0)
        gradient = p * (1 + surprise) * (of_p + g_entropy * (surprise + entropy))
        gradient += p * g_entropy * of_entropy[..., None]
        gradient.scatter_add_(-1, index, g * of_rest[..., None])
        result["gradient of logits"] = gradient / a["temperature"]
        of_row = size[..., None] * (g + g_entropy * (1 + entropy)) / a["temperature"]
        rough["gradient of logits"] = torch.where(log_p == -torch.inf, 0.0, of_row)
    return result, rough


def _ppo_policy_loss(a: dict[str, Any], exact: Named, upstream: Named) -> Magnitudes:
    mask = _mask(a, "logprobs")
    x = {
        name: torch.where(mask, a[name], 0.0)
        for name in ("logprobs", "old_logprobs", "advantages", "ref_logprobs", "entropy",
                     "is_weights")
        if name in a
    }  # fmt: skip
    advantages = x["advantages"]
    if "moments" in a:
        advantages = torch.where(mask, losses._whiten(advantages, a["moments"]), 0.0)
    log_ratio = x["logprobs"] - x["old_logprobs"]
    of_ratio = torch.ones_like(log_ratio)  # an error of the log-ratio is one of the ratio's digits
    if a["ratio_level"] == "sequence":
        of_ratio, log_ratio = (
            token_means(y, mask, a.get("cu_seqlens")) for y in (1 + log_ratio.abs(), log_ratio)
        )
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clip = a["clip_range"]
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    in_range = ratio.clamp(1 - low, 1 + high)
    if a["objective"] == "cispo":
        slope = -advantages * in_range * of_ratio
        loss = slope * x["logprobs"]
    else:
        unclipped, clipped = -advantages * ratio, -advantages * in_range
        loss = torch.maximum(unclipped, clipped) * of_ratio
        held = (clipped > unclipped) | (log_ratio.abs() > MAX_LOG_RATIO)
        slope = torch.where(held, 0.0, unclipped) * of_ratio
    if a.get("dual_clip") is not None:
        loss = torch.where(advantages < 0, loss.minimum(-a["dual_clip"] * advantages), loss)
    weights = x.get("is_weights", torch.ones(()).double())
    loss, slope = (loss * weights).abs(), (slope * weights).abs()
    kl = torch.zeros_like(loss)
    if "ref_logprobs" in x:
        to_ref = x["logprobs"] - x["ref_logprobs"]
        kl = _kl_magnitude(to_ref, a["kl_estimator"])
        of_slope = {"k1": torch.ones_like(kl), "k2": to_ref.abs()}.get(a["kl_estimator"], kl)
        loss = loss + abs(a["kl_coef"]) * kl
        slope = slope + abs(a["kl_coef"]) * of_slope
    if "entropy" in x:
        loss = loss + (a["entropy_coef"] * x["entropy"]).abs()

    weight = _token_weights(a, mask)
    total = (weight * loss).sum()
    stats = {name: x for name, x in exact.items() if name.startswith("output.1.")}
    stats["output.1.kl"] = token_mean(kl, mask)
    if mask.any():
        stats["output.1.ratio_mean"] = token_mean(ratio * of_ratio, mask)
        stats["output.1.ratio_max"] = (ratio * of_ratio)[mask].max()
    if "entropy" in x:
        stats["output.1.entropy"] = token_mean(x["entropy"].abs(), mask)
    gradients = {name: x.abs() for name, x in exact.items() if name.startswith("gradient")}
    rough = {}
    if "gradient of logprobs" in exact:
        weight = weight * upstream["output.0"].abs()
        gradients["gradient of logprobs"] = weight * slope
        if "ref_logprobs" in x:  # autograd takes the derivative of k3 as 1 - e^-x
            rough["gradient of logprobs"] = weight * abs(a["kl_coef"]) * (1 + kl)
    return {"output.0": total} | stats | gradients, rough


def _ppo_value_loss(a: dict[str, Any], exact: Named, upstream: Named) -> Magnitudes:
    mask = _mask(a, "values")
    values, returns = (torch.where(mask, a[name], 0.0) for name in ("values", "returns"))
    stats = {
        "output.1.value_mean": token_mean(values.abs(), mask),
        "output.1.return_mean": token_mean(returns.abs(), mask),
    }
    rough = {}
    if returns.numel():
        mean = exact["output.1.return_mean"]
        deviation = torch.where(mask, (returns - mean).abs(), 0.0)
        of_deviation = token_mean(deviation, mask)
        of_shift = deviation.max() * of_deviation
        stats["output.1.return_var"] = exact["output.1.return_var"] + of_shift
        # Where variances are merged, the means are those of float64.
        rough["output.1.return_var"] = mean.abs() * of_deviation + of_shift
    return {name: x.abs() for name, x in exact.items()} | stats, rough


def _pairwise_loss(a: dict[str, Any], exact: Named, upstream: Named) -> Magnitudes:
    difference, total = a["chosen"] - a["rejected"], a["chosen"] + a["rejected"]
    margin = a.get("margin")
    m = difference - (0.0 if margin is None else margin)
    coef, pairs = abs(a["center_coef"]), max(len(m), 1)
    loss = -logsigmoid(m) * (1 + m.clamp(min=0)) + coef * total**2
    slope = torch.sigmoid(-m) * (1 + m.abs()) + 2 * coef * total.abs()
    result = {"output.0": loss.sum() / pairs, "output.1.accuracy": exact["output.1.accuracy"]}
    result["output.1.margin"] = difference.abs().sum() / pairs
    for name in exact:
        if name.startswith("gradient"):
            result[name] = upstream["output.0"].abs() * slope / pairs
    return result, {}


def _ranking_loss(a: dict[str, Any], exact: Named, upstream: Named) -> Magnitudes:
    ranks = a["ranks"]
    there = ranks >= 0
    scores = torch.where(there, a["scores"], 0.0)
    pair = there[:, :, None] & there[:, None, :] & (ranks[:, :, None] < ranks[:, None, :])
    m = torch.where(pair, scores[:, :, None] - scores[:, None, :], 0.0)
    of_prompt = pair.sum((1, 2))
    share = (1 / of_prompt.clamp(min=1) / (of_prompt > 0).sum().clamp(min=1))[:, None, None]
    loss = torch.where(pair, -logsigmoid(m) * (1 + m.clamp(min=0)), 0.0)
    slope = torch.where(pair, torch.sigmoid(-m) * (1 + m.abs()), 0.0) * share
    result = {
        "output.0": (loss * share).sum(),
        "output.1.accuracy": exact["output.1.accuracy"],
        "output.1.margin": m.abs().sum() / pair.sum().clamp(min=1),
    }
    if "gradient of scores" in exact:
        result["gradient of scores"] = upstream["output.0"].abs() * (slope.sum(1) + slope.sum(2))
    return result, {}


_MAGNITUDES: dict[str, Callable[[dict[str, Any], Named, Named], Magnitudes]] = {
    "gae": _gae,
    "kl_shaped_gae": _kl_shaped_gae,
    "token_logprobs": _token_logprobs,
    "ppo_policy_loss": _ppo_policy_loss,
    "ppo_value_loss": _ppo_value_loss,
    "pairwise_loss": _pairwise_loss,
    "ranking_loss": _ranking_loss,
}


def _mask(a: dict[str, Any], like: str) -> Tensor:
    mask = a.get("mask")
    return torch.ones_like(a[like], dtype=torch.bool) if mask is None else mask


def _kl_magnitude(log_ratio: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return log_ratio.abs()
    if estimator == "k2":
        return log_ratio.square() / 2
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(-log_ratio).abs() + log_ratio.abs()


def _token_weights(a: dict[str, Any], mask: Tensor) -> Tensor:
    """By how much each token's loss counts in the reduced one."""
    zeros = torch.zeros(mask.shape, dtype=torch.float64, requires_grad=True)
    loss = losses._reduce(zeros, mask, a.get("cu_seqlens"), a["reduction"], a.get("normalizer"))
    return torch.autograd.grad(loss, zeros)[0]
