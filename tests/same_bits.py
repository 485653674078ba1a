"""Whether a refactoring changed a bit: the same tiny runs by the engine of another commit and by
that of the working tree.

    python tests/same_bits.py REVISION

Every command of the engine trains for a few steps, by its command line; then metrics (without times
and memory), samples, checkpoints and weights of the two are compared, and the working tree resumes
the other's runs from a checkpoint in their middle. The kernels are the working tree's in both.
Prints a line for each run, and "identical" at the end; the exit status is 1 where one differs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from tiny import tiny_model_folder

from ppo_engine.sealed import SUMS

ROOT = Path(__file__).resolve().parent.parent

FUNCTIONS = """
def length(prompts, responses, target, **columns):
    return [-abs(len(response) - wanted) / 10 for response, wanted in zip(responses, target)]

def vowels(prompts, responses):
    return [sum(letter in "aeiou" for letter in response) for response in responses]

def go_on(prompts, turns, **columns):
    return [{"role": "tool", "content": "go on"} if len(said) < 4 else None for said in turns]
"""
SUBJECTS = ("rain", "a chair", "the sea", "clocks", "bread", "a very long road", "owls", "tea")

PPO = [
    "--data", "prompts.jsonl", "run.checkpoint_every=2", "run.keep_checkpoints=0",
    "run.sample_every=1", "steps=5",
    "ppo.rollout_batch_size=8", "ppo.mini_batch_size=4", "ppo.micro_batch_size=3", "ppo.epochs=2",
    "generation.max_new_tokens=9", "generation.temperature=0.8",
    "policy.optimizer.learning_rate=1e-3",
]  # fmt: skip
SUPERVISED = [
    "run.checkpoint_every=2", "run.keep_checkpoints=0", "model.optimizer.learning_rate=1e-3",
]  # fmt: skip
# In this order: later runs use what earlier ones made.
RUNS: dict[str, list[str]] = {
    "sft": [
        "sft", "--model", "chat", "--data", "examples.jsonl", *SUPERVISED,
        "sft.batch_size=4", "sft.epochs=3", "data.eval_fraction=0.3",
    ],
    "reward, pairs": [
        "reward", "--model", "chat", "--data", "pairs.jsonl", *SUPERVISED,
        "reward.batch_size=3", "reward.epochs=3", "reward.center_coef=0.01",
        "data.eval_fraction=0.3",
    ],
    "reward, rankings": [
        "reward", "--model", "chat", "--data", "rankings.jsonl", *SUPERVISED,
        "reward.batch_size=3", "reward.epochs=3", "data.eval_fraction=0.3",
        "model.trainable_layers=1",
    ],
    "ppo, reward model": [
        "ppo", "--model", "chat", "--reward", "{out}/reward, pairs/reward_model", *PPO,
        "ppo.adaptive_kl.target=1", "evaluation.prompts=3", "evaluation.every=2",
        "reward.missing_eos_penalty=0.5", "ppo.critic_warmup_steps=1",
    ],
    "ppo, two rewards, lora": [
        "ppo", "--model", "text", "--reward", "functions.py:length",
        "--reward", "functions.py:vowels", "reward.weights=[1,0.1]", *PPO, "data.path=texts.jsonl",
        "policy.lora.rank=2", "critic.trainable_layers=1", "reward.normalize=true",
        "ppo.whiten_rewards=true", "generation.top_p=0.9", "ppo.importance_cap=2",
    ],
    "grpo, several turns": [
        "grpo", "--model", "chat", "--reward", "functions.py:length", *PPO, "ppo.group_size=4",
        "environment.function=functions.py:go_on", "environment.max_turns=2",
    ],
    "remax, frozen layers": [
        "ppo", "--model", "chat", "--reward", "functions.py:vowels", *PPO, "ppo.estimator=remax",
        "ppo.group_size=2", "policy.trainable_layers=1", "ppo.objective=cispo",
        "policy.gradient_checkpointing=true",
    ],
    "smoke": ["demo", "--smoke", "--seed", "1"],
    "smoke, grpo": ["demo", "--smoke", "--seed", "2", "--algorithm", "grpo"],
    "candidates": [
        "generate", "--model", "{out}/ppo, reward model/policy", "--data", "prompts.jsonl",
        "--n", "2", "--reward", "functions.py:length",
    ],
}  # fmt: skip
RESUMED = ("sft", "reward, pairs", "ppo, reward model", "ppo, two rewards, lora",
           "grpo, several turns", "remax, frozen layers")  # fmt: skip
AT_STEP = 2

DRIVER = """
import json, random, sys
from pathlib import Path
import numpy
from ppo_engine.cli import main

