"""One generator of random arguments for each op; a case is known by its op and its seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fuzz.draw import INDICES, Draw, Layout, Size
from ppo_kernels.reference import IGNORED_TARGET, MAX_LOG_RATIO
from ppo_kernels.sequences import token_means

NAN, INF = torch.nan, torch.inf
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Arguments of `op`, and which of them are differentiated."""

    op: str
    seed: int
    arguments: Arguments
    wrt: tuple[str, ...]

    def upstream(self, name: str, like: Tensor) -> Tensor | None:
        """The gradient that comes in at output `name`; the same numbers in every dtype."""
        draw = Draw(f"{self.op} {self.seed} {name}")
        scale = draw.pick(1.0, 1.0, -0.25, 2.0**12, 0.0)
        kind = draw.pick("random", "random", "sparse", "shared", "absent")
        if not like.ndim or kind == "shared":
            return torch.tensor(scale, dtype=like.dtype).expand(like.shape)
        if kind == "absent":
            return None
        x = (scale * draw.normal(like.shape)).float().to(like.dtype)
        return torch.where(draw.chance(like.shape, 0.5), x, 0.0) if kind == "sparse" else x


class Sizes(NamedTuple):
    """How large the cases of an op are: most, every 20th and every 100th of them."""

    common: tuple[Size, ...]  # one of these
    wide: Size  # worth several threads
    long: Size  # rows of tens of thousands


def make_case(op: str, seed: int, exact_memory: bool = False) -> Case:
    """Case `seed` of `op`; without canaries around its tensors where `exact_memory`."""
    draw = Draw(f"{op} {seed}", exact_memory)
    generate, sizes = CASES[op]
    size = draw.pick(*sizes.common)
    if seed % 20 == 19:
        size = sizes.long if seed % 100 == 99 else sizes.wide
    arguments, trained = generate(draw, size)
    wrt = tuple(name for name in trained if name in arguments and draw.maybe(0.8))
    return Case(op, seed, arguments, wrt)


Generated = tuple[Arguments, tuple[str, ...]]  # and the names of what may be differentiated


def gae(draw: Draw, size: Size) -> Generated:
    layout, dtypes = draw.layout(size), draw.dtypes()
    tokens = {name: _spread(draw, layout.shape) for name in ("rewards", "values")}
    arguments = _token_tensors(draw, layout, dtypes, tokens, may_be_nan=("rewards", "values"))
    return arguments | _horizon(draw, layout, dtypes), ()


def kl_shaped_gae(draw: Draw, size: Size) -> Generated:
    layout, dtypes = draw.layout(size), draw.dtypes()
    logprobs = -3 * draw.normal(layout.shape).abs()
    tokens = {
        "logprobs": logprobs,
        "ref_logprobs": logprobs + draw.pick(0.0, 0.1, 1.0, 15.0) * draw.normal(layout.shape),
        "values": _spread(draw, layout.shape),
    }
    arguments = _token_tensors(draw, layout, dtypes, tokens, may_be_nan=tuple(tokens))
    arguments["scores"] = _per_sequence(draw, layout, dtypes)
    arguments["kl_coef"] = draw.number(draw.pick(0.0, 0.05, 1.0, -0.5))
    arguments["kl_estimator"] = draw.pick("k1", "k2", "k3")
    return arguments | _horizon(draw, layout, dtypes), ()


