"""Whether an implementation is right, before it is timed."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.case import Case, Inputs, Outputs, Run, fresh, with_gradients

# Largest error allowed, beside the largest magnitude of the exact result (or 1): by the dtype of
# the inputs, as those who compute in it can do no better. Our own tests are far stricter.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


class WrongResult(Exception):
    """The result is not that of the formula in float64."""


def exact(case: Case, inputs: Inputs) -> Outputs:
    """Outputs and gradients of the reference in float64; in the order that `error` takes them."""
    if case.chunk is None:
        return _exact_rows(case, inputs)
    rows = len(next(iter(inputs.values())))
    chunks = [slice(first, first + case.chunk) for first in range(0, rows, case.chunk)]
    parts = [
        _exact_rows(case, {k: x if k in case.shared else x[chunk] for k, x in inputs.items()})
        for chunk in chunks
    ]
    of_shared = [False] * (len(parts[0]) - len(case.trained))
    of_shared += [name in case.shared for name in case.trained]
    return tuple(
        sum(column, torch.zeros_like(column[0]))
        if added or not column[0].ndim
        else torch.cat(column)
        for added, column in zip(of_shared, zip(*parts, strict=True), strict=True)
    )


def error(case: Case, inputs: Inputs, run: Run, truth: Outputs, *, gradients: bool) -> float:
    """The largest error of `run`, relative to the exact result's largest magnitude (or 1).

    Raises WrongResult where it is over the tolerance, or not a number.
    """
    if gradients:
        outputs, found = with_gradients(case, inputs, run)
        results = [*outputs, *found]
    else:
        with torch.no_grad():
            results = [*run(fresh(case, inputs))]
    outputs_only = len(truth) - len(case.trained)
    wanted = truth if gradients else truth[:outputs_only]
    if len(results) != len(wanted):
        raise WrongResult(f"{len(results)} results in place of {len(wanted)}")
    tolerance = TOLERANCES[case.dtype]
    largest = 0.0
    for result, expected in zip(results, wanted, strict=True):
        difference = _difference(result, expected)
        if not difference <= tolerance:  # NaN too
            raise WrongResult(f"error {difference:.1e}, over {tolerance:.0e}")
        largest = max(largest, difference)
    return largest


def _exact_rows(case: Case, inputs: Inputs) -> Outputs:
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}

    def run(x: Inputs) -> Outputs:
        return case.ours(x, "reference")

    if not case.trained:
        return run(wide)
    outputs, found = with_gradients(case, wide, run)
    # Half the memory; far below any tolerance.
    return tuple(x.detach().float() if x.numel() > 1 else x.detach() for x in (*outputs, *found))


def _difference(result: Tensor, expected: Tensor) -> float:
    if result.shape != expected.shape:
        raise WrongResult(f"shape {tuple(result.shape)} in place of {tuple(expected.shape)}")
    if not expected.numel():
        return 0.0
    worst = 0.0
    scale = max(1.0, float(expected.abs().max()))
    # In parts: the difference of large gradients would be another tensor of their size.
    flat = zip(
        result.detach().reshape(-1).split(2**24), expected.reshape(-1).split(2**24), strict=True
    )
    for a, b in flat:
        difference = float((a.to(b.dtype) - b).abs().max())
        if difference != difference:
            return difference
        worst = max(worst, difference)
    return worst / scale
