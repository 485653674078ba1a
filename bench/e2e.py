"""One PPO step, ours against TRL's: `python bench/e2e.py --device cpu`; see --help.

The same models, prompts, batch, response length, epochs and dtype; each side in processes of its
own, in turn (ours, TRL, ours, TRL, …). The first step of each process is warm-up. Printed: the
median seconds of each phase, response tokens per second, peak memory, the floor (`e2e_floor.py`
has the formula), and what is the same on both sides and what is not.

TRL 1.12.0 is the last release with a PPO trainer. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

# A script's own folder comes first on the path; the package `bench` is in the one above.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import machine, table
from bench.e2e_compare import SIDES, Side, compare, rows
from bench.e2e_floor import Shape, floors
from bench.e2e_models import MODELS, model_config, needed_bytes, prepare, sizes
from bench.e2e_table import print_comparison, print_differences
from bench.e2e_worker import Work
from bench.results import Row, write_csv
from ppo_engine.errors import UserError

TRL_VERSION = "1.12.0"
_STEPS = 2  # of each process, the warm-up step included
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> int:
    options = _options()
    try:
        return _run(options)
    except UserError as error:
        table.say(f"Error: {error}")
        return 1


def _run(options: argparse.Namespace) -> int:
    device, dtype = machine.asked(options.device), _DTYPES[options.dtype]
    if device.type == "cpu" and options.model != MODELS[0]:
        raise UserError(f"--model {options.model} is for a GPU: add --device cuda.")
    size = sizes(device.type)
    size = replace(
        size,
        prompts=options.prompts or size.prompts,
        new_tokens=options.new_tokens or size.new_tokens,
    )
    if size.prompts % size.micro_batch:
        raise UserError(f"--prompts {size.prompts} must be a multiple of {size.micro_batch}.")
    shape = Shape.of(model_config(options.model))
    sides = [Side(name) for name in SIDES]
    for side in sides:
        side.skipped = _reason_to_skip(side.name, options.only, shape, device, dtype)
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
            work = replace(work, moments=options.moments, offload=options.offload)
            compare(work, sides, options.repeats)
    measured = [side for side in sides if side.steps]
    if measured:
        lengths = [len(ids) for ids in work.prompt_ids]
        floor = floors(shape, lengths, work.new_tokens, work.epochs, ceilings, dtype)
        print_comparison(sides, floor, work)
        print_differences(work)
    for side in sides:
        if side.skipped:
            table.say(f"{side.name} was not measured. {side.skipped}")
    if measured and options.out:
        command = shlex.join(["python", "bench/e2e.py", *sys.argv[1:]])
        common = _common(options.model, work, ceilings, device)
        write_csv(options.out, command, rows(measured, floor, work, common))
        table.say(f"Rows are in {options.out}")
    return 1 if not measured or any(side.failed for side in sides) else 0


def _common(model: str, work: Work, ceilings: machine.Ceilings, device: torch.device) -> Row:
    return {
        "model": model,
        "dtype": work.dtype,
        "prompts": len(work.prompts),
        "prompt_tokens": sum(map(len, work.prompt_ids)),
        "new_tokens": work.new_tokens,
        "epochs": work.epochs,
        "micro_batch": work.micro_batch,
        "moments": work.moments,
        "offload": work.offload,
        "device": machine.describe(device),
        **machine.versions(),
        "transformers": importlib.metadata.version("transformers"),
        "trl": TRL_VERSION,
        "commit": machine.commit(),
        **table.ceiling_columns(ceilings),
    }


def _reason_to_skip(
    side: str, only: str | None, shape: Shape, device: torch.device, dtype: torch.dtype
) -> str:
    if only and side.lower() != only:
        return f"--only {only}."
    if side == "TRL" and (found := _trl_version()) != TRL_VERSION:
        return (
            f"TRL {TRL_VERSION} is needed, the last release with PPO, and "
            f"{f'{found} is installed' if found else 'none is installed'}: "
            f"pip install trl=={TRL_VERSION}"
        )
    if device.type == "cuda":
        needed = needed_bytes(shape.parameters, side, dtype)
        there = torch.cuda.get_device_properties(device).total_memory
        if needed > there:
            return (
                f"Weights, gradients and optimizer states alone need {needed / 2**30:.0f} GiB, and "
                f"the GPU has {there / 2**30:.0f} GiB."
            )
    return ""


def _trl_version() -> str | None:
    try:
        return importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return None


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time one PPO step, ours against TRL's, each in processes of its own."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="of compute; default: fp32 on a CPU, bf16 on a GPU"
    )
    parser.add_argument(
        "--moments", choices=("float32", "8bit"), default="float32", help="of our AdamW"
    )
    parser.add_argument(
        "--offload", action="store_true", help="our reference and reward model wait on the CPU"
    )
    parser.add_argument("--prompts", type=_positive, help="in a step; default: 16, on a GPU 64")
    parser.add_argument(
        "--new-tokens", type=_positive, help="of every response; default: 32, on a GPU 128"
    )
    parser.add_argument(
        "--repeats", type=_positive, default=2, help="processes of each side (default: 2)"
    )
    parser.add_argument("--only", choices=[name.lower() for name in SIDES], help="one side alone")
    parser.add_argument("--out", metavar="FILE.csv", help="write the rows to this file")
    options = parser.parse_args()
    options.dtype = options.dtype or ("fp32" if options.device == "cpu" else "bf16")
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


if __name__ == "__main__":
    sys.exit(main())
