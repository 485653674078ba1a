"""Every op on random cases, on each instruction set of this machine and on all cores.

`python -m fuzz OP SEED` runs one case again, `python -m fuzz OP FIRST:LAST` several, here in this
process; each is named before it runs, so that a crash can be traced.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fuzz.cases import CASES, make_case
from fuzz.shrink import describe, failures
from ppo_kernels import dispatch, implementations

CHUNK = 20  # cases of one task; every 20th case is a large one


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("op", nargs="?", choices=list(CASES))
    parser.add_argument("seeds", nargs="?", help="SEED, or FIRST:LAST without the last")
    parser.add_argument("--cases", type=int, default=2000, help="of each op (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="the first (default 0)")
    parser.add_argument(
        "--exact-memory", action="store_true",
        help="no canaries: tensors end with their memory, for AddressSanitizer and valgrind",
    )  # fmt: skip
    arguments = parser.parse_args()
    if dispatch.cpu is None:
        parser.error(implementations()["gae"]["cpp"].reason)
    exact = arguments.exact_memory
    if arguments.seeds is not None:
        first, _, last = arguments.seeds.partition(":")
        return again(arguments.op, range(int(first), int(last) if last else int(first) + 1), exact)
    ops = list(CASES) if arguments.op is None else [arguments.op]
    return everything(ops, range(arguments.seed, arguments.seed + arguments.cases), exact)


def again(op: str, seeds: range, exact_memory: bool) -> int:
    """Run these cases here, one after another."""
    found = 0
    for seed in seeds:
        print(f"{op} {seed}", flush=True)
        if len(seeds) == 1:
            print(describe(make_case(op, seed, exact_memory)), flush=True)
        for message in failures(op, range(seed, seed + 1), exact_memory):
            print(message, flush=True)
            found += 1
    print(f"{found} of {len(seeds)} cases fail")
    return min(found, 1)


def everything(ops: list[str], seeds: range, exact_memory: bool) -> int:
    """Run these cases of each op in other processes, one instruction set after the other."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    found = 0
    with Progress(*columns) as progress:
        for isa in dispatch.cpu.supported_isas():
            os.environ["PPO_KERNELS_ISA"] = isa  # for the processes that are started next
            bars = {op: progress.add_task(f"{isa} {op}", total=len(seeds)) for op in ops}
            with ProcessPoolExecutor(
                mp_context=multiprocessing.get_context("spawn"), initializer=faulthandler.enable
            ) as pool:
                chunks: dict[Future[list[str]], tuple[str, range]] = {}
                for op in ops:
                    for at in range(0, len(seeds), CHUNK):
                        some = seeds[at : at + CHUNK]
                        chunks[pool.submit(failures, op, some, exact_memory)] = (op, some)
                for done in as_completed(chunks):
                    op, some = chunks[done]
                    try:
                        messages = done.result()
                    except BrokenProcessPool:
                        progress.console.print(_crash(chunks), markup=False, soft_wrap=True)
                        return 1
                    for message in messages:
                        progress.console.print(
                            f"[{isa}] {message}", markup=False, highlight=False, soft_wrap=True
                        )
                    found += len(messages)
                    progress.advance(bars[op], len(some))
    print(f"{found} of {len(seeds) * len(ops)} cases on each instruction set fail")
    return min(found, 1)


def _crash(chunks: dict[Future[list[str]], tuple[str, range]]) -> str:
    """Tasks are taken in order, so that it was one of the first that are not done."""
    open_ = [what for task, what in chunks.items() if task.exception() is not None]
    isa = os.environ["PPO_KERNELS_ISA"]
    suspects = [
        f"  PPO_KERNELS_ISA={isa} PYTHONPATH=tests python -m fuzz {op} {some.start}:{some.stop}"
        for op, some in open_[: os.cpu_count()]
    ]
    return "\n".join(["A process crashed. One of these does it again:", *suspects])


if __name__ == "__main__":
    raise SystemExit(main())
