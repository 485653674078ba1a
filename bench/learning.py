"""What is learnt, ours against TRL's and against ours of before: `python bench/learning.py`; see
--help.

PPO on the demo's model, prompts and reward model, each side with as many responses of the same
length, mini-batches, epochs, the same learning rate, coefficient of the KL and AdamW, in fp32, all
weights trained. A side only trains and saves its policy every few steps; `learning_evaluator.py`
samples from what was saved, on held-out prompts, and measures reward and KL. So no side marks its
own work, and curves of reward against KL can be laid over each other whatever the speed at which a
side leaves the reference.

Every side and seed leaves a file in --folder, and what is there is not run again. Before, TRL:

    git archive 4166b5f --prefix=before/ | tar x -C /tmp
    (cd /tmp/before && PYTHONPATH=kernels python setup.py build_ext --inplace)
    pip install trl==1.12.0  # its owner deleted PPO in September 2026
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# A script's own folder comes first on the path; the package `bench` is in the one above.
ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch
from transformers import AutoModelForCausalLM

from bench import machine, table
from bench.e2e import PPO
from bench.e2e_compare import WORKER_ENVIRONMENT
from bench.e2e_run import versions
from bench.learning_curves import curves, judged
from bench.learning_evaluator import Evaluator
from bench.results import Row, write_csv
from ppo_engine.demo.model import model_path
from ppo_engine.demo.prompts import HELD_OUT_TOPICS, TRAINING_TOPICS, prompt_about
from ppo_engine.demo.tiny import save_tiny_model
from ppo_engine.errors import UserError
from ppo_engine.pretrained.quiet import quiet_transformers
from ppo_engine.run.directory import atomic_folder
from ppo_engine.text.renderer import Renderer
from ppo_engine.text.tokenizer import load_tokenizer

BEFORE = "4166b5f"  # the last commit before steps, passes and rollouts were made anew
SIDES = ("before", "now", "TRL")
_LINES_SHOWN = 15  # of what a training that failed had printed last
# Of a training; `steps` rollouts of `responses`, a policy saved after every `hold_every`.
_FULL: dict[str, Any] = {
    "steps": 12, "hold_every": 3, "responses": 32, "mini_batch": 8, "new_tokens": 24,
    "learning_rate": 3e-5, "kl_coef": 0.1, "lam": 1.0, "held_out": 64, "samples": 2,
}  # fmt: skip
_SMOKE = _FULL | {
    "steps": 2, "hold_every": 1, "responses": 4, "mini_batch": 2, "new_tokens": 6,
    "learning_rate": 1e-3, "held_out": 4, "samples": 1,
}  # fmt: skip


def main() -> int:
    options = _options()
    try:
        return _run(options)
    except UserError as error:
        table.say(f"Error: {error}")
        return 1


def _run(options: argparse.Namespace) -> int:
    folder, sizes = Path(options.folder).absolute(), _SMOKE if options.smoke else _FULL
    for side in options.sides:
        _check(side, options.before)
    wanted = [(side, seed) for seed in options.seeds for side in options.sides]
    missing = [run for run in wanted if not _is_there(_file(folder, *run), sizes)]
    if missing:
        policy, reward = _models(folder, options.smoke)
        evaluator = _evaluator(policy, reward, sizes)
        for side, seed in missing:
            work = _work(policy, reward, sizes, seed) | {"folder": str(folder / f"{side}-{seed}")}
            points, seconds = _train_and_measure(side, work, evaluator, options.before)
            run = {"side": side, "seed": seed, "sizes": sizes, "seconds": seconds, "points": points}
            _write(_file(folder, side, seed), run)
    runs = [json.loads(_file(folder, *run).read_text(encoding="utf-8")) for run in wanted]
    rows = rows_of(runs)
    found = curves(rows)
    for line in judged(found, [("now", "TRL"), ("now", "before")]):
        table.say(line)
    if options.out:
        common = {**machine.about(torch.device("cpu")), "trl": PPO.trl, "before": BEFORE}
        command = shlex.join(["python", "bench/learning.py", *sys.argv[1:]])
        write_csv(options.out, command, [row | common for row in rows])
        from bench.plot import plot_learning

        picture = Path(options.out).with_suffix(".png")
        plot_learning(rows, found, picture)
        table.say(f"Rows are in {options.out}, curves in {picture}")
    return 0


def rows_of(runs: Sequence[dict[str, Any]]) -> list[Row]:
    """One for each policy that was measured."""
    return [
        {"side": run["side"], "seed": run["seed"]} | point
        for run in runs
        for point in run["points"]
    ]


# --- One training ---------------------------------------------------------------------------------


def _train_and_measure(
    side: str, work: dict[str, Any], evaluator: Evaluator, before: str | None
) -> tuple[list[dict[str, float]], float]:
    """Reward and KL of each policy that a side saved, that of step 0 first; seconds of training."""
    held = Path(work["folder"])
    shutil.rmtree(held, ignore_errors=True)
    held.mkdir(parents=True)
    try:
        started = time.perf_counter()
        with table.waiting(f"{side}, seed {work['seed']}: training"):
            _train(side, work, before)
        seconds = time.perf_counter() - started
        table.say(f"{side}, seed {work['seed']}: trained in {seconds:.0f} s")
        points = []
        for step in range(0, len(work["prompts"]) + 1, work["hold_every"]):
            policy = held / f"step-{step}" if step else work["policy"]
            with table.waiting(f"{side}, seed {work['seed']}: measuring step {step}"):
                # The same numbers are drawn for every side.
                found = evaluator.measure(policy, seed=1000 * work["seed"] + step)
            table.say(
                f"  step {step:>3}: reward {found['reward']:+.2f} ± {found['reward_se']:.2f}, "
                f"KL {found['kl']:.2f} ± {found['kl_se']:.2f}"
            )
            points.append({"step": step} | found)
    finally:
        shutil.rmtree(held, ignore_errors=True)  # half a gigabyte a policy
    return points, seconds


def _train(side: str, work: dict[str, Any], before: str | None) -> None:
    file = Path(work["folder"], "work.json")
    _write(file, work)
    script = ROOT / "bench" / ("learning_trl.py" if side == "TRL" else "learning_ours.py")
    code = before if side == "before" and before else ROOT
    ended = subprocess.run(
        # -P: a script's own folder has modules of names that others may ask for.
        [sys.executable, "-P", str(script), str(file)],
        env=os.environ
        | WORKER_ENVIRONMENT
        | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{code}{os.pathsep}{code}/kernels"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if ended.returncode:
        last = "\n".join(ended.stdout.splitlines()[-_LINES_SHOWN:])
        raise UserError(f"{side}'s training ended with exit status {ended.returncode}:\n{last}")


def _work(policy: str, reward: str, sizes: dict[str, Any], seed: int) -> dict[str, Any]:
    """What a worker is told; the prompts of each step are ours, as TRL shuffles for itself."""
    renderer = Renderer(load_tokenizer(policy))
    prompts = [prompt_about(topic) for topic in TRAINING_TOPICS]
    order = _epochs(prompts, random.Random(seed))
    return {
        **sizes,
        "policy": policy,
        "reward": reward,
        "seed": seed,
        "prompts": [
            [next(order) for _ in range(sizes["responses"])] for _ in range(sizes["steps"])
        ],
        "prompt_ids": [renderer.prompt(prompt) for prompt in prompts],
    }


def _epochs(prompts: list[Any], draw: random.Random) -> Iterator[Any]:
    while True:
        yield from draw.sample(prompts, len(prompts))


# --- What all sides start from --------------------------------------------------------------------


def _models(folder: Path, smoke: bool) -> tuple[str, str]:
    """Policy and reward model: made in `folder`, the latter by the demo, if they are not there.

    The policy is stored in fp32, as engines save in the dtype that they have read: in bf16 most of
    what so few steps change would be rounded away.
    """
    start = str(folder / "tiny") if smoke else model_path()
    if smoke and not Path(start).exists():
        save_tiny_model(Path(start), seed=0)
    policy = folder / "policy"
    if not policy.exists():
        with atomic_folder(policy) as partial, quiet_transformers():
            model: Any = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
            model.save_pretrained(partial)
            load_tokenizer(start).save_pretrained(partial)
    demo = folder / "demo"
    reward = demo / "reward" / "reward_model"
    if not reward.exists():
        command = [sys.executable, "-m", "ppo_engine", "demo", "--output-dir", str(demo)]
        command += ["--smoke", "--model", start] if smoke else []
        with table.waiting("The demo trains the reward model"):
            subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return str(policy), str(reward)


def _evaluator(policy: str, reward: str, sizes: dict[str, Any]) -> Evaluator:
    renderer = Renderer(load_tokenizer(policy))
    topics = HELD_OUT_TOPICS[: sizes["held_out"]]
    return Evaluator(
        policy,
        reward,
        [renderer.prompt(prompt_about(topic)) for topic in topics],
        new_tokens=sizes["new_tokens"],
        samples=sizes["samples"],
    )


# --- Files ----------------------------------------------------------------------------------------


def _file(folder: Path, side: str, seed: int) -> Path:
    return folder / f"{side}-{seed}.json"


def _write(file: Path, content: Any) -> None:
    """Whole or not at all: a run that was stopped here is run again."""
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content), encoding="utf-8")
    os.replace(unfinished, file)


def _is_there(file: Path, sizes: dict[str, Any]) -> bool:
    if not file.exists():
        return False
    if json.loads(file.read_text(encoding="utf-8"))["sizes"] != sizes:
        raise UserError(f"{file} is of a training of another size: give another --folder.")
    return True


def _check(side: str, before: str | None) -> None:
    """Raises UserError where a side cannot be run here."""
    if side == "TRL" and (found := versions(sys.executable).get("trl")) != PPO.trl:
        raise UserError(
            f"TRL {PPO.trl} is needed, the last release with PPO, and "
            f"{f'{found} is installed' if found else 'none is installed'}: pip install "
            f"trl=={PPO.trl}, or leave it out by --sides."
        )
    if side == "before" and not (before and list(Path(before, "kernels").glob("*/_cpu*.so"))):
        raise UserError(
            f"--before must be a folder with the files of {BEFORE} and its kernels, built in "
            f"place: {before or 'none was given'}. bench/learning.py begins with the commands that "
            "make it; --sides leaves it out."
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="PPO of three sides on the demo's task: reward against KL, by one judge.",
        allow_abbrev=False,
    )
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=SIDES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--before", metavar="FOLDER", help=f"the files of {BEFORE}, built")
    parser.add_argument(
        "--folder", required=True, help="what has been run, and the reward model; goes on there"
    )
    parser.add_argument("--out", metavar="FILE.csv", help="write the rows, and curves beside it")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, two steps, in a minute")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