def token_logprobs(draw: Draw, size: Size) -> Generated:
    rows, vocab = draw.shape(size)
    vocab = max(vocab, 1)
    logits, peaks, comparable = _logits(draw, rows, vocab)
    targets = draw.integers(0, vocab, (rows,))
    for chance, others in (
        (0.3, peaks), (0.1, torch.zeros_like(peaks)), (0.1, torch.full_like(peaks, vocab - 1))
    ):  # fmt: skip
        targets = torch.where(draw.chance((rows,), chance), others, targets)
    targets[draw.chance((rows,), draw.pick(0.0, 0.0, 0.1, 0.2, 0.5, 1.0))] = IGNORED_TARGET
    wanted = (targets != IGNORED_TARGET)[:, None]
    logits = logits.to(next(draw.dtypes()))
    logits = draw.poison(logits, wanted.expand_as(logits)) if draw.maybe(0.5) else logits
    leading = draw.pick((rows,), (rows,), (rows, 1), (1, rows), (), (rows // 6, 3, 2))
    if leading == ():
        logits, targets = (logits[0], targets[0]) if rows else (torch.ones(1), torch.tensor(0))
    else:
        count = torch.Size(leading).numel()
        logits, targets = logits[:count].view(*leading, vocab), targets[:count].view(leading)
    arguments = {
        "logits": draw.place(logits, rows_contiguous=draw.maybe(0.8)),
        "targets": draw.place(targets.to(draw.pick(*INDICES))),
        "return_entropy": draw.maybe(0.6),
        "temperature": draw.pick(1.0, 1.0, 1, 0.7, draw.uniform(0.1, 4.0)),
    }
    return arguments, ("logits",) if comparable else ()


def _logits(draw: Draw, rows: int, vocab: int) -> tuple[Tensor, Tensor, bool]:
    """Rows flat, peaked, far from 0, rising, falling, with classes of probability 0.

    Also returns the class of each row's peak, and whether all rows are distributions, so that the
    gradient is defined.
    """

    def one_of(*values: float) -> Tensor:  # for each row
        return torch.tensor(values, dtype=torch.float64)[draw.integers(0, len(values), (rows, 1))]

    place = torch.arange(vocab)
    z = one_of(0, 0.1, 1, 1, 3, 3, 10, 100) * draw.normal((rows, vocab))
    z += one_of(0, 0, 0, 0, -1e4, 1e4, -3e4, 3e4)
    z += one_of(0, 0, 0, 0, 90, -90) * place / vocab
    peaks = draw.integers(0, vocab, (rows, 1))
    z.scatter_add_(1, peaks, one_of(0, 0, 0, 5, 12, 25, 90))
    kept = z.gather(1, peaks)
    z[draw.chance(z.shape, draw.pick(0.0, 0.0, 0.0, 0.5, 0.99))] = -INF
    z = torch.where(place < one_of(0, 0, 0, 0.5, 0.97) * vocab, -INF, z)
    z.scatter_(1, peaks, kept)
    broken = rows > 0 and draw.maybe(0.05)
    if broken:
        z[draw.random.randrange(rows)] = -INF
        z[draw.random.randrange(rows), draw.random.randrange(vocab)] = NAN
    return z, peaks[:, 0], not broken


def ppo_policy_loss(draw: Draw, size: Size) -> Generated:
    layout, dtypes, numbers = draw.layout(size), draw.dtypes(), _reduction(draw)
    shape = layout.shape
    numbers["clip_range"] = draw.pick(0.2, 0.0, 0, (0.2, 0.28), draw.uniform(0.01, 0.9), (0.0, 3.0))
    if draw.maybe(0.1):
        numbers["clip_range"] = (1.0, 0.3)
    numbers["objective"] = draw.pick("clip", "clip", "cispo")
    numbers["ratio_level"] = draw.pick("token", "token", "sequence")
    cispo = numbers["objective"] == "cispo"
    numbers["dual_clip"] = None if cispo else draw.pick(None, None, 1.3, 3.0)
    numbers["kl_estimator"] = draw.pick("k1", "k2", "k3")
    logprobs = -3 * draw.normal(shape).abs()

    def others(*spreads: float) -> Tensor:  # log-probs of another policy, at some tokens the same
        noise = draw.pick(*spreads) * draw.normal(shape)
        return logprobs + torch.where(draw.chance(shape, 0.8), noise, 0.0)

    tokens = {
        "logprobs": logprobs,
        "old_logprobs": others(0.0, 0.02, 0.4, 0.4, 3.0, 30.0),
        "advantages": _spread(draw, shape),
    }
    if draw.maybe(0.5):
        tokens["ref_logprobs"] = others(0.0, 1e-4, 0.1, 2.0, 30.0)
        numbers["kl_coef"] = draw.pick(0.0, 0.1, 1.0, -0.5)
    if draw.maybe(0.5):
        tokens["entropy"] = draw.normal(shape).abs()
        numbers["entropy_coef"] = draw.pick(0.0, 0.01, 1.0, -0.5)
    if draw.maybe(0.3):
        tokens["is_weights"] = draw.normal(shape).exp()
    if draw.maybe(0.5):
        numbers["moments"] = draw.place(_moments(draw, tokens["advantages"]).to(next(dtypes)))

    def off_ties(x: dict[str, Tensor]) -> None:
        """Where rounding alone would choose a branch, all log-probs become 0."""

        def become_0(close: Tensor) -> None:
            for name in x.keys() & {"logprobs", "old_logprobs", "ref_logprobs"}:
                x[name] = torch.where(close, 0.0, x[name])

        if "ref_logprobs" in x:
            to_ref = x["logprobs"].double() - x["ref_logprobs"].double()
            become_0((to_ref.abs() - MAX_LOG_RATIO).abs() < 1e-4)
        log_ratio = x["logprobs"].double() - x["old_logprobs"].double()
        clip = numbers["clip_range"]
        low, high = clip if isinstance(clip, tuple) else (clip, clip)
        rounding = torch.full_like(log_ratio, 1e-5)
        if numbers["ratio_level"] == "sequence":
            log_ratio, size = (
                token_means(torch.where(layout.real(), y, 0.0), layout.real(), layout.cu_seqlens)
                for y in (log_ratio, log_ratio.abs())
            )
            rounding *= 1 + size
        close = (log_ratio.abs() - MAX_LOG_RATIO).abs() < 10 * rounding
        for bound in (1 - low, 1 + high, numbers["dual_clip"] or INF):
            close |= ((log_ratio.exp() - bound).abs() < rounding * bound) & (log_ratio != 0)
        become_0(close)

    arguments = _token_tensors(draw, layout, dtypes, tokens, off_ties, may_be_nan=("advantages",))
    return _in_one_row(draw, arguments | numbers), ("logprobs", "entropy")


def _moments(draw: Draw, x: Tensor) -> Tensor:
    """(count, mean, M2): of `x`, of other numbers, of one and of none."""
    if x.numel() and draw.maybe(0.5):
        return torch.stack((torch.tensor(x.numel()), x.mean(), (x - x.mean()).square().sum()))
    return torch.tensor(draw.pick((50, 0.3, 100.0), (7, 3.0, 0), (1, 0.0, 0), (0, 0, 0)))


def ppo_value_loss(draw: Draw, size: Size) -> Generated:
    layout, dtypes, numbers = draw.layout(size), draw.dtypes(), _reduction(draw)
    clip = numbers["clip_range"] = draw.pick(0.2, 0.2, None, 0.0, 1, draw.uniform(0.01, 5.0))
    values = _spread(draw, layout.shape)
    tokens = {
        "values": values,
        "old_values": values + draw.pick(0.0, 0.1, 0.3, 3.0) * draw.normal(layout.shape),
        "returns": values + draw.pick(0.0, 0.1, 1.0, 10.0) * draw.normal(layout.shape),
    }

    def off_ties(x: dict[str, Tensor]) -> None:
        """Where rounding alone would choose a branch, values and old values become 0."""
        if clip is None:
            return
        value, old, target = (x[name].double() for name in tokens)
        clipped = torch.clamp(value, old - clip, old + clip)
        rounding = 1e-6 * (value.abs() + old.abs() + target.abs() + clip)
        close = (((value - old).abs() - clip).abs() < rounding) & (value != old)
        errors = (value - target).abs() - (clipped - target).abs()
        close |= (errors.abs() < rounding) & (value != clipped)
        for name in ("values", "old_values"):
            x[name] = torch.where(close, 0.0, x[name])

    arguments = _token_tensors(draw, layout, dtypes, tokens, off_ties, may_be_nan=("returns",))
    return _in_one_row(draw, arguments | numbers), ("values",)


def pairwise_loss(draw: Draw, size: Size) -> Generated:
    rows, columns = draw.shape(size)
    shape, dtypes = (rows * columns,), draw.dtypes()
    scale = draw.pick(0.01, 1.0, 3.0, 100.0)
    chosen, rejected = (scale * draw.normal(shape) for _ in range(2))
    rejected = torch.where(draw.chance(shape, 0.1), chosen, rejected)
    tensors = {"chosen": chosen, "rejected": rejected}
    arguments: Arguments = {"center_coef": draw.pick(0.0, 0.0, 0.05, 1.0, -0.1)}
    if draw.maybe(0.6):
        arguments["margin"] = draw.pick(None, 0.7, 1, -0.5)
    else:
        tensors["margin"] = _spread(draw, shape)
    layout = Layout(shape, None, None)
    return arguments | _token_tensors(draw, layout, dtypes, tensors), ("chosen", "rejected")


def ranking_loss(draw: Draw, size: Size) -> Generated:
    shape = draw.shape(size)
    ranks = draw.integers(0, draw.pick(2, 3, 300), shape) * draw.pick(1, 1, 1, 7 * 10**6)
    absent = draw.chance(shape, draw.pick(0.0, 0.0, 0.0, 0.1, 0.1, 0.5, 1.0))
    ranks = torch.where(absent, draw.pick(-1, -100), ranks)
    ranks[draw.chance((shape[0], 1), draw.pick(0.0, 0.0, 0.2)).expand(shape)] = 4  # no pair
    dtype = draw.pick(*INDICES)
    if dtype == torch.int64 and draw.maybe(0.3):
        ranks = torch.where(ranks < 0, ranks, ranks + 2**40)
    ranks = draw.flattened(ranks)
    scores = draw.pick(0.01, 1.0, 3.0, 100.0) * draw.normal(shape)
    if shape[1]:
        scores = torch.where(draw.chance(shape, 0.1), scores[:, :1], scores)
    layout = Layout(shape, None, ranks >= 0)
    arguments = _token_tensors(draw, layout, draw.dtypes(), {"scores": scores})
    del arguments["mask"]
    return arguments | {"ranks": draw.place(ranks.to(dtype))}, ("scores",)


# --------------------------------------------------------------------------------------------------


def _spread(draw: Draw, shape: tuple[int, ...]) -> Tensor:
    """Numbers of various sizes, around 0 or far from it."""
    return draw.pick(1.0, 1.0, 1e-3, 30.0) * draw.normal(shape) + draw.pick(0.0, 0.0, 1.0, 1e3)


def _token_tensors(
    draw: Draw,
    layout: Layout,
    dtypes: Iterator[torch.dtype],
    tokens: dict[str, Tensor],
    off_ties: Callable[[dict[str, Tensor]], None] = lambda _: None,
    may_be_nan: tuple[str, ...] = (),
) -> Arguments:
    """`tokens` in their dtypes, with garbage under the mask, in memory; and what describes the
    layout."""
    x = {name: draw.flattened(y).to(next(dtypes)) for name, y in tokens.items()}
    off_ties(x)
    if may_be_nan and layout.real().any() and draw.maybe(0.04):
        places = layout.real().view(-1).nonzero()
        x[draw.pick(*may_be_nan)].view(-1)[places[draw.random.randrange(len(places))]] = NAN
    arguments: Arguments = {
        name: draw.place(draw.poison(y, layout.mask) if draw.maybe(0.9) else y)
        for name, y in x.items()
    }
    if layout.mask is not None:
        arguments["mask"] = draw.place(layout.mask)
    if layout.cu_seqlens is not None:
        arguments["cu_seqlens"] = draw.place(layout.cu_seqlens.to(draw.pick(*INDICES)))
    return arguments


def _per_sequence(draw: Draw, layout: Layout, dtypes: Iterator[torch.dtype]) -> Tensor:
    real = layout.real_sequences()
    x = draw.flattened(_spread(draw, real.shape)).to(next(dtypes))
    return draw.place(draw.poison(x, real))


def _horizon(draw: Draw, layout: Layout, dtypes: Iterator[torch.dtype]) -> Arguments:
    """What ends and discounts a sequence."""
    arguments: Arguments = {
        "gamma": draw.pick(1.0, 1, 0.99, 0.0, draw.uniform(0.0, 1.0)),
        "lam": draw.pick(0.95, 1.0, 1, 0.0, draw.uniform(0.0, 1.0)),
    }
    if draw.maybe(0.5):
        arguments["bootstrap"] = _per_sequence(draw, layout, dtypes)
    return arguments


def _reduction(draw: Draw) -> Arguments:
    reduction = draw.pick("token_mean", "token_mean", "sequence_mean", "sum")
    normalizer = draw.pick(None, None, draw.number(draw.pick(1.0, 37.5, 0.0, 2.0)))
    return {"reduction": reduction, "normalizer": normalizer}


def _in_one_row(draw: Draw, arguments: Arguments) -> Arguments:
    """At times without boundaries, where a loss does not need them."""
    needs = arguments["reduction"] == "sequence_mean" or arguments.get("ratio_level") == "sequence"
    if not needs and draw.maybe(0.3):
        arguments.pop("cu_seqlens", None)
    return arguments


def _sizes(longest: int) -> Sizes:
    common = (Size(0, 20, 20), Size(0, 300, 300), Size(0, 4100, min(4100, longest)))
    return Sizes(common, Size(16_400, 40_000, min(9_000, longest)), Size(0, 0, 33_000, rows=3))


# The definition of GAE is a loop over T in Python: its rows are kept shorter.
CASES: dict[str, tuple[Callable[[Draw, Size], Generated], Sizes]] = {
    "gae": (gae, _sizes(260)),
    "kl_shaped_gae": (kl_shaped_gae, _sizes(260)),
    "token_logprobs": (token_logprobs, _sizes(70_000)),
    "ppo_policy_loss": (ppo_policy_loss, _sizes(70_000)),
    "ppo_value_loss": (ppo_value_loss, _sizes(70_000)),
    "pairwise_loss": (pairwise_loss, _sizes(70_000)),
    # The definition holds every pair.
    "ranking_loss": (
        ranking_loss,
        Sizes(
            (Size(0, 20, 20), Size(0, 300, 100), Size(0, 4100, 68)),
            Size(16_400, 40_000, 20),
            Size(0, 0, 1000, rows=2),
        ),
    ),
}
