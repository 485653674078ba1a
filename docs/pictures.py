"""The pictures of docs/method.md and docs/failures.md: `python docs/pictures.py`.

The objective and the advantages come from the kernels. The curves come from docs/runs.csv, the
metrics of runs of a tiny model and of SmolLM2-135M-Instruct; `--train FOLDER` trains those that are
not in FOLDER yet (half a minute and some minutes each on two cores) and writes that file anew.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ppo_engine import (
    EvaluationConfig,
    GenerationConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    PPOSettings,
    PPOTrainer,
    RunConfig,
)
from ppo_engine.data.rows import read_jsonl
from ppo_engine.demo.model import model_path
from ppo_engine.demo.prompts import TRAINING_TOPICS, prompt_about
from ppo_engine.demo.tiny import save_tiny_model
from ppo_kernels import gae, ppo_policy_loss

DOCS = Path(__file__).parent
COLORS = ("#2a6fbb", "#d1602b", "#3b8f5a", "#8457a8")
METRICS = (
    "objective/scores",
    "objective/kl",
    "objective/entropy",
    "value/explained_variance",
    "eval/scores",
    "eval/scores_se",
    "eval/kl",
    "eval/ref_perplexity",
)

# An answer that goes wrong and mends itself: what a critic might think before each token.
TOKENS = ("2+2", "is", "5", ",", "no", ",", "4", ".")
VALUES = (0.6, 0.6, 0.6, 0.15, 0.15, 0.5, 0.5, 0.95)
SCORE = 1.0

CHEERFUL = re.compile(
    r"\b(love|joy|happy|beautiful|wonderful|delight|smile|bright|warm|great)", re.IGNORECASE
)


def says_one(prompts: list[Any], responses: list[str]) -> list[float]:
    """1 with a cheerful word, else 0."""
    return [float(bool(CHEERFUL.search(response))) for response in responses]


def counts_all(prompts: list[Any], responses: list[str]) -> list[float]:
    """How many cheerful words there are: the same aim, with no end to it."""
    return [float(len(CHEERFUL.findall(response))) for response in responses]


def vowels(prompts: list[Any], responses: list[str]) -> list[float]:
    return [sum(letter in "aeiou" for letter in response) / 4 for response in responses]


@dataclass(frozen=True)
class Run:
    """GRPO of SmolLM2 on the demo's prompts."""

    reward: Any = says_one
    learning_rate: float = 4e-4

    def trainer(self, output: Path) -> PPOTrainer:
        optimizer = OptimizerConfig(learning_rate=self.learning_rate, warmup_fraction=0.1)
        config = PPOConfig(
            policy=ModelConfig(trainable_layers=8, optimizer=optimizer),
            generation=GenerationConfig(max_new_tokens=24),
            ppo=PPOSettings(estimator="grpo", group_size=8, mini_batch_size=16, kl_coef=0.02),
            evaluation=EvaluationConfig(prompts=32, keep_best=False),
            run=RunConfig(output_dir=str(output)),
            steps=16,
        )
        prompts = [prompt_about(topic) for topic in TRAINING_TOPICS]
        return PPOTrainer(model_path(), self.reward, prompts, config=config)


