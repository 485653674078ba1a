"""Whether the demo learns, whatever the seed: `python bench/demo.py`; see --help.

`ppo-engine demo` for each algorithm and seed, one after the other, each in a process of its own.
Printed for each: by how much VADER rose on held-out prompts, in standard errors too, how many of
the held-out rankings the reward model had right, and the time. None is left out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

# A script's own folder comes first on the path; the package `bench` is in the one above.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import machine, table
from bench.results import Row, write_csv

ALGORITHMS = ("ppo", "grpo")
WANTED = 3.0  # standard errors


def main() -> int:
    options = _options()
    device = torch.device("cpu")
    about = {
        "device": machine.describe(device),
        "threads": torch.get_num_threads(),
        **machine.versions(),
        "commit": machine.commit(),
    }
    table.say(f"{about['device']}, {about['threads']} threads")
    rows: list[Row] = []
    for seed in options.seeds:
        for algorithm in options.algorithms:
            row = _run(algorithm, seed, options.share_base)
            rows.append(row | about)
            table.say(
                f"{algorithm:5s} seed {seed}: VADER {row['rise']:+.3f} ± {row['rise_se']:.3f} "
                f"({row['standard_errors']:.1f} standard errors), reward model right on "
                f"{row['reward_accuracy']:.0%} ± {row['reward_accuracy_se']:.0%}, "
                f"{row['seconds']:.0f} s"
            )
            if options.out:  # after each, as a limit of time may end it
                write_csv(options.out, shlex.join(["python", "bench/demo.py", *sys.argv[1:]]), rows)
    rose = sum(row["standard_errors"] > WANTED for row in rows)
    table.say(f"{rose} of {len(rows)} rose by more than {WANTED:g} standard errors.")
    return 0


def _run(algorithm: str, seed: int, share_base: bool) -> Row:
    with tempfile.TemporaryDirectory(prefix="ppo-demo-") as folder:
        command = [sys.executable, "-m", "ppo_engine", "demo", "--algorithm", algorithm]
        command += ["--seed", str(seed), "--output-dir", f"{folder}/run"]
        command += ["share_base=true"] * share_base
        with table.waiting(f"{algorithm}, seed {seed}"):
            subprocess.run(command, check=True, capture_output=True)
        found = json.loads(Path(folder, "run", "summary.json").read_text(encoding="utf-8"))
    names = ("rise", "rise_se", "reward_accuracy", "reward_accuracy_se", "seconds")
    figures = {name: found[name] for name in (*names, "peak_memory_gib")}
    of_errors = found["rise"] / found["rise_se"]
    about = {"algorithm": algorithm, "seed": seed, "share_base": share_base}
    return {**about, "standard_errors": of_errors, **figures}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run the demo with several seeds; a table of all.")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(8), metavar="SEED")
    parser.add_argument("--algorithms", choices=ALGORITHMS, nargs="+", default=ALGORITHMS)
    parser.add_argument("--share-base", action="store_true", help="adapters on one base")
    parser.add_argument("--out", metavar="FILE.csv", help="write the rows to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
