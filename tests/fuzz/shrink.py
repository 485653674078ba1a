"""Makes a case that fails smaller, one step after another, and describes it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fuzz.cases import Arguments, Case, make_case
from fuzz.check import Failure, Op, check, reproduction
from fuzz.draw import compact

# What a case may go without, and what changes least.
_OPTIONAL = ("mask", "bootstrap", "moments", "normalizer", "dual_clip", "entropy", "ref_logprobs",
             "is_weights", "margin", "cu_seqlens")  # fmt: skip
_PLAIN = {"return_entropy": False, "temperature": 1.0, "gamma": 1.0, "lam": 1.0, "clip_range": 0.2,
          "reduction": "sum", "objective": "clip", "ratio_level": "token", "kl_estimator": "k1",
          "kl_coef": 0.0, "entropy_coef": 0.0, "center_coef": 0.0}  # fmt: skip
_PER_SEQUENCE = ("scores", "bootstrap")
_SECONDS = 5.0


def failures(op: str, seeds: range, exact_memory: bool = False) -> list[str]:
    """A message for each of these cases that the compiled op does not pass.

    Without canaries, in memory of exactly the size it takes, where `exact_memory`.
    """
    messages = []
    for seed in seeds:
        case = make_case(op, seed, exact_memory)
        try:
            check(case, guarded=not exact_memory)
        except Failure as failure:
            messages.append(explain(case, failure))
            if len(messages) == 3:
                return [*messages, f"{op}: cases from seed {seed + 1} on not run"]
    return messages


def explain(case: Case, failure: Failure, run: Op | None = None) -> str:
    """The failure, how to see it again, and the smallest case found that fails."""
    small, still = _shrunk(case, failure, run)
    return (
        f"{case.op}, seed {case.seed}: {failure}\n  again: {reproduction(case)}\n"
        f"  a smaller case: {still}\n{describe(small)}"
    )


def describe(case: Case) -> str:
    """One line for each argument."""
    lines = [f"    {name} = {_text(x)}" for name, x in case.arguments.items()]
    return "\n".join([*lines, f"    differentiated in {', '.join(case.wrt) or 'nothing'}"])


def _shrunk(case: Case, failure: Failure, run: Op | None) -> tuple[Case, Failure]:
    """Greedy: a step that still fails is kept, and all are tried again, for some seconds."""
    until, steps = time.monotonic() + _SECONDS, _steps(case)
    while time.monotonic() < until and (smaller := next(steps, None)) is not None:
        try:
            check(smaller, run)
        except Failure as still:
            if not isinstance(still.__cause__, ValueError | TypeError):
                case, failure, steps = smaller, still, _steps(smaller)
        except (ValueError, IndexError, RuntimeError):
            pass  # the step made arguments that fit no more
    return case, failure


def _steps(case: Case) -> Iterator[Case]:
    """Cases that are smaller in one way, the ways that save most first."""
    a = case.arguments
    for arguments in (*_fewer_sequences(a), *_fewer_columns(a)):
        yield replace(case, arguments=arguments)
    for name in case.wrt:
        yield replace(case, wrt=tuple(x for x in case.wrt if x != name))
    for name in _OPTIONAL:
        if name in a and name not in case.wrt:
            rest = {n: x for n, x in a.items() if n != name}
            yield replace(case, arguments=_finite(rest) if name == "mask" else rest)
    for name, plain in _PLAIN.items():
        if name in a and not (type(a[name]) is type(plain) and a[name] == plain):
            yield replace(case, arguments=a | {name: plain})
    for name, x in a.items():
        if isinstance(x, Tensor) and not x.is_contiguous():
            yield replace(case, arguments=a | {name: compact(x)})


def _fewer_sequences(a: Arguments) -> Iterator[Arguments]:
    """Parts of the first dimension; of packed tokens, some of the sequences."""
    if "cu_seqlens" not in a:
        rows = next(len(x) if x.ndim else 0 for x in a.values() if isinstance(x, Tensor))
        for part in _parts(rows):
            yield {name: x[part] if _has(x, 0, rows) else x for name, x in a.items()}
        return
    cu_seqlens = a["cu_seqlens"]
    count, tokens = len(cu_seqlens) - 1, int(cu_seqlens[-1])
    for part in _parts(count):
        bounds = cu_seqlens[part.start : part.stop + 1]
        yield _inside(a, bounds) | {name: a[name][part] for name in _PER_SEQUENCE if name in a}
    for part in _parts(tokens) if count == 1 else ():
        yield _inside(a, torch.tensor([part.start, part.stop]))


def _inside(a: Arguments, bounds: Tensor) -> Arguments:
    """The packed tokens of the sequences that have these boundaries."""
    tokens, inside = int(a["cu_seqlens"][-1]), slice(int(bounds[0]), int(bounds[-1]))
    rest = {name: x[inside] if _has(x, 0, tokens) else x for name, x in a.items()}
    return rest | {"cu_seqlens": compact(bounds - bounds[0])}


def _fewer_columns(a: Arguments) -> Iterator[Arguments]:
    """Parts of the second dimension of padded tokens."""
    columns = {x.shape[1] for x in a.values() if isinstance(x, Tensor) and x.ndim == 2}
    if len(columns) == 1 and "logits" not in a:
        for part in _parts(min(columns)):
            yield {name: x[:, part] if _has(x, 1, min(columns)) else x for name, x in a.items()}


def _parts(count: int) -> Iterator[slice]:
    """Either half, and all but one at either end."""
    for first, last in ((0, count // 2), (count // 2, count), (0, count - 1), (1, count)):
        if 0 <= first <= last and last - first < count:
            yield slice(first, last)


def _finite(a: Arguments) -> Arguments:
    """Without the garbage that the mask hid."""
    return {
        name: compact(x.nan_to_num(0, 0, 0)) if isinstance(x, Tensor) and x.is_floating_point()
        else x for name, x in a.items()
    }  # fmt: skip


def _has(x: Any, dimension: int, size: int) -> bool:
    return isinstance(x, Tensor) and x.ndim > dimension and x.shape[dimension] == size


def _text(x: Any) -> str:
    if not isinstance(x, Tensor):
        return repr(x)
    text = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
    text += f", strides {list(x.stride())}, offset {x.storage_offset()}"
    return f"{text}: {x.tolist()}" if x.numel() <= 8 else text
