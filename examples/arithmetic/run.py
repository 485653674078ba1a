"""Teach SmolLM2-135M sums, with several seeds: `python examples/arithmetic/run.py`.

Makes the data, runs `ppo-engine grpo` for each seed, and prints the accuracy on held-out sums
before and after, with standard errors. None of the seeds is left out; one that is done already is
not run again, and one that was interrupted goes on. `--write` puts the table into README.md, and
the curves into accuracy.png, beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from make_data import make_data
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ppo_engine.demo.model import model_path
from ppo_engine.demo.tiny import save_tiny_model

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"
WANTED = 3.0  # standard errors
Point = tuple[int, float, float]  # step, accuracy, its standard error
SMOKE = (
    "steps=1", "policy.trainable_layers=1", "ppo.rollout_batch_size=16", "ppo.mini_batch_size=16",
)  # fmt: skip


def main() -> None:
    options = _options()
    files = make_data(options.output_dir / "data")
    if options.smoke:
        model = str(options.output_dir / "tiny-model")
        save_tiny_model(Path(model), seed=0)
    else:
        model = options.model or model_path()
    runs = {}
    for seed in options.seeds:
        folder = options.output_dir / f"seed-{seed}"
        if not (folder / "policy").exists():  # written at a run's end
            train(model, files, seed, folder, SMOKE if options.smoke else ())
        runs[seed] = evaluations(folder)
    text = table(runs)
    print(f"\n{text}")
    if options.write:
        page = HERE / "README.md"
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        page.write_text(f"{before}{BEGIN}{text}{END}{after}", encoding="utf-8")
        draw(runs, HERE / "accuracy.png")


def train(
    model: str, files: tuple[Path, Path], seed: int, folder: Path, settings: Sequence[str]
) -> None:
    """A run of the command that a user would type; it is printed first."""
    training, held_out = files
    arguments = ["grpo", "--config", str(HERE / "config.yaml"), "--model", model]
    arguments += ["--data", str(training), "--reward", "last_number"]
    arguments += ["--seed", str(seed), "--output-dir", str(folder), f"evaluation.path={held_out}"]
    arguments += settings
    if (folder / "config.yaml").exists():  # it was interrupted
        arguments.append("run.resume=true")
    print(shlex.join(["ppo-engine", *arguments]), flush=True)
    if code := subprocess.run([sys.executable, "-m", "ppo_engine", *arguments]).returncode:
        sys.exit(code)  # it has said why


def evaluations(folder: Path) -> list[Point]:
    """Each evaluation on the held-out sums."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "eval/scores" in row]
    return [(row["step"], row["eval/scores"], row["eval/scores_se"]) for row in rows]


def table(runs: dict[int, list[Point]]) -> str:
    """Markdown: a line for each seed, and how many rose by more than `WANTED` standard errors."""
    lines = [
        "| seed | accuracy before | after | rise, in standard errors of the difference |",
        "| --: | --: | --: | --: |",
    ]
    enough = 0
    for seed, found in runs.items():
        (_, before, before_se), (_, after, after_se) = found[0], found[-1]
        error = math.hypot(before_se, after_se)  # as if of different sums: never too small
        rise = (after - before) / error if error else 0.0
        enough += rise > WANTED
        lines.append(
            f"| {seed} | {before:.0%} ± {before_se:.0%} | {after:.0%} ± {after_se:.0%} "
            f"| {rise:.1f} |"
        )
    lines += ["", f"{enough} of {len(runs)} rose by more than {WANTED:g} standard errors."]
    return "\n".join(lines) + "\n"


def draw(runs: dict[int, list[Point]], path: Path) -> None:
    """Accuracy over the steps, a curve for each seed, with its standard error as a band."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for seed, found in runs.items():
        steps, accuracies, errors = zip(*found, strict=True)
        [line] = axes.plot(steps, accuracies, marker="o", ms=3.5, label=f"seed {seed}")
        low = [a - e for a, e in zip(accuracies, errors, strict=True)]
        high = [a + e for a, e in zip(accuracies, errors, strict=True)]
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, lw=0)
    axes.set(xlabel="step", ylabel="right answers to 100 held-out sums, ± SE", ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=130)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="GRPO on small sums, with several seeds.")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), metavar="SEED")
    parser.add_argument("--model", help="Hugging Face name or folder; default: SmolLM2-135M")
    parser.add_argument(
        "--output-dir", type=Path, help="default: runs/arithmetic, or runs/arithmetic-smoke"
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--smoke", action="store_true", help="a tiny random model, one step")
    either.add_argument("--write", action="store_true", help="write README's table and picture")
    chosen = parser.parse_args()
    if chosen.output_dir is None:  # what is done is not run again: never of another model's
        chosen.output_dir = Path("runs/arithmetic-smoke" if chosen.smoke else "runs/arithmetic")
    return chosen


if __name__ == "__main__":
    main()
