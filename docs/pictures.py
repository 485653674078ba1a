"""The pictures of docs/method.md and docs/failures.md: `python docs/pictures.py`.

The objective and the advantages come from the kernels. The curves come from docs/runs.csv, the
metrics of runs of SmolLM2-135M-Instruct; `--train FOLDER` trains those that are not in FOLDER yet
(some minutes each on two cores) and writes that file anew.
"""

from __future__ import annotations

import argparse
import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


@dataclass(frozen=True)
class Run:
    """GRPO on the demo's prompts; each run but the first differs from it in what stands here."""

    reward: Any = says_one
    learning_rate: float = 4e-4
    estimator: str = "grpo"

    def config(self, folder: Path) -> PPOConfig:
        optimizer = OptimizerConfig(learning_rate=self.learning_rate, warmup_fraction=0.1)
        model = ModelConfig(trainable_layers=8, optimizer=optimizer)
        estimator: Any = self.estimator
        settings = PPOSettings(estimator=estimator, group_size=8, mini_batch_size=16, kl_coef=0.02)
        return PPOConfig(
            policy=model,
            critic=model,
            generation=GenerationConfig(max_new_tokens=24),
            ppo=settings,
            evaluation=EvaluationConfig(prompts=32, keep_best=False),
            run=RunConfig(output_dir=str(folder)),
            steps=16,
        )


FAILURES = {
    "as it should be": Run(),
    "learning rate 1e-6": Run(learning_rate=1e-6),
    "learning rate 4e-3": Run(learning_rate=4e-3),
    "a reward without an end": Run(reward=counts_all),
}
ESTIMATORS = {name: Run(estimator=name) for name in ("monte_carlo", "td", "gae")}


def train(folder: Path) -> None:
    """Train what `folder` lacks, and write docs/runs.csv."""
    rows = []
    for name, run in {**FAILURES, **ESTIMATORS}.items():
        path = folder / name.replace(" ", "-")
        if not (path / "report.png").exists():
            prompts = [prompt_about(topic) for topic in TRAINING_TOPICS]
            PPOTrainer(model_path(), run.reward, prompts, config=run.config(path)).train()
        for _, row in read_jsonl(path / "metrics.jsonl"):
            values = [row.get(metric) for metric in METRICS]
            rows.append([name, row["step"], *("" if x is None else f"{x:.5g}" for x in values)])
    with (DOCS / "runs.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["run", "step", *METRICS], *rows])


def draw_objective(axes: Axes, advantage: float) -> None:
    """The clipped objective of one token by its ratio, as `ppo_policy_loss` computes it."""
    ratios = torch.linspace(0.0, 2.0, 201).clamp_min(1e-3)
    nothing, given = torch.zeros(1), torch.tensor([advantage])
    objective = [-float(ppo_policy_loss(r.log()[None], nothing, given)[0]) for r in ratios]
    axes.plot(ratios, advantage * ratios, color="#7a7a7a", lw=1, ls=":", label="unclipped")
    axes.plot(ratios, objective, color=COLORS[0], lw=2, label="what PPO maximizes")
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
    places = torch.arange(len(TOKENS))
    for number, (name, lam) in enumerate(estimates.items()):
        advantages, _ = gae(rewards, values, gamma=1.0, lam=lam)
        where = places + (number - 1.5) * 0.2
        axes.bar(where, advantages[0], width=0.2, color=COLORS[number], label=f"λ = {name}")
    axes.axhline(0, color="black", lw=0.8)
    names = [f"{token}\nV {value:.2f}" for token, value in zip(TOKENS, VALUES, strict=True)]
    axes.set_xticks(places, names)
    axes.legend(fontsize=7, frameon=False)
    label(axes, "Advantages of one answer's tokens, score 1 at the end", "advantage")
    axes.set_xlabel("token, and the critic's value before it", fontsize=8)


def draw_runs(axes: Axes, rows: list[dict[str, str]], names: list[str], metric: str) -> None:
    for number, name in enumerate(names):
        found = [
            (int(row["step"]), float(row[metric]))
            for row in rows
            if row["run"] == name and row[metric]
        ]
        steps, values = zip(*found, strict=True)
        axes.plot(steps, values, color=COLORS[number], lw=1.5, marker="o", ms=2.5, label=name)
    axes.set_xlabel("step", fontsize=8)


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
    for figure, runs, panels in (
        (estimators, [*ESTIMATORS], (score, critic)),
        (failures, [*FAILURES], (score, kl, entropy)),
    ):
        for axes, (metric, title, unit) in zip(
            figure.subplots(1, len(panels)), panels, strict=True
        ):
            draw_runs(axes, rows, runs, metric)
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
