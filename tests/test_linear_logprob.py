"""`linear_logprobs`: every implementation against float64, and no tensor of [tokens, vocab]."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import ops
import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ppo_kernels import head, linear_logprobs, reference, token_logprobs

INF, NAN = float("inf"), float("nan")
WRT = ("hidden", "weight", "bias")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(params=ops.implementations_of("linear_logprobs"))
def impl(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=ops.implementations_of("linear_logprobs", but=("reference",)))
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, and several tiles in each, of small tensors."""
    monkeypatch.setattr(head, "_TOKENS", {"cpu": 16})
    monkeypatch.setattr(head, "_TOKENS_OF_TILES", 32)
    monkeypatch.setattr(head, "_BYTES_OF_TILES", 32 * 40 * 4)
    monkeypatch.setattr(head, "_TILE_BYTES", 2000)


def inputs(
    rows: tuple[int, ...] = (37,),
    vocab: int = 131,
    width: int = 12,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> dict[str, Any]:
    """Arguments of `linear_logprobs`; about one target in five is ignored."""
    targets = torch.randint(0, vocab, rows)
    targets[torch.rand(rows) < 0.2] = -100
    return {
        "hidden": torch.randn(*rows, width).to(dtype),
        "weight": torch.randn(vocab, width).to(dtype),
        "bias": torch.randn(vocab).to(dtype),
        "targets": targets,
        "temperature": 0.7,
        "return_entropy": True,
    } | more


def check(arguments: dict[str, Any], kernel: str, wrt: tuple[str, ...] = WRT) -> None:
    ops.assert_products_rule(
        linear_logprobs, reference.linear_logprobs, arguments, wrt, impl=kernel
    )


def same_as(
    reference_: Callable[..., Any], op: Callable[..., Any], arguments: dict[str, Any]
) -> None:
    torch.testing.assert_close(
        ops.run(op, arguments, WRT), ops.run(reference_, arguments, WRT), rtol=1e-4, atol=1e-5
    )


# --- Values and gradients -------------------------------------------------------------------------


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_rule(kernel: str, dtype: torch.dtype, softcap: float | None) -> None:
    arguments = inputs(dtype=dtype, softcap=softcap)
    if dtype == torch.float64:  # plain PyTorch in float64 is no bound to an error
        expected = ops.run(reference.linear_logprobs, arguments, WRT)
        actual = ops.run(partial(linear_logprobs, impl=kernel), arguments, WRT)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
        return
    check(arguments, kernel)
    without = {name: x for name, x in arguments.items() if name != "bias"}
    check(without | {"return_entropy": False}, kernel, WRT[:2])


@pytest.mark.parametrize("vocab", [1, 2, 7, 39, 40, 41, 80, 333, 1031])
@pytest.mark.parametrize("width", [1, 2, 17])
def test_any_vocabulary_and_width(kernel: str, vocab: int, width: int) -> None:
    check(inputs((5,), vocab, width), kernel)


@pytest.mark.parametrize(
    "rows", [(), (0,), (1,), (16,), (33,), (2, 0), (3, 4), (2, 3, 11)], ids=str
)
def test_leading_shapes(impl: str, rows: tuple[int, ...]) -> None:
    arguments = inputs(rows)
    check(arguments, impl)
    logprobs, entropy = linear_logprobs(**arguments, impl=impl)
    assert logprobs.shape == entropy.shape == rows
    alone = linear_logprobs(**arguments | {"return_entropy": False}, impl=impl)
    assert torch.equal(alone, logprobs)


def test_strides_and_offsets(impl: str) -> None:
    arguments = inputs((6,) if impl == "triton" else (37,))
    op = partial(linear_logprobs, impl=impl)
    expected = ops.run(op, arguments, WRT)
    for name in WRT:
        for _, view in ops.views(arguments[name]):
            found = ops.run(op, arguments | {name: view}, WRT)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    row = arguments["weight"][:1].expand(131, 12)
    same_as(reference.linear_logprobs, op, arguments | {"weight": row})
    targets = torch.stack((arguments["targets"],) * 2, 1)[:, 0].to(torch.int32)
    ops.assert_same_bits(expected, ops.run(op, arguments | {"targets": targets}, WRT))


@pytest.mark.usefixtures("products")
def test_ignored_tokens_are_not_read(kernel: str) -> None:
    arguments = inputs()
    ignored = arguments["targets"] == -100
    arguments["hidden"][ignored] = torch.tensor([NAN, INF, -INF])[torch.arange(12) % 3]
    check(arguments, kernel)
    found = ops.run(partial(linear_logprobs, impl=kernel), arguments, WRT)
    for name in ("output.0", "output.1", "gradient of hidden"):
        assert found[name].isfinite().all() and not found[name][ignored].any()


@pytest.mark.usefixtures("products")
def test_all_tokens_ignored(kernel: str) -> None:
    given = inputs() | {"targets": torch.full((37,), -100)}
    given["hidden"].fill_(NAN)
    for x in ops.run(partial(linear_logprobs, impl=kernel), given, WRT).values():
        assert not x.any()


@pytest.mark.parametrize("gap", [7.0, 16.0, 25.0, 60.0])
def test_peaked_logits_keep_their_digits(kernel: str, gap: float) -> None:
    """1 - p of a nearly certain target must not cancel (Liger #1329)."""
    hidden, targets = 0.3 * torch.randn(6, 8), torch.tensor([0, 1, 50, 99, 39, 40])
    weight, bias = torch.randn(100, 8), torch.zeros(100)
    bias[targets] += gap
    hidden[:, 0], weight[:, 0] = 1.0, 0.0
    found = []
    for convert in (torch.Tensor.float, torch.Tensor.double):
        x, w, b = (convert(t).requires_grad_() for t in (hidden, weight, bias))
        logprobs, entropy = linear_logprobs(x, w, targets, bias=b, return_entropy=True, impl=kernel)
        gradients = torch.autograd.grad(logprobs.sum(), (x, w, b))
        found.append([t.double() for t in (logprobs, entropy, *gradients)])
    for single, double in zip(*found, strict=True):
        largest = float(double.abs().max())
        torch.testing.assert_close(single, double, rtol=3e-5, atol=1e-6 * largest)


def test_a_vocabulary_masked_by_its_bias(kernel: str) -> None:
    """Whole tiles without any probability, before the target's, after it and around it."""
    arguments = inputs((6,), 131)
    arguments["targets"] = torch.tensor([0, 39, 40, 79, 80, 130])
    for masked in (slice(0, 80), slice(40, 131), slice(41, 79)):
        bias = arguments["bias"].clone()
        bias[masked] = -INF
        given = arguments | {"bias": bias}
        expected = reference.linear_logprobs(**given)
        found = linear_logprobs(**given, impl=kernel)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        lowest = bias.masked_fill(bias == -INF, torch.finfo(torch.float32).min)
        torch.testing.assert_close(
            linear_logprobs(**given | {"bias": lowest}, impl=kernel),
            reference.linear_logprobs(**given | {"bias": lowest}), rtol=1e-5, atol=1e-5,
        )  # fmt: skip


def test_nan_stays_visible(kernel: str) -> None:
    for place in (0, 45, 130):
        given = inputs((3,)) | {"targets": torch.tensor([1, 60, 130])}
        given["weight"][place] = NAN
        for x in linear_logprobs(**given, impl=kernel):
            assert x.isnan().all()


def test_gradcheck(impl: str) -> None:
    given = inputs((2, 3), 7, 4, torch.float64, softcap=2.5)
    given["targets"] = torch.tensor([[0, 6, -100], [3, 2, 2]])
    tensors = [given.pop(name).requires_grad_() for name in WRT]

    def function(*x: Tensor) -> Any:
        return linear_logprobs(**given, **dict(zip(WRT, x, strict=True)), impl=impl)

    # Along one direction in Triton's interpreter, which takes a minute for all.
    assert torch.autograd.gradcheck(function, tensors, fast_mode=impl == "triton")


def test_no_second_derivative_in_silence(kernel: str) -> None:
    given = inputs((3,), return_entropy=False)
    hidden = given["hidden"].requires_grad_()
    logprobs = linear_logprobs(**given, impl=kernel)
    (gradient,) = torch.autograd.grad((logprobs**2).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


def test_several_hidden_states_under_one_head(kernel: str) -> None:
    policy, other = inputs(), torch.randn(37, 12)
    stacked = torch.stack((policy["hidden"], other))
    both = linear_logprobs(
        **policy | {"hidden": stacked, "targets": policy["targets"].expand(2, -1)}, impl=kernel
    )
    for place, hidden in enumerate(stacked):
        alone = linear_logprobs(**policy | {"hidden": hidden}, impl=kernel)
        torch.testing.assert_close([x[place] for x in both], list(alone))


def test_n_times_v_beyond_32_bits() -> None:
    tokens, vocab = 70_000, 32_768
    assert tokens * vocab > 2**31
    hidden, weight = torch.randn(tokens, 1), torch.randn(vocab, 1)
    targets = torch.randint(vocab, (tokens,))
    torch.set_num_threads(2)
    found = linear_logprobs(hidden, weight, targets)
    for place in (0, 40_000, tokens - 1):
        expected = token_logprobs(hidden[place] @ weight.T, targets[place])
        torch.testing.assert_close(found[place], expected)


def test_the_option_native_bf16(request: pytest.FixtureRequest) -> None:
    """Given, or inherited as by test_dispatch.py's runs on other instruction sets."""
    asked = request.config.getoption("--native-bf16")
    if asked is None:
        pytest.skip("not given")
    for dtype in (torch.bfloat16, torch.float16):
        assert head.multiplies(dtype, torch.device("cpu")) == (asked == "yes")


# --- Which gradients, in what dtypes, in what memory ----------------------------------------------


FROZEN = ((), *itertools.combinations(WRT, 1), *itertools.combinations(WRT, 2))


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_no_gradient_is_made_in_vain(frozen: tuple[str, ...]) -> None:
    given = inputs((16,), return_entropy=False)
    given["targets"].clamp_(min=0)
    found = ops.run(linear_logprobs, given, WRT)
    whole = {name: found[f"gradient of {name}"] for name in WRT}
    for name in WRT:
        given[name].requires_grad_(name not in frozen)
    logprobs = linear_logprobs(**given)
    with ops.Watch() as watch:
        logprobs.backward(ops.upstream_of("output", logprobs.detach()))
    for name in WRT:
        assert (given[name].grad is None) == (name in frozen)
        if name not in frozen:
            assert torch.equal(given[name].grad, whole[name])
    assert watch.products == 1 + ("hidden" not in frozen) + ("weight" not in frozen)


def test_a_weight_tied_to_the_embedding(kernel: str) -> None:
    weight = torch.randn(131, 12, requires_grad=True)
    ids = torch.randint(131, (40,))

    def loss(op: Callable[..., Tensor]) -> Tensor:
        hidden = torch.nn.functional.embedding(ids[:-1], weight).tanh()
        return op(hidden, weight, ids[1:]).mean()

    found = [
        torch.autograd.grad(loss(op), weight)[0]
        for op in (reference.linear_logprobs, partial(linear_logprobs, impl=kernel))
    ]
    torch.testing.assert_close(*found)


@pytest.mark.usefixtures("products")
def test_autocast(kernel: str) -> None:
    """As `F.linear` under autocast, but the weight's gradient keeps its digits."""
    given = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ops.assert_products_rule(
            linear_logprobs, reference.linear_logprobs, given, WRT, torch.bfloat16, impl=kernel
        )
        halves = given | {"hidden": given["hidden"].bfloat16()}
        assert linear_logprobs(**halves, impl=kernel)[0].dtype == torch.float32


def test_gradient_checkpointing(kernel: str) -> None:
    given = inputs()

    def run(hidden: Tensor, weight: Tensor, bias: Tensor, again: bool) -> Any:
        arguments = given | {"hidden": hidden, "weight": weight, "bias": bias}
        op = partial(linear_logprobs, impl=kernel)
        if not again:
            return op(**arguments)
        return checkpoint(lambda: op(**arguments), use_reentrant=False)

    tensors = {name: given[name] for name in WRT}
    found = [ops.run(run, tensors | {"again": again}, WRT) for again in (False, True)]
    ops.assert_same_bits(*found)


@pytest.mark.parametrize("impl", ["cpp"])
def test_no_tensor_of_tokens_times_vocab(impl: str) -> None:
    """Nor does the memory grow with the tokens."""
    extra = []
    for tokens in (512, 2048):
        given = inputs((tokens,), 1000, 8, return_entropy=False)
        for name in WRT:
            given[name].requires_grad_()
        with ops.Watch() as watch:
            linear_logprobs(**given, impl=impl).sum().backward()
        assert watch.largest < tokens * 1000 / 8
        with torch.profiler.profile(profile_memory=True) as profile:
            linear_logprobs(**given, impl=impl).sum().backward()
        largest = max(event.cpu_memory_usage for event in profile.events())
        assert largest < tokens * 1000 * 4 / 8
        extra.append(watch.largest)
    assert extra[1] == max(extra[0], 2048 * 8)  # a chunk of logits, or the hidden states


def test_the_watch_sees_logits() -> None:
    given = inputs((512,), 1000, 8)
    with ops.Watch() as watch:
        linear_logprobs(**given, impl="reference")
    assert watch.largest == 512 * 1000


def test_chunks_adapt_to_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(head, "_TOKENS", {"cpu": 256})
    tokens = partial(head.chunk_tokens, vocab=2**18, dtype=torch.float32, device=cpu)
    monkeypatch.setattr(head, "_free_bytes", lambda device: 2**34)
    assert [tokens(n) for n in (0, 1, 16, 100, 256)] == [0, 1, 16, 100, 256]
    assert tokens(300) == 160  # two of about the same size
    assert tokens(1024, dtype=torch.bfloat16) == 512  # as many bytes
    for free, expected in ((2**34, 256), (2**29, 128), (2**20, head._FEWEST_TOKENS)):
        monkeypatch.setattr(head, "_free_bytes", lambda device, free=free: free)
        assert tokens(1024) == expected
    monkeypatch.undo()
    assert head._free_bytes(cpu) > 0


def test_tokens_without_gradient_need_no_logits() -> None:
    given = inputs((64,), return_entropy=False)
    given["targets"].clamp_(min=0)
    hidden = given["hidden"].requires_grad_()
    logprobs = linear_logprobs(**given)
    upstream = torch.zeros(64)
    upstream[5] = 1.0
    with ops.Watch() as watch:
        (gradient,) = torch.autograd.grad(logprobs, hidden, upstream)
    assert watch.products == 2 and gradient[5].any() and not gradient[6].any()


# --- torch.compile --------------------------------------------------------------------------------


@pytest.mark.parametrize("entropy", [False, True])
def test_compiles_without_a_graph_break(impl: str, entropy: bool) -> None:
    torch._dynamo.reset()
    shape = (6,) if impl == "triton" else (37,)
    arguments = inputs(shape, return_entropy=entropy, softcap=3.0)
    op = partial(linear_logprobs, impl=impl)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    expected = ops.run(op, arguments, WRT)
    torch.testing.assert_close(ops.run(compiled, arguments, WRT), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = ops.run(op, arguments, WRT)
        torch.testing.assert_close(ops.run(compiled, arguments, WRT), expected)


def test_opcheck() -> None:
    given = inputs()
    tensors = [given[name].requires_grad_() for name in WRT]
    numbers = torch.tensor([0.7, INF], dtype=torch.float64)
    settings = (given["targets"], numbers, torch.float32, "cpp")
    torch.library.opcheck(torch.ops.ppo_kernels.linear_logprobs, (*tensors, *settings))
    grad = torch.randn(37)
    torch.library.opcheck(
        torch.ops.ppo_kernels.linear_logprobs_backward,
        (grad, grad, *(x.detach() for x in tensors), *settings, True, False, True),
    )


# --- Mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(131, 5)}, ValueError,
         r"hidden must be \[\.\.\., H\] and weight \[V, H\]"),
        ({"weight": torch.zeros(12)}, ValueError, r"shapes \(37, 12\) and \(12,\)"),
        ({"weight": torch.zeros(131, 12).bfloat16()}, TypeError,
         "weight must have the dtype of hidden, float32, but has bfloat16; .*autocast"),
        ({"bias": torch.zeros(130)}, ValueError, r"bias must have shape \(131,\)"),
        ({"bias": torch.zeros(131).double()}, TypeError, "bias must have the dtype of hidden"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, "targets must have shape"),
        ({"targets": torch.full((37,), 131)}, ValueError, r"targets\[0\] is 131, .* 0 to 130"),
        ({"hidden": torch.tensor(1.0)}, ValueError, "hidden must be"),
        ({"hidden": [1.0]}, TypeError, "hidden must be a tensor, but is list"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number > 0"),
        ({"softcap": 0.0}, ValueError, "softcap must be a finite number > 0"),
        ({"softcap": "none"}, TypeError, "softcap must be a number"),
        ({"impl": "cuda"}, RuntimeError, "impl='cuda' cannot run: "),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)  # fmt: skip
def test_errors(impl: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="linear_logprobs: .*" + message):
        linear_logprobs(**inputs() | {"impl": impl} | change)
