"""`adamw` with moments in 8 bits: what the codes keep, and that training with them is as without.

`test_adamw.py` asks for the same bits from every implementation.
"""

from __future__ import annotations

import re
from typing import Any

import ops
import pytest
import torch
from test_adamw import BF16, Model, equal
from torch import Tensor, nn

from ppo_kernels import adamw, reference, zero_moments

IMPLS = pytest.mark.parametrize("impl", ops.implementations_of("adamw"))
KERNELS = pytest.mark.parametrize("kernel", ops.implementations_of("adamw", but=("reference",)))
BLOCK = reference.MOMENT_BLOCK


def stepped(model: Model, grads: list[Tensor], impl: str) -> list[Tensor]:
    for number, g in enumerate(grads, 1):
        model.step(number, [g], impl=impl)
    return model.tensors()


def test_every_code_is_kept() -> None:
    """By itself, and beside the largest of its block, which is exact."""
    exp_avg = torch.arange(-127, 128).to(torch.int8)
    exp_avg_sq = torch.arange(1, 256).to(torch.uint8)
    scales = torch.tensor([[3.0], [0.7]])
    moments = reference.dequantize_moments(exp_avg, exp_avg_sq, scales)
    assert moments[0].abs().max() == 3 and moments[1].max() == torch.tensor(0.7) ** 2
    found = reference.quantize_moments(*moments)
    assert torch.equal(found[0], exp_avg) and torch.equal(found[1], exp_avg_sq)
    torch.testing.assert_close(found[2], scales)
    assert moments[0].diff().gt(0).all() and moments[1].diff().gt(0).all()


def test_what_the_codes_lose() -> None:
    """Relative to each, from the largest of a block down to a 1e-4th; and no root becomes 0."""
    x = torch.logspace(0, -4, 256)
    mean, square = reference.dequantize_moments(*reference.quantize_moments(-x, x * x))
    for found, worst, near in ((-mean, 0.2, 0.031), (square.sqrt(), 0.11, 0.016)):
        error = (found / x - 1).abs()
        assert error.max() < worst and error[x > 0.5].max() < near
    x = torch.logspace(0, -30, 256)
    codes = reference.quantize_moments(x, x)[1]
    assert codes.min() == 1
    assert reference.dequantize_moments(codes.char(), codes, torch.ones(2, 1))[1].min() > 0


@IMPLS
def test_zeros_stay(impl: str) -> None:
    model = Model(shapes=[(BLOCK + 3,)], bits=8)
    before = model.state["weights"][0].clone()
    found = stepped(model, [torch.zeros(BLOCK + 3)] * 2, impl)
    assert torch.equal(found[0], before)
    assert not any(x.any() for x in found[1:])


@KERNELS
def test_bits_of_the_reference_at_the_ends_of_float32(kernel: str) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = []
    for _ in range(3):
        size = 10 ** torch.empty(9, BLOCK).uniform_(-44, 38, generator=generator)
        size[:4] = size[:4] ** torch.tensor([[1e-3], [0.5], [0.2], [0.1]])
        size[4] = size[4].clamp(max=1e-30)  # squares are 0
        size[5:7] = size[5:7].clamp(1e-25, 1e-18)  # or subnormal
        grads.append(torch.randn(9, BLOCK, generator=generator).sign() * size)
    found, expected = (
        stepped(Model(True, shapes=[(9, BLOCK)], bits=8), grads, impl)
        for impl in (kernel, "reference")
    )
    assert equal(found, expected)


@IMPLS
def test_a_number_that_is_not_finite_makes_its_block_nan(impl: str) -> None:
    """In the weights as with float32 moments; for the rest of the block a step later."""
    for bad in (torch.nan, torch.inf, -torch.inf):
        grads = [torch.ones(2 * BLOCK), torch.ones(2 * BLOCK)]
        grads[0][5] = bad
        model = Model(True, shapes=[(2 * BLOCK,)], bits=8)
        nan = stepped(model, grads[:1], impl)[0].isnan()
        assert nan.nonzero().tolist() == [[5]]
        assert model.state["moment_scales"][0].isnan().tolist() == [[True, False]] * 2
        model.step(2, grads[1:], impl=impl)
        assert model.tensors()[0].isnan().tolist() == [True] * BLOCK + [False] * BLOCK