@dataclass(frozen=True)
class TinyRun:
    """PPO of the smoke test's random model, to write vowels; the critic starts from the policy."""

    estimator: Any
    seed: int

    def trainer(self, output: Path) -> PPOTrainer:
        model = output.parent / "tiny"
        save_tiny_model(model, seed=0)
        role = ModelConfig(optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant"))
        config = PPOConfig(
            policy=role,
            critic=role,
            generation=GenerationConfig(max_new_tokens=16),
            ppo=PPOSettings(estimator=self.estimator, mini_batch_size=16, kl_coef=0.01),
            run=RunConfig(output_dir=str(output), seed=self.seed, dtype="float32", sample_every=0),
            steps=30,
        )
        prompts = [f"Prompt {number}" for number in range(64)]
        return PPOTrainer(str(model), vowels, prompts, config=config)


FAILURES = {
    "as it should be": Run(),
    "learning rate 1e-6": Run(learning_rate=1e-6),
    "learning rate 4e-3": Run(learning_rate=4e-3),
    "a reward without an end": Run(reward=counts_all),
}
ESTIMATORS = ("monte_carlo", "gae", "td")
SEEDS = range(3)
TINY = {f"{name}, seed {seed}": TinyRun(name, seed) for name in ESTIMATORS for seed in SEEDS}


def train(folder: Path) -> None:
    """Train what `folder` lacks, and write docs/runs.csv."""
    rows = []
    runs: dict[str, Run | TinyRun] = {**TINY, **FAILURES}
    for name, run in runs.items():
        path = folder / name.replace(" ", "-")
        if not (path / "report.png").exists():
            run.trainer(path).train()
        for _, row in read_jsonl(path / "metrics.jsonl"):
            values = [row.get(metric) for metric in METRICS]
            rows.append([name, row["step"], *("" if x is None else f"{x:.5g}" for x in values)])
    with (DOCS / "runs.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["run", "step", *METRICS], *rows])


def draw_objective(axes: Axes, advantage: float) -> None:
    """The clipped objective of one token by its ratio, as `ppo_policy_loss` computes it."""
    ratios = [max(0.001, step / 100) for step in range(201)]
    old, given = torch.zeros(1), torch.tensor([advantage])
    losses = [ppo_policy_loss(torch.tensor([math.log(r)]), old, given)[0] for r in ratios]
    axes.plot(
        ratios, [advantage * r for r in ratios], color="#7a7a7a", lw=1, ls=":", label="unclipped"
    )
    axes.plot(
        ratios, [-float(loss) for loss in losses], color=COLORS[0], lw=2, label="what PPO maximizes"
    )
    axes.axvspan(0.8, 1.2, color=COLORS[0], alpha=0.08, lw=0)
    axes.plot([1], [advantage], "o", color=COLORS[1], ms=5, label="where an update begins")
    label(axes, f"Advantage {advantage:+.0f}", "objective of the token")
    axes.set_xlabel("ratio of its probability, new to old", fontsize=8)


def draw_advantages(axes: Axes) -> None:
    """One episode's advantages by four λ, as `gae` computes them."""
    rewards = torch.zeros(1, len(TOKENS))
    rewards[0, -1] = SCORE
    values = torch.tensor([VALUES])
    estimates = {"1 (Monte Carlo)": 1.0, "0.95": 0.95, "0.5": 0.5, "0 (TD)": 0.0}
    for number, (name, lam) in enumerate(estimates.items()):
        advantages, _ = gae(rewards, values, gamma=1.0, lam=lam)
        where = [place + (number - 1.5) * 0.2 for place in range(len(TOKENS))]
        axes.bar(
            where, advantages[0].tolist(), width=0.2, color=COLORS[number], label=f"λ = {name}"
        )
    axes.axhline(0, color="black", lw=0.8)
    names = [f"{token}\nV {value:.2f}" for token, value in zip(TOKENS, VALUES, strict=True)]
    axes.set_xticks(range(len(TOKENS)), names)
    axes.legend(fontsize=7, frameon=False)
    label(axes, "Advantages of one answer's tokens, score 1 at the end", "advantage")
    axes.set_xlabel("token, and the critic's value before it", fontsize=8)


def draw_runs(
    axes: Axes, rows: list[dict[str, str]], curves: dict[str, list[str]], metric: str
) -> None:
    """A curve for each entry: the mean of its runs, and what they span."""
    for color, (name, runs) in zip(COLORS, curves.items(), strict=False):
        found: dict[int, list[float]] = defaultdict(list)
        for row in rows:
            if row["run"] in runs and row[metric]:
                found[int(row["step"])].append(float(row[metric]))
        steps = [*found]
        axes.plot(steps, [sum(x) / len(x) for x in found.values()], color=color, lw=1.5, label=name)
        lowest, highest = map(min, found.values()), map(max, found.values())
        axes.fill_between(steps, [*lowest], [*highest], color=color, alpha=0.15, lw=0)
    axes.set_xlabel("step", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def label(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.set_ylabel(unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def pictures() -> dict[str, Figure]:
    clip = Figure(figsize=(7.2, 2.7), layout="constrained")
    for axes, advantage in zip(clip.subplots(1, 2), (1.0, -1.0), strict=True):
        draw_objective(axes, advantage)
    clip.axes[0].legend(fontsize=7, frameon=False)
    advantages = Figure(figsize=(7.2, 3.0), layout="constrained")
    draw_advantages(advantages.subplots())

    with (DOCS / "runs.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    estimators = Figure(figsize=(7.2, 2.7), layout="constrained")
    failures = Figure(figsize=(10.0, 2.9), layout="constrained")
    score = ("objective/scores", "Score", "mean of 64 responses")
    critic = ("value/explained_variance", "Explained variance of the critic", "1 is perfect")
    kl = ("objective/kl", "KL to the reference", "nats per response")
    entropy = ("objective/entropy", "Entropy of the policy", "nats per token")
    of_seeds = {name: [f"{name}, seed {seed}" for seed in SEEDS] for name in ESTIMATORS}
    for figure, curves, panels in (
        (estimators, of_seeds, (score, critic)),
        (failures, {name: [name] for name in FAILURES}, (score, kl, entropy)),
    ):
        for axes, (metric, title, unit) in zip(
            figure.subplots(1, len(panels)), panels, strict=True
        ):
            draw_runs(axes, rows, curves, metric)
            label(axes, title, unit)
        figure.axes[0].legend(fontsize=7, frameon=False)
    return {
        "clip": clip,
        "advantages": advantages,
        "estimators": estimators,
        "failures": failures,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", metavar="FOLDER", type=Path, help="train the runs into FOLDER")
    folder = parser.parse_args().train
    if folder is not None:
        train(folder)
    for name, figure in pictures().items():
        figure.savefig(DOCS / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
