"""Which implementation of an op runs, and why; and what the compiled ones need of their tensors."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

DEVICES = ("cpu", "cuda")  # that have kernels
IMPLS = ("reference", "cpp", "triton", "cuda")
OPS = (
    "gae",
    "kl_shaped_gae",
    "token_logprobs",
    "linear_logprobs",
    "ppo_policy_loss",
    "ppo_value_loss",
    "linear_ppo_loss",
    "pairwise_loss",
    "ranking_loss",
    "sample",
    "decode_attention",
    "adamw",
    "rms_norm",
    "rotary_embedding",
    "swiglu",
    "packed_linear",
)


class Availability(NamedTuple):
    """Whether an implementation can run here, and how it was built or why it cannot."""

    available: bool
    reason: str


# pip keeps a wheel that was built without the kernels.
_AGAIN = "install the package again, with pip's --no-cache-dir --force-reinstall --no-deps"


def _why_not_built(name: str) -> str:
    """What setup.py recorded when it could not build the extension `_cpu` or `_cuda`."""
    info = Path(__file__).with_name("_build_info.json")
    try:
        recorded = json.loads(info.read_text()).get(name)
    except (OSError, ValueError):
        recorded = None
    if recorded is None:
        return (
            f"the compiled extension ppo_kernels._{name} is missing: install the package, or "
            "build it in place with `python setup.py build_ext --inplace`"
        )
    if recorded["built"]:
        return f"the compiled extension was built for another Python: {_AGAIN}"
    return f"{recorded['reason']} (fix that, then {_AGAIN})"


def _load_extension() -> tuple[Any, Availability]:
    try:
        _cpu = importlib.import_module("ppo_kernels._cpu")
    except ModuleNotFoundError:
        return None, Availability(False, _why_not_built("cpu"))
    except ImportError as error:
        return None, Availability(False, f"the compiled extension does not load: {error}")
    if _is_older_than_its_sources(Path(str(_cpu.__file__))):
        warnings.warn(
            "the compiled extension ppo_kernels._cpu is older than its sources in csrc/: build it "
            "anew with `python setup.py build_ext --inplace`",
            RuntimeWarning,
            stacklevel=2,
        )
    # Raises where PPO_KERNELS_ISA names an instruction set that cannot run here.
    return _cpu, Availability(True, f"{_cpu.isa()} of {', '.join(_cpu.supported_isas())}")


def _is_older_than_its_sources(module: Path) -> bool:
    """As after a `git pull` where the package was installed with `pip install -e`."""
    sources = Path(__file__).parents[2] / "csrc"
    times = [x.stat().st_mtime for x in sources.rglob("*") if x.is_file()]
    return max(times, default=0.0) > module.stat().st_mtime


def _load_cuda() -> tuple[Any, str]:
    """The module of the CUDA kernels, or None and why it is missing."""
    try:
        return importlib.import_module("ppo_kernels._cuda"), ""
    except ModuleNotFoundError:
        return None, _why_not_built("cuda")
    except ImportError as error:
        return None, f"the compiled extension does not load: {error}"


# The compiled modules, None where one is missing.
cpu, _CPP = _load_extension()
cuda, _WHY_NO_CUDA = _load_cuda()
# Where they are faster than Triton's; bench/notes/gpu.md has the figures.
WITH_CUDA = ("gae", "kl_shaped_gae")
NOT_NEEDED = Availability(False, "no kernel of its own; Triton's is used")
FOR_CPUS = Availability(
    False, "for CPUs only; a GPU's own product reads weights at the speed of memory"
)
NEEDS_AVX2 = Availability(False, f"needs AVX2, runs {_CPP.reason}; torch's product is used")
BY_DESIGN = (NOT_NEEDED, FOR_CPUS, NEEDS_AVX2)  # nothing is missing


def _triton_version() -> str:
    """Empty where it is missing; torch's builds for AMD ship it under other names."""
    if importlib.util.find_spec("triton") is None:
        return ""
    for name in ("triton", "triton-rocm", "pytorch-triton-rocm", "pytorch-triton"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


# Looked up once, at import: torch.compile cannot trace it.
_TRITON_VERSION = _triton_version()
HAS_TRITON = _TRITON_VERSION != ""
# As triton's own decorators decide, once, when the kernels are imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _triton() -> Availability:
    if not HAS_TRITON:
        return Availability(False, "the Python package triton is missing")
    if _INTERPRETED:
        return Availability(True, "interpreted (TRITON_INTERPRET=1): any device, very slow")
    if not torch.cuda.is_available():
        return Availability(False, "no GPU: torch.cuda.is_available() is False")
    return Availability(True, f"triton {_TRITON_VERSION}")


@functools.cache
def _cuda_on(index: int) -> Availability:
    """On the GPU of that index: there may be others, of other generations."""
    if cuda is None:
        return Availability(False, _WHY_NO_CUDA)
    device = torch.device(cuda.device_type, index)
    if device.type == "cuda" and not torch.cuda.is_available():
        return Availability(False, "no GPU: torch.cuda.is_available() is False")
    if torch.version.hip:
        return Availability(False, "for NVIDIA's GPUs only")
    with on(device):
        why_not = cuda.why_not()  # an old driver, or a GPU of another generation
    return Availability(not why_not, why_not or "compiled by nvcc")


def _cuda(device: torch.device | None = None) -> Availability:
    index = None if device is None else device.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return _cuda_on(index)


if cuda is not None and torch.version.cuda:
    # torch.compile cannot trace a query of the driver.
    _cuda = torch.compiler.assume_constant_result(_cuda)


@functools.cache
def triton_kernels(name: str) -> Any:
    """The module of that name in `ppo_kernels.triton`, imported when it is first needed."""
    return importlib.import_module(f"ppo_kernels.triton.{name}")


def _availability(op: str, impl: str, device: torch.device | None = None) -> Availability:
    if impl == "reference":
        return Availability(True, "plain PyTorch, any device")
    if impl == "cpp":
        needs_avx2 = op == "packed_linear" and cpu is not None and cpu.isa() == "baseline"
        return NEEDS_AVX2 if needs_avx2 else _CPP
    if op == "packed_linear":
        return FOR_CPUS
    if impl == "triton":
        return _triton()
    return _cuda(device) if op in WITH_CUDA else NOT_NEEDED


def implementations() -> dict[str, dict[str, Availability]]:
    """What can run here: `{op: {impl: Availability(available, reason)}}`; on the current GPU."""
    return {op: {impl: _availability(op, impl) for impl in IMPLS} for op in OPS}


def resolve(op: str, impl: str, device: torch.device) -> str:
    """The implementation to run for `impl`, which may be "auto", on tensors of `device`.

    Raises ValueError for an unknown `impl`, and RuntimeError, with the reason, for one that cannot
    run here.
    """
    if impl == "auto":
        if device.type == "cpu" and cpu is not None:
            return "cpp"
        if device.type == "cuda" and op in WITH_CUDA and _cuda(device).available:
            return "cuda"
        if device.type == "cuda" and HAS_TRITON:
            return "triton"
        if device.type in ("cpu", "cuda"):
            _warn_missing(_CPP.reason if device.type == "cpu" else _triton().reason)
        return "reference"
    if impl not in IMPLS:
        raise ValueError(
            f"{op}: impl must be 'auto' or one of {', '.join(map(repr, IMPLS))}, but is {impl!r}"
        )
    gpu = device if impl == "cuda" and device.type == "cuda" else None
    can_run, reason = _availability(op, impl, gpu)
    if not can_run:
        raise RuntimeError(f"{op}: impl={impl!r} cannot run: {reason}")
    if impl == "cpp" and device.type != "cpu":
        raise RuntimeError(f"{op}: impl='cpp' runs on CPU tensors, but these are on {device}")
    if impl == "cuda" and device.type != cuda.device_type:
        raise RuntimeError(f"{op}: impl='cuda' runs on a GPU's tensors, but these are on {device}")
    if impl == "triton" and device.type != "cuda" and not _INTERPRETED:
        raise RuntimeError(
            f"{op}: impl='triton' runs on a GPU's tensors, but these are on {device}"
        )
    return impl


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        "ppo_kernels runs in plain PyTorch, several times slower than its compiled kernels: "
        f"{reason}",
        RuntimeWarning,
        stacklevel=5,
    )


