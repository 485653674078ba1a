"""Where the time of a PPO step goes: spans in the engine, and a table made from a profile of them.

`span` names what runs; it does nothing unless a torch profiler is on. `recording` profiles one step
and `write_profile` puts it into a folder:

trace.json.gz   for Perfetto (ui.perfetto.dev) or chrome://tracing
anatomy.csv     a line per phase: seconds, share of the step, share of the step that is transformer
anatomy.txt     the same as a table

Every moment of a step belongs to the innermost span that is open, so that the phases add up to the
step. On a CPU time is wall time. On a GPU a moment belongs to the span that launched the kernel
running then; while none runs, to the span in which the host is, for which the GPU waits.

The transformer is the models' own work. Forward: every call of a model, of its layers without the
head, or of the head alone (embedding, layers, norm; output or score layer), decoding's included;
and the head's matrix products, also those of the backward pass, where log-probs and the policy's
loss are made from hidden states.
Backward: the autograd nodes of the operations in those calls (a node carries the sequence number of
the operation that made it), the sums of their gradients, and the accumulation into `.grad`. All
else is not the transformer: sampling and the bookkeeping of `generate`, tokenizing, gathering
response tokens, what log-probs and losses take beside those products, GAE, optimizer, autograd's
own overhead, and a reward function, whatever it does.

What is approximate: the profiler adds microseconds to every operation, so phases of many small
ones, decoding first, take a larger share than they do unprofiled. Operations of other threads, as
of a reward function that has some, are in the trace but move no time between phases on a CPU.

What it costs, as measured with SmolLM2-135M, 16 prompts and 32 new tokens on 2 CPU cores: decoding
a tenth to a quarter slower, the rest of the step within its noise; then 4 s to write 384,000 events
(8 MB packed), which hold about 1 kB of memory each until then. Events grow with the tokens decoded
and the micro-batches, so one step is profiled, not several. The GPU's part has never run on a GPU.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from ppo_engine.models import value_model
from ppo_engine.pretrained import architecture
from ppo_engine.run.directory import atomic_folder
from ppo_engine.spans import PREFIX, span

if TYPE_CHECKING:
    from ppo_engine.ppo.engine import PPOEngine

_TRANSFORMER = "transformer"
_OF_THE_HEAD = ("logprobs", "losses")  # spans whose matrix products are the transformer's
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "mkldnn::_linear_pointwise")
_OTHER = "other"  # of a stage, or of the step, what no span inside it names
_NODE = "autograd::engine::evaluate_function: "  # a node's backward, with the sum of its gradients
_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")

Span = tuple[float, float, str]  # start and end in microseconds, name
Spans = tuple[str, ...]  # names of the spans open at one time, the innermost last


@dataclass(frozen=True)
class Phase:
    """Time of a phase of the step, without that of the phases inside it."""

    name: str
    seconds: float
    transformer: float  # seconds of it


@dataclass(frozen=True)
class Anatomy:
    """The phases of one step, which add up to it."""

    phases: tuple[Phase, ...]
    gpu_seconds: float | None  # with a kernel running; None where the trace has no kernel

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    @property
    def transformer(self) -> float:
        return sum(phase.transformer for phase in self.phases)


@contextmanager
def recording(engine: PPOEngine) -> Iterator[profile]:
    """Profile the block as one step of `engine`; the profile is complete after it."""
    # The profiler's messages for its own developers would break the live display.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    activities = [ProfilerActivity.CPU]
    if engine.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    recorder = profile(activities=activities, acc_events=True)  # torch 2.11 warns without
    with _transformer_spans(engine), recorder as found, span("step"):
        yield found


def write_profile(found: profile, folder: Path, title: str) -> str:
    """Write trace and table into `folder`, all or nothing; returns the table as text."""
    with atomic_folder(folder) as partial:
        trace, packed = partial / "trace.json", partial / "trace.json.gz"
        found.export_chrome_trace(str(trace))
        with open(trace, encoding="utf-8", errors="replace") as file:
            anatomy = read_anatomy(json.load(file, object_hook=_relevant, strict=False))
        with open(trace, "rb") as source, gzip.open(packed, "wb", compresslevel=5) as out:
            shutil.copyfileobj(source, out)
        trace.unlink()
        text = _as_text(anatomy, title)
        (partial / "anatomy.txt").write_text(text, encoding="utf-8")
        _write_csv(anatomy, partial / "anatomy.csv")
    return text


def read_anatomy(trace: Mapping[str, Any]) -> Anatomy:
    """The anatomy of the one step in a Chrome trace of `recording`."""
    events = [event for event in trace["traceEvents"] if event and event.get("ph") == "X"]
    marks = [event for event in events if _is_mark(event)]
    [step] = [event for event in marks if event["name"] == f"{PREFIX}step"]
    spans = [_as_span(event, event["name"].removeprefix(PREFIX)) for event in marks]
    timeline, ours = _Timeline(spans), [event for event in events if event["tid"] == step["tid"]]
    makers = _makers(timeline, ours)
    for event in events:
        if event["name"].startswith(_NODE):
            maker = makers.get(event["args"].get("Sequence number"))
            if maker == _TRANSFORMER or "AccumulateGrad" in event["name"]:  # into the models' own
                spans.append(_as_span(event, _TRANSFORMER))
    for event in ours:
        if event["name"] in _PRODUCTS and ("", *timeline.at(event["ts"]))[-1] in _OF_THE_HEAD:
            spans.append(_as_span(event, _TRANSFORMER))
    return _divide(_Timeline(spans), _as_span(step, "step"), events)


def _makers(timeline: _Timeline, events: Iterable[dict[str, Any]]) -> dict[int, str]:
    """Of each autograd node, by its sequence number, the span of the operation that made it.

    The operations around that one carry its number too, and begin before it.
    """
    forward = [
        event
        for event in events
        if "Sequence number" in event.get("args", ()) and not event["args"].get("Fwd thread id")
    ]
    return {
        event["args"]["Sequence number"]: ("", *timeline.at(event["ts"]))[-1]
        for event in sorted(forward, key=lambda event: event["ts"])
    }


def _divide(host: _Timeline, step: Span, events: list[dict[str, Any]]) -> Anatomy:
    """Assign every moment of the step to the spans that it belongs to."""
    start, end, _ = step
    launches = {
        event["args"].get("correlation"): event["ts"]
        for event in events
        if event["cat"] in _LAUNCHES
    }
    kernels = [event for event in events if event["cat"] in _KERNELS]
    # In the order in which the host first comes by, which is that of the table.
    times = {spans: 0.0 for _, _, spans in host.between(start, end)}
    busy, now = 0.0, start
    for kernel in sorted(kernels, key=lambda event: event["ts"]):
        begins = min(max(kernel["ts"], now), end)
        ends = min(max(kernel["ts"] + kernel["dur"], begins), end)
        for since, until, spans in host.between(now, begins):
            times[spans] += until - since
        spans = host.at(launches.get(kernel["args"].get("correlation"), begins))
        times[spans] = times.get(spans, 0.0) + ends - begins
        busy, now = busy + ends - begins, ends
    for since, until, spans in host.between(now, end):
        times[spans] += until - since
    return Anatomy(_phases(times), busy * 1e-6 if kernels else None)


def _phases(times: Mapping[Spans, float]) -> tuple[Phase, ...]:
    """Microseconds by open spans as phases, named `stage` or `stage: innermost span`."""
    found: dict[tuple[str, str], list[float]] = {}
    for spans, time in times.items():
        # spans[0] is the step; none are open where a kernel was launched before it.
        stage, *inner = [name for name in spans[1:] if name != _TRANSFORMER] or [_OTHER]
        phase = found.setdefault((stage, inner[-1] if inner else _OTHER), [0.0, 0.0])
        phase[0] += time * 1e-6
        phase[1] += time * 1e-6 if _TRANSFORMER in spans else 0.0
    split = {stage for stage, name in found if name != _OTHER}
    # As they first come, but what is left over last: of a stage, and of the step.
    stages = sorted(dict.fromkeys(stage for stage, _ in found), key=_OTHER.__eq__)
    order = sorted(found, key=lambda key: (stages.index(key[0]), key[1] == _OTHER))
    return tuple(
        Phase(f"{stage}: {name}" if stage in split else stage, *found[stage, name])
        for stage, name in order
    )


class _Timeline:
    """Which spans are open at each moment, from spans that nest."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._times: list[float] = []
        self._paths: list[Spans] = []
        open_spans: list[tuple[float, Spans]] = [(float("inf"), ())]
        self._change(float("-inf"), ())
        for start, end, name in sorted(spans, key=lambda span: (span[0], -span[1])):
            while open_spans[-1][0] <= start:
                self._close(open_spans)
            outer_end, outer = open_spans[-1]
            path = (*outer, name)
            open_spans.append((min(end, outer_end), path))
            self._change(start, path)
        while len(open_spans) > 1:
            self._close(open_spans)

    def at(self, time: float) -> Spans:
        return self._paths[bisect_right(self._times, time) - 1]

    def between(self, start: float, end: float) -> Iterator[tuple[float, float, Spans]]:
        """(from, to, path) of each part of the interval."""
        if start >= end:
            return
        first, last = bisect_right(self._times, start), bisect_right(self._times, end)
        edges = [start, *self._times[first:last], end]
        for (since, until), path in zip(
            pairwise(edges), self._paths[first - 1 : last], strict=True
        ):
            yield since, until, path

    def _change(self, time: float, path: Spans) -> None:
        self._times.append(time)
        self._paths.append(path)

    def _close(self, open_spans: list[tuple[float, Spans]]) -> None:
        end, _ = open_spans.pop()
        self._change(end, open_spans[-1][1])


