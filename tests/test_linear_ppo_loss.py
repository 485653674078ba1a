"""`linear_ppo_loss`: the loss of log-probs that come from hidden states, gradients in one pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import ops
import pytest
import torch
import torch._dynamo
from torch import Tensor

from bench.timing import peak_extra_bytes
from ppo_kernels import (
    head,
    linear_logprobs,
    linear_ppo_loss,
    ppo_loss,
    ppo_policy_loss,
    reference,
)

WRT = ("hidden", "weight", "bias")
TOKENS = ("targets", "old_logprobs", "advantages", "ref_logprobs", "is_weights")
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=ops.implementations_of("linear_ppo_loss"))
def impl(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=ops.implementations_of("linear_ppo_loss", but=("reference",)))
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_TOKENS", {"cpu": 16})
    monkeypatch.setattr(head, "_TILE_BYTES", 2000)


def inputs(
    rows: tuple[int, ...] = (5, 9),
    vocab: int = 71,
    width: int = 12,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> dict[str, Any]:
    """Arguments with which every term of the loss and every branch of it occurs."""
    hidden, weight = torch.randn(*rows, width), torch.randn(vocab, width)
    bias, targets = torch.randn(vocab), torch.randint(0, vocab, rows)
    logprobs = linear_logprobs(hidden, weight, targets, bias=bias, temperature=0.7, softcap=4.0)
    return {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "bias": bias.to(dtype),
        "targets": targets,
        "old_logprobs": logprobs + 0.4 * torch.randn(rows),
        "advantages": torch.randn(rows),
        "ref_logprobs": logprobs + torch.randn(rows),
        "is_weights": torch.rand(rows) + 0.5,
        "temperature": 0.7,
        "softcap": 4.0,
        "clip_range": (0.2, 0.28),
        "dual_clip": 1.3,
        "entropy_coef": 0.01,
        "kl_coef": 0.1,
        "moments": torch.tensor([10.0, 0.2, 9.0]),
    } | more


def check(arguments: dict[str, Any], kernel: str, dtype: torch.dtype | None = None) -> None:
    ops.assert_products_rule(
        linear_ppo_loss, reference.linear_ppo_loss, arguments, WRT, dtype, impl=kernel
    )


def packed(arguments: dict[str, Any], mask: Tensor) -> dict[str, Any]:
    found = {name: arguments[name][mask] for name in (*TOKENS, "hidden")}
    return arguments | found | {"cu_seqlens": ops.cu_seqlens_of(mask)}


# --- Values and gradients -------------------------------------------------------------------------


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ppo_loss.REDUCTIONS)
def test_error_rule(kernel: str, dtype: torch.dtype, reduction: str) -> None:
    arguments = inputs(dtype=dtype, reduction=reduction)
    check(arguments, kernel)
    plain = {n: x for n, x in arguments.items() if n not in ("ref_logprobs", "is_weights")}
    check(plain | {"entropy_coef": 0.0, "dual_clip": None, "kl_coef": 0.0}, kernel)


@pytest.mark.parametrize("mask", ops.MASKS)
@pytest.mark.parametrize("reduction", ppo_loss.REDUCTIONS)
def test_masks_and_layouts(impl: str, mask: str, reduction: str) -> None:
    """What is masked is not read, be it NaN or no class; packed and padded are one."""
    given = inputs(reduction=reduction)
    real = ops.make_mask(mask, (5, 9))
    if real is not None:
        for name in ("hidden", *TOKENS[1:]):
            where = real[..., None] if name == "hidden" else real
            given[name] = ops.poison(given[name], where.expand_as(given[name]))
        given["targets"] = given["targets"].masked_fill(~real, 10**6)
    op = partial(linear_ppo_loss, impl=impl)
    check(given | {"mask": real}, impl)
    whole = ops.run(op, given | {"mask": real}, WRT)
    if real is None or mask == "empty":
        return
    short = ops.run(op, packed(given, real), WRT)
    whole["gradient of hidden"] = whole["gradient of hidden"][real]
    torch.testing.assert_close(short, whole, rtol=1e-4, atol=1e-6)


def test_the_same_as_two_ops(impl: str) -> None:
    given = inputs()
    shared = ("bias", "temperature", "softcap")

    def two_ops(**x: Any) -> Any:
        of_head = {name: x.pop(name) for name in shared}
        logprobs, entropy = linear_logprobs(
            x.pop("hidden"), x.pop("weight"), x.pop("targets"), **of_head, return_entropy=True,
            impl=impl,
        )  # fmt: skip
        return ppo_policy_loss(logprobs, entropy=entropy, **x, impl=impl)

    op = partial(linear_ppo_loss, impl=impl)
    torch.testing.assert_close(ops.run(op, given, WRT), ops.run(two_ops, given, WRT))


@pytest.mark.usefixtures("products")
def test_micro_batches_add_up(kernel: str) -> None:
    given = inputs((8, 9), mask=ops.make_mask("interior", (8, 9)))
    tokens = given["mask"].sum()
    op = partial(linear_ppo_loss, impl=kernel)
    whole = ops.run(op, given, WRT)
    parts = []
    for first in (0, 3, 5):
        last = {0: 3, 3: 5, 5: 8}[first]
        cut = {name: given[name][first:last] for name in (*TOKENS, "hidden", "mask")}
        parts.append(ops.run(op, given | cut | {"normalizer": tokens}, WRT))
    for name in ("output.0", "gradient of weight", "gradient of bias"):
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name])
    of_hidden = torch.cat([part["gradient of hidden"] for part in parts])
    torch.testing.assert_close(of_hidden, whole["gradient of hidden"])


@pytest.mark.parametrize("normalizer", [0.0, 0, 7, 2.5, torch.tensor(3)], ids=str)
@pytest.mark.usefixtures("products")
def test_normalizer(kernel: str, normalizer: Any) -> None:
    for dtype in (torch.float32, torch.float16):
        check(inputs(dtype=dtype, normalizer=normalizer, reduction="sequence_mean"), kernel)


def test_without_old_logprobs_it_is_on_policy(impl: str) -> None:
    given = inputs() | {"old_logprobs": None}
    check(given, impl)
    _, stats = linear_ppo_loss(**given, impl=impl)
    assert stats.ratio_mean == 1 and stats.ratio_max == 1
    assert stats.clip_fraction == 0 and stats.approx_kl == 0


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
@pytest.mark.parametrize("old", [True, False], ids=["old log-probs", "on policy"])
def test_it_returns_the_log_probs_of_its_pass(impl: str, ratio_level: str, old: bool) -> None:
    """Those of `linear_logprobs`, whatever the layout; 0 where nothing is real, no gradient."""
    given = inputs(ratio_level=ratio_level, mask=ops.make_mask("interior", (5, 9)))
    if not old:
        given["old_logprobs"] = None
    names = ("hidden", "weight", "targets", "bias", "temperature", "softcap")
    expected = linear_logprobs(**{name: given[name] for name in names}, impl=impl)
    expected = torch.where(given["mask"], expected, 0)
    for name in WRT:
        given[name].requires_grad_()
    loss, stats = linear_ppo_loss(**given, impl=impl)
    again, same, logprobs = linear_ppo_loss(**given, return_logprobs=True, impl=impl)
    assert loss == again and stats == same and not logprobs.requires_grad
    torch.testing.assert_close(logprobs, expected)


def test_an_ignored_target_counts_with_logprob_0(impl: str) -> None:
    given = inputs()
    given["targets"][1, 2:5] = -100
    given["old_logprobs"][1, 2:5] = -0.1
    check(given, impl)
    hidden = ops.run(partial(linear_ppo_loss, impl=impl), given, WRT)["gradient of hidden"]
    assert not hidden[1, 2:5].any() and hidden[1, 5].any()


def test_the_entropy_is_measured_also_without_a_bonus(impl: str) -> None:
    given = inputs(entropy_coef=0.0)
    _, stats = linear_ppo_loss(**given, impl=impl)
    names = ("hidden", "weight", "targets", "bias", "temperature", "softcap")
    shared = {name: given[name] for name in names}
    _, entropy = linear_logprobs(**shared, return_entropy=True)
    torch.testing.assert_close(stats.entropy, entropy.mean())


def test_gradients_are_scaled_by_what_comes_in(kernel: str) -> None:
    given = inputs(dtype=torch.float64)
    op = partial(linear_ppo_loss, impl=kernel)
    once = ops.run(op, given, WRT, lambda name, x: torch.ones_like(x))
    for factor in (0.0, -3.0, 65536.0):
        found = ops.run(op, given, WRT, lambda name, x, f=factor: torch.full_like(x, f))
        for name in WRT:
            expected = factor * once[f"gradient of {name}"]
            torch.testing.assert_close(found[f"gradient of {name}"], expected)


@pytest.mark.usefixtures("products")
def test_float16_keeps_the_gradients_of_a_mean_over_many_tokens(kernel: str) -> None:
    """Each is far below what float16 holds; scaling the loss brings them back."""
    given = inputs(dtype=torch.float16, normalizer=2.0**24)
    scaled = partial(ops.run, wrt=WRT, upstream=lambda name, x: torch.full_like(x, 2.0**20))
    found = scaled(partial(linear_ppo_loss, impl=kernel), given)
    exact = scaled(reference.linear_ppo_loss, ops.in_dtype(given, torch.float64))
    for name in WRT:
        expected = exact[f"gradient of {name}"]
        error = (found[f"gradient of {name}"].double() - expected).abs().max()
        assert error < 5e-3 * expected.abs().max(), name


@pytest.mark.usefixtures("products")
def test_float16_keeps_the_gradients_of_long_sequences() -> None:
    """1 over their lengths, as `sequence_mean` has it, comes last too."""
    found = {}
    for reduction in ("token_mean", "sequence_mean"):
        torch.manual_seed(0)
        given = inputs((1, 2048), 71, 4, dtype=torch.float16, reduction=reduction)
        del given["is_weights"], given["ref_logprobs"]
        scaled = partial(ops.run, wrt=WRT, upstream=lambda name, x: torch.full_like(x, 2.0**11))
        found[reduction] = scaled(partial(linear_ppo_loss, impl="cpp"), given)
    torch.testing.assert_close(*found.values(), rtol=1e-3, atol=1e-5)  # one sequence: the same


def test_gradcheck(impl: str) -> None:
    given = inputs((2, 3), 7, 4, torch.float64, mask=ops.make_mask("interior", (2, 3)))
    given = ops.in_dtype(given, torch.float64)
    tensors = [given.pop(name).requires_grad_() for name in WRT]

    def function(*x: Tensor) -> Tensor:
        return linear_ppo_loss(**given, **dict(zip(WRT, x, strict=True)), impl=impl)[0]

    # Along one direction in Triton's interpreter, which takes a minute for all.
    assert torch.autograd.gradcheck(function, tensors, fast_mode=impl == "triton")


def test_peaked_logits(kernel: str) -> None:
    """Tokens of p > 0.999 keep their gradient (Liger #1329)."""
    given = inputs(softcap=None, temperature=1.0, entropy_coef=0.0)
    given["bias"] = torch.zeros(71)
    given["hidden"] = 0.1 * given["hidden"]
    given["targets"].fill_(3)
    given["bias"][3] = 16.0
    given |= {"old_logprobs": None, "kl_coef": 0.0}
    exact = ops.in_dtype(given, torch.float64)
    expected = ops.run(partial(linear_ppo_loss, impl=kernel), exact, WRT)
    found = ops.run(partial(linear_ppo_loss, impl=kernel), given, WRT)
    for name in WRT:
        a, b = found[f"gradient of {name}"].double(), expected[f"gradient of {name}"]
        torch.testing.assert_close(a, b, rtol=1e-3, atol=3e-5 * float(b.abs().max()))


# --- One pass, in the memory of a chunk -----------------------------------------------------------


def test_three_products_and_no_more() -> None:
    """Of 45 tokens in chunks of 16; without gradients one, and of a frozen weight two."""
    given = inputs()
    for trained, products in (((), 1), (("hidden",), 2), (("weight",), 2), (WRT, 3)):
        arguments = {
            name: x.requires_grad_(name in trained) if name in WRT else x
            for name, x in given.items()
        }
        with ops.Watch() as watch:
            loss, _ = linear_ppo_loss(**arguments)
            if trained:
                loss.backward()
        assert watch.products == (3 if trained else 1) * products
        for name in WRT:
            assert (arguments[name].grad is not None) == (name in trained)
            arguments[name].grad = None


@pytest.mark.parametrize("reduction", ppo_loss.REDUCTIONS)
def test_no_tensor_of_tokens_times_vocab(reduction: str) -> None:
    largest = []
    for rows in (8, 32):
        given = inputs((rows, 64), 1000, 8, reduction=reduction)
        for name in WRT:
            given[name].requires_grad_()
        with ops.Watch() as watch:
            linear_ppo_loss(**given)[0].backward()
        largest.append(watch.largest)
        assert watch.largest < rows * 64 * 1000 / 8
        with torch.profiler.profile(profile_memory=True) as profile:
            linear_ppo_loss(**given)[0].backward()
        assert max(event.cpu_memory_usage for event in profile.events()) < rows * 64 * 1000 * 4 / 8
    assert largest == [16_000, 32 * 64 * 8]  # a chunk of logits, the hidden states


@pytest.mark.usefixtures("products")
def test_autocast(kernel: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(inputs(), kernel, torch.bfloat16)


@pytest.mark.parametrize("tokens", [8, 256, 512])  # of bfloat16 twice as many to a chunk
def test_sums_of_bfloat16(tokens: int, monkeypatch: pytest.MonkeyPatch, either_cpu: bool) -> None:
    """64 chunks and two err about as little as one: a sum in bfloat16 is rounded 63 times."""
    monkeypatch.setattr(head, "_TOKENS", {"cpu": tokens})
    hidden, weight = torch.rand(1024, 12).bfloat16(), torch.rand(71, 12).bfloat16()
    targets, grad_logits = torch.zeros(1024, dtype=torch.int64), torch.rand(1024, 71).bfloat16()
    made = head.Head(hidden, weight, None, targets, torch.bfloat16, (False, True, False))
    for place in made.chunks():
        states = made.states(place)
        made.add_gradients(place, states, grad_logits[place].to(states.dtype))
    _, found, _ = made.gradients()
    assert found is not None
    exact = grad_logits.double().t() @ hidden.double()
    rounding = (exact.bfloat16() - exact).square().mean()
    assert (found - exact).square().mean() < 3 * rounding


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_memory_in_bfloat16(chunks: int, either_cpu: bool) -> None:
    """Where the CPU multiplies it, the weight's gradient and the logits of a chunk. The sum of more
    than two chunks is in float32, beside its copy in bfloat16 when there are no more logits."""
    vocab, width = 4000, 64
    given = inputs((32 * chunks,), vocab, width, torch.bfloat16)
    trained = [given[name].requires_grad_() for name in ("hidden", "weight")]

    def step() -> None:
        torch.autograd.grad(linear_ppo_loss(**given)[0], trained)

    step()
    logits, gradient = 2 * 32 * vocab, 2 * vocab * width
    least = gradient + logits if either_cpu and chunks <= 2 else 3 * gradient
    assert peak_extra_bytes(torch.device("cpu"), step) < least + 0.6 * logits


# --- torch.compile --------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
def test_compiles_without_a_graph_break(impl: str, old: bool) -> None:
    torch._dynamo.reset()
    given = inputs(mask=ops.make_mask("right", (5, 9)))
    given["old_logprobs"] = given["old_logprobs"] if old else None
    op = partial(linear_ppo_loss, impl=impl, return_logprobs=old)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(ops.run(compiled, given, WRT), ops.run(op, given, WRT))


def test_new_coefficients_do_not_compile_again() -> None:
    torch._dynamo.reset()
    given = inputs()
    compiled = torch.compile(linear_ppo_loss, fullgraph=True, backend="aot_eager")
    for x in (0.1, 0.2):  # the second makes them symbolic
        compiled(**given | {"temperature": 1 + x, "entropy_coef": x / 7, "kl_coef": x})
    with torch.compiler.set_stance("fail_on_recompile"):
        again = given | {"temperature": 1.4, "entropy_coef": 0.3, "kl_coef": 0.25}
        torch.testing.assert_close(compiled(**again), linear_ppo_loss(**again))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, either_cpu: bool) -> None:
    given = inputs(dtype=dtype)
    tensors = [given[name].requires_grad_() for name in WRT]
    numbers = ppo_loss.traced_numbers(0.7, 4.0, 0.2, 0.28, 1.3, 0.01, 0.1)
    tokens = [given[name] for name in TOKENS]
    for wanted in ((True, True, True), (False, True, False)):
        arguments = (*tensors, *tokens, None, None, given["moments"], numbers, None)
        settings = ("token_mean", "k3", "clip", dtype, "cpp")
        torch.library.opcheck(
            torch.ops.ppo_kernels.linear_ppo_loss, (*arguments, *settings, *wanted)
        )


# --- Mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(71, 5)}, ValueError, r"hidden must be \[\.\.\., H\] and weight"),
        ({"targets": torch.zeros(45, dtype=torch.int64)}, ValueError, "targets must have shape"),
        ({"targets": torch.full((5, 9), 71)}, ValueError, r"targets\[0, 0\] is 71"),
        ({"advantages": torch.zeros(5, 8)}, ValueError, "must have the shape of advantages"),
        ({"advantages": torch.zeros(9, 5), "old_logprobs": None, "ref_logprobs": None,
          "is_weights": None}, ValueError, r"advantages must have shape \(5, 9\), but has"),
        ({"advantages": torch.zeros(5, 9, device="meta"), "old_logprobs": None,
          "ref_logprobs": None, "is_weights": None}, ValueError,
         "advantages must be on the device of hidden, cpu, but is on meta"),
        ({"mask": torch.ones(5, 9)}, TypeError, "mask must be bool"),
        ({"moments": torch.zeros(2)}, ValueError, r"moments must have shape \(3,\)"),
        ({"clip_range": -0.1}, ValueError, "clip_range must be"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip must be a finite number > 1"),
        ({"reduction": "mean"}, ValueError, "reduction must be 'token_mean', "),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator must be"),
        ({"normalizer": -1.0}, ValueError, "normalizer must be a finite number >= 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be"),
        ({"impl": "cuda"}, RuntimeError, "impl='cuda' cannot run: "),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)  # fmt: skip
def test_errors(impl: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="linear_ppo_loss: .*" + message):
        linear_ppo_loss(**inputs() | {"impl": impl} | change)


def test_packed_boundaries_are_checked(impl: str) -> None:
    given = packed(inputs(), torch.ones(5, 9, dtype=torch.bool))
    wrong = torch.tensor([0, 30, 20, 45])
    with pytest.raises(ValueError, match="linear_ppo_loss: cu_seqlens must not fall"):
        linear_ppo_loss(**given | {"cu_seqlens": wrong}, impl=impl)
