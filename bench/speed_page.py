"""Write the figures of docs/speed.md and README.md anew from bench/results.

`python bench/speed_page.py`; with `--check` it writes nothing and exits with 1 where a page has
other figures than the results.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.learning_curves import curves, table
from bench.results import Row, read_csv
from bench.targets import is_a_call
from ppo_kernels.dispatch import IMPLS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- speed: begin -->\n", "<!-- speed: end -->\n"

_Row = dict[str, str]


def tables() -> str:
    """All tables, one section for each machine that results are kept of."""
    sections = []
    for folder in sorted(RESULTS.glob("*/")):
        for name, section in _SECTIONS.items():
            if (folder / name).exists():
                sections.append(section(*read_csv(folder / name)))
    return "\n".join(sections)


def headlines() -> str:
    """A row for each step that was measured beside TRL's: how many times as fast ours was."""
    lines = [
        "| one step | on | seconds | TRL's | times faster | sampling | update | GiB | TRL's |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for file in sorted(RESULTS.glob("*/e2e*.csv")):
        _, rows = read_csv(file)
        ours, theirs = (
            {row["phase"]: row for row in rows if row["side"] == side} for side in ("ours", "TRL")
        )
        if not theirs:
            continue
        step = ours["step"]
        seconds = [f"{float(side['step']['seconds']):.1f}" for side in (ours, theirs)]
        times = [
            f"{float(theirs[phase]['seconds']) / float(ours[phase]['seconds']):.1f}"
            for phase in ("step", "generate", "update")
        ]
        peaks = [f"{float(side['step']['peak_bytes']) / 2**30:.1f}" for side in (ours, theirs)]
        cells = " | ".join([*seconds, *times, *peaks])
        base = " by adapters on one base, TRL's of all weights" if _shares_base(step) else ""
        what = f"{_algorithm(step)}{base}, TRL {step['trl']}: {step['model']}, {step['dtype']}"
        lines.append(f"| {what} | {step['device']} | {cells} |")
    return "\n".join(lines) + "\n"


def _ops(command: str, rows: list[_Row]) -> str:
    first = rows[0]
    threads = f", {first['threads']} threads" if "cuda" not in command else ""
    lines = [
        f"**{first['device']}**{threads}, torch {first['torch']}, commit {first['commit']}, by "
        f"`{command}`. At its best the machine reads {float(first['read_gb_per_s']):.1f} GB/s and "
        f"copies {float(first['copy_gb_per_s']):.1f} GB/s.",
        "",
        "| op | size | pass | ms | x floor | best alternative | its ms | times faster |",
        "| --- | --- | --- | --: | --: | --- | --: | --: |",
    ]
    calls, adds = [], []  # ms of ours, and of `torch.add` beside it
    for same in _groups(rows, "op", "shape", "dtype", "mode").values():
        timed = [row for row in same if row["ms_p50"]]
        ours = min((r for r in timed if r["impl"] in IMPLS), key=_ms, default=None)
        other = min((r for r in timed if r["impl"] not in IMPLS), key=_ms, default=None)
        if ours is None:
            continue
        if is_a_call(ours):
            calls.append(_ms(ours))
            adds.append(float(ours["call_ms"]))
        if ours["size"] != "large":
            continue
        lines.append(
            f"| `{ours['op'].split(',')[0]}`{''.join(ours['op'].partition(',')[1:])} "
            f"| {ours['shape']} {ours['dtype']} | {_PASS[ours['mode']]} "
            f"| {_ms(ours):.3g} | {float(ours['x_floor']):.2f} "
            + (
                f"| {other['impl']} | {_ms(other):.3g} | {float(ours['x_best_alternative']):.1f} |"
                if other
                else "| none ran | | |"
            )
        )
    if calls:
        times = [call / add for call, add in zip(calls, adds, strict=True)]
        lines += [
            "",
            f"A call on 8x64 tokens takes {min(calls) * 1e3:.0f} to {max(calls) * 1e3:.0f} µs, "
            f"{min(times):.0f} to {max(times):.0f} times one `torch.add`.",
        ]
    return "\n".join(lines) + "\n"


_PASS = {"fwd": "forward", "bwd": "backward", "both": "forward and backward"}


def _ms(row: _Row) -> float:
    return float(row["ms_p50"])


def _groups(rows: list[_Row], *names: str) -> dict[tuple[str, ...], list[_Row]]:
    found: dict[tuple[str, ...], list[_Row]] = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in names)].append(row)
    return found


