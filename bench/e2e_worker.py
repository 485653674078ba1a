"""What the worker processes of `bench/e2e.py` and `bench/e2e_grpo.py` share: the work, a clock for
its phases, and the line on standard output that tells the parent of each step.

Needs torch only: no worker may load what another one brings.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch

PHASES = ("generate", "score", "advantages", "update")
LEARNING_RATE = 1e-6  # small: the last step's work is that of the first
GRPO_KL_COEF = 0.04
# Whatever the libraries print, a line that begins like this is a report.
_REPORT = "e2e-report "
_WORK_FILE = "work.json"


@dataclass(frozen=True)
class Work:
    """One step, to be done `steps` times on the models and prompts of a folder."""

    folder: str  # with `policy/` and `reward/`, and a tokenizer in both
    prompts: list[Any]  # text or chat messages
    prompt_ids: list[list[int]]  # the same as tokens
    new_tokens: int  # of every response
    epochs: int
    micro_batch: int  # responses in one forward pass of TRL's; ours go by tokens
    steps: int  # the first one is warm-up
    device: str
    dtype: str
    # Of our AdamW; TRL's are in the dtype of its weights.
    moments: Literal["float32", "8bit"] = "float32"
    group: int = 1  # responses to each prompt
    share_base: bool = False  # ours: adapters on one base
    offload: bool = False  # whether our frozen models wait on the CPU between their uses

    @property
    def responses(self) -> int:
        return len(self.prompts) * self.group

    @property
    def response_tokens(self) -> int:
        return self.responses * self.new_tokens

    def save(self) -> None:
        (Path(self.folder) / _WORK_FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: str) -> Self:
        return cls(**json.loads((Path(folder) / _WORK_FILE).read_text(encoding="utf-8")))


class PhaseClock:
    """Seconds of each phase of a step; every moment of the step belongs to one of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self, phase: str) -> None:
        """Begin a step, in `phase`."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.phase = phase
        self._others = _cpu_seconds_of_others()
        self._since = self._now()

    def switch(self, phase: str) -> None:
        """The phase so far is over and `phase` begins."""
        now = self._now()
        self.seconds[self.phase] += now - self._since
        self.phase, self._since = phase, now

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """`phase` while the context lasts, then the one from before."""
        before = self.phase
        self.switch(phase)
        yield
        self.switch(before)

    def others(self) -> float:
        """The share of the machine's CPU time that other processes took since the start.

        Linux counts in ticks of 10 ms: of a step of a few ticks this says little.
        """
        seconds = _cpu_seconds_of_others() - self._others
        available = sum(self.seconds.values()) * (os.cpu_count() or 1)
        return min(max(0.0, seconds / available), 1.0)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def cheap_reward(text: str) -> float:
    """Of a response, for steps whose rewards a function gives."""
    return text.count("e") / max(1, len(text))


def report_step(clock: PhaseClock, *, prompt_tokens: int, response_tokens: int) -> None:
    """Tell the parent that a step is over."""
    clock.switch(clock.phase)
    step = {
        "seconds": clock.seconds,
        "prompt_tokens": prompt_tokens,
        "response_tokens": response_tokens,
        "peak_bytes": peak_bytes(clock.device),
        "threads": torch.get_num_threads(),
        "others": clock.others(),
    }
    print(f"\n{_REPORT}{json.dumps(step)}", flush=True)


def read_report(line: str) -> dict[str, Any] | None:
    """The step that a line of a worker's output reports, or None."""
    return json.loads(line.removeprefix(_REPORT)) if line.startswith(_REPORT) else None


def _cpu_seconds_of_others() -> float:
    """Busy CPU time of the whole machine less this process's; 0 where Linux does not tell."""
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0]
    except OSError:
        return 0.0
    user, nice, system, _idle, _waiting, *interrupts_and_steal = map(int, first.split()[1:9])
    busy = user + nice + system + sum(interrupts_and_steal)
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time()


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # Of this program alone: on Linux `ru_maxrss` begins at the size of the parent process.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