for name, arguments in json.loads(Path(sys.argv[1]).read_text()).items():
    print(name, flush=True)
    random.seed(0), numpy.random.seed(0)  # nothing draws from them, but checkpoints hold them
    status = main(arguments)
    if status:
        raise SystemExit(f"{name}: exit status {status}")
"""


def main(revision: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_inputs(work / "inputs")
        checkout(revision, work / "engine")
        before, after = work / "before", work / "after"
        for out, engine in ((before, work / "engine"), (after, ROOT)):
            print(f"Running {engine if engine == ROOT else revision} …", flush=True)
            run(engine, work, commands(out))
        found = {name: list(differences(before / name, after / name)) for name in RUNS}
        resumed = work / "resumed"
        for name in RESUMED:
            half_of(before / name, resumed / name)
        print(f"Resuming the runs of {revision} …", flush=True)
        run(ROOT, work, commands(resumed, RESUMED, resume=True))
        for name in RESUMED:
            title = f"{name}, resumed at step {AT_STEP}"
            found[title] = list(differences(before / name, resumed / name, but=("config.yaml",)))
    for name, different in found.items():
        print(f"{name}: {different[0] if different else 'the same bits'}")
    same = not any(found.values())
    print("identical" if same else "DIFFERENT")
    return 0 if same else 1


def write_inputs(folder: Path) -> None:
    folder.mkdir()
    Path(tiny_model_folder(folder)).rename(folder / "chat")
    Path(tiny_model_folder(folder, chat_template=False, seed=1)).rename(folder / "text")
    (folder / "functions.py").write_text(FUNCTIONS)
    rows: dict[str, list[dict[str, Any]]] = {
        "prompts": [
            {"prompt": [{"role": "user", "content": f"About {subject}?"}], "target": 3 * place}
            for place, subject in enumerate(SUBJECTS)
        ],
        "texts": [
            {"prompt": f"On {subject}:", "target": 2 * place}
            for place, subject in enumerate(SUBJECTS)
        ],
        "examples": [
            {"prompt": f"What of {subject}?", "response": f"It is {subject}." * (1 + place % 3)}
            for place, subject in enumerate(SUBJECTS)
        ],
        "pairs": [
            {"prompt": f"Praise {subject}.", "chosen": f"Good {subject}", "rejected": "No" * place}
            for place, subject in enumerate(SUBJECTS, start=1)
        ],
        "rankings": [
            {
                "prompt": f"Praise {subject}.",
                "responses": [f"Good {subject}", "Well", f"No {subject}", "?"],
                "ranks": [0, 1, 1 + place % 2, None],
                "finished": [True, place % 2 == 0, True, True],
            }
            for place, subject in enumerate(SUBJECTS)
        ],
    }
    for name, found in rows.items():
        lines = [json.dumps(row) + "\n" for row in found]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def checkout(revision: str, folder: Path) -> None:
    """The engine of a commit, without touching the working tree."""
    folder.mkdir()
    archive = subprocess.run(
        ["git", "archive", revision, "ppo_engine"], cwd=ROOT, check=True, stdout=subprocess.PIPE
    )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)


def commands(
    out: Path, names: Iterable[str] = tuple(RUNS), resume: bool = False
) -> dict[str, list[str]]:
    """The command lines of the runs; a resumed one takes its models where it did before."""
    made = out.parent / "before" if resume else out
    return {
        name: [
            *(argument.replace("{out}", str(made)) for argument in RUNS[name]),
            "--output-dir", str(out / name), *["run.resume=true"] * resume,
        ]
        for name in names
    }  # fmt: skip


def run(engine: Path, work: Path, lines: dict[str, list[str]]) -> None:
    """All commands in one process, as imports take longest."""
    job = work / "commands.json"
    job.write_text(json.dumps(lines))
    path = os.pathsep.join(map(str, (engine, ROOT / "kernels")))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CI": "1"}
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, str(job)], cwd=work / "inputs", env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if result.returncode:
        raise SystemExit(f"{result.stdout[-4000:]}\n{engine} failed")


def half_of(run: Path, copy: Path) -> None:
    """The folder of a run as it was after `AT_STEP` steps, but for the lines it rewinds itself."""
    shutil.copytree(run, copy)
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > AT_STEP:
            shutil.rmtree(folder)
    for result in ("policy", "critic", "reward_model"):
        shutil.rmtree(copy / result, ignore_errors=True)
    best = copy / "best"
    if best.exists() and json.loads((best / "best.json").read_text())["step"] > AT_STEP:
        shutil.rmtree(best)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(run), str(copy)))


def differences(a: Path, b: Path, but: tuple[str, ...] = ()) -> Iterator[str]:
    """What is in one run's folder and not, or not so, in the other's."""
    files = [{x.relative_to(y) for x in y.rglob("*") if x.is_file()} for y in (a, b)]
    if not files[0]:
        yield "it wrote nothing"
    for name in sorted(files[0] ^ files[1]):
        yield f"{name} is in one only"
    for name in sorted(files[0] & files[1]):
        if name.name not in but and not same_file(a / name, b / name):
            yield f"{name} differs"


def same_file(a: Path, b: Path) -> bool:
    match a.suffix:
        case ".png" | ".html":
            return True  # drawn from metrics.jsonl
        case "" if a.name in (SUMS, ".lock"):
            return True  # sums of files that are compared, and that hold times; a process's number
        case ".safetensors":
            return same(load_file(a), load_file(b))
        case ".jsonl":
            return same(*(list(map(json.loads, x.read_text().splitlines())) for x in (a, b)))
        case ".json":
            return same(*(json.loads(x.read_text()) for x in (a, b)))
        case ".yaml":
            return settings(a) == settings(b)
        case _:
            return a.read_bytes() == b.read_bytes()


def settings(file: Path) -> str:
    """Of a run, without the folder that all runs of its side are in, or that of a demo's model."""
    side = next(x for x in file.parents if x.name in ("before", "after", "resumed"))
    text = json.dumps(yaml.safe_load(file.read_text())).replace(str(side), "")
    return re.sub(r"/ppo-engine-\w+", "", text)


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, but for figures of time and memory."""
    if isinstance(a, torch.Tensor):
        alike = isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape)
        return alike and torch.equal(*(x.flatten().view(torch.uint8) for x in (a, b)))
    if isinstance(a, dict):
        keys = [{key for key in x if not _measures_the_machine(key)} for x in (a, b)]
        return keys[0] == keys[1] and all(same(a[key], b[key]) for key in keys[0])
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack("d", a) == struct.pack("d", b)
    return bool(a == b and type(a) is type(b))


def _measures_the_machine(key: Any) -> bool:
    named = (
        "time/", "memory/", "tokens_per_second", "mfu/", "overhead/", "seconds", "peak_memory",
        "_name_or_path",
    )  # fmt: skip
    return str(key).startswith(named)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    raise SystemExit(main(sys.argv[1]))
