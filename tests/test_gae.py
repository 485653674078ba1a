"""`gae` and `kl_shaped_gae`: every implementation against float64, a plain loop and known cases."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ops
import pytest
import torch
import torch._dynamo
from torch import Tensor

from ppo_kernels import dispatch, gae, kl_shaped_gae, reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=ops.implementations_of("gae"))
def impl(request: pytest.FixtureRequest) -> str:
    """Every implementation, for what can be said without the reference."""
    return str(request.param)


@pytest.fixture(params=ops.implementations_of("gae", but=("reference",)))
def kernel(request: pytest.FixtureRequest) -> str:
    """Every implementation that is held against the reference."""
    return str(request.param)


def inputs(
    shape: tuple[int, int], mask: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Arguments of `kl_shaped_gae`, with garbage under the mask."""
    logprobs = -3 * torch.rand(shape)
    some = {
        "logprobs": logprobs,
        "ref_logprobs": logprobs + 0.3 * torch.randn(shape),
        "values": torch.randn(shape),
    }
    arguments: dict[str, Any] = {k: ops.poison(x.to(dtype), mask) for k, x in some.items()}
    arguments |= {"scores": torch.randn(shape[0]).to(dtype), "kl_coef": 0.2, "mask": mask}
    return arguments | {"bootstrap": torch.randn(shape[0]).to(dtype), "gamma": 0.97, "lam": 0.9}


