"""One update pass with its blocks made in several ways: `python bench/passes.py`; see --help.

Forward and backward of the policy's loss over packed rows of random tokens, no optimizer. What
differs between the sides is what stands around the matrix products: norms, rotary embedding, gates.
(In float32 on some CPUs ours also multiplies by oneDNN, as the engine does.) All are in one process
and in turn, after their gradients were held against plain's. Printed: the median time, the ratio to
plain, the floor (the FLOP of `e2e_floor`, three times the forward pass's, at the rate of a square
product in the same run), the share of that rate (MFU), and the memory on top of the weights,
gradients included.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from pathlib import Path

# A script's own folder comes first on the path; the package `bench` is in the one above.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import machine, table
from bench.e2e_floor import Shape, forward
from bench.e2e_models import MODELS, load
from bench.e2e_worker import PhaseClock
from bench.passes_sides import PLAIN, SIDES, Sides, difference, reason_to_skip
from bench.results import Row, write_csv
from bench.timing import peak_extra_bytes, time_in_turn
from ppo_engine.errors import UserError
from ppo_engine.memory import keep_freed_memory
from ppo_engine.messages import first_line
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.precision import choose_dtype, rounding
from ppo_engine.models.reader import Limit
from ppo_engine.settings.schema import ModelConfig

_TEXT = {"cpu": (16, 32), "cuda": (128, 128)}  # tokens of prompt and response, as in `e2e.py`
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> int:
    options = _options()
    try:
        return _run(options)
    except UserError as error:
        table.say(f"Error: {error}")
    except torch.OutOfMemoryError as error:  # of plain's; another side's is in its row
        table.say(f"Error: {first_line(error)} Give fewer --tokens.")
    return 1


def _run(options: argparse.Namespace) -> int:
    device = machine.asked(options.device)
    keep_freed_memory()
    dtype = _DTYPES[options.dtype] if options.dtype else choose_dtype("auto", device)
    table.say(f"{machine.describe(device)}, {torch.get_num_threads()} threads; its ceilings:")
    ceilings = machine.measure_ceilings(device, [dtype])
    table.print_ceilings(ceilings)
    with table.waiting(f"Preparing {options.model}"):
        model, tokenizer = load(options.model, device.type)
        policy = LanguageModel.open(
            model, ModelConfig(), device=device, dtype=dtype, tokenizer=tokenizer
        )
    torch.manual_seed(0)
    prompt, response = _TEXT[device.type]
    tokens = options.tokens or Limit.automatic(policy.model).tokens
    sides = Sides(policy, max(1, tokens // (prompt + response - 1)), prompt, response)
    rows = _measure(policy, sides, ceilings, options)
    about = f"{options.model}, {str(dtype).removeprefix('torch.')}, {len(sides.lengths)} texts"
    _print(f"{about}, {sum(sides.lengths)} tokens, {sides.targets} of them predicted", rows)
    if options.out:
        common = {
            "prompt_tokens": prompt,
            "response_tokens": response,
            **machine.about(device),
            **table.ceiling_columns(ceilings),
        }
        command = shlex.join(["python", "bench/passes.py", *sys.argv[1:]])
        write_csv(options.out, command, [row | common for row in rows])
        table.say(f"Rows are in {options.out}")
    return int(any(row["status"].startswith("wrong") for row in rows))


def _measure(
    policy: LanguageModel, sides: Sides, ceilings: machine.Ceilings, options: argparse.Namespace
) -> list[Row]:
    """One for each side; a side that is not timed has a `status` that says why."""
    device, dtype = policy.device, policy.dtype
    shape = Shape.of(policy.model.config)
    work = forward(shape, sides.lengths, logits=sides.targets).times(3, 2)
    least = work.seconds(ceilings, dtype)
    limit = allowed(dtype, policy.model.config.num_hidden_layers)
    expected = sides.gradients(PLAIN)
    rows: dict[str, Row] = {}
    for name in [PLAIN, *(side for side in options.sides or SIDES if side != PLAIN)]:
        rows[name] = row = {
            "side": name,
            "model": options.model,
            "dtype": str(dtype).removeprefix("torch."),
            "texts": len(sides.lengths),
            "tokens": sum(sides.lengths),
            "status": reason_to_skip(name, device) or "ok",
        } | dict.fromkeys(_MEASURED)
        if row["status"] != "ok":
            continue
        try:
            if name != PLAIN:
                with table.waiting(f"{name}: a first pass, and its gradients"):
                    row["difference"] = difference(sides.gradients(name), expected)
                if not row["difference"] <= limit:
                    row["status"] = f"wrong: gradients differ by {row['difference']:.2g}"
                    continue
            row["peak_bytes"] = peak_extra_bytes(device, sides.call(name))
        except (RuntimeError, ImportError, TypeError, AttributeError) as failure:
            if name == PLAIN:
                raise
            row["status"] = first_line(failure)
    calls = {name: [sides.call(name)] for name, row in rows.items() if row["status"] == "ok"}
    clock = PhaseClock(device)
    clock.start("update")
    timings = time_in_turn(device, calls, options.seconds)
    clock.switch("update")
    for name, timing in timings.items():
        rows[name] |= {
            "ms_p20": timing.p20 * 1e3,
            "ms_p50": timing.p50 * 1e3,
            "ms_p80": timing.p80 * 1e3,
            "x_plain": timings[PLAIN].p50 / timing.p50,
            "floor_ms": least * 1e3,
            "x_floor": timing.p50 / least,
            "mfu": work.flop / timing.p50 / ceilings.matmul[dtype],
            "others": clock.others(),
        }
    return list(rows.values())


_MEASURED = (
    "difference", "ms_p20", "ms_p50", "ms_p80", "x_plain", "floor_ms", "x_floor", "mfu",
    "peak_bytes", "others",
)  # fmt: skip


def allowed(dtype: torch.dtype, layers: int) -> float:
    """By how much gradients of two sides may differ: each errs by what rounding changes in a layer,
    and the layers' errors add up as random ones do."""
    return 2 * rounding(dtype) * math.sqrt(layers)