if cpu is None or (not HAS_TRITON and (torch.version.cuda or torch.version.hip)):
    # torch.compile cannot trace a warning, but calls a function of constant result as it traces.
    _warn_missing = torch.compiler.assume_constant_result(lambda reason: _warn_once(reason))


_PLAIN = (Tensor, torch.nn.Parameter)
_Tensor = TypeVar("_Tensor", Tensor, Tensor | None)


def eager(*tensors: Tensor | None) -> bool:
    """Whether the kernels may be called directly on these tensors.

    Not while a graph is traced, and not on tensors without memory of their own (fake, functional,
    other subclasses): these go through `torch.ops.ppo_kernels`, at some microseconds a call.
    """
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0 or _functorch.peek_interpreter_stack() is not None:
        _refuse_transforms(tensors)
    if is_recorded():
        return False
    for x in tensors:  # noqa: SIM110 - `all` of a generator takes three times as long
        # Of a view that is negated when it is read, the memory has the other sign.
        if x is not None and (type(x) not in _PLAIN or x.is_neg()):
            return False
    return True


def is_recorded() -> bool:
    """Whether `make_fx` or `torch.jit.trace` writes down the calls of torch's own operators."""
    if torch._C._get_tracing_state() is not None:
        return True
    return torch._C._len_torch_dispatch_stack() > 0 and get_proxy_mode() is not None


