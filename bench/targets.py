"""What the kernels are to reach, as a ratio to the floor of the same run; and whether they did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from bench.case import Mode
from bench.results import Row
from ppo_kernels.dispatch import IMPLS

EXPLANATIONS = {"cpu": "bench/notes/cpu.md", "cuda": "bench/notes/gpu.md"}


class Target(NamedTuple):
    """The time of `ops` together, at one size, is to be at most `most` times their floors', calls'
    of a `torch.add` of 8x64, or eager PyTorch's; or so many MB beside the gradients, or in all."""

    ops: tuple[str, ...]
    shape: str
    dtype: str
    mode: Mode
    most: float
    of: Literal["floor", "call", "eager", "extra MB", "peak MB"] = "floor"


_HEAD = "1024x576x49152"
EAGER = ("eager", "eager, in float32")
_LOSSES = ("ppo_policy_loss", "ppo_value_loss")

TARGETS = {
    "cpu": (
        Target(("token_logprobs",), "2048x49152", "float32", "fwd", 1.4),
        Target(("token_logprobs, entropy",), "2048x49152", "float32", "fwd", 1.7),
        Target(("token_logprobs",), "2048x49152", "bfloat16", "fwd", 2.5),
        Target(("token_logprobs, entropy",), "2048x49152", "float32", "bwd", 1.5),
        Target(("kl_shaped_gae",), "4096x1024", "float32", "fwd", 1.5),
        Target(("kl_shaped_gae, packed",), "3139421", "float32", "fwd", 1.5),
        Target(("gae, long rows",), "8x32768", "float32", "fwd", 2.0),
        Target(_LOSSES, "4096x1024", "float32", "both", 1.5),
        Target(("sample",), "16x49152", "float32", "fwd", 1.5),
        Target(("sample, top-p",), "16x49152", "float32", "fwd", 4.0),
        Target(("adamw",), "SmolLM2-135M", "float32", "fwd", 1.0),
        Target(("adamw",), "SmolLM2-135M", "bfloat16", "fwd", 1.0),
        *(
            target
            for dtype in ("float32", "bfloat16")
            for target in (
                # Of bfloat16 the floor is in bfloat16 where the CPU multiplies it, else in float32.
                Target(("linear_ppo_loss",), _HEAD, dtype, "both", 1.2),
                Target(("linear_ppo_loss",), _HEAD, dtype, "both", 0.5, of="eager"),
                Target(("linear_ppo_loss",), _HEAD, dtype, "both", 64, of="extra MB"),
                Target(("linear_logprobs",), _HEAD, dtype, "fwd", 1.15),
            )
        ),
    ),
    "cuda": (
        Target(("kl_shaped_gae",), "4096x4096", "float32", "fwd", 1 / 0.85),
        Target(("kl_shaped_gae, long rows",), "8x131072", "float32", "fwd", 1 / 0.5),
        Target(("kl_shaped_gae",), "512x1024", "float32", "fwd", 2.0, of="call"),
        Target(("token_logprobs, entropy",), "8192x151936", "bfloat16", "fwd", 1 / 0.9),
        Target(("token_logprobs, entropy",), "8192x151936", "bfloat16", "bwd", 1 / 0.85),
        Target(_LOSSES, "4096x4096", "float32", "both", 1 / 0.85),
        Target(("adamw",), "187500000", "bfloat16", "fwd", 1 / 0.85),
        Target(("linear_ppo_loss",), "8192x4096x151936", "bfloat16", "both", 1.15),
        Target(("linear_ppo_loss",), "8192x4096x151936", "bfloat16", "both", 6442, of="peak MB"),
        Target(("linear_logprobs",), "8192x4096x151936", "bfloat16", "fwd", 1.1),
    ),
}
MOST_OF_A_CALL = {"cpu": 8.0}  # on the smallest tensors: in calls of torch.add


def verdicts(rows: Sequence[Row], device: str) -> Iterator[str]:
    """A line for each target that these rows of one run say something of."""
    ours = _best(row for row in rows if row["impl"] in IMPLS and row["ms_p50"] is not None)
    for target in TARGETS[device]:
        keys = [(op, target.shape, target.dtype, target.mode) for op in target.ops]
        of = [row for row in ours if _case(row) in keys]
        if len(of) == len(keys):
            found, result = _reached(target, of, rows)
            title = " + ".join(target.ops)
            what = f"{title} {target.shape} {target.dtype} {target.mode}"
            yield _line(what, result, f"<= {target.most:.4g}", found <= target.most)
    for row in filter(is_a_call, ours) if device in MOST_OF_A_CALL else ():
        what, most = f"{row['op']} {row['shape']}, a call", MOST_OF_A_CALL[device]
        calls = row["ms_p50"] / row["call_ms"]
        yield _line(what, f"{calls:.1f} torch.adds", f"<= {most:g}", calls <= most)
    compiled = [row for row in rows if "compiled" in row["impl"] and row["size"] == "large"]
    for row in ours:
        same = [other for other in compiled if _case(other) == _case(row)]
        others = [other["ms_p50"] for other in same if other["ms_p50"]]
        if others:
            times = min(others) / row["ms_p50"]
            what = f"{row['op']} {row['shape']} {row['dtype']} {row['mode']}, torch.compile"
            yield _line(what, f"{times:.1f}x faster", "> 1", times > 1)


def is_a_call(row: Row) -> bool:
    """Whether a row is of tensors so small that its floor is a call of `torch.add`."""
    small = row["size"] == "small" and row["mode"] == "fwd"
    return small and row["floor_ms"] == row["call_ms"]


def _reached(target: Target, of: Sequence[Row], rows: Sequence[Row]) -> tuple[float, str]:
    """What is held against the target, and the same in words."""
    if target.of in ("extra MB", "peak MB"):
        kind, unit = target.of.split()
        found = sum(row[f"{kind}_bytes"] for row in of) / 1e6
        return found, f"{found:.0f} {unit} {kind}"
    if target.of == "eager":
        keys = [_case(row) for row in of]
        eager = [r for r in rows if r["impl"] in EAGER and _case(r) in keys and r["ms_p50"]]
        theirs = sum(row["ms_p50"] for row in eager)
        found = sum(row["ms_p50"] for row in of) / theirs if theirs else float("nan")
    else:
        found = sum(row["ms_p50"] for row in of) / sum(row[f"{target.of}_ms"] for row in of)
    return found, f"{found:.2f}x the {target.of}"


def _case(row: Row) -> tuple[str, str, str, Mode]:
    return row["op"], row["shape"], row["dtype"], row["mode"]


def _best(rows: Iterable[Row]) -> list[Row]:
    """The fastest of each case."""
    slowest_first = sorted(rows, key=lambda row: -row["ms_p50"])
    return list({_case(row): row for row in slowest_first}.values())


def _line(what: str, result: str, target: str, met: bool) -> str:
    return f"  {what:<72} {result:>18}   {target:<7} {'met' if met else 'MISSED'}"