def _print(title: str, rows: list[Row]) -> None:
    table.say(f"\nOne update pass, {title}")
    line = "  {:<8} {:>9} {:>20} {:>8} {:>8} {:>6} {:>9} {:>10}"
    table.say(
        line.format("", "ms", "(p20 to p80)", "x plain", "x floor", "MFU", "peak MB", "differs")
    )
    for row in rows:
        if row["ms_p50"] is None:
            table.say(f"  {row['side']:<8} not measured: {row['status']}")
            continue
        table.say(
            line.format(
                row["side"],
                f"{row['ms_p50']:.4g}",
                f"({row['ms_p20']:.4g} to {row['ms_p80']:.4g})",
                f"{row['x_plain']:.2f}",
                f"{row['x_floor']:.2f}",
                f"{row['mfu']:.0%}",
                f"{row['peak_bytes'] / 1e6:.0f}",
                "" if row["difference"] is None else f"{row['difference']:.0e}",
            )
        )
    table.say(f"  floor: {rows[0]['floor_ms']:.4g} ms")
    table.warn_if_busy(rows[0]["others"], "a pass")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time one update pass, its blocks made in several ways, against the floor. "
        "Exit status 1 where the gradients of a side are not plain's.",
        epilog="Sides: " + "; ".join(f"{name}: {what}" for name, what in SIDES.items()),
        allow_abbrev=False,
    )
    parser.add_argument("--device", choices=_TEXT, default="cpu")
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--dtype", choices=_DTYPES, help="default: what the engine takes there")
    parser.add_argument(
        "--tokens", type=int, help="of the pass, about; default: what the engine takes there"
    )
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, metavar="SIDE", help="beside plain; default: all"
    )
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of passes of each side (default: 20)"
    )
    parser.add_argument("--out", metavar="FILE.csv", help="write the rows to this file")
    options = parser.parse_args()
    if options.tokens is not None and options.tokens < 1:
        parser.error("--tokens must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