@KERNELS
def test_anywhere_in_memory(kernel: str) -> None:
    """At odd addresses, and nothing beside."""
    count = 2047
    codes = torch.full((2, count + 9), 7, dtype=torch.uint8)
    numbers, scales = torch.full((count + 9,), 7.0), torch.full((2 * 8 + 2,), 7.0)
    w, of_blocks = numbers[3 : count + 3], scales[1:-1].view(2, 8)
    m, v = codes[0, 1 : count + 1].view(torch.int8), codes[1, 3 : count + 3]
    w[:], m[:], v[:], of_blocks[:] = torch.randn(count), 0, 0, 0
    expected = [x.clone() for x in (w, m, v, of_blocks)]
    for x, impl in ((expected, "reference"), ((w, m, v, of_blocks), kernel)):
        adamw(x[0], torch.ones(count), x[1], x[2], moment_scales=x[3], step=1, learning_rate=0.1,
              impl=impl)  # fmt: skip
    assert all(map(torch.equal, (w, m, v, of_blocks), expected))
    w[:], m[:], v[:], of_blocks[:] = 7, 7, 7, 7
    assert all(bool((x == 7).all()) for x in (codes, numbers, scales))


@pytest.mark.parametrize("halves", [False, True])
def test_training_is_as_with_float32_moments(halves: bool) -> None:
    """A classifier of tokens, most of whose embeddings have no gradient in most steps."""

    def losses(bits: int) -> Tensor:
        torch.manual_seed(0)
        table, model = (
            torch.randn(500, 32),
            nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 7)),
        )
        classes = torch.randint(7, (500,))
        shapes = [tuple(x.shape) for x in (table, *model.parameters())]
        state = Model(halves, shapes=shapes, bits=bits)
        trained = [nn.Parameter(x) for x in (table, *model.parameters())]
        names = [name for name, _ in model.named_parameters()]
        for old, x in zip(state.state["weights"], trained, strict=True):
            old.copy_(x)
        found = []
        for number in range(1, 301):
            for x, value in zip(trained, state.tensors(), strict=False):
                x.data.copy_(value)
            tokens = (torch.rand(64) ** 3 * 500).long()  # some are frequent
            hidden = nn.functional.embedding(tokens, trained[0])
            outputs = torch.func.functional_call(
                model, dict(zip(names, trained[1:], strict=True)), hidden
            )
            loss = nn.functional.cross_entropy(outputs, classes[tokens])
            grads = list(torch.autograd.grad(loss, trained))
            state.step(number, grads, learning_rate=3e-3, betas=(0.9, 0.95))
            found.append(loss.detach())
        return torch.stack(found)

    found, expected = losses(8), losses(32)
    assert expected[-50:].mean() < 0.2 * expected[:5].mean()
    assert (found - expected).abs().mean() < 0.05 * expected.mean()
    assert found[-50:].mean() < 1.15 * expected[-50:].mean()


@IMPLS
def test_errors(impl: str) -> None:
    x = torch.zeros(4, 100, dtype=BF16)
    exp_avg, exp_avg_sq, scales = zero_moments(x)
    assert (exp_avg.dtype, exp_avg_sq.dtype, scales.shape) == (torch.int8, torch.uint8, (2, 2))
    given: dict[str, Any] = dict(
        weights=x, grads=x, remainder=x.short(), exp_avg=exp_avg, exp_avg_sq=exp_avg_sq,
        moment_scales=scales, step=1, learning_rate=0.1, impl=impl,
    )  # fmt: skip
    adamw(**given)
    for error, change, message in (
        (TypeError, {"moment_scales": None}, "exp_avg[0] must be float32, but is int8"),
        (TypeError, {"exp_avg": x.float()}, "exp_avg[0] must be int8, but is float32"),
        (TypeError, {"exp_avg_sq": exp_avg}, "exp_avg_sq[0] must be uint8, but is int8"),
        (TypeError, {"moment_scales": scales.double()}, "moment_scales[0] must be float32, but is"),
        (ValueError, {"moment_scales": scales[:, :1]}, "moment_scales[0] must have shape (2, 2)"),
        (ValueError, {"moment_scales": [scales] * 2}, "moment_scales must be as many tensors as w"),
        (ValueError, {"moment_scales": torch.zeros(2, 2).t()}, "moment_scales[0] must be contigu"),
    ):
        with pytest.raises(error, match=re.escape(f"adamw: {message}")):
            adamw(**given | change)
