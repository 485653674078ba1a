"""Rollouts, ours against `model.generate` and the floor: `python bench/rollout.py`; see --help.

Every side continues the same prompts by as many tokens, drawn at temperature 1, in one process, in
turn (ours, generate, …, ours, generate, …); the first round is warm-up. Between rounds every weight
is written anew, as an update does, so that nothing made of the weights outlives a rollout. Printed:
the median seconds, the ratio to `generate` of the same round (the median of all rounds), tokens per
second, and the floor (`rollout_floor.py` has the formula). Nothing is downloaded.

Where responses vary in length, half of them end within 8 tokens: a first rollout of ours says which
tokens to take for ends. Each side draws for itself, and its floor is that of its own lengths.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path

# A script's own folder comes first on the path; the package `bench` is in the one above.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import machine, table
from bench.e2e_models import load
from bench.results import Row, write_csv
from bench.rollout_cases import CASES, EARLY, Case, early_ends, prompt_rows
from bench.rollout_compare import Result, compare, rows_of, write_weights_anew
from bench.rollout_profile import profiled
from bench.rollout_sides import GENERATE, OURS, SIDES, Sides
from bench.rollout_table import print_case, print_profile
from ppo_engine.errors import UserError
from ppo_engine.memory import keep_freed_memory
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.settings.schema import ModelConfig
from ppo_kernels.head import multiplies

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> int:
    options = _options()
    try:
        return _run(options)
    except UserError as error:
        table.say(f"Error: {error}")
        return 1


def _run(options: argparse.Namespace) -> int:
    device = machine.asked(options.device)
    keep_freed_memory()
    if options.dtype:
        dtypes = [_DTYPES[options.dtype]]
    elif device.type == "cuda":
        dtypes = [torch.bfloat16]
    else:
        dtypes = [dtype for dtype in _DTYPES.values() if multiplies(dtype, device)]
    table.say(f"{machine.describe(device)}, {torch.get_num_threads()} threads; its ceilings:")
    ceilings = machine.measure_ceilings(device, dtypes)
    table.print_ceilings(ceilings)
    common = {
        **machine.about(device),
        **table.ceiling_columns(ceilings),
    }
    cases = [case for case in CASES[device.type] if case.name in (options.cases or case.name)]
    command = shlex.join(["python", "bench/rollout.py", *sys.argv[1:]])
    found: list[Row] = []
    failed = False
    for model in dict.fromkeys(case.model for case in cases):
        for dtype in dtypes:
            sides = _open(model, device, dtype)
            for case in (case for case in cases if case.model == model):
                results, rows = _measure(case, sides, ceilings, options)
                failed |= any(r.skipped for r in results if r.name in (OURS, GENERATE))
                found += [row | common for row in rows]
                if options.out:  # after each, as a limit of time may end it
                    write_csv(options.out, command, found)
            del sides  # before the next takes the memory
    if options.out:
        table.say(f"\nRows are in {options.out}")
    return 1 if failed else 0


def _open(name: str, device: torch.device, dtype: torch.dtype) -> Sides:
    with table.waiting(f"Preparing {name}"):
        model, tokenizer = load(name, device.type)
        return Sides(
            LanguageModel.open(
                model, ModelConfig(), device=device, dtype=dtype, tokenizer=tokenizer
            )
        )


def _measure(
    case: Case, sides: Sides, ceilings: machine.Ceilings, options: argparse.Namespace
) -> tuple[list[Result], list[Row]]:
    policy = sides.policy
    prompts = prompt_rows(case, policy)
    sides.end_with([])
    if case.varied:
        with table.waiting("A first rollout, for where to end"):
            sides.end_with(early_ends(sides.write(2 * EARLY, prompts)))
    wanted = [name for name in (OURS, *case.sides) if name in (options.sides or SIDES)]
    results = [Result(name) for name in wanted]
    compare(results, case, sides, prompts, options.repeats)
    rows = rows_of(results, case, prompts, policy, ceilings)
    print_case(case, rows, " ".join(sides.sampler.notes), machine.describe(policy.device))
    if options.profile:
        for name in (OURS, GENERATE):
            if name in wanted:
                write_weights_anew(policy)
                run, model = sides.run(name, case), policy.model
                print_profile(name, profiled(partial(run, prompts), model, policy.device))
    return results, rows


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time rollouts, ours against model.generate and the machine's floor. Exit "
        "status 1 where ours or generate could not run.",
        epilog="Sides: " + "; ".join(f"{name}: {what}" for name, what in SIDES.items()),
        allow_abbrev=False,
    )
    parser.add_argument("--device", choices=CASES, default="cpu")
    known = [case.name for cases in CASES.values() for case in cases]
    parser.add_argument(
        "--cases", nargs="+", choices=known, metavar="CASE", help=f"of {', '.join(known)}"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, metavar="SIDE", help="default: all")
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="default: on a CPU those that it multiplies; else bf16"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count (default: 3)")
    parser.add_argument("--profile", action="store_true", help="and where a rollout's time goes")
    parser.add_argument("--out", metavar="FILE.csv", help="write the rows to this file")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    there = [case.name for case in CASES[options.device]]
    if wrong := [name for name in options.cases or () if name not in there]:
        parser.error(f"{wrong[0]} is not a case of --device {options.device}: {', '.join(there)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
