"""`token_logprobs`: every implementation against float64 and the cases that broke others."""

from __future__ import annotations

from functools import partial
from typing import Any

import ops
import pytest
import torch
import torch._dynamo
from torch import Tensor

from ppo_kernels import dispatch, reference, token_logprobs

NEEDS_CPP = pytest.mark.skipif(dispatch.cpu is None, reason="the C++ extension is not built")
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=ops.implementations_of("token_logprobs"))
def impl(request: pytest.FixtureRequest) -> str:
    """Every implementation, for what can be said without the reference."""
    return str(request.param)


@pytest.fixture(params=ops.implementations_of("token_logprobs", but=("reference",)))
def kernel(request: pytest.FixtureRequest) -> str:
    """Every implementation that is held against the reference, or does better than it."""
    return str(request.param)


def inputs(
    rows: tuple[int, ...], vocab: int, dtype: torch.dtype = torch.float32, scale: float = 3.0
) -> dict[str, Any]:
    """Arguments of `token_logprobs`; about one target in five is ignored."""
    targets = torch.randint(0, max(vocab, 1), rows)
    if not vocab:
        targets.fill_(-100)
    targets[torch.rand(rows) < 0.2] = -100
    logits = (scale * torch.randn(*rows, vocab)).to(dtype)
    return {"logits": logits, "targets": targets, "temperature": 0.7, "return_entropy": True}


def check(arguments: dict[str, Any], kernel: str) -> None:
    """The error rule, with the entropy and without: its sums are other ones."""
    for entropy in (True, False):
        ops.assert_error_rule(
            token_logprobs, reference.token_logprobs, arguments | {"return_entropy": entropy},
            ("logits",), impl=kernel,
        )  # fmt: skip


@pytest.mark.parametrize("vocab", [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 127, 1025, 4099, 32003])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_error_rule(kernel: str, vocab: int, dtype: torch.dtype) -> None:
    arguments = inputs((3, 4), vocab, dtype)
    if dtype == torch.float64:  # plain PyTorch in float64 is no bound to an error
        expected = ops.run(reference.token_logprobs, arguments, ("logits",))
        actual = ops.run(partial(token_logprobs, impl=kernel), arguments, ("logits",))
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)
    else:
        check(arguments, kernel)


