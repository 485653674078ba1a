"""`adamw`: the same bits from every implementation, from both kinds of weights, and from torch."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace
from typing import Any

import ops
import pytest
import torch
from torch import Tensor

from ppo_kernels import adamw, dispatch, join_master, split_master, zero_moments
from ppo_kernels.reference import optimizer

IMPLS = pytest.mark.parametrize("impl", ops.implementations_of("adamw"))
KERNELS = pytest.mark.parametrize("kernel", ops.implementations_of("adamw", but=("reference",)))
BITS = pytest.mark.parametrize("bits", [32, 8])
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Around a vector, a block of moments, Triton's tile and a thread's piece; with nothing in one.
SHAPES = [(3,), (), (0, 4), (33, 31), (1024,), (1025,), (16401,)]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "grad_scale": 0.37},
    {"betas": (0.5, 0.5), "learning_rate": 0.5, "eps": 1e-3},
    {"betas": (0.0, 0.0), "weight_decay": 0.1},
]


def gradients(
    seed: int, dtype: torch.dtype = F32, shapes: list[tuple[int, ...]] = SHAPES
) -> list[Tensor]:
    """Of sizes from 1e-12 to 1e12 (1e-7 to 1e4 in float16), and zeros."""
    generator = torch.Generator().manual_seed(seed)
    least, most = (-7, 4) if dtype == F16 else (-12, 12)

    def of(shape: tuple[int, ...]) -> Tensor:
        size = 10 ** torch.empty(shape).uniform_(least, most, generator=generator)
        kept = torch.rand(shape, generator=generator) < 0.9
        return (torch.randn(shape, generator=generator) * size * kept).to(dtype)

    return [of(shape) for shape in shapes]


class Model:
    """Weights and the state of AdamW; `halves`: bfloat16 with a remainder; `bits` of moments."""

    def __init__(
        self,
        halves: bool = False,
        device: str = "cpu",
        shapes: list[tuple[int, ...]] = SHAPES,
        bits: int = 32,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(s, generator=generator).to(device) for s in shapes]
        self.state: dict[str, list[Tensor]] = {
            "exp_avg": [torch.zeros_like(x) for x in weights],
            "exp_avg_sq": [torch.zeros_like(x) for x in weights],
            "weights": weights,
        }
        if halves:
            pairs = [split_master(x) for x in weights]
            self.state["weights"], self.state["remainder"] = map(list, zip(*pairs, strict=True))
        if bits == 8:
            names = ("exp_avg", "exp_avg_sq", "moment_scales")
            moments = zip(*map(zero_moments, weights), strict=True)
            self.state |= zip(names, map(list, moments), strict=True)

    def step(self, number: int | Tensor, grads: list[Tensor], **settings: Any) -> None:
        settings = {"learning_rate": 3e-3} | settings
        adamw(grads=grads, step=number, **self.state, **settings)

    def tensors(self) -> list[Tensor]:
        """In float32: weights, and both moments, or their codes and scales."""
        weights = self.state["weights"]
        if "remainder" in self.state:
            weights = [*map(join_master, weights, self.state["remainder"])]
        moments = (self.state.get(n, []) for n in ("exp_avg", "exp_avg_sq", "moment_scales"))
        return [*weights, *(x.float() for tensors in moments for x in tensors)]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    """In every bit, that of a zero's sign too; any NaN equals any other."""
    bits = [[x.nan_to_num(7.0).view(torch.int32) for x in tensors] for tensors in (found, expected)]
    return all(map(torch.equal, *bits))


def after(
    steps: int, dtype: torch.dtype = F32, halves: bool = False, bits: int = 32, **settings: Any
) -> Model:
    model = Model(halves, bits=bits)
    for number in range(1, steps + 1):
        model.step(number, gradients(number, dtype), **settings)
    return model


