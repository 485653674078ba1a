"""`ppo-engine doctor`: what is installed, what runs, what is missing, and what that costs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

import ppo_kernels
from ppo_engine.errors import UserError
from ppo_engine.memory import keep_freed_memory, why_no_heap
from ppo_engine.models import precision
from ppo_kernels import dispatch

_PACKAGES = ("torch", "transformers", "triton", "pydantic", "safetensors", "ppo-engine")
_OPTIONAL = {
    "peft": "LoRA: pip install 'ppo-engine[lora]'",
    "bitsandbytes": "a quantized base under LoRA: pip install 'ppo-engine[quant]'",
    "datasets": "parquet files and saved data sets: pip install 'ppo-engine[data]'",
    "math_verify": "the reward math_equal: pip install 'ppo-engine[math]'",
    "jsonschema": "the reward json_schema: pip install 'ppo-engine[json]'",
    "tensorboard": "run.trackers=[tensorboard]: pip install 'ppo-engine[tensorboard]'",
    "wandb": "run.trackers=[wandb]: pip install 'ppo-engine[wandb]'",
    "trackio": "run.trackers=[trackio]: pip install 'ppo-engine[trackio]'",
    "starlette": "the ranking page: pip install 'ppo-engine[pages]'",
    "uvicorn": "the ranking page: pip install 'ppo-engine[pages]'",
    "vaderSentiment": "the demo: pip install 'ppo-engine[demo]'",
    "gguf": "reading the demo's model: pip install 'ppo-engine[demo]'",
    "accelerate": "reading the demo's model: pip install 'ppo-engine[demo]'",
}
_COST = {
    "cuda": "on a GPU, the Triton kernels run instead, up to three times slower (GAE)",
    "cpp": "ops on the CPU run in plain PyTorch, several times slower and with more memory",
    "triton": "ops on a GPU run in plain PyTorch",
}
_PIECES = "cost: with glibc's malloc, training takes up to 60 % more memory"
_TOLERANCE = 1e-4  # absolute and relative, fp32 against fp32


@dataclass
class Report:
    """Prints findings one by one and remembers whether something that should work does not."""

    console: Console = field(default_factory=lambda: Console(highlight=False, soft_wrap=True))
    broken: list[str] = field(default_factory=list)

    def title(self, text: str) -> None:
        self.console.print(f"\n[bold]{text}[/bold]")

    def line(self, state: str, name: str, text: str) -> None:
        """`state` is ok, info, missing (optional) or BROKEN (makes the exit status 1)."""
        style = {"ok": "green", "missing": "yellow", "BROKEN": "bold red"}.get(state, "dim")
        self.console.print(f"  [{style}]{state:<8}[/{style}]{name:<24} {escape(text)}".rstrip())
        if state == "BROKEN":
            self.broken.append(name)


def examine(report: Report | None = None) -> int:
    """Print everything; 1 where something that should work is broken, 0 otherwise."""
    report = report or Report()
    _versions(report)
    _machine(report)
    _operations(report)
    _optional(report)
    if report.broken:
        report.console.print(f"\nBroken: {', '.join(report.broken)}.", style="bold red")
        return 1
    report.console.print("\nEverything that should work here does.", style="bold green")
    return 0


def _versions(report: Report) -> None:
    report.title("Versions")
    report.line("info", "python", f"{platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        version = _version(package)
        report.line("info", package, version or "not installed")
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler:
        report.line("info", "C++ compiler", compiler)
    else:
        report.line("missing", "C++ compiler", "none found; needed only to build the kernels")


def _machine(report: Report) -> None:
    report.title("Machine")
    threads = f"{torch.get_num_threads()} torch threads, {os.cpu_count()} cores"
    report.line("info", "CPU", f"{torch.backends.cpu.get_cpu_capability()}, {threads}")
    compute = precision.choose_dtype("auto", torch.device("cpu"))
    report.line("info", "CPU compute", f"{str(compute).removeprefix('torch.')} by default")
    keep_freed_memory()
    if why_no_heap():
        report.line(
            "missing", "CPU memory", f"no heap for large tensors: {why_no_heap()}; {_PIECES}"
        )
    else:
        report.line("ok", "CPU memory", "large tensors have a heap of their own")
    if not torch.cuda.is_available():
        report.line("info", "GPU", "none that torch can use")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        report.line("info", f"GPU {index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB")


def _operations(report: Report) -> None:
    report.title("Ops: what can run, and one small check of each against the reference")
    table = ppo_kernels.implementations()
    gpu = torch.cuda.is_available()
    for impl in dispatch.IMPLS:
        for availability in {table[op][impl] for op in table}:
            if availability.available:
                report.line("ok", impl, availability.reason)
            elif availability in dispatch.BY_DESIGN:
                ops = [op for op in table if table[op][impl] == availability]
                report.line("info", impl, f"{availability.reason}: {', '.join(ops)}")
            elif impl == "cpp" and importlib.util.find_spec("ppo_kernels._cpu"):
                report.line("BROKEN", impl, f"{availability.reason}; cost: {_COST[impl]}")
            else:
                needed = impl == "cpp" or gpu
                cost = f"cost: {_COST[impl]}" if needed else "no cost on this machine"
                report.line("missing", impl, f"{availability.reason}; {cost}")
    for op in table:
        for impl in (impl for impl in dispatch.IMPLS if table[op][impl].available):
            if impl != "reference":
                _check(report, op, impl)
        if op not in _EXAMPLES:
            report.line("info", op, "has no quick check")


def _check(report: Report, op: str, impl: str) -> None:
    """The op by `impl` against the reference, on a small input of fixed random numbers."""
    if op not in _EXAMPLES:
        return
    name = f"{op} ({impl})"
    on_gpu = impl != "cpp" and torch.cuda.is_available()  # elsewhere triton is interpreted
    device = torch.device("cuda" if on_gpu else "cpu")
    generator = torch.Generator().manual_seed(0)
    arguments, options = _EXAMPLES[op](generator)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    function = getattr(ppo_kernels, op)
    try:
        got, expected = (
            _results(function, [_copied(x, device) for x in arguments], options | {"impl": i})
            for i in (impl, "reference")
        )
    except Exception as error:  # whatever it is, the op is broken; go on with the others
        report.line("BROKEN", name, f"{type(error).__name__}: {error}")
        return
    worst = max(
        float(((a - b).abs() / (1 + b.abs())).max()) for a, b in zip(got, expected, strict=True)
    )
    if worst <= _TOLERANCE:  # False for NaN
        agreement = f"within {worst:.0e}" if worst else "exactly"
        report.line("ok", name, f"agrees with the reference {agreement}")
    else:
        report.line("BROKEN", name, f"differs from the reference by {worst:.1e} (limit 1e-4)")


def _copied(argument: Any, device: torch.device) -> Any:
    return argument.to(device, copy=True) if isinstance(argument, torch.Tensor) else argument


def _results(
    function: Callable[..., Any], arguments: list[Any], options: dict[str, Any]
) -> list[torch.Tensor]:
    """What it returns, or, where that is nothing, what it has made of its arguments."""
    returned = function(*arguments, **options)
    return arguments if returned is None else _tensors(returned)


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for item in result if item is not None for tensor in _tensors(item)]


Example = tuple[list[Any], dict[str, Any]]
_SHAPE = (3, 17)


def _tokens(generator: torch.Generator, count: int) -> list[torch.Tensor]:
    return list(torch.randn((count, *_SHAPE), generator=generator))


def _mask() -> torch.Tensor:
    return torch.arange(_SHAPE[1]) < torch.tensor([[17], [9], [0]])


def _shaped_example(generator: torch.Generator) -> Example:
    scores = torch.randn(_SHAPE[0], generator=generator)
    return [scores, *_tokens(generator, 3)], {"mask": _mask(), "kl_coef": 0.1, "gamma": 0.99}


def _logprob_example(generator: torch.Generator) -> Example:
    logits = 5 * torch.randn((7, 1001), generator=generator)
    targets = torch.randint(1001, (7,), generator=generator)
    return [logits, targets], {"return_entropy": True, "temperature": 0.7}


def _linear_example(generator: torch.Generator) -> Example:
    hidden, weight = (torch.randn(n, 24, generator=generator) for n in (40, 301))
    targets = torch.randint(301, (40,), generator=generator)
    return [hidden, weight, targets], {"temperature": 0.7, "softcap": 8.0}


def _linear_loss_example(generator: torch.Generator) -> Example:
    tensors, settings = _linear_example(generator)
    old_logprobs, advantages = torch.randn((2, 40), generator=generator) - torch.tensor([[5], [0]])
    return [*tensors, old_logprobs, advantages], settings


def _attention_example(generator: torch.Generator) -> Example:
    query, keys = (torch.randn(n, generator=generator) for n in ((3, 4, 8), (3, 2, 37, 8)))
    lengths = torch.tensor([37, 1, 20])
    return [query, keys, keys.flip(2), lengths], {"scale": 0.3, "window": 30}


def _rotary_example(generator: torch.Generator) -> Example:
    query, key = (torch.randn(2, n, 5, 10, generator=generator) for n in (4, 2))
    angles = torch.randn(2, 5, 6, generator=generator)
    return [query, key, angles.cos(), angles.sin()], {}


def _packed_example(generator: torch.Generator) -> Example:
    x, weight = (torch.randn(n, 33, generator=generator) for n in (19, 50))
    return [x, ppo_kernels.pack_weight(weight, dtype=torch.float32)], {}


def _ranking_example(generator: torch.Generator) -> Example:
    scores = torch.randn((5, 4), generator=generator)
    return [scores, torch.randint(-1, 3, (5, 4), generator=generator)], {}


def _adamw_example(generator: torch.Generator) -> Example:
    weights, grads, exp_avg = torch.randn((3, 33), generator=generator)
    settings = {"step": 3, "learning_rate": 0.1, "weight_decay": 0.1}
    return [weights, grads, exp_avg, exp_avg.square()], settings


_EXAMPLES: dict[str, Callable[[torch.Generator], Example]] = {
    "gae": lambda g: (_tokens(g, 2), {"mask": _mask()}),
    "kl_shaped_gae": _shaped_example,
    "token_logprobs": _logprob_example,
    "linear_logprobs": _linear_example,
    "linear_ppo_loss": _linear_loss_example,
    "ppo_policy_loss": lambda g: (_tokens(g, 3), {"mask": _mask()}),
    "ppo_value_loss": lambda g: (_tokens(g, 3), {"mask": _mask()}),
    "pairwise_loss": lambda g: (list(torch.randn((2, 33), generator=g)), {"center_coef": 0.01}),
    "ranking_loss": _ranking_example,
    "sample": lambda g: ([torch.randn((3, 101), generator=g)], {"seed": 1, "offset": 2}),
    "decode_attention": _attention_example,
    "adamw": _adamw_example,
    "rms_norm": lambda g: ([torch.randn(n, generator=g) for n in ((5, 40), (40,))], {"eps": 1e-6}),
    "rotary_embedding": _rotary_example,
    "swiglu": lambda g: (list(torch.randn((2, 5, 40), generator=g)), {}),
    "packed_linear": _packed_example,
}


def _optional(report: Report) -> None:
    report.title("Optional packages")
    for package, use in _OPTIONAL.items():
        version = _version(package)
        report.line("ok" if version else "missing", package, version or f"needed for {use}")
    from ppo_engine.demo.model import find_gguf

    try:
        report.line("ok", "demo model", str(find_gguf()))
    except UserError as error:
        report.line("missing", "demo model", str(error))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