def gae_inputs(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Arguments of `gae`."""
    arguments = inputs(*args, **kwargs)
    names = ("values", "mask", "bootstrap", "gamma", "lam")
    return {"rewards": arguments["logprobs"]} | {name: arguments[name] for name in names}


def loop(rewards: list[float], values: list[float], last: float, g: float, lam: float) -> list:
    """The recursion, written from the paper."""
    advantages, following, advantage = [], last, 0.0
    for r, v in zip(reversed(rewards), reversed(values), strict=True):
        advantage = r + g * following - v + g * lam * advantage
        following = v
        advantages.append(advantage)
    return advantages[::-1]


@pytest.mark.parametrize("shape", list(ops.shapes()), ids=str)
@pytest.mark.parametrize("kind", ops.MASKS)
def test_error_rule(kernel: str, shape: tuple[int, int], kind: str) -> None:
    mask = ops.make_mask(kind, shape)
    ops.assert_error_rule(gae, reference.gae, gae_inputs(shape, mask), impl=kernel)
    ops.assert_error_rule(kl_shaped_gae, reference.kl_shaped_gae, inputs(shape, mask), impl=kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_dtypes_and_estimators(kernel: str, dtype: torch.dtype, estimator: str) -> None:
    mask = ops.make_mask("interior", (5, 31))
    arguments = inputs((5, 31), mask, dtype) | {"kl_estimator": estimator}
    if dtype == torch.float64:  # plain PyTorch in float64 is no bound to an error
        expected = reference.kl_shaped_gae(**arguments)
        actual = kl_shaped_gae(**arguments, impl=kernel)
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    else:
        ops.assert_error_rule(kl_shaped_gae, reference.kl_shaped_gae, arguments, impl=kernel)
        ops.assert_error_rule(gae, reference.gae, gae_inputs((5, 31), mask, dtype), impl=kernel)


def test_mixed_dtypes_are_promoted(impl: str) -> None:
    arguments = inputs((5, 31)) | {"values": torch.randn(5, 31).bfloat16()}
    ops.assert_error_rule(kl_shaped_gae, reference.kl_shaped_gae, arguments, impl=impl)
    arguments["scores"] = arguments["scores"].double()
    assert kl_shaped_gae(**arguments, impl=impl).advantages.dtype == torch.float64


def test_against_a_plain_loop_that_skips_masked_tokens(impl: str) -> None:
    mask = ops.make_mask("interior", (6, 40))
    assert mask is not None
    arguments = gae_inputs((6, 40), mask, torch.float64)
    advantages, returns = gae(**arguments, impl=impl)
    for b in range(6):
        real = mask[b]
        rewards, values = arguments["rewards"][b][real], arguments["values"][b][real]
        last = float(arguments["bootstrap"][b])
        expected = torch.tensor(
            loop(rewards.tolist(), values.tolist(), last, 0.97, 0.9), dtype=torch.float64
        )
        torch.testing.assert_close(advantages[b][real], expected)
        torch.testing.assert_close(returns[b][real], expected + values)
        assert not advantages[b][~real].any() and not returns[b][~real].any()


def test_lambda_one_is_monte_carlo_and_zero_is_one_step(impl: str) -> None:
    rewards, values = torch.randn(3, 9), torch.randn(3, 9)
    advantages, returns = gae(rewards, values, gamma=1.0, lam=1.0, impl=impl)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1))
    advantages, _ = gae(rewards, values, gamma=0.9, lam=0.0, impl=impl)
    following = torch.cat((values[:, 1:], torch.zeros(3, 1)), 1)
    torch.testing.assert_close(advantages, rewards + 0.9 * following - values)
    advantages, _ = gae(rewards, values, gamma=0.0, lam=0.95, impl=impl)
    torch.testing.assert_close(advantages, rewards - values)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("kind", ["full", "left", "right", "interior", "empty"])
def test_packed_equals_padded(impl: str, kind: str, index_dtype: torch.dtype) -> None:
    mask = ops.make_mask(kind, (7, 19))
    assert mask is not None
    padded = inputs((7, 19), mask)
    packed = padded | {"mask": None, "cu_seqlens": ops.cu_seqlens_of(mask, index_dtype)}
    for name in ("logprobs", "ref_logprobs", "values"):
        packed[name] = ops.pack(padded[name], mask)
    a = kl_shaped_gae(**padded, impl=impl)
    b = kl_shaped_gae(**packed, impl=impl)
    assert torch.equal(ops.pack(a.advantages, mask), b.advantages)
    assert torch.equal(ops.pack(a.returns, mask), b.returns)
    torch.testing.assert_close(a.kl, b.kl)
    torch.testing.assert_close(a.moments, b.moments)


def test_packed_with_a_mask_skips_masked_tokens(impl: str) -> None:
    cu_seqlens = torch.tensor([0, 4, 4, 9, 30])
    mask = torch.rand(30) < 0.6
    mask[4:9] = False
    mask = mask.view(1, 30)
    arguments = inputs((1, 30), mask) | {"cu_seqlens": cu_seqlens}
    for name in ("logprobs", "ref_logprobs", "values", "mask"):
        arguments[name] = arguments[name][0]
    arguments |= {"scores": torch.randn(4), "bootstrap": torch.randn(4)}
    # Sequences 1 (empty) and 2 (all masked) contribute nothing, whatever their scores are.
    arguments["scores"][1:3] = arguments["bootstrap"][1:3] = float("nan")
    ops.assert_error_rule(kl_shaped_gae, reference.kl_shaped_gae, arguments, impl=impl)
    assert kl_shaped_gae(**arguments, impl=impl).kl[1:3].tolist() == [0.0, 0.0]


def test_strides_and_offsets(impl: str) -> None:
    mask = ops.make_mask("interior", (5, 13))
    arguments = inputs((5, 13), mask)
    expected = ops.run(kl_shaped_gae, arguments | {"impl": impl})
    for name in ("logprobs", "ref_logprobs", "values", "scores", "bootstrap"):
        for _, view in ops.views(arguments[name]):
            ops.assert_same_bits(
                expected, ops.run(kl_shaped_gae, arguments | {name: view, "impl": impl})
            )
    assert mask is not None
    strided = {"mask": mask.repeat_interleave(2, 1)[:, ::2], "impl": impl}
    ops.assert_same_bits(expected, ops.run(kl_shaped_gae, arguments | strided))


@pytest.mark.parametrize("estimator", [None, "k1", "k3"])
def test_few_long_rows_in_chunks(monkeypatch: pytest.MonkeyPatch, estimator: str | None) -> None:
    """Triton's way for these: chunks that are summed up first; here in small ones."""
    if "triton" not in {param.values[0] for param in ops.implementations_of("gae")}:
        pytest.skip("triton is not installed")
    kernels = dispatch.triton_kernels("gae")
    monkeypatch.setattr(kernels, "CHUNK", 16)
    monkeypatch.setattr(kernels, "SUMMARIES", 4)
    mask = ops.make_mask("interior", (3, 333))
    assert mask is not None
    padded = inputs((3, 333), mask) | {"kl_estimator": estimator}
    packed = padded | {"mask": None, "cu_seqlens": ops.cu_seqlens_of(mask)}
    for name in ("logprobs", "ref_logprobs", "values"):
        packed[name] = ops.pack(padded[name], mask)
    for arguments in (padded, packed):
        if estimator:
            op, reference_op = kl_shaped_gae, reference.kl_shaped_gae
        else:
            op, reference_op = gae, reference.gae
            arguments = arguments | {"rewards": arguments["logprobs"]}
            for name in ("logprobs", "ref_logprobs", "scores", "kl_coef", "kl_estimator"):
                del arguments[name]
        ops.assert_error_rule(op, reference_op, arguments, impl="triton")


def test_expanded_tensors(impl: str) -> None:
    row, scores = torch.randn(1, 9), torch.randn(1)
    a = gae(row.expand(4, 9), torch.zeros(1, 1).expand(4, 9), bootstrap=scores.expand(4), impl=impl)
    b = gae(row.repeat(4, 1), torch.zeros(4, 9), bootstrap=scores.repeat(4), impl=impl)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_nothing_under_the_mask_is_read(impl: str) -> None:
    mask = ops.make_mask("interior", (6, 17))
    assert mask is not None
    arguments = inputs((6, 17), mask)
    arguments["scores"][1::3] = arguments["bootstrap"][1::3] = float("nan")  # rows without token
    result = kl_shaped_gae(**arguments, impl=impl)
    for x in result:
        assert x.isfinite().all()
    assert not result.advantages[~mask].any() and not result.returns[~mask].any()
    assert not result.kl[1::3].any()


def test_the_score_lands_on_the_last_real_token(impl: str) -> None:
    mask = torch.tensor([[False, True, True, False, True, False]])
    zeros = torch.zeros(1, 6)
    result = kl_shaped_gae(
        torch.tensor([2.0]), zeros, zeros, zeros, kl_coef=0.0, gamma=1.0, lam=0.5, mask=mask,
        impl=impl,
    )  # fmt: skip
    assert result.advantages.tolist() == [[0.0, 0.5, 1.0, 0.0, 2.0, 0.0]]


def test_moments_survive_a_large_mean(impl: str) -> None:
    scores = torch.full((64,), 1e4)
    zeros = torch.zeros(64, 33)
    values = torch.randn(64, 33)
    count, mean, m2 = kl_shaped_gae(
        scores, zeros, zeros, values, kl_coef=0.0, gamma=1.0, lam=1.0, impl=impl
    ).moments.tolist()
    exact = scores[:, None].double() - values.double()
    assert count == 64 * 33
    assert mean == pytest.approx(float(exact.mean()), rel=1e-6)
    assert m2 == pytest.approx(float((exact - exact.mean()).square().sum()), rel=1e-3)


def test_kl_coef_as_a_tensor(impl: str) -> None:
    arguments = inputs((4, 8))
    a = kl_shaped_gae(**arguments, impl=impl)
    b = kl_shaped_gae(**arguments | {"kl_coef": torch.tensor(0.2)}, impl=impl)
    torch.testing.assert_close(a, b)


def test_results_carry_no_gradient(impl: str) -> None:
    arguments = inputs((4, 8))
    for name in ("logprobs", "values", "scores"):
        arguments[name].requires_grad_()
    assert not any(x.requires_grad for x in kl_shaped_gae(**arguments, impl=impl))
    assert not any(
        x.requires_grad for x in gae(arguments["logprobs"], arguments["values"], impl=impl)
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradcheck_of_the_references(estimator: str) -> None:
    mask = ops.make_mask("interior", (3, 5))
    arguments = inputs((3, 5), None, torch.float64) | {"mask": mask, "kl_estimator": estimator}
    names = ("scores", "logprobs", "ref_logprobs", "values", "bootstrap")
    tensors = [arguments.pop(name).requires_grad_() for name in names]

    def of(*x: Tensor) -> tuple[Tensor, ...]:
        return tuple(reference.kl_shaped_gae(**dict(zip(names, x, strict=True)), **arguments))

    assert torch.autograd.gradcheck(of, tensors)


@pytest.mark.parametrize("kind", ["none", "interior"])
@pytest.mark.parametrize("shape", [(300, 257), (3, 40_001), (20_000, 3)], ids=str)
def test_threads_change_no_bit(shape: tuple[int, int], kind: str) -> None:
    arguments = inputs(shape, ops.make_mask(kind, shape)) | {"impl": "auto"}
    results = []
    for threads in (1, 2, 3, 7, 2):
        torch.set_num_threads(threads)
        results.append(ops.run(kl_shaped_gae, arguments))
    for other in results[1:]:
        ops.assert_same_bits(results[0], other)


def cases() -> list[tuple[str, Callable[..., Any], dict[str, Any]]]:
    mask = ops.make_mask("interior", (4, 9))
    assert mask is not None
    packed = {"mask": None, "cu_seqlens": torch.tensor([0, 4, 9], dtype=torch.int32)}
    per_token = {name: torch.randn(9) for name in ("logprobs", "ref_logprobs", "values")}
    per_sequence = {"scores": torch.randn(2), "bootstrap": torch.randn(2)}
    return [
        ("gae", gae, gae_inputs((4, 9), mask)),
        ("kl_shaped_gae", kl_shaped_gae, inputs((4, 9), mask)),
        ("kl_shaped_gae", kl_shaped_gae, inputs((4, 9)) | packed | per_token | per_sequence),
    ]


@pytest.mark.parametrize("case", range(3))
def test_compiles_without_a_graph_break(impl: str, case: int) -> None:
    _, op, arguments = cases()[case]
    if impl == "reference" and "cu_seqlens" in arguments:
        pytest.skip("the reference looks into cu_seqlens, which a graph cannot")
    torch._dynamo.reset()
    compiled = torch.compile(partial(op, impl=impl), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**arguments), op(**arguments, impl=impl))


def test_a_new_coefficient_does_not_compile_again() -> None:
    torch._dynamo.reset()
    arguments = inputs((4, 9))
    compiled = torch.compile(partial(kl_shaped_gae, impl="auto"), fullgraph=True)
    compiled(**arguments | {"kl_coef": torch.tensor(0.1)})
    with torch.compiler.set_stance("fail_on_recompile"):
        for value in (0.2, 0.3):
            given = arguments | {"kl_coef": torch.tensor(value)}
            expected = kl_shaped_gae(**given)
            torch.testing.assert_close(compiled(**given), expected)


@pytest.mark.parametrize("case", range(3))
def test_opcheck(case: int) -> None:
    name, _, arguments = cases()[case]
    names = ["rewards", "values", "gamma", "lam", "mask", "bootstrap", "cu_seqlens"]
    if name == "kl_shaped_gae":
        names = ["scores", "logprobs", "ref_logprobs", "values", "kl_coef", "gamma", "lam",
                 "kl_estimator", "mask", "bootstrap", "cu_seqlens"]  # fmt: skip
        arguments |= {"kl_estimator": "k3", "kl_coef": torch.tensor(0.1, dtype=torch.float64)}
    torch.library.opcheck(getattr(torch.ops.ppo_kernels, name), [*map(arguments.get, names), "cpp"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": torch.zeros(4, 8)}, ValueError, r"values must have the shape of rewards"),
        ({"values": torch.zeros(4, 9, dtype=torch.int64)}, TypeError, "values must be .*float32"),
        ({"rewards": [1.0]}, TypeError, "rewards must be a tensor, but is list"),
        ({"mask": torch.ones(4, 9)}, TypeError, "mask must be bool, but is float32"),
        ({"mask": torch.ones(4, 1, dtype=torch.bool)}, ValueError, "mask must have the shape"),
        ({"bootstrap": torch.zeros(3)}, ValueError, r"bootstrap must have one number per sequence"),
        ({"gamma": 1.5}, ValueError, "gamma must be a finite number >= 0 and <= 1, but is 1.5"),
        ({"lam": float("nan")}, ValueError, "lam must be a finite number"),
        ({"cu_seqlens": torch.tensor([0, 36])}, ValueError, r"rewards must be \[N\]"),
        ({"impl": "fast"}, ValueError, "impl must be 'auto' or one of 'reference', 'cpp'"),
        ({"impl": "cuda"}, RuntimeError, "impl='cuda' cannot run: "),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_errors(impl: str, change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = gae_inputs((4, 9)) | {"impl": impl} | change
    with pytest.raises(error, match=r"gae: .*" + message):
        gae(**arguments)


@pytest.mark.parametrize("cu_seqlens", [[1, 9], [0, 8], [0, 7, 3, 9], [0, 12]], ids=str)
def test_wrong_boundaries(impl: str, cu_seqlens: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens must"):
        gae(torch.zeros(9), torch.zeros(9), cu_seqlens=torch.tensor(cu_seqlens), impl=impl)


def test_errors_of_kl_shaped_gae(impl: str) -> None:
    for change, message in (
        ({"kl_estimator": "k4"}, "kl_estimator must be 'k1', 'k2' or 'k3', but is 'k4'"),
        ({"kl_coef": float("inf")}, "kl_coef must be a finite number"),
        ({"kl_coef": torch.zeros(2)}, "kl_coef must be a number or a 0-dim tensor"),
        ({"scores": torch.zeros(4, 9)}, "scores must have one number per sequence"),
    ):
        with pytest.raises(ValueError, match=message):
            kl_shaped_gae(**inputs((4, 9)) | change, impl=impl)
