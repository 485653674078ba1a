"""What `bench/e2e.py` and `bench/e2e_grpo.py` share: options, sides in turn, table, rows."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench import machine, table
from bench.e2e_compare import Side, compare, rows
from bench.e2e_floor import Pass, Shape, floors
from bench.e2e_models import (
    MODELS,
    Sizes,
    model_config,
    needed_bytes,
    prepare,
    save_reward_adapters,
)
from bench.e2e_table import print_comparison, print_differences
from bench.e2e_worker import Work
from bench.results import Row, write_csv
from ppo_engine.errors import UserError

_STEPS = 2  # of each process, the warm-up step included
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_VERSIONS = """
import importlib.metadata, json, platform
found = {"python": platform.python_version()}
for package in ("torch", "triton", "transformers", "trl"):
    try:
        found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Contest:
    """A step of ours against TRL's: what is done, by whom, and what is said of it."""

    what: str  # the algorithm
    command: str  # the program, from the repository's root
    trl: str  # the version that is measured
    why: str  # this one
    scripts: Mapping[str, str]  # of the sides "ours" and "TRL"
    sizes: Mapping[str, Sizes]  # by the type of the device
    trained: int  # models
    frozen: int
    passes: Callable[[Shape, Work], dict[str, list[Pass]]]
    same: Callable[[Work], Sequence[str]]
    different: Callable[[Work], Sequence[tuple[str, str, str]]]


def main(contest: Contest, description: str) -> int:
    options = _options(contest, description)
    try:
        return _run(contest, options)
    except UserError as error:
        table.say(f"Error: {error}")
        return 1


def _run(contest: Contest, options: argparse.Namespace) -> int:
    device, dtype = machine.asked(options.device), _DTYPES[options.dtype]
    if device.type == "cpu" and options.model != MODELS[0]:
        raise UserError(f"--model {options.model} is for a GPU: add --device cuda.")
    size = contest.sizes[device.type]
    size = replace(
        size,
        prompts=options.prompts or size.prompts,
        new_tokens=options.new_tokens or size.new_tokens,
    )
    if size.prompts * size.group % size.micro_batch:
        each = f" of {size.group} responses" if size.group > 1 else ""
        raise UserError(f"--prompts {size.prompts}{each} must be a multiple of {size.micro_batch}.")
    shape = Shape.of(model_config(options.model))
    pythons = {"ours": sys.executable, "TRL": options.trl}
    sides = [Side(name, script, pythons[name]) for name, script in contest.scripts.items()]
    for side in sides:
        side.versions = versions(side.python)
        side.skipped = reason_to_skip(contest, side, options.only, shape, device, dtype)
    if not all(side.skipped for side in sides):
        table.say(f"{machine.describe(device)}, {torch.get_num_threads()} threads; its ceilings:")
        ceilings = machine.measure_ceilings(device, [dtype])
        table.print_ceilings(ceilings)
        with tempfile.TemporaryDirectory(prefix="ppo-e2e-") as folder:
            with table.waiting("Preparing models and prompts"):
                work = prepare(
                    options.model,
                    size,
                    Path(folder),
                    steps=_STEPS,
                    device=options.device,
                    dtype=str(dtype).removeprefix("torch."),
                )
                if options.share_base:
                    save_reward_adapters(Path(folder))
            work = replace(
                work,
                moments=options.moments,
                share_base=options.share_base,
                offload=options.offload,
            )
            compare(work, sides, options.repeats)
    measured = [side for side in sides if side.steps]
    if measured:
        floor = floors(contest.passes(shape, work), ceilings, dtype)
        print_comparison(contest.what, sides, floor, work)
        print_differences(contest.same(work), contest.different(work), contest.trl)
    for side in sides:
        if side.skipped:
            table.say(f"{side.name} was not measured. {side.skipped}")
    if measured and options.out:
        command = shlex.join(["python", contest.command, *sys.argv[1:]])
        common = _common(contest, options.model, work, ceilings, device)
        write_csv(options.out, command, rows(measured, floor, work, common))
        table.say(f"Rows are in {options.out}")
    return 1 if not measured or any(side.failed for side in sides) else 0


