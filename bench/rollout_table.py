"""What `bench/rollout.py` prints: a table for each case, its target, where the time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench import table
from bench.results import Row
from bench.rollout_cases import Case, Target
from bench.rollout_compare import RATIOS
from bench.rollout_sides import OURS


def print_case(case: Case, rows: Sequence[Row], note: str, device: str) -> None:
    first = rows[0]
    table.say(
        f"\n{case.name}: {case.model}, {first['dtype']}, {case.responses} responses in groups of "
        f"{case.group}, {first['prompt_tokens']} prompt tokens, at most {case.new_tokens} new "
        f"ones, memory for {first['rows']} rows"
    )
    line = "  {:<11} {:>8} {:>19} {:>8} {:>10} {:>8} {:>8} {:>7}"
    table.say(
        line.format("", "s", "(least to most)", "tok/s", "x generate", "floor", "x floor", "early")
    )
    for row in rows:
        if row["seconds"] is None:
            table.say(f"  {row['side']:<11} not measured: {row['status']}")
            continue
        ratio = row["x_generate"]
        table.say(
            line.format(
                row["side"],
                f"{row['seconds']:.4g}",
                f"({row['seconds_min']:.4g} to {row['seconds_max']:.4g})",
                f"{row['tokens_per_second']:.0f}",
                "" if ratio is None else f"{ratio:.2f}",
                f"{row['floor_seconds']:.3g}",
                f"{row['x_floor']:.2f}",
                f"{row['early']:.0%}",
            )
        )
    if note:
        table.say(f"  ours: {note}")
    if verdict := judged(rows, case.targets.get(first["dtype"]), device):
        table.say(f"  {verdict}")
    others = max((row["others"] for row in rows if row["seconds"] is not None), default=0.0)
    table.warn_if_busy(others, "a rollout")


def judged(rows: Sequence[Row], target: Target | None, device: str) -> str:
    """Whether ours reached the target; '' where there is none, or no time to hold against it."""
    ours = next((row for row in rows if row["side"] == OURS), None)
    if target is None or ours is None or ours["seconds"] is None or target.on not in device:
        return ""
    if target.beside:
        reached = ours[RATIOS[target.beside]]
        if reached is None:
            return ""
        met = reached >= target.least
        what = f"{reached:.2f}x {target.beside}, target >= {target.least:g}"
    else:
        reached = ours["x_floor" if target.of == "floors" else target.of]
        met = reached <= target.most
        what = f"{reached:.3g} {target.of}, target <= {target.most:.3g}"
    return f"{what}: {'met' if met else 'MISSED'}"


def print_profile(name: str, found: Mapping[str, float]) -> None:
    """Seconds by phase, as `rollout_profile.profiled` found them."""
    whole = sum(found.values())
    table.say(f"  {name} under the profiler, which slows the host: {whole:.3g} s")
    for phase, seconds in found.items():
        table.say(f"    {phase:<26} {seconds:8.3f} s {seconds / whole:6.1%}")