def refuse_recording(op: str) -> None:
    """By an op that calls its kernels alone."""
    if is_recorded():
        raise TypeError(
            f"{op}: make_fx and torch.jit.trace see nothing of what its kernels write: call it "
            "with impl='reference'"
        )


def is_plain(x: Tensor) -> bool:
    """Whether a tensor has memory of its own; while a graph is traced nobody knows."""
    return type(x) in _PLAIN or torch.compiler.is_compiling()


def _refuse_transforms(tensors: tuple[Tensor | None, ...]) -> None:
    """Of them the kernels know nothing: they would drop a tangent, and read a wrapper's memory."""
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(
            "the kernels have no forward-mode differentiation: call the op with impl='reference'"
        )
    if any(x is not None and _functorch.is_functorch_wrapped_tensor(x) for x in tensors):
        raise RuntimeError(
            "the kernels know nothing of vmap and the other transforms of torch.func: call the op "
            "with impl='reference'"
        )


def refuse_batches(*gradients: Tensor | None) -> None:
    """Gradients that come in many at a time, with `is_grads_batched` or from a vectorized
    Jacobian."""
    if any(x is not None and _functorch.is_legacy_batchedtensor(x) for x in gradients):
        raise RuntimeError(
            "the kernels' gradients take one gradient at a time, no batch of them: leave out "
            "is_grads_batched or vectorize, or call the op with impl='reference'"
        )


def traced(value: float | Tensor) -> Tensor:
    """`value` as a 0-dim float64 tensor, for a custom op while a graph is traced.

    A number given to a custom op would be a constant of the graph, compiled anew for each value
    (and so would `torch.as_tensor` of it); a product stays symbolic.
    """
    return torch.ones((), dtype=torch.float64, device="cpu") * value


# --- Tensors as csrc/bindings takes them ----------------------------------------------------------


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an op computes in and returns, for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty contiguous tensor of that dtype, shaped like `x`.

    On small tensors `new_empty` of a shape takes torch twice as long.
    """
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def common_dtype(first: Tensor, *others: Tensor | None) -> torch.dtype:
    """The dtype that all of them fit in."""
    dtype = first.dtype
    for x in others:
        if x is not None and x.dtype is not dtype:
            dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def in_one_dtype(first: Tensor, *others: Tensor | None) -> tuple[torch.dtype, tuple[Any, ...]]:
    """Their common dtype, and all of them in it: themselves where they are."""
    dtype = common_dtype(first, *others)
    tensors = (first, *others)
    for x in tensors:
        if x is not None and x.dtype is not dtype:
            return dtype, tuple(None if x is None else x.to(dtype) for x in tensors)
    return dtype, tensors


def on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are launched on the current device: the tensors' one, inside this."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def side_by_side(x: _Tensor) -> _Tensor:
    """`x` with the elements of its last dimension next to each other: a copy where they are not."""
    if x is None or x.stride(-1) == 1 or x.shape[-1] <= 1:
        return x
    return x.contiguous()


def offsets(cu_seqlens: Tensor | None) -> Tensor | None:
    """`cu_seqlens` as the kernels read it."""
    return None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