@pytest.mark.parametrize("rows", [(), (0,), (1,), (5,), (2, 0), (3, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("vocab", [1, 11, 0])
def test_leading_shapes(impl: str, rows: tuple[int, ...], vocab: int) -> None:
    if impl == "reference" and vocab == 0:
        pytest.skip("the gather of plain PyTorch needs a class")
    arguments = inputs(rows, vocab)
    if vocab:
        check(arguments, impl)
    logprobs, entropy = token_logprobs(**arguments, impl=impl)
    assert logprobs.shape == entropy.shape == rows
    assert torch.equal(token_logprobs(**arguments | {"return_entropy": False}, impl=impl), logprobs)


def test_strides_and_offsets(impl: str) -> None:
    """Whatever lies around the rows, here NaN, is not read; padded columns are no classes."""
    arguments = inputs((3, 4), 37)
    expected = ops.run(partial(token_logprobs, impl=impl), arguments)
    for _, view in ops.views(arguments["logits"]):
        ops.assert_same_bits(
            expected, ops.run(partial(token_logprobs, impl=impl), arguments | {"logits": view})
        )
    shifted = torch.full((3, 6, 40), NAN)
    shifted[:, 1:-1, :37] = arguments["logits"]
    view = shifted[:, 1:-1, :37].requires_grad_()
    strided_targets = arguments["targets"].t().contiguous().t()
    given = arguments | {"logits": view, "targets": strided_targets}
    ops.assert_same_bits(expected, ops.run(partial(token_logprobs, impl=impl), given))
    transposed = arguments["logits"].transpose(0, 1).contiguous().transpose(0, 1)
    ops.assert_same_bits(
        ops.run(partial(token_logprobs, impl=impl), arguments, ("logits",)),
        ops.run(
            partial(token_logprobs, impl=impl), arguments | {"logits": transposed}, ("logits",)
        ),
    )


def test_expanded_logits(impl: str) -> None:
    row, targets = torch.randn(1, 19), torch.tensor([0, 5, 18])
    a = token_logprobs(row.expand(3, 19), targets, impl=impl)
    assert torch.equal(a, token_logprobs(row.repeat(3, 1), targets, impl=impl))


def test_logits_are_read_where_they_lie(kernel: str) -> None:
    rows, vocab = (2, 16) if kernel == "triton" else (8, 64), 512
    logits = torch.randn(rows[0], rows[1] + 1, vocab)
    with torch.profiler.profile(profile_memory=True) as profile:
        token_logprobs(logits[:, :-1], torch.zeros(rows, dtype=torch.int64), impl=kernel)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 4 * rows[0] * rows[1] * 4  # a few numbers for each row


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_ignored_targets_are_not_read(impl: str, index_dtype: torch.dtype) -> None:
    logits = torch.randn(4, 23)
    logits[1], logits[3] = NAN, INF
    targets = torch.tensor([3, -100, 22, -100], dtype=index_dtype)
    logits.requires_grad_()
    logprobs, entropy = token_logprobs(logits, targets, return_entropy=True, impl=impl)
    (2 * logprobs + entropy).sum().backward()
    assert logits.grad is not None
    for x in (logprobs, entropy, logits.grad):
        assert x.isfinite().all()
        assert not x[1].any() and not x[3].any()
        assert x[0].any() and x[2].any()


def test_all_targets_ignored(impl: str) -> None:
    logits = torch.full((3, 5), NAN, requires_grad=True)
    targets = torch.full((3,), -100)
    logprobs = token_logprobs(logits, targets, impl=impl)
    logprobs.sum().backward()
    assert not logprobs.any() and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("offset", [-1e4, 1e4, -3e4, 2e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strongly_offset_logits(kernel: str, offset: float, dtype: torch.dtype) -> None:
    """A running maximum must start at -inf, not 0 (verl #7439)."""
    arguments = inputs((12,), 333)
    check(arguments | {"logits": (arguments["logits"] + offset).to(dtype)}, kernel)


@pytest.mark.parametrize("place", [0, 1, 1023, 1024, 2047, 2048, 4999])
def test_a_maximum_in_any_block(kernel: str, place: int) -> None:
    arguments = inputs((6,), 5000)
    arguments["logits"][:, place] = torch.linspace(0, 60, 6)
    check(arguments, kernel)


@pytest.mark.parametrize("lowest", [-70.0, -100.0, -1e3, -3e5, -2e7, -1e9, -2e38])
def test_classes_that_are_nearly_impossible(kernel: str, lowest: float) -> None:
    """Exponents beyond the range of the dtype, some of them in every block, must count as 0."""
    arguments = inputs((4,), 5000)
    far = torch.linspace(lowest, 2 * lowest / 3, 2500)
    arguments["logits"][:, ::2] = far[torch.randperm(2500)]
    arguments["targets"] = torch.tensor([1, 2, 2051, 4999])
    check(arguments, kernel)


def test_minus_infinity_is_probability_zero(impl: str) -> None:
    arguments = inputs((6,), 2100)
    logits = arguments["logits"]
    arguments["targets"] = torch.tensor([0, 5, 9, 2099, 7, 3])
    logits[0, 1:] = -INF  # one class left: log-prob 0, entropy 0
    logits[1, :2099] = -INF  # the target is not among the classes left: -inf
    logits[2, :2098] = -INF
    logits[2, 9] = 0.5
    logits[3, 1:-1] = -INF
    logits[4, ::2] = -INF
    logits[5, :2050] = -INF  # whole blocks
    logits[5, 3] = 0.1
    logprobs, entropy = token_logprobs(**arguments, impl=impl)
    assert logprobs[0] == 0 and entropy[0] == 0
    assert logprobs[1] == -INF and entropy[1] == 0
    check(arguments, impl)


@pytest.mark.parametrize("masked", [slice(0, 16), slice(40, 3000), slice(0, 2999)])
def test_a_vocabulary_masked_with_the_lowest_number(kernel: str, masked: slice) -> None:
    """Logits may differ by more than a float holds; in one lane, from tile to tile, and between."""
    given = inputs((3,), 3000)
    given["targets"] = torch.tensor([2999, 30, 3])
    given["logits"][:, masked] = torch.finfo(torch.float32).min
    given["logits"][:, given["targets"]] = torch.randn(3, 3)
    check(given, kernel)


def test_nan_and_no_class_at_all_stay_visible(impl: str) -> None:
    logits = torch.randn(3, 5000)
    logits[0, 4000] = NAN
    logits[1] = -INF
    logits[2, 10] = INF
    for place in (3, 4000):
        targets = torch.tensor([place] * 3)
        logprobs, entropy = token_logprobs(logits, targets, return_entropy=True, impl=impl)
        assert logprobs.isnan().all()
        assert entropy[0].isnan() and entropy[2].isnan()
    first = torch.full((1, 40), NAN)
    assert token_logprobs(first, torch.tensor([0]), impl=impl).isnan().all()


@pytest.mark.parametrize("vocab", [1, 13, 1000, 4099])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_in_place_of_the_logits(kernel: str, vocab: int, dtype: torch.dtype) -> None:
    given = inputs((5,), vocab, dtype)
    hidden = given["logits"].requires_grad_()
    found = []
    for inplace in (False, True):
        logits = hidden * 1
        seen: list[Tensor] = []
        logits.register_hook(seen.append)
        outputs = token_logprobs(
            **given | {"logits": logits}, inplace_backward=inplace, impl=kernel
        )
        (outputs[0].sum() + outputs[1].sum()).backward(retain_graph=True)
        assert (seen[0].data_ptr() == logits.data_ptr()) == inplace
        found.append(seen[0])
        if inplace:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                outputs[0].sum().backward()
    assert torch.equal(*found)


def test_a_gradient_in_place_only_where_it_can_be(kernel: str) -> None:
    """Not of a leaf, whose values are the user's; nor of logits with other ones between."""
    leaf = torch.randn(2, 4, 9, requires_grad=True)
    for logits in (leaf, leaf.view(8, 9), leaf[0], (leaf * 1)[:, 1:]):
        before = logits.detach().clone()
        targets = torch.zeros(logits.shape[:-1], dtype=torch.int64)
        token_logprobs(logits, targets, inplace_backward=True, impl=kernel).sum().backward()
        assert torch.equal(logits, before)


@pytest.mark.parametrize("gap", [5.0, 7.0, 12.0, 16.0, 25.0, 60.0, 75.0])
def test_peaked_logits_keep_their_digits(kernel: str, gap: float) -> None:
    """1 - p of a nearly certain target, and so its gradient, must not cancel (Liger #1329).

    Plain float32 loses all digits here, so the bound is relative to float64.
    """
    logits = torch.randn(4, 1000)
    targets = torch.tensor([0, 1, 500, 999])
    logits[torch.arange(4), targets] += gap
    results = []
    for x in (logits, logits.double()):
        x.requires_grad_()
        logprobs, entropy = token_logprobs(x, targets, return_entropy=True, impl=kernel)
        (gradient,) = torch.autograd.grad(logprobs.sum(), x, retain_graph=True)
        (of_entropy,) = torch.autograd.grad(entropy.sum(), x)
        results.append([y.double() for y in (logprobs, entropy, gradient, of_entropy)])
    for single, double in zip(*results, strict=True):
        # p (log p + H), of the entropy's gradient, may change its sign anywhere.
        atol = 1e-6 * double.abs().max().item() if single is results[0][3] else 1e-38
        torch.testing.assert_close(single, double, rtol=3e-5, atol=atol)
    if gap < 30:  # and float64 itself agrees with plain PyTorch, as far as that has digits
        expected = reference.token_logprobs(logits.double(), targets)
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(results[1][0], expected, rtol=1e-3, atol=1e-15)


def test_tiny_and_huge_temperatures(kernel: str) -> None:
    for temperature in (0.05, 1.0, 50.0):
        check(inputs((8,), 257) | {"temperature": temperature}, kernel)
    # Nearly one-hot rows: plain float32 is right to a unit in the last place of 1, as this is.
    arguments = inputs((8,), 257) | {"temperature": 1e-3}
    exact = reference.token_logprobs(**arguments | {"logits": arguments["logits"].double()})
    for single, double in zip(token_logprobs(**arguments, impl=kernel), exact, strict=True):
        torch.testing.assert_close(single.double(), double, rtol=1e-6, atol=1.2e-7)


def test_one_of_two_gradients(impl: str) -> None:
    arguments = inputs((5,), 40)
    for name in (0, 1):
        grads = []
        for x in (arguments["logits"].clone(), arguments["logits"].double()):
            out = token_logprobs(**arguments | {"logits": x.requires_grad_()}, impl=impl)[name]
            grads.append(torch.autograd.grad(out.sum(), x)[0].double())
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_a_row_without_gradient_is_not_read(kernel: str) -> None:
    logits = torch.randn(2, 9)
    logits[1] = NAN
    logits.requires_grad_()
    logprobs = token_logprobs(logits, torch.tensor([1, 2]), impl=kernel)
    torch.where(torch.tensor([True, False]), logprobs, 0.0).sum().backward()
    assert logits.grad is not None and logits.grad[0].any() and not logits.grad[1].any()


def test_gradcheck(impl: str) -> None:
    logits = torch.randn(3, 2, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[0, 6], [-100, 3], [2, 2]])
    for entropy in (False, True):
        function = partial(
            token_logprobs, targets=targets, temperature=0.6, return_entropy=entropy, impl=impl
        )
        # Along one direction in Triton's interpreter, which takes a minute for all.
        assert torch.autograd.gradcheck(function, logits, fast_mode=impl == "triton")


def test_no_second_derivative_in_silence(kernel: str) -> None:
    logits = torch.randn(2, 5, requires_grad=True)
    logprobs = token_logprobs(logits, torch.tensor([0, 1]), impl=kernel)
    (gradient,) = torch.autograd.grad((logprobs**2).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


def test_threads_change_no_bit() -> None:
    arguments = inputs((37,), 5003)
    results = []
    for threads in (1, 2, 3, 7, 2):
        torch.set_num_threads(threads)
        results.append(ops.run(token_logprobs, arguments, ("logits",)))
    for other in results[1:]:
        ops.assert_same_bits(results[0], other)


@NEEDS_CPP
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_is_read_and_written_right(dtype: torch.dtype) -> None:
    """All 65,536 bit patterns as logits, and gradients rounded to nearest even."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    z = bits.view(dtype)
    zeros = torch.zeros(len(z), 1, dtype=dtype)
    pairs = torch.cat((z[:, None], zeros), 1)  # log p_1 = -softplus(z), exact in its argument
    targets = torch.ones(len(z), dtype=torch.int64)
    pairs.requires_grad_()
    logprobs = token_logprobs(pairs, targets, impl="cpp")
    expected = -torch.nn.functional.softplus(z.double(), threshold=700).float()
    finite = z.isfinite()
    # To rounding, which below the normal numbers is a half of 2^-149.
    torch.testing.assert_close(logprobs[finite], expected[finite], rtol=3e-7, atol=2**-149)
    assert logprobs[z.isnan()].isnan().all()
    # d log p_1 / d z_1 = 1 - p_1, here scaled to fall everywhere in the range of the dtype.
    scale = torch.logspace(-9, 4, len(z)) * torch.where(bits % 2 == 0, 1.0, -1.0)
    (gradient,) = torch.autograd.grad((logprobs * scale)[finite].sum(), pairs)
    wanted = (-torch.expm1(logprobs.double()) * scale)[finite].float()
    assert ((gradient[finite, 1] == wanted.to(dtype)).double().mean()) > 0.999
    torch.testing.assert_close(gradient[finite, 1], wanted.to(dtype), rtol=8e-3, atol=1e-7)


@NEEDS_CPP
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_half_way_go_to_the_even_one(dtype: torch.dtype) -> None:
    dropped = 13 if dtype == torch.float16 else 16  # bits of the mantissa
    bits = torch.arange(14000, 15000, dtype=torch.int32).to(torch.int16)  # around 1
    below = bits.view(dtype).float()
    step = torch.exp2(torch.floor(torch.log2(below)) + dropped - 23)
    ties = torch.cat((below + step / 2, -below - step / 2))
    # Of an impossible target and a certain other class, the gradients are g and -g themselves.
    logits = torch.tensor([-1e4, 0.0], dtype=dtype).repeat(len(ties), 1).requires_grad_()
    targets = torch.zeros(len(ties), dtype=torch.int64)
    (gradient,) = torch.autograd.grad(token_logprobs(logits, targets, impl="cpp"), logits, ties)
    wanted = ties.to(dtype)
    assert torch.equal(gradient, torch.stack((wanted, -wanted), 1))


def test_a_nan_is_not_lost(impl: str) -> None:
    """Also where nothing else of the row has any probability."""
    logits = torch.tensor([[0.5, NAN, -INF], [0.5, NAN, 1.0], [NAN, 0.5, 0.0], [0.5, -INF, -INF]])
    logprobs, entropy = token_logprobs(
        logits, torch.zeros(4, dtype=torch.int64), return_entropy=True, impl=impl
    )
    assert logprobs[:3].isnan().all() and entropy[:3].isnan().all()
    assert logprobs[3] == 0 and entropy[3] == 0


@pytest.mark.parametrize("entropy", [False, True])
def test_compiles_without_a_graph_break(impl: str, entropy: bool) -> None:
    torch._dynamo.reset()
    arguments = inputs((3, 4), 50) | {"return_entropy": entropy}
    op = partial(token_logprobs, impl=impl)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    expected = ops.run(op, arguments, ("logits",))
    torch.testing.assert_close(ops.run(compiled, arguments, ("logits",)), expected)


def test_a_new_temperature_does_not_compile_again() -> None:
    torch._dynamo.reset()
    arguments = inputs((3, 4), 50)
    compiled = torch.compile(token_logprobs, fullgraph=True, backend="aot_eager")
    for temperature in (0.7, 0.8):  # the second makes it symbolic
        compiled(**arguments | {"temperature": temperature})
    with torch.compiler.set_stance("fail_on_recompile"):
        for temperature in (0.3, 1.5):
            given = arguments | {"temperature": temperature}
            torch.testing.assert_close(compiled(**given), token_logprobs(**given))


@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck(entropy: bool) -> None:
    arguments = inputs((3, 4), 50)
    logits, targets = arguments["logits"].requires_grad_(), arguments["targets"]
    temperature = torch.tensor(0.7, dtype=torch.float64)
    op = torch.ops.ppo_kernels.token_logprobs
    torch.library.opcheck(op, (logits, targets, temperature, entropy, "cpp"))
    with torch.no_grad():
        logprobs, of_entropy, state = op(logits, targets, temperature, entropy, "cpp")
    grad = torch.randn(3, 4)
    torch.library.opcheck(
        torch.ops.ppo_kernels.token_logprobs_backward,
        (grad, grad if entropy else None, logits.detach(), targets, logprobs, of_entropy, state,
         temperature, "cpp"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"targets must have shape"),
        ({"targets": torch.zeros(3, 4)}, TypeError, "targets must be int32 or int64"),
        ({"targets": torch.full((3, 4), 50)}, ValueError, r"targets\[0, 0\] is 50, but must be a"),
        ({"targets": torch.full((3, 4), -1)}, ValueError, r"is -1, .* class, 0 to 49, or -100"),
        ({"logits": torch.zeros(3, 4, 50).long()}, TypeError, "logits must be .*float32"),
        ({"logits": torch.tensor(1.0)}, ValueError, r"logits must be \[\.\.\., V\]"),
        ({"temperature": 0.0}, ValueError, "temperature must be a finite number > 0, but is 0.0"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, but is 'hot'"),
        ({"impl": "cuda"}, RuntimeError, "impl='cuda' cannot run: "),
        ({"impl": "fast"}, ValueError, "impl must be 'auto' or one of"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors(impl: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="token_logprobs: .*" + message):
        token_logprobs(**inputs((3, 4), 50) | {"impl": impl} | change)


def test_the_wrong_target_is_named(impl: str) -> None:
    targets = torch.tensor([[0, 1, -100], [2, 77, 3]])
    with pytest.raises(ValueError, match=r"targets\[1, 1\] is 77"):
        token_logprobs(torch.zeros(2, 3, 50), targets, impl=impl)