def test_every_master_is_split_exactly() -> None:
    """All lower halves, with upper halves where something carries, ends or is special."""
    edges = torch.tensor([0, 1, 0x7F, 0x80, 0x3F7F, 0x3F80, 0x7F7E, 0x7F7F, 0x7F80, 0x7FC0, 0x7FFF])
    upper = torch.cat((edges, torch.randint(0x7FFF, (40,)))).repeat(2)
    upper[len(upper) // 2 :] += 0x8000
    low = torch.arange(2**16)
    bits = ((upper << 16)[:, None] + low).to(torch.int32)
    master = bits.view(F32)
    weights, remainder = split_master(master)
    assert (weights.dtype, remainder.dtype) == (BF16, torch.int16)
    joined = join_master(weights, remainder)
    nan = master.isnan()
    assert torch.equal(joined.view(torch.int32)[~nan], bits[~nan])
    assert torch.equal(weights.isnan(), nan) and joined[nan].isnan().all()
    # The nearest; of two as near the one of the larger magnitude.
    nearest = torch.where(low == 0x8000, upper[:, None] + 1, master.bfloat16().view(torch.int16))
    assert torch.equal(weights.view(torch.int16)[~nan], nearest.to(torch.int16)[~nan])


@IMPLS
def test_every_remainder_goes_through_a_step(impl: str) -> None:
    """A learning rate of 0 changes no master, whatever its lower half."""
    upper = torch.tensor([0, 0x3F80, 0x3FFF, 0x7F7F, 0x7F80, 0x8000, 0xC0FF])
    master = ((upper << 16)[:, None] + torch.arange(0, 2**16, 7)).to(torch.int32).view(F32)
    weights, remainder = split_master(master)
    before = weights.clone(), remainder.clone()
    moments = torch.zeros(2, *master.shape)
    adamw(weights, torch.ones_like(master), *moments, remainder=remainder, step=1,
          learning_rate=0.0, impl=impl)  # fmt: skip
    for found, expected in zip((weights, remainder), before, strict=True):
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


@IMPLS
@BITS
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_bits_of_the_reference(impl: str, settings: dict[str, Any], bits: int) -> None:
    """50 steps in bfloat16 with a remainder are 50 steps of the reference in float32."""
    few = 3 if impl == "triton" else 50  # Triton's interpreter takes milliseconds a tile
    for dtype, steps in ((F32, few), (BF16, 3), (F16, 3)):
        expected = after(steps, dtype, bits=bits, impl="reference", **settings).tensors()
        for halves in (False, True):
            found = after(steps, dtype, halves, bits, impl=impl, **settings)
            assert equal(found.tensors(), expected), (dtype, halves)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torch has no fused multiply-add on this CPU",
)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_bits_of_torch(settings: dict[str, Any]) -> None:
    """But where torch's vectors do not fill a tensor: whole ones only."""
    shapes = [(64, 3), (4096,)]
    settings = {"learning_rate": 3e-3, "weight_decay": 0.0} | settings
    scale = settings.pop("grad_scale", 1.0)
    ours, model = Model(True, shapes=shapes), Model(shapes=shapes)
    theirs = [torch.nn.Parameter(x) for x in model.state["weights"]]
    lr = settings.pop("learning_rate")
    optimizer = torch.optim.AdamW(theirs, lr=lr, fused=True, **settings)
    for number in range(1, 51):
        grads = gradients(number, shapes=shapes)
        ours.step(number, grads, learning_rate=lr, grad_scale=scale, **settings)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g * torch.tensor(scale)
        optimizer.step()
    state = [optimizer.state[p] for p in theirs]
    moments = [s[name] for name in ("exp_avg", "exp_avg_sq") for s in state]
    assert equal(ours.tensors(), [*(p.detach() for p in theirs), *moments])


@IMPLS
def test_steps_by_hand(impl: str) -> None:
    """The first step goes as far as the learning rate, whatever the gradient; then by formula."""
    w, m, v = (torch.tensor([x, x]) for x in (1.0, 0.0, 0.0))
    given = {"learning_rate": 0.25, "betas": (0.5, 0.75), "eps": 0.0, "impl": impl}
    adamw(w, torch.tensor([3.0, -1e-3]), m, v, step=1, weight_decay=0.5, **given)
    torch.testing.assert_close(w, torch.tensor([0.875 - 0.25, 0.875 + 0.25]))
    w, m, v = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([8.0])
    adamw(w, torch.tensor([8.0]), m, v, step=2, grad_scale=0.5, **given)
    assert (m.item(), v.item()) == (3.0, 10.0)
    assert w.item() == pytest.approx(1 - 0.25 * (3 / 0.75) / (10 / 0.4375) ** 0.5)


def test_a_product_and_a_sum_are_rounded_once() -> None:
    """The reference's, where rounding to float64 in between would give another number."""
    a, b = torch.tensor([1 + 2**-12, 1 + 2**-12]), torch.tensor([1 + 2**-12, -1 - 2**-12])
    c = torch.tensor([2.0**-60, -(2.0**-60)])
    exact = torch.tensor([1 + 2**-11 + 2**-23, -(1 + 2**-11 + 2**-23)])  # 2^-24 was a tie
    assert torch.equal(optimizer._fused(a, b, c), exact)
    assert torch.equal(optimizer._fused(a, b, -c), exact - c.sign() * 2**-23)
    special = torch.tensor([torch.inf, torch.nan, 0.0])
    assert equal([optimizer._fused(special, special, special)], [special])


