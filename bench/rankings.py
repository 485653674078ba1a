"""A reward model trained on rankings of four, against the same data expanded to pairs.

Answers to short prompts, ranked by VADER as in the demo; the same prompts held out. Rankings with a
tie are left out: the others have six pairs each, so that both ways take the same number of
optimizer steps. A step reads each of its rankings' answers once, or three times, in the pairs that
they are in; what rankings reach in two epochs, still in less time, is shown as well. Seconds are
those of the training steps alone.

    python bench/rankings.py --model HuggingFaceTB/SmolLM2-135M-Instruct --cache rankings.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.console import Console

from ppo_engine.demo.candidates import (
    TONES,
    TOPICS_PER_BATCH,
    best_first,
    load_vader,
    part,
    rank_candidates,
)
from ppo_engine.demo.model import save_lower_layers
from ppo_engine.demo.prompts import TRAINING_TOPICS
from ppo_engine.memory import keep_freed_memory
from ppo_engine.models import precision
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.run.progress import Progress
from ppo_engine.settings.schema import (
    ModelConfig,
    OptimizerConfig,
    PreferenceDataConfig,
    RewardModelConfig,
    RewardModelSettings,
    RunConfig,
)
from ppo_engine.training.reward import RewardModelTrainer

PAIRS = list(itertools.combinations(range(len(TONES)), 2))
WAYS = {"rankings": 1, "rankings, two epochs": 2, "pairs": 1}  # and epochs
RANKINGS_PER_STEP = 4
TRAINED_LAYERS = 3
HELD_OUT = 0.3  # of the prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a small chat model: name or folder")
    parser.add_argument("--cache", required=True, type=Path, help="file of the ranked answers")
    parser.add_argument("--depth", type=int, default=6, help="layers of the reward model")
    parser.add_argument("--rounds", type=int, default=2, help="rankings of each prompt")
    parser.add_argument("--seeds", type=int, default=5, help="splits and trainings")
    options = parser.parse_args()
    keep_freed_memory()
    if not options.cache.exists():
        rank_answers(options.model, options.cache, options.rounds)
    rankings = read(options.cache)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        shallow = f"{folder}/model"
        save_lower_layers(options.model, options.depth, shallow)
        for seed in range(options.seeds):
            sets = split(rankings, seed)
            for name, found in results.items():
                place = Path(folder) / f"{name}-{seed}"
                found.append(train(shallow, name, sets, place, seed))
                print(f"seed {seed}, {name}: {told(found[-1])}", flush=True)
            assert results["rankings"][-1]["steps"] == results["pairs"][-1]["steps"]
    show(results)


def rank_answers(model: str, cache: Path, rounds: int) -> None:
    """Sample four answers to each prompt and rank them, as the demo does."""
    device = precision.choose_device("auto")
    policy = LanguageModel.open(
        model, ModelConfig(), device=device, dtype=precision.choose_dtype("auto", device)
    )
    torch.manual_seed(0)
    topics = TRAINING_TOPICS * rounds
    with Progress(math.ceil(len(topics) / TOPICS_PER_BATCH), "Answers") as progress:
        rankings = rank_candidates(policy, topics, 1, 24, load_vader(), progress)
    cache.write_text("".join(json.dumps(row) + "\n" for row in rankings), encoding="utf-8")


def read(cache: Path) -> list[dict[str, Any]]:
    """The rankings without a tie, which have all six pairs."""
    rows = [json.loads(line) for line in cache.read_text(encoding="utf-8").split("\n") if line]
    return [row for row in rows if len({*row["ranks"]}) == len(TONES)]


def split(rankings: list[dict[str, Any]], seed: int) -> dict[str, list[dict[str, Any]]]:
    """By prompt."""
    prompts = sorted({json.dumps(row["prompt"]) for row in rankings})
    held_out = random.Random(seed).sample(prompts, round(HELD_OUT * len(prompts)))
    sets: dict[str, list[dict[str, Any]]] = {"training": [], "eval": []}
    for row in rankings:
        sets["eval" if json.dumps(row["prompt"]) in held_out else "training"].append(row)
    return sets


def expand(rankings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All ordered pairs."""
    return [
        part(row, pair) for row in rankings for pair in itertools.combinations(best_first(row), 2)
    ]


def train(
    model: str, name: str, sets: dict[str, list[dict[str, Any]]], folder: Path, seed: int
) -> dict[str, float]:
    """Held-out accuracy, its standard error by prompt, and the seconds of all training steps."""
    size, micro = RANKINGS_PER_STEP, RANKINGS_PER_STEP
    if name == "pairs":  # as many steps, and as many sequences in a forward pass
        size, micro = RANKINGS_PER_STEP * len(PAIRS), RANKINGS_PER_STEP * len(TONES) // 2
        sets = {which: expand(rows) for which, rows in sets.items()}
    folder.mkdir()
    for which, rows in sets.items():
        (folder / f"{which}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RewardModelConfig(
        model=ModelConfig(
            path=model,
            trainable_layers=TRAINED_LAYERS,
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.1),
        ),
        data=PreferenceDataConfig(
            path=str(folder / "training.jsonl"), eval_path=str(folder / "eval.jsonl")
        ),
        reward=RewardModelSettings(batch_size=size, micro_batch_size=micro, epochs=WAYS[name]),
        run=RunConfig(output_dir=str(folder / "run"), seed=seed),
    )
    with (folder / "log.txt").open("w") as log:
        found = RewardModelTrainer(config=config, console=Console(file=log)).train()
    steps = [json.loads(line) for line in (folder / "run/metrics.jsonl").open()]
    shutil.rmtree(folder)  # the model in it takes half a gigabyte
    return {
        "accuracy": found["eval/accuracy"],
        "error": found["eval/accuracy_se"],
        "seconds": sum(step.get("time/update", 0.0) for step in steps),
        "steps": len(steps) - 1,
    }


def told(result: dict[str, float]) -> str:
    return (
        f"accuracy {result['accuracy']:.1%} ± {result['error']:.1%}, {result['seconds']:.1f} s "
        f"of training, {result['steps']:.0f} steps"
    )


def show(results: dict[str, list[dict[str, float]]]) -> None:
    print("\nMeans; standard errors of one split, by prompt")
    for name, found in results.items():
        accuracy, error, seconds = (
            statistics.mean(x[key] for x in found) for key in ("accuracy", "error", "seconds")
        )
        print(f"{name:>20}: held-out accuracy {accuracy:.1%} ± {error:.1%}, {seconds:.1f} s")
    for name in list(WAYS)[:-1]:
        both = list(zip(results[name], results["pairs"], strict=True))
        ratios = [pairs["seconds"] / rankings["seconds"] for rankings, pairs in both]
        rises = [rankings["accuracy"] - pairs["accuracy"] for rankings, pairs in both]
        error = statistics.stdev(rises) / math.sqrt(len(rises)) if len(rises) > 1 else math.nan
        print(
            f"{name.capitalize()} train {statistics.mean(ratios):.2f}x as fast as pairs "
            f"({min(ratios):.2f} to {max(ratios):.2f}); their accuracy is higher by "
            f"{statistics.mean(rises):+.1%} ± {error:.1%} (over seeds)."
        )


if __name__ == "__main__":
    main()