@contextmanager
def _transformer_spans(engine: PPOEngine) -> Iterator[None]:
    """A span around each call of the models, inside the context."""
    causal = [policy.model for policy in (engine.policy, engine.reference) if policy is not None]
    scoring = [scorer.model for scorer in (engine.critic, *engine.rewards.models) if scorer]
    modules: list[Any] = []
    for model in map(architecture.unwrap, causal):
        modules += [model, model.base_model, model.get_output_embeddings()]
    for model in map(architecture.unwrap, scoring):
        modules += [model, model.base_model, value_model.score_head(model)]
    with ExitStack() as stack:
        for module in {id(module): module for module in modules if module is not None}.values():
            stack.enter_context(_span_around(module))
        yield


@contextmanager
def _span_around(module: nn.Module) -> Iterator[None]:
    running: list[record_function] = []

    def begin(*_: Any) -> None:
        running.append(record_function(PREFIX + _TRANSFORMER))
        running[-1].__enter__()

    def finish(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    hooks = (
        module.register_forward_pre_hook(begin),
        module.register_forward_hook(finish, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _relevant(entry: dict[str, Any]) -> dict[str, Any] | None:
    """The entry of a trace, or None for one of the many that the table does not need."""
    category = entry.get("cat")
    if category == "cpu_op":
        name = entry["name"]
        needed = "Sequence number" in entry["args"] or name.startswith(_NODE) or name in _PRODUCTS
    else:
        needed = category in (None, "user_annotation", *_KERNELS, *_LAUNCHES)
    return entry if needed else None


def _is_mark(event: Mapping[str, Any]) -> bool:
    return event["cat"] == "user_annotation" and event["name"].startswith(PREFIX)


def _as_span(event: Mapping[str, Any], name: str) -> Span:
    return event["ts"], event["ts"] + event["dur"], name


def _as_text(anatomy: Anatomy, title: str) -> str:
    total, transformer = anatomy.seconds, anatomy.transformer
    table = Table(title=f"{title}, {total:.2f} s", title_justify="left", box=box.SIMPLE)
    table.add_column("phase")
    for name in ("seconds", "share", "of it transformer"):
        table.add_column(name, justify="right")
    for phase in anatomy.phases:
        own = f"{phase.transformer / phase.seconds:.1%}" if phase.transformer else ""
        table.add_row(phase.name, f"{phase.seconds:.3f}", f"{phase.seconds / total:.1%}", own)
    table.add_section()
    table.add_row("step", f"{total:.3f}", "100.0%", f"{transformer / total:.1%}")
    out = io.StringIO()
    console = Console(file=out, width=88, highlight=False)
    console.print(table)
    console.print(
        f"Not the transformer: {1 - transformer / total:.1%} of the step, including any "
        "reward function."
    )
    if anatomy.gpu_seconds is None:
        console.print("Times are wall times of the CPU: no GPU kernel was seen.")
    else:
        console.print(f"The GPU was idle for {1 - anatomy.gpu_seconds / total:.1%} of the step.")
    console.print("Profiling slows a step, decoding most; metrics.jsonl has times without it.")
    return "\n".join(line.rstrip() for line in out.getvalue().split("\n"))


def _write_csv(anatomy: Anatomy, file: Path) -> None:
    with open(file, "w", encoding="utf-8", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(("phase", "seconds", "share", "transformer_share"))
        for phase in anatomy.phases:
            shares = (phase.seconds / anatomy.seconds, phase.transformer / anatomy.seconds)
            rows.writerow((phase.name, f"{phase.seconds:.6f}", *(f"{x:.6f}" for x in shares)))