def _e2e(command: str, rows: list[_Row]) -> str:
    first = rows[0]
    sides: dict[str, dict[str, _Row]] = defaultdict(dict)
    for row in rows:
        sides[row["side"]][row["phase"]] = row
    algorithm, against = _algorithm(first), ""
    if len(sides) > 1:
        against = f", against TRL {first['trl']}"
        if algorithm == "PPO":
            against += ", the last with PPO, which its owner deleted in September 2026"
    if _shares_base(first):
        against += (
            ", ours by adapters in the last layers of one base (`share_base`), TRL's of all "
            "weights of policy and critic"
        )
    group = first.get("group", "1")
    responses = f" x {group} responses" if group != "1" else ""
    lines = [
        f"One {algorithm} step of {first['model']}, {first['dtype']}, {first['prompts']} prompts"
        f"{responses} x {first['new_tokens']} new tokens, {first['epochs']} "
        f"epoch{'' if first['epochs'] == '1' else 's'}, on **{first['device']}**, "
        f"{first['threads']} threads{against}, torch {first['torch']}, commit {first['commit']}, "
        f"by `{command}`:",
        "",
        f"| seconds | {' | '.join(sides)} | floor |",
        f"| --- |{' --: |' * (len(sides) + 1)}",
    ]
    for phase in sides["ours"]:
        times = " | ".join(f"{float(side[phase]['seconds']):.1f}" for side in sides.values())
        name = f"**{phase}**" if phase == "step" else phase
        lines.append(f"| {name} | {times} | {float(sides['ours'][phase]['floor_seconds']):.1f} |")
    steps = [side["step"] for side in sides.values()]
    speeds = " | ".join(f"{float(step['tokens_per_second']):.1f}" for step in steps)
    peaks = " | ".join(f"{float(step['peak_bytes']) / 2**30:.1f}" for step in steps)
    lines += [f"| response tokens per second | {speeds} | |", f"| peak memory, GiB | {peaks} | |"]
    return "\n".join(lines) + "\n"


def _algorithm(row: _Row) -> str:
    return row.get("algorithm", "PPO")  # files from before GRPO was measured do not say


def _shares_base(row: _Row) -> bool:
    return row.get("share_base") == "True"


def _learning(command: str, rows: list[_Row]) -> str:
    first = rows[0]
    points: list[Row] = [
        row | {"kl": float(row["kl"]), "reward": float(row["reward"])} for row in rows
    ]
    lines = [
        f"What is learnt: PPO on the demo's prompts and reward model, by ours of "
        f"{first['before']}, ours now and TRL {first['trl']}, on **{first['device']}**, torch "
        f"{first['torch']}, commit {first['commit']}, by `{command}`. Reward on held-out prompts "
        f"at equal KL to the reference, mean and deviation of {len({row['seed'] for row in rows})} "
        "seeds, all measured by one evaluator:",
        "",
        *table(curves(points)),
    ]
    return "\n".join(lines) + "\n"


def _rollout(command: str, rows: list[_Row]) -> str:
    first = rows[0]
    lines = [
        f"Rollouts on **{first['device']}**, {first['threads']} threads, torch {first['torch']}, "
        f"transformers {first['transformers']}, commit {first['commit']}, by `{command}`:",
        "",
        "| responses x new tokens | model | s | x floor | beside | its s | times faster |",
        "| --- | --- | --: | --: | --- | --: | --: |",
    ]
    for same in _groups(rows, "case", "dtype").values():
        sides = {row["side"]: row for row in same if row["seconds"]}
        if "ours" not in sides:
            continue
        ours = sides.pop("ours")
        what = f"{ours['responses']} x {ours['new_tokens']}"
        what += f" in groups of {ours['group']}" if ours["group"] != "1" else ""
        what += f", memory for {ours['rows']}" if ours["rows"] != ours["responses"] else ""
        for name, side in sides.items():
            lines.append(
                f"| {what} | {ours['model']}, {ours['dtype']} | {float(ours['seconds']):.2f} "
                f"| {float(ours['x_floor']):.2f} | {name} | {float(side['seconds']):.2f} "
                f"| {float(side['seconds']) / float(ours['seconds']):.2f} |"
            )
    return "\n".join(lines) + "\n"


