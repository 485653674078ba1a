"""Compile what the ops launch on GPUs that are not here: `python tests/ahead_of_time.py`.

The ops are called as a user would, on CPU tensors; what they launch is compiled for each target
instead of run. The table that comes out, a line for each kernel, configuration and target, says how
many registers a thread and how much shared memory a block takes, and what is spilled to memory.
`--write` puts it where tests/test_ahead_of_time.py finds it; that goes with one version of triton.

To compile all takes minutes, so lines whose kernel is as it was when the committed table was made
are taken from there, but for every tenth; `--all` compiles these too.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

import ppo_kernels
from ppo_kernels import dispatch, logprob

TABLE = Path(__file__).with_name("ahead_of_time.csv")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KEY = ("kernel", "configuration", "target")
TAKES = ("registers", "spilled", "shared")
COLUMNS = (*KEY, "source", *TAKES)
ALWAYS = 10  # one line in so many is compiled, whatever the committed table has

Row = dict[str, Any]
Launch = tuple[JITFunction, dict[str, str], dict[str, Any], dict[Any, Any], dict[str, Any]]


def calls() -> Iterator[Callable[[], object]]:
    """Calls that launch every kernel, in every form that a program has."""
    rows, length = 6, 300
    halves = torch.bfloat16, torch.float16
    mask = torch.rand(rows, length) < 0.5
    cu_seqlens = torch.arange(rows + 1, dtype=torch.int64) * length

    def tokens(
        count: int, dtype: torch.dtype = torch.float32, packed: bool = False
    ) -> list[Tensor]:
        shape = (rows * length,) if packed else (rows, length)
        return list(torch.randn(count, *shape).to(dtype).unbind())

    def shaped(dtype: torch.dtype, packed: bool = False, **settings: Any) -> Callable[[], object]:
        logprobs, ref_logprobs, values = tokens(3, dtype, packed)
        settings = {"kl_coef": 0.1, "impl": "triton"} | settings
        scores = torch.randn(rows).to(dtype)
        return lambda: ppo_kernels.kl_shaped_gae(scores, logprobs, ref_logprobs, values, **settings)

    for estimator in ("k1", "k2", "k3"):
        yield shaped(torch.float32, kl_estimator=estimator, mask=mask)
    for dtype in (*halves, torch.float64):
        yield shaped(dtype, kl_estimator="k3", mask=mask, kl_coef=torch.tensor(0.1))
    yield shaped(torch.float32, packed=True, cu_seqlens=cu_seqlens, bootstrap=torch.randn(rows))
    for size in (60, 250):
        rewards, values = torch.randn(2, rows, size)
        yield lambda r=rewards, v=values: ppo_kernels.gae(r, v, impl="triton")
    long = torch.randn(3, 2, 9 * 1024 + 5)
    for dtype in (torch.float32, torch.bfloat16):
        x, y, z = long.to(dtype)
        yield lambda x=x, y=y: ppo_kernels.gae(x, y, impl="triton")
        yield lambda x=x, y=y, z=z: ppo_kernels.kl_shaped_gae(
            x[:, 0], x, y, z, kl_coef=0.1, kl_estimator="k3", impl="triton"
        )

    def logprobs(vocab: int, dtype: torch.dtype, entropy: bool) -> Callable[[], object]:
        logits = torch.randn(4, vocab).to(dtype).requires_grad_()
        targets = torch.randint(vocab, (4,))

        def both() -> object:
            found = ppo_kernels.token_logprobs(
                logits, targets, return_entropy=entropy, impl="triton"
            )
            outputs = found if isinstance(found, tuple) else (found,)
            return torch.autograd.grad([x.sum() for x in outputs], logits)

        return both

    for dtype in (torch.float32, *halves, torch.float64):
        for entropy in (False, True):
            yield logprobs(49152, dtype, entropy)
    yield logprobs(50257, torch.bfloat16, True)  # nothing divides it
    for vocab in (50, 1000, 3000):
        yield logprobs(vocab, torch.float32, True)

    def capped(dtype: torch.dtype) -> Callable[[], object]:
        logits, targets = torch.randn(4, 50257).to(dtype), torch.randint(50257, (4,))

        def both() -> object:
            found = logprob.forward(logits, targets, 1.0, True, True, "triton", 30.0)
            return logprob.backward(
                found[0], found[1], logits, targets, *found, 1.0, "triton", True, 30.0
            )

        return both

    for dtype in (torch.float32, *halves, torch.float64):
        yield capped(dtype)

    def policy(dtype: torch.dtype, packed: bool = False, **settings: Any) -> Callable[[], object]:
        x = tokens(6, dtype, packed)
        logprobs, entropy = x[0].requires_grad_(), x[1].requires_grad_()
        settings = {"impl": "triton"} | settings
        if settings.pop("whole", False):
            settings |= dict(entropy=entropy, entropy_coef=0.1, ref_logprobs=x[4], is_weights=x[5],
                             dual_clip=3.0, moments=torch.ones(3), kl_coef=0.1)  # fmt: skip
        return lambda: ppo_kernels.ppo_policy_loss(logprobs, x[2], x[3], **settings)

    def value(dtype: torch.dtype, packed: bool = False, **settings: Any) -> Callable[[], object]:
        x = tokens(3, dtype, packed)
        return lambda: ppo_kernels.ppo_value_loss(
            x[0].requires_grad_(), x[1], x[2], **settings, impl="triton"
        )

    for loss in (policy, value):
        for dtype in (torch.float32, *halves, torch.float64):
            yield loss(dtype, mask=mask)
        yield loss(torch.float32, reduction="sequence_mean", mask=mask)
        yield loss(torch.float32, packed=True, reduction="sequence_mean", cu_seqlens=cu_seqlens)
        yield loss(torch.float32, reduction="sum", normalizer=torch.tensor(3.0))
    for estimator in ("k1", "k2", "k3"):
        yield policy(torch.float32, whole=True, kl_estimator=estimator, mask=mask)
    yield policy(torch.bfloat16, whole=True, mask=mask)
    yield policy(torch.float32, mask=mask.t().contiguous().t())
    of_sequences = {"ratio_level": "sequence"}
    for dtype in (torch.float32, *halves, torch.float64):
        yield policy(dtype, **of_sequences, mask=mask)
    yield policy(torch.float32, whole=True, **of_sequences, mask=mask)
    yield policy(torch.float32, packed=True, **of_sequences, cu_seqlens=cu_seqlens)
    yield policy(torch.float32, objective="cispo", mask=mask)
    yield policy(torch.float32, objective="cispo", **of_sequences, mask=mask)

    for dtype in (torch.float32, *halves, torch.float64):
        chosen, rejected, margin = torch.randn(3, 9).to(dtype)
        yield lambda c=chosen, r=rejected: ppo_kernels.pairwise_loss(
            c.requires_grad_(), r.requires_grad_(), impl="triton"
        )
        yield lambda c=chosen, r=rejected, m=margin: ppo_kernels.pairwise_loss(
            c, r, margin=m, impl="triton"
        )

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        scores = torch.randn(3, 5).to(dtype).requires_grad_()
        ranks = torch.randint(5, (3, 5))
        yield lambda s=scores, r=ranks: ppo_kernels.ranking_loss(s, r, impl="triton")
        for settings in ({}, {"top_k": 5, "top_p": 0.9}):
            yield lambda s=settings, d=dtype: ppo_kernels.sample(
                torch.randn(2, 49152).to(d), **s, seed=1, offset=0, impl="triton"
            )
    yield lambda: ppo_kernels.sample(
        torch.randn(2, 300), top_p=0.9, seed=1, offset=torch.arange(2), impl="triton"
    )
    # What is 0-dim on a GPU is read there; of a CPU's the op makes numbers.
    for counters in (torch.tensor(3), torch.arange(2)):
        yield lambda c=counters: dispatch.triton_kernels("sample").sample(
            torch.randn(2, 49152), 1.0, 0, 1.0, torch.tensor(1), 0, c,
            torch.empty(2, dtype=torch.int64), torch.empty(2),
        )  # fmt: skip

    def attention(
        heads: int, kv_heads: int, width: int, longest: int, dtype: torch.dtype,
        of_slots: torch.dtype, of_new: torch.dtype | None = None, **settings: Any,
    ) -> Callable[[], object]:  # fmt: skip
        query = torch.randn(2, heads, width).to(dtype)
        slots = torch.randn(2, 2, kv_heads, longest, width).to(of_slots)
        given = {"scale": width**-0.5, "impl": "triton"} | settings
        if of_new is not None:
            new = torch.randn(2, 2, kv_heads, width).to(of_new)
            given |= {"new_keys": new[0], "new_values": new[1]}
        lengths = torch.tensor([3, longest])
        return lambda: ppo_kernels.decode_attention(query, *slots, lengths, **given)

    sinks = torch.randn(8)
    for dtype, of_slots in (
        *((x, x) for x in (torch.float32, *halves, torch.float64)),
        (torch.float32, torch.bfloat16),
    ):
        yield attention(14, 2, 64, 1024, dtype, of_slots)  # Qwen2.5-0.5B
        yield attention(8, 8, 256, 100, dtype, of_slots, softcap=50.0, sinks=sinks)
    for heads, kv_heads, width in ((12, 2, 128), (28, 4, 128), (9, 3, 64), (32, 32, 80)):
        yield attention(heads, kv_heads, width, 1024, torch.bfloat16, torch.bfloat16)
    yield attention(8, 4, 256, 1024, torch.bfloat16, torch.bfloat16, softcap=50.0)  # Gemma-2
    yield attention(8, 1, 64, 300, torch.bfloat16, torch.bfloat16, window=128, sinks=sinks)
    for dtype, of_new in ((torch.float32, torch.float32), *((torch.bfloat16, x) for x in (
        torch.bfloat16, torch.float32, torch.float64
    ))):  # fmt: skip
        yield attention(12, 2, 128, 1024, dtype, dtype, of_new)
    yield attention(8, 8, 256, 100, torch.bfloat16, torch.bfloat16, torch.bfloat16, softcap=50.0)

    def step(
        *dtypes: torch.dtype, first: int = 0, bits: int = 32, **settings: Any
    ) -> Callable[[], object]:
        weights, grads = (torch.zeros(5000).to(dtype)[first:] for dtype in dtypes)
        moments = torch.zeros(2, 5000)[:, first:]
        if bits == 8:
            *moments, settings["moment_scales"] = ppo_kernels.zero_moments(weights)
        if dtypes[0] == torch.bfloat16:
            settings["remainder"] = torch.zeros(5000, dtype=torch.int16)[first:]
        settings = {"step": 1, "learning_rate": 1e-3, "impl": "triton"} | settings
        return lambda: ppo_kernels.adamw(weights, grads, *moments, **settings)

    for weights in (torch.float32, torch.bfloat16):
        for grads in (torch.float32, *halves):
            yield step(weights, grads)
        yield step(weights, weights, bits=8)
        yield step(weights, weights, first=1)
        yield step(weights, weights, betas=(0.0, 0.9))
    # What is 0-dim on a GPU is read there.
    one = torch.zeros(4096)
    yield lambda: dispatch.triton_kernels("adamw").adamw(
        ([one], [one], [one], [one], [], []), (torch.tensor(1.0),) * 3, (0.1, True, 0.9, 0.1), 1e-8,
        torch.tensor(1.0),
    )  # fmt: skip

    def norm(
        width: int, *dtypes: torch.dtype, wrt: tuple[str, ...] = ("x", "weight")
    ) -> Callable[[], object]:
        x, weight = torch.randn(40, width).to(dtypes[0]), torch.randn(width).to(dtypes[1])
        trained = [{"x": x, "weight": weight}[name].requires_grad_() for name in wrt]

        def both() -> object:
            y = ppo_kernels.rms_norm(x, weight, eps=1e-5, dtype=dtypes[-1], impl="triton")
            return torch.autograd.grad(y, trained, torch.randn(y.shape).to(y.dtype))

        return both

    for dtype in (torch.float32, *halves, torch.float64):
        for width in (64, 576, 20_000):  # of a head, of SmolLM2, in tiles
            yield norm(width, dtype, dtype)
    for width in (1536, 8192, 16_384):
        yield norm(width, torch.bfloat16, torch.bfloat16)
    yield norm(576, torch.float32, torch.float32, torch.bfloat16)
    yield norm(100, torch.bfloat16, torch.float32, torch.bfloat16)  # nothing divides it
    for name in ("x", "weight"):
        yield norm(1536, torch.bfloat16, torch.bfloat16, wrt=(name,))

    def rotary(
        heads: int, kv_heads: int, width: int, rotated: int, dtype: torch.dtype,
        of_angles: torch.dtype,
    ) -> Callable[[], object]:  # fmt: skip
        fused = torch.randn(2, 5, heads + 2 * kv_heads, width).to(dtype).transpose(1, 2)
        query, key, _ = fused.requires_grad_().split((heads, kv_heads, kv_heads), 1)
        cos, sin = torch.randn(2, 2, 5, rotated).to(of_angles)

        def both() -> object:
            found = ppo_kernels.rotary_embedding(query, key, cos, sin, impl="triton")
            return torch.autograd.grad([x.sum() for x in found], fused)

        return both

    for dtype in (torch.float32, *halves, torch.float64):
        yield rotary(9, 3, 64, 64, dtype, dtype)
    for heads, kv_heads, width, rotated in (
        (12, 2, 128, 128), (32, 8, 128, 128), (32, 32, 80, 32), (32, 32, 96, 72), (8, 1, 256, 256)
    ):  # fmt: skip
        yield rotary(heads, kv_heads, width, rotated, torch.bfloat16, torch.float32)

    def gated(
        width: int, dtype: torch.dtype, halves: bool, wrt: tuple[bool, bool] = (True, True)
    ) -> Callable[[], object]:
        both = torch.randn(3, 2 * width).to(dtype)
        given = both.chunk(2, -1) if halves else both.view(2, 3, width).unbind()
        given = [x.detach().requires_grad_(want) for x, want in zip(given, wrt, strict=True)]
        trained = [x for x in given if x.requires_grad]

        def both_passes() -> object:
            y = ppo_kernels.swiglu(*given, impl="triton")
            return torch.autograd.grad(y, trained, torch.randn(y.shape).to(dtype))

        return both_passes

    for dtype in (torch.float32, *halves, torch.float64):
        for of_one in (False, True):
            yield gated(1536, dtype, of_one)
    yield gated(100, torch.bfloat16, True)  # several rows of a program; nothing divides them
    for wrt in ((True, False), (False, True)):
        yield gated(1536, torch.bfloat16, False, wrt)

    gradient, factor = torch.randn(9), torch.tensor(2.0)
    yield lambda: dispatch.triton_kernels("fused_loss").scale(gradient, factor)


def launches() -> dict[tuple[str, str], Launch]:
    """What the calls launch, by kernel and configuration."""
    found: dict[tuple[str, str], Launch] = {}

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launch = _described(self, args, named)
        found.setdefault((self.__name__, _configuration(launch)), launch)

    before = JITFunction.run, dispatch._INTERPRETED
    # Nothing is interpreted, but CPU tensors are to be taken.
    JITFunction.run, dispatch._INTERPRETED = record, True
    try:
        for call in calls():
            call()
    finally:
        JITFunction.run, dispatch._INTERPRETED = before
    return found


def _described(function: JITFunction, args: tuple[Any, ...], named: dict[str, Any]) -> Launch:
    """What triton would specialise such a launch on."""
    given = dict(zip(function.arg_names, args, strict=False))
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}
    for number, parameter in enumerate(function.params):
        x = given[parameter.name]
        specialised = isinstance(x, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or x is None or (specialised and x == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = x
            continue
        signature[parameter.name] = parameter.annotation_type or mangle_type(x)
        aligned = isinstance(x, Tensor) and not parameter.do_not_specialize_on_alignment
        if aligned or (specialised and x % 16 == 0):
            attributes[(number,)] = [["tt.divisibility", 16]]
    return function, signature, constants, attributes, named


def _configuration(launch: Launch) -> str:
    """The types of the tensors, what is there, and the constants."""
    function, signature, constants, attributes, options = launch
    types = [f"{name}:{kind[1:]}" for name, kind in signature.items() if kind.startswith("*")]
    wide = [
        function.params[number].name for (number,) in attributes
        if not signature[function.params[number].name].startswith("*")
    ]  # fmt: skip
    given = [f"{name}={x}" for name, x in constants.items() if x is not None]
    return " ".join((*types, *given, *(f"16|{name}" for name in wide),
                     f"warps={options.get('num_warps', 4)}"))  # fmt: skip


def resources(launch: Launch, target: str) -> Row:
    """Compile; what the program takes."""
    function, signature, constants, attributes, options = launch
    source = ASTSource(function, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if "cubin" in compiled.asm:
        registers, spilled = _of_cubin(compiled.asm["cubin"])
    else:
        text = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        # Scalar registers are spilled to lanes of others, not to memory.
        spilled = _number(r"\.private_segment_fixed_size:\s+(\d+)", text)
    return {"registers": registers, "spilled": spilled, "shared": compiled.metadata.shared}


def _of_cubin(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack, which is where spills go)."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in {text[:2000]}")
    return int(match.group(1))


def _source(launch: Launch) -> str:
    """Changes with the kernel, with what that calls, and with triton's options."""
    function, _, _, _, options = launch
    text = f"{function.cache_key} {sorted(options.items())}"
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def table(known: Mapping[tuple[str, ...], Row]) -> Iterator[Row]:
    """The lines in their order; those of `known` are not made again while their source stands."""
    found = sorted(launches().items(), key=lambda x: x[0])
    for number, ((key, launch), target) in enumerate(product(found, TARGETS)):
        row = dict(zip(KEY, (*key, target), strict=True)) | {"source": _source(launch)}
        there = known.get((*key, target))
        if number % ALWAYS and there is not None and there["source"] == row["source"]:
            yield there
        else:
            yield row | resources(launch, target)


def committed() -> tuple[str, dict[tuple[str, ...], Row]]:
    """The version of triton, and the committed lines by their keys."""
    version, _, text = TABLE.read_text().partition("\n")
    rows = csv.DictReader(text.splitlines())
    return version, {tuple(row[name] for name in KEY): row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--write", action="store_true", help=f"into {TABLE.name}")
    parser.add_argument("--all", action="store_true", help="compile all, not what has changed")
    options = parser.parse_args()
    version, known = committed()
    here = f"# triton {triton.__version__}"
    rows = list(table({} if options.all or version != here else known))
    to = TABLE.open("w", newline="") if options.write else sys.stdout
    print(here, file=to)
    writer = csv.DictWriter(to, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    main()
