"""Runs of each command that are killed or stopped: at the named points of a save, and at random
moments. They are resumed, and must end with the same bits as one that nobody disturbed.

Each run is a fork of this process, which has loaded all that takes long.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tiny import tiny_model_folder
from trainers import same, untimed, weights

from faults import SURVIVED, Try
from faults._runs import STEPS, grpo, one_base, ppo, reward_model, sft, waiting
from ppo_engine import sealed
from ppo_engine.errors import Stopped
from ppo_engine.run import checkpoint, directory
from ppo_engine.training import ppo as ppo_training
from ppo_engine.training import supervised

MAKERS = {"ppo": ppo, "reward": reward_model, "sft": sft}
RANDOM = 52  # 13 of each signal
# What else a checkpoint may have to keep; each is killed a few times.
OTHERS = {"grpo": grpo, "ppo on one base": one_base, "ppo in packed passes": waiting}
FEW = 4
# Where a kill would leave a save half done: before each call of these.
POINTS: list[tuple[Any, str]] = [
    (checkpoint, "save_state"),
    (directory, "seal"),
    (sealed, "sync"),
    (os, "replace"),
    (Path, "rename"),
    (Path, "mkdir"),
    (directory, "_append"),
]


def tries(
    count: int = RANDOM,
    points: Sequence[tuple[Any, str]] = POINTS,
    makers: Mapping[str, Any] = MAKERS | OTHERS,
) -> Iterator[Try]:
    torch.set_num_threads(1)  # which a fork could not use
    draw = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        base = Path(name)
        model = tiny_model_folder(base / "model")
        for command, make in makers.items():
            random_kills = min(count, FEW if command in OTHERS else count)

            def start(folder: Path, prepare: Callable[[], object] = lambda: None) -> int:
                return _forked(lambda: (prepare(), _train(make, model, folder)))  # noqa: B023

            whole = base / f"{command}-whole"
            began = time.monotonic()
            os.waitpid(start(whole), 0)
            seconds = time.monotonic() - began
            faults: list[tuple[str, Callable[[Path], None]]] = []
            for owner, called in points if command in MAKERS else []:
                for number in range(1, 4):
                    fault = f"kill -9 before {called} in a save"
                    arm = lambda o=owner, c=called, n=number: _kill_at(o, c, n)  # noqa: E731
                    faults.append((fault, lambda folder, arm=arm: _wait(start(folder, arm))))
            for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                for _ in range(random_kills // 4):
                    after = draw.uniform(0, seconds)
                    kill = lambda folder, n=number, s=after: _send(start(folder), n, s)  # noqa: E731
                    faults.append((f"{signal.Signals(number).name} at a random moment", kill))
            for index, (fault, harm) in enumerate(faults):
                folder = base / f"{command}-{index}"
                harm(folder)
                _wait(_forked(lambda f=folder: _train(make, model, f, go_on=True)))  # noqa: B023
                yield Try(f"{command}: {fault}", _difference(folder, whole))


def _train(make: Any, model: str, folder: Path, *, go_on: bool = False) -> None:
    with (
        mock.patch.object(ppo_training, "write_curves", lambda *_: None),
        mock.patch.object(supervised, "write_curves", lambda *_: None),
    ):
        resume = go_on and (folder / "config.yaml").exists()
        make(model, folder, resume=resume, checkpoint_every=1).train()


def _forked(run: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    for number in (signal.SIGTERM, signal.SIGHUP):  # as nohup, or a shell's `&`, may have left them
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        run()
        code = 0
    except Stopped as stopped:
        code = 128 + stopped.number
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)


def _kill_at(owner: Any, name: str, number: int) -> None:
    """This process is killed before its call of that number."""
    function, left = getattr(owner, name), [number]

    def counted(*given: Any, **named: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given, **named)

    setattr(owner, name, counted)


def _send(child: int, number: int, after: float) -> None:
    time.sleep(after)
    os.kill(child, number)
    _wait(child)


def _wait(child: int) -> None:
    os.waitpid(child, 0)


def _difference(folder: Path, whole: Path) -> str:
    if not (folder / "metrics.jsonl").exists():
        return "it could not be gone on with"
    if untimed(folder / "metrics.jsonl") != untimed(whole / "metrics.jsonl"):
        steps = [row["step"] for row in untimed(folder / "metrics.jsonl")]
        return f"other metrics (steps {steps} of {STEPS})"
    for name in ("policy", "critic", "reward_model", "model"):
        if (whole / name).exists() and not same(weights(folder / name), weights(whole / name)):
            return f"other weights in {name}"
    remains = [path.name for path in folder.rglob(".*")]
    return f"remains: {remains}" if remains else SURVIVED
