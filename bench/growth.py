"""Time a token and peak memory as a step grows: `python bench/growth.py`; see --help.

Each size is a step of `PPOEngine` in a process of its own: score, advantages and one epoch of the
update on so many response tokens, in responses whose lengths are uniform from 1 to a limit, drawn
once, so that a larger step begins with a smaller one's. Then a rollout of as many tokens, in
responses of the limit's length: a column of its own, as its steps are of more rows. All sizes are
measured in turn, `--rounds` times; a first step and a first rollout of each process do not count.

Time a token is to stay within 15 %, and the peak of a step what it is once passes are full: what
the sampler has for keys and values comes after it was read.
"""

from __future__ import annotations

import argparse
import random
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

# A script's own folder comes first on the path; the package `bench` is in the one above.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import machine, table
from bench.e2e_compare import WorkerFailed, reports
from bench.e2e_models import MODELS, Sizes, prepare
from bench.e2e_worker import PHASES, Work
from bench.growth_step import STEPS, Growth
from bench.results import Row, write_csv
from ppo_engine.errors import UserError
from ppo_engine.models.precision import choose_dtype

WITHIN = 1.15  # the most time a token beside the least
CONSTANT = 1.05  # the same of the peaks, of steps with more than two full passes
_TRAINED = [phase for phase in PHASES if phase != "generate"]


class Scale(NamedTuple):
    """What is measured on a kind of device."""

    model: str
    limit: int  # of a response's length
    pass_tokens: int  # what `auto` takes where memory is not short
    tokens: Sequence[int]  # of all responses of a step


SCALES = {
    "cpu": Scale("smollm2", 128, 2048, [1024 * 2**i for i in range(5)]),
    "cuda": Scale("qwen2.5-1.5b", 512, 8192, [8192 * 2**i for i in range(6)]),
}


@dataclass
class Size:
    """What the processes of one size have reported; `skipped` says why there is nothing."""

    tokens: int
    steps: list[dict[str, Any]] = field(default_factory=list)
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    skipped: str = ""

    def per_token(self, *phases: str) -> float:
        """Milliseconds, the median of the rounds."""
        found = self.rollouts if phases == ("generate",) else self.steps
        each = [sum(x["seconds"][p] for p in phases) / x["response_tokens"] for x in found]
        return statistics.median(each) * 1e3


def main() -> int:
    options = _options()
    try:
        return _run(options)
    except UserError as error:
        table.say(f"Error: {error}")
        return 1


def _run(options: argparse.Namespace) -> int:
    device = machine.asked(options.device)
    scale = SCALES[device.type]
    model, counts = options.model or scale.model, options.tokens or scale.tokens
    dtype = str(choose_dtype("auto", device)).removeprefix("torch.")
    table.say(
        f"{machine.describe(device)}, {torch.get_num_threads()} threads: {model}, {dtype}, "
        f"responses of 1 to {scale.limit} tokens, passes of at most {scale.pass_tokens}"
    )
    common = {
        "model": model,
        "dtype": dtype,
        "limit": scale.limit,
        "pass_tokens": scale.pass_tokens,
        **machine.about(device),
    }
    command = shlex.join(["python", "bench/growth.py", *sys.argv[1:]])
    sizes = [Size(tokens) for tokens in counts]
    with tempfile.TemporaryDirectory(prefix="ppo-growth-") as folder:
        with table.waiting("Preparing models and prompts"):
            work = prepare(
                model,
                Sizes(prompts=16, new_tokens=scale.limit, prompt_tokens=16, epochs=1),
                Path(folder),
                steps=STEPS,
                device=options.device,
                dtype=dtype,
            )
        for _ in _measured(sizes, work, scale, options.rounds):
            rows = rows_of([size for size in sizes if size.steps or size.skipped])
            if options.out:  # after each, as a limit of time may end it
                write_csv(options.out, command, [row | common for row in rows])
    _print(rows)
    good = [row for row in rows if row["status"] == "ok"]
    for line in judged(good, scale.pass_tokens):
        table.say(f"  {line}")
    if options.out:
        table.say(f"Rows are in {options.out}")
    if options.plot and good:
        from bench.plot import plot_growth

        picture = Path(options.out).with_suffix(".png")
        plot_growth(good, f"{common['device']}, {model}, {dtype}", picture)
        table.say(f"Curves are in {picture}")
    return int(len(good) < len(rows))


def response_lengths(tokens: int, limit: int) -> list[int]:
    """Uniform from 1 to `limit`, as many as are `tokens` together; the last is cut to that."""
    draw, found, left = random.Random(0), list[int](), tokens
    while left > 0:
        found.append(min(draw.randint(1, limit), left))
        left -= found[-1]
    return found