@IMPLS
@BITS
def test_one_list_and_one_at_a_time(impl: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    together, alone = Model(True, bits=bits), Model(True, bits=bits)
    if impl == "triton":
        monkeypatch.setattr(dispatch.triton_kernels("adamw"), "SEARCHED", 2)
    together.step(1, gradients(1), impl=impl)
    for i, g in enumerate(gradients(1)):
        one = {name: tensors[i] for name, tensors in alone.state.items()}
        adamw(grads=g, step=1, learning_rate=3e-3, **one, impl=impl)
    assert equal(together.tensors(), alone.tensors())
    adamw([], [], [], [], step=1, learning_rate=3e-3, impl=impl)


@KERNELS
def test_anywhere_in_memory(kernel: str) -> None:
    """Addresses that 16 does not divide; a gradient that is not contiguous; nothing beside."""
    count = 2047  # one short of Triton's tiles
    wide = torch.full((6, count + 9), 7.0)
    w, m, v = wide[::2, 3 : count + 3]
    w[:], m[:], v[:] = torch.randn(count), 0, 0
    g = torch.randn(count, 2)[:, 1]
    expected = [x.clone() for x in (w, m, v)]
    for tensors, impl in ((expected, "reference"), ((w, m, v), kernel)):
        adamw(tensors[0], g, *tensors[1:], step=1, learning_rate=0.1, impl=impl)
    assert equal([w, m, v], expected)
    wide[::2, 3 : count + 3] = 7
    assert (wide == 7).all()


@KERNELS
def test_nan_and_infinite_gradients(kernel: str) -> None:
    """As torch has it: they stay in the moments and in the weight; others are not touched."""
    bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 0.0])
    bad.view(torch.int32)[0] = 0x7FFFFFFF  # a NaN whose bits would round to a number's
    p = torch.nn.Parameter(torch.ones(5))
    optimizer = torch.optim.AdamW([p], lr=3e-3, weight_decay=0.0, fused=True)
    ours = Model(True, shapes=[(5,)])
    ours.state["weights"][0].fill_(1.0)
    ours.state["remainder"][0].zero_()
    for number, g in enumerate((bad, torch.ones(5)), 1):
        ours.step(number, [g], impl=kernel)
        p.grad = g
        optimizer.step()
    expected = [p.detach(), *(optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq"))]
    for found, x in zip(ours.tensors(), expected, strict=True):
        torch.testing.assert_close(found, x, equal_nan=True)
    assert ours.state["weights"][0].isnan().tolist() == [True, True, True, False, False]
    assert not ours.state["remainder"][0][:3].any()


@IMPLS
@BITS
def test_resumed_is_uninterrupted(impl: str, bits: int) -> None:
    file = io.BytesIO()
    torch.save(after(3, BF16, True, bits, impl=impl).state, file)
    resumed = Model(True)
    resumed.state = torch.load(io.BytesIO(file.getvalue()))
    resumed.step(4, gradients(4, BF16), impl=impl)
    assert equal(resumed.tensors(), after(4, BF16, True, bits, impl=impl).tensors())


@IMPLS
def test_numbers_may_be_tensors(impl: str) -> None:
    by_numbers, by_tensors = Model(), Model()
    by_numbers.step(7, gradients(1), grad_scale=0.3, impl=impl)
    by_tensors.step(
        torch.tensor(7), gradients(1), grad_scale=torch.tensor(0.3),
        learning_rate=torch.tensor(3e-3, dtype=torch.float64), impl=impl,
    )  # fmt: skip
    assert equal(by_numbers.tensors(), by_tensors.tensors())


@pytest.mark.parametrize("kernel", ops.implementations_of("adamw", but=("reference", "cpp")))
def test_numbers_in_the_memory_of_a_gpu(kernel: str) -> None:
    """Where they are tensors of the device, which on a CPU the public op makes numbers of."""
    from ppo_kernels.adamw import _factors, _mixing

    expected, found = Model(), Model()
    expected.step(7, gradients(1), grad_scale=0.3, weight_decay=0.1, impl=kernel)
    factors = _factors(torch.tensor(7), 3e-3, (0.9, 0.999), 0.1)
    assert all(isinstance(x, Tensor) for x in factors[1:])
    lists = (
        *(found.state["weights"], gradients(1), found.state["exp_avg"]),
        *(found.state["exp_avg_sq"], [], []),
    )
    dispatch.triton_kernels("adamw").adamw(
        lists, factors, _mixing((0.9, 0.999)), 1e-8, torch.tensor(0.3)
    )
    assert equal(found.tensors(), expected.tensors())


@BITS
def test_same_bits_for_any_threads(bits: int) -> None:
    if dispatch.cpu is None:
        pytest.skip("the extension is not built")
    expected = after(2, BF16, True, bits, impl="cpp").tensors()
    torch.set_num_threads(3)
    assert equal(after(2, BF16, True, bits, impl="cpp").tensors(), expected)


@IMPLS
def test_a_graph_notices(impl: str) -> None:
    w = torch.nn.Parameter(torch.ones(3))
    loss = (w * w).sum()
    adamw(w, torch.ones(3), *torch.zeros(2, 3), step=1, learning_rate=0.1, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@IMPLS
def test_errors(impl: str) -> None:
    x, half = torch.zeros(4, 3), torch.zeros(4, 3, dtype=BF16)
    given = dict(weights=x, grads=x, exp_avg=x, exp_avg_sq=x, step=1, learning_rate=0.1, impl=impl)
    for change, message in (
        ({"grads": torch.zeros(3, 4)}, "grads[0] must have shape (4, 3)"),
        ({"exp_avg": [x, x]}, "exp_avg must be as many tensors as weights, 1, but are 2"),
        ({"exp_avg_sq": torch.zeros(3, 4).t()}, "exp_avg_sq[0] must be contiguous, as it is chang"),
        ({"step": 0}, "step must be a finite number >= 1"),
        ({"learning_rate": -1.0}, "learning_rate must be a finite number >= 0"),
        ({"betas": (0.9, 1.0)}, "betas must be a finite number >= 0 and < 1"),
        ({"eps": -1.0}, "eps must be a finite number >= 0"),
        ({"weight_decay": torch.inf}, "weight_decay must be a finite number >= 0"),
        ({"grad_scale": torch.nan}, "grad_scale must be a finite number"),
        ({"step": torch.ones(2)}, "step must be a number or a 0-dim tensor"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"adamw: {message}")):
            adamw(**given | change)
    for change, message in (
        ({"weights": half}, "remainder must be given with bfloat16 weights, and only with them"),
        ({"remainder": x.short()}, "remainder must be given with bfloat16 weights, and only"),
        ({"weights": half, "remainder": x}, "remainder[0] must be int16, but is float32"),
        ({"weights": x.double()}, "weights must be bfloat16 or float32, but is float64"),
        ({"exp_avg": half}, "exp_avg[0] must be float32, but is bfloat16"),
        ({"grads": x.double()}, "grads must be bfloat16 or float16 or float32, but is float64"),
        (
            {name: [x, None] for name in ("weights", "grads", "exp_avg", "exp_avg_sq")},
            "weights[1] must be a tensor, but is NoneType",
        ),
        ({"betas": 0.9}, "betas must be two numbers"),
        ({"weights": []}, "weights must be a tensor"),
    ):
        with pytest.raises(TypeError, match=re.escape(f"adamw: {message}")):
            adamw(**given | change)
    for wrong in ((x, x.short()), (half, x)):
        with pytest.raises(TypeError, match="adamw: "):
            join_master(*wrong)
    with pytest.raises(TypeError, match="adamw: master must be float32"):
        split_master(half)


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="no Triton")
def test_a_gpus_tables_are_kept_for_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each call, as of a parameter at a time; the oldest go where there are too many."""
    kernels, capturing, made = dispatch.triton_kernels("adamw"), False, []
    stream = SimpleNamespace(cuda_stream=7)

    def copied(rows: Any, pin_memory: bool) -> Any:
        made.append(rows)
        return SimpleNamespace(to=lambda *_, **__: torch.tensor(rows))

    of_gpu = SimpleNamespace(
        is_current_stream_capturing=lambda: capturing, current_stream=lambda _: stream
    )
    monkeypatch.setattr(kernels, "torch", SimpleNamespace(cuda=of_gpu, tensor=copied))
    monkeypatch.setattr(kernels, "_kept", {})
    monkeypatch.setattr(kernels, "_held", 0)
    monkeypatch.setattr(kernels, "_captured", [])
    device, most = torch.device("cuda", 0), kernels._MOST_KEPT
    calls = [((2 * i,), (2 * i + 1,)) for i in range(most)]
    for call in (*calls, *calls[:5]):
        kernels._table(call, device)
    assert len(made) == most
    capturing = True
    for call in calls:
        assert kernels._table(call, device).tolist() == [list(row) for row in call]
    capturing = False
    kernels._table(((-1, -2), (-3, -4)), device)  # of two tensors: the two oldest go
    capturing = True
    for call in calls[5:7]:
        with pytest.raises(RuntimeError, match="call it once on the same tensors"):
            kernels._table(call, device)
    kernels._table(calls[0], device)
    kernels._table(calls[7], device)
