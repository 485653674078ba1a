"""Where the time of one rollout goes, by torch's profiler.

On a CPU every moment of the thread that samples: what is not inside an operation is the host's
(Python, and what it calls that torch does not see). On a GPU every kernel, by its name, for inside
a captured graph nothing else is known of it, and the time that none runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ppo_engine.models import fused
from ppo_engine.pretrained import architecture
from ppo_engine.rollout import products
from ppo_engine.spans import PREFIX

_ROLLOUT, _PREFILL = "bench.rollout", "bench.prefill"
OTHER, HOST, IDLE = "other operations", "host: Python and launches", "no kernel runs"
# A phase is a span of the engine's of that name, and what its pattern finds: of an operation, or of
# a kernel. The outermost counts, so that all of a prefill is one.
PHASES: Mapping[str, re.Pattern[str]] = {
    "prefill": re.compile(re.escape(_PREFILL)),
    "packing": re.compile("pack_weight"),
    "attention": re.compile("scaled_dot_product|attention|flash|fmha", re.IGNORECASE),
    "sampling": re.compile(
        "multinomial|exponential|cumsum|searchsorted|aten::(log_)?softmax|sample|^draw|cunn_SoftMax"
    ),
    "products": re.compile(
        "aten::(linear|matmul|mm|addmm|bmm|baddbmm)$|_linear|gemm|gemv|cutlass|nvjet|splitK",
        re.IGNORECASE,
    ),
}


class Part(NamedTuple):
    """Time that belongs to one operation or kernel."""

    names: Sequence[str]  # its own last, before it those it runs within, the outermost first
    microseconds: float


def profiled(run: Callable[[], object], model: Any, device: torch.device) -> dict[str, float]:
    """Seconds of each phase of `run`, which samples from the causal language model `model`."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    recorder = profile(activities=activities, acc_events=True)  # torch 2.11 warns without
    with _named_ops(), _prefill_spans(model), recorder as found, record_function(_ROLLOUT):
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = found.events()
    [whole] = [e for e in events if e.name == _ROLLOUT and e.device_type == DeviceType.CPU]
    read, rest = (_kernels, IDLE) if device.type == "cuda" else (_operations, HOST)
    return divide(read(events, whole), whole.time_range.elapsed_us(), rest)


def divide(parts: Iterable[Part], whole: float, rest: str) -> dict[str, float]:
    """Seconds by phase; what of the `whole` (microseconds) is in no part is the phase `rest`."""
    found = dict.fromkeys((*PHASES, OTHER), 0.0)
    for part in parts:
        found[_phase(part.names)] += part.microseconds * 1e-6
    return found | {rest: max(0.0, whole * 1e-6 - sum(found.values()))}


def _phase(names: Sequence[str]) -> str:
    for name in names:
        for phase, pattern in PHASES.items():
            ours = name.startswith(PREFIX)  # its name says it, whatever else it contains
            if name == f"{PREFIX}{phase}" if ours else pattern.search(name):
                return phase
    return OTHER


def _operations(events: Sequence[Any], whole: Any) -> Iterator[Part]:
    """What the sampling thread did within the `whole`."""
    for event in events:
        names, above = [event.name], event.cpu_parent
        while above is not None and above is not whole:
            names.insert(0, above.name)
            above = above.cpu_parent
        # A span that is no phase is the host's own.
        if above is whole and ("::" in event.name or _phase(names) != OTHER):
            yield Part(names, event.self_cpu_time_total)


def _kernels(events: Sequence[Any], _: Any) -> Iterator[Part]:
    """What ran on the GPU; within a prefill what began while its span was open there."""
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
    prefills = [e.time_range for e in on_gpu if e.name in (_PREFILL, f"{PREFIX}prefill")]
    for event in on_gpu:
        if not event.name.startswith((PREFIX, _ROLLOUT, _PREFILL)):
            start = event.time_range.start
            inside = any(span.start <= start < span.end for span in prefills)
            names = [_PREFILL, event.name] if inside else [event.name]
            yield Part(names, event.time_range.elapsed_us())


@contextmanager
def _named_ops() -> Iterator[None]:
    """The ops of a step that are called directly, which a profiler does not see, by their names."""

    def named(op: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"ppo_kernels::{op.__name__}"):
                return op(*args, **kwargs)

        return run

    users = {fused: ("rms_norm", "rotary_embedding"), products: ("packed_linear", "pack_weight")}
    with ExitStack() as patches:
        for module, ops in users.items():
            for op in ops:
                patches.enter_context(mock.patch.object(module, op, named(getattr(module, op))))
        yield


@contextmanager
def _prefill_spans(model: Any) -> Iterator[None]:
    """A span around each call of the model with more than one token a row."""
    open_spans: list[record_function | None] = []

    def begin(_: Any, args: Any, kwargs: Any) -> None:
        given = args[0] if args else kwargs.get("input_ids")
        given = kwargs.get("inputs_embeds") if given is None else given
        several = given is not None and given.shape[1] > 1
        open_spans.append(record_function(_PREFILL) if several else None)
        if open_spans[-1] is not None:
            open_spans[-1].__enter__()

    def finish(*_: Any) -> None:
        span = open_spans.pop()
        if span is not None:
            span.__exit__(None, None, None)

    base = architecture.unwrap(model).base_model
    hooks = (
        base.register_forward_pre_hook(begin, with_kwargs=True),
        base.register_forward_hook(finish, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