def _common(
    contest: Contest, model: str, work: Work, ceilings: machine.Ceilings, device: torch.device
) -> Row:
    return {
        "algorithm": contest.what,
        "model": model,
        "dtype": work.dtype,
        "prompts": len(work.prompts),
        "group": work.group,
        "prompt_tokens": sum(map(len, work.prompt_ids)),
        "new_tokens": work.new_tokens,
        "epochs": work.epochs,
        "micro_batch": work.micro_batch,
        "moments": work.moments,
        "share_base": work.share_base,
        "offload": work.offload,
        "device": machine.describe(device),
        "trl": contest.trl,
        "commit": machine.commit(),
        **table.ceiling_columns(ceilings),
    }


def reason_to_skip(
    contest: Contest,
    side: Side,
    only: str | None,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """Why a side is not measured here; empty where it is."""
    if only and side.name.lower() != only:
        return f"--only {only}."
    if side.name == "TRL" and (found := side.versions.get("trl", "")) != contest.trl:
        return (
            f"TRL {contest.trl} is needed, {contest.why}, and "
            f"{f'{found} is installed' if found else 'none is installed'} for {side.python}: "
            f"pip install trl=={contest.trl} in an environment, and --trl its python"
        )
    if device.type == "cuda":
        needed = needed_bytes(
            shape.parameters, side.name, dtype, trained=contest.trained, frozen=contest.frozen
        )
        there = torch.cuda.get_device_properties(device).total_memory
        if needed > there:
            return (
                f"Weights, gradients and optimizer states alone need {needed / 2**30:.0f} GiB, and "
                f"the GPU has {there / 2**30:.0f} GiB."
            )
    return ""


def versions(python: str) -> dict[str, str]:
    """Of this interpreter, and of what speeds depend on in its environment; empty where there is
    no such interpreter."""
    try:
        asked = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True)
        found: dict[str, str] = json.loads(asked.stdout)
    except (OSError, ValueError):
        return {}
    return found


def _options(contest: Contest, description: str) -> argparse.Namespace:
    cpu, gpu = contest.sizes["cpu"], contest.sizes["cuda"]
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="of compute; default: fp32 on a CPU, bf16 on a GPU"
    )
    parser.add_argument(
        "--moments", choices=("float32", "8bit"), default="float32", help="of our AdamW"
    )
    parser.set_defaults(share_base=False, offload=False)
    if contest.trained > 1:
        parser.add_argument(
            "--offload", action="store_true", help="our reference and reward model wait on the CPU"
        )
        parser.add_argument(
            "--share-base",
            action="store_true",
            help="ours trains adapters in the last layers of one base (share_base); TRL's as ever",
        )
    parser.add_argument(
        "--prompts",
        type=_positive,
        help=f"in a step; default: {cpu.prompts}, on a GPU {gpu.prompts}",
    )
    parser.add_argument(
        "--new-tokens",
        type=_positive,
        help=f"of every response; default: {cpu.new_tokens}, on a GPU {gpu.new_tokens}",
    )
    parser.add_argument(
        "--repeats", type=_positive, default=2, help="processes of each side (default: 2)"
    )
    parser.add_argument(
        "--only", choices=[name.lower() for name in contest.scripts], help="one side alone"
    )
    parser.add_argument(
        "--trl",
        metavar="PYTHON",
        default=sys.executable,
        help=f"of an environment with TRL {contest.trl}; default: this one",
    )
    parser.add_argument("--out", metavar="FILE.csv", help="write the rows to this file")
    options = parser.parse_args()
    options.dtype = options.dtype or ("fp32" if options.device == "cpu" else "bf16")
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number