def _demo(command: str, rows: list[_Row]) -> str:
    first = rows[0]
    seconds = [float(row["seconds"]) for row in rows]
    threads = " or ".join(sorted({row["threads"] for row in rows}))
    lines = [
        f"The demo{' with one base' if _shares_base(first) else ''} on **{first['device']}**, "
        f"{threads} threads, torch {first['torch']}, "
        f"commit {first['commit']}, by `{command}`: the rise of VADER on held-out prompts, how "
        "many standard errors it is, and the held-out rankings that the reward model had right. "
        f"Half of the runs took at most {median(seconds):.0f} s.",
        "",
        "| seed | algorithm | rise of VADER | standard errors | reward model right |",
        "| --: | --- | --: | --: | --: |",
    ]
    lines += [
        f"| {row['seed']} | {row['algorithm'].upper()} "
        f"| {float(row['rise']):+.2f} ± {float(row['rise_se']):.2f} "
        f"| {float(row['standard_errors']):.1f} "
        f"| {float(row['reward_accuracy']):.0%} ± {float(row['reward_accuracy_se']):.0%} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _passes(command: str, rows: list[_Row]) -> str:
    first = rows[0]
    lines = [
        f"One update pass (the policy's loss, forward and backward) of {first['model']}, "
        f"{first['dtype']}, {first['tokens']} tokens in {first['texts']} texts, on "
        f"**{first['device']}**, {first['threads']} threads, torch {first['torch']}, commit "
        f"{first['commit']}, by `{command}`; norms, rotary embedding and gates are made by:",
        "",
        "| | ms | times as fast as plain | x floor | MFU | memory beside the weights, GB |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    lines += [
        f"| {row['side']} | {float(row['ms_p50']):.0f} | {float(row['x_plain']):.2f} "
        f"| {float(row['x_floor']):.2f} | {float(row['mfu']):.0%} "
        f"| {float(row['peak_bytes']) / 1e9:.1f} |"
        for row in rows
        if row["ms_p50"]
    ]
    return "\n".join(lines) + "\n"


def _growth(command: str, rows: list[_Row]) -> str:
    first = rows[0]
    lines = [
        f"Steps of {first['model']}, {first['dtype']}, as they grow: responses of 1 to "
        f"{first['limit']} tokens, one epoch, on **{first['device']}**, {first['threads']} "
        f"threads, torch {first['torch']}, commit {first['commit']}, by `{command}`. Milliseconds "
        "for each response token; the step is without its rollout.",
        "",
        "| response tokens | step | score | advantages | update | peak, GiB | rollout |",
        "| --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in (row for row in rows if row["status"] == "ok"):
        step, score, advantages, update, generate = (
            f"{float(row[f'{phase}_ms_per_token']):.3g}"
            for phase in ("step", "score", "advantages", "update", "generate")
        )
        lines.append(
            f"| {int(row['tokens']):,} | {step} | {score} | {advantages} | {update} "
            f"| {float(row['peak_bytes']) / 2**30:.2f} | {generate} |"
        )
    return "\n".join(lines) + "\n"


_SECTIONS = {
    "ops.csv": _ops,
    "e2e.csv": _e2e,
    "e2e-fp32.csv": _e2e,
    "e2e-8bit.csv": _e2e,
    "e2e-share-base.csv": _e2e,
    "e2e-grpo.csv": _e2e,
    "e2e-grpo-fp32.csv": _e2e,
    "passes.csv": _passes,
    "passes-7b.csv": _passes,
    "growth.csv": _growth,
    "rollout.csv": _rollout,
    "demo.csv": _demo,
    "demo-share-base.csv": _demo,
    "learning.csv": _learning,
}


# What stands between the markers of each page.
_PAGES = {"docs/speed.md": tables, "README.md": headlines}


def rewritten(page: str) -> str:
    """A page of the repository as it should be: what is between its markers made anew."""
    before, _, rest = (ROOT / page).read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{_PAGES[page]()}\n{END}{after}"


def main() -> int:
    status = 0
    for page in _PAGES:
        wanted = rewritten(page)
        if "--check" not in sys.argv[1:]:
            (ROOT / page).write_text(wanted, encoding="utf-8")
        elif (ROOT / page).read_text(encoding="utf-8") != wanted:
            print(f"{page} has other figures than bench/results: run bench/speed_page.py")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