def _measured(sizes: Sequence[Size], work: Work, scale: Scale, rounds: int) -> Iterator[None]:
    """Fill the `sizes`: each once in each round; yields after each."""
    for number in range(1, rounds + 1):
        for size in sizes:
            if size.skipped:
                continue
            lengths = response_lengths(size.tokens, scale.limit)
            growth = Growth(
                **asdict(work)
                | {
                    "prompts": [*islice(cycle(work.prompts), len(lengths))],
                    "prompt_ids": [*islice(cycle(work.prompt_ids), len(lengths))],
                    "lengths": lengths,
                    "pass_tokens": scale.pass_tokens,
                }
            )
            growth.save()
            try:
                with table.waiting(f"{size.tokens} tokens, round {number} of {rounds}"):
                    _, step, _, rollout = reports("growth_step.py", growth)
                size.steps.append(step)
                size.rollouts.append(rollout)
            except WorkerFailed as failure:
                size.skipped = str(failure)
            yield


def rows_of(sizes: Sequence[Size]) -> list[Row]:
    """One for each size; one that was not measured has a `status` and no time."""
    return [
        {"tokens": size.tokens, "status": size.skipped or "ok"}
        | (dict.fromkeys(_COLUMNS) if size.skipped else _figures(size))
        for size in sizes
    ]


_COLUMNS = (
    *(f"{phase}_ms_per_token" for phase in (*_TRAINED, "step", "generate")),
    "peak_bytes", "sampling_peak_bytes", "rounds", "others",
)  # fmt: skip


def _figures(size: Size) -> Row:
    """Times in milliseconds a response token; "step" is all but generation."""
    times = [
        *(size.per_token(phase) for phase in _TRAINED),
        size.per_token(*_TRAINED),
        size.per_token("generate"),
    ]
    peaks = [max(x["peak_bytes"] for x in found) for found in (size.steps, size.rollouts)]
    others = max(x["others"] for x in [*size.steps, *size.rollouts])
    return dict(zip(_COLUMNS, [*times, *peaks, len(size.steps), others], strict=True))


def judged(rows: Sequence[Row], pass_tokens: int) -> list[str]:
    """Whether the targets are met; of the peaks, by the steps with more than two full passes."""
    found = []
    full = [row for row in rows if row["tokens"] >= 2 * pass_tokens]
    for what, column, of, most in (
        ("time a token", "step_ms_per_token", rows, WITHIN),
        ("peak memory once passes are full", "peak_bytes", full, CONSTANT),
    ):
        if len(of) > 1:
            values = [row[column] for row in of]
            ratio = max(values) / min(values)
            verdict = "met" if ratio <= most else "MISSED"
            found.append(f"{what}, the most by the least: {ratio:.3f}, target <= {most}: {verdict}")
    return found


def _print(rows: Sequence[Row]) -> None:
    line = "  {:>8} {:>8} {:>8} {:>11} {:>8} {:>9} {:>9} {:>13}"
    table.say("\nmilliseconds a response token, and peak memory in GiB")
    titles = ("tokens", "step", "score", "advantages", "update", "peak", "generate", "peak with it")
    table.say(line.format(*titles))
    for row in rows:
        if row["status"] != "ok":
            table.say(f"  {row['tokens']:>8} not measured: {row['status']}")
            continue
        times = {phase: f"{row[f'{phase}_ms_per_token']:.4g}" for phase in (*PHASES, "step")}
        peak, with_it = (f"{row[c] / 2**30:.2f}" for c in ("peak_bytes", "sampling_peak_bytes"))
        table.say(
            line.format(
                row["tokens"], times["step"], times["score"], times["advantages"], times["update"],
                peak, times["generate"], with_it,
            )
        )  # fmt: skip
    others = max((row["others"] for row in rows if row["status"] == "ok"), default=0.0)
    table.warn_if_busy(others, "a step")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time a token and peak memory of a step as its response tokens grow. Exit "
        "status 1 where a size could not be measured.",
        allow_abbrev=False,
    )
    parser.add_argument("--device", choices=SCALES, default="cpu")
    parser.add_argument("--model", choices=MODELS, help="default: smollm2, on a GPU qwen2.5-1.5b")
    parser.add_argument(
        "--tokens", type=int, nargs="+", metavar="N",
        help="of all responses of a step; default: 1k to 16k, on a GPU 8k to 256k",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=1, help="processes of each size (default: 1)")
    parser.add_argument("--out", metavar="FILE.csv", help="write the rows to this file")
    parser.add_argument("--plot", action="store_true", help="with --out: curves beside it, as PNG")
    options = parser.parse_args()
    if min([options.rounds, *(options.tokens or [])]) < 1:
        parser.error("--rounds and --tokens must be at least 1")
    if options.plot and not options.out:
        parser.error("--plot needs --out: the picture goes beside the rows")
    return options


if __name__ == "__main__":
    sys.exit(main())
