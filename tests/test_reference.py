"""The specification against numbers written out from the definitions, and against itself."""

from __future__ import annotations

import math

import pytest
import torch
from ops import MASKS, cu_seqlens_of, make_mask, pack, poison, run
from torch import Tensor

from ppo_kernels import reference

F64 = torch.float64


def tensor(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=F64)


def test_gae_by_hand() -> None:
    # gamma = 1/2, lam = 1/2; backwards from V = 8 after the end:
    # delta_2 = 3 + 4 - 2 = 5; delta_1 = 2 + 1 - 4 = -1; delta_0 = 1 + 2 - 6 = -3
    # A_2 = 5; A_1 = -1 + 5/4 = 1/4; A_0 = -3 + 1/16
    advantages, returns = reference.gae(
        tensor([1, 2, 3]), tensor([6, 4, 2]), gamma=0.5, lam=0.5, bootstrap=tensor(8)
    )
    assert advantages.tolist() == [[-2.9375, 0.25, 5.0]]
    assert returns.tolist() == [[3.0625, 4.25, 7.0]]


def test_gae_skips_masked_tokens() -> None:
    nan = math.nan
    mask = torch.tensor([[False, True, False, True, True, False]])
    advantages, returns = reference.gae(
        tensor([nan, 1, nan, 2, 3, nan]), tensor([nan, 6, nan, 4, 2, nan]),
        gamma=0.5, lam=0.5, bootstrap=tensor(8), mask=mask,
    )  # fmt: skip
    assert advantages.tolist() == [[0, -2.9375, 0, 0.25, 5.0, 0]]
    assert returns.tolist() == [[0, 3.0625, 0, 4.25, 7.0, 0]]


def test_gae_limits() -> None:
    """lam = 1 gives Monte Carlo returns, lam = 0 one-step temporal differences."""
    rewards, values = torch.randn(2, 3, 5, dtype=F64)
    _, returns = reference.gae(rewards, values, lam=1.0)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1))
    advantages, _ = reference.gae(rewards, values, gamma=0.9, lam=0.0)
    following = torch.cat((values[:, 1:], torch.zeros(3, 1, dtype=F64)), 1)
    torch.testing.assert_close(advantages, rewards + 0.9 * following - values)


def test_kl_shaped_gae_by_hand() -> None:
    # k1 = (1, -2), r = (-1/2, 1 + 10); gamma = lam = 1: A_1 = 11 - 3 = 8, A_0 = -1/2 + 3 - 1 + 8.
    # The masked row counts nowhere, whatever its score.
    shaped = reference.kl_shaped_gae(
        tensor(10, math.nan),
        tensor([-1, -3, -1], [-1, -1, -1]),
        tensor([-2, -1, -1], [-2, -1, -1]),
        tensor([1, 3, 5], [1, 3, 5]),
        kl_coef=0.5, gamma=1.0, lam=1.0,
        mask=torch.tensor([[True, True, False], [False, False, False]]),
    )  # fmt: skip
    assert shaped.advantages.tolist() == [[9.5, 8, 0], [0, 0, 0]]
    assert shaped.returns.tolist() == [[10.5, 11, 0], [0, 0, 0]]
    assert shaped.kl.tolist() == [-1, 0]
    assert shaped.moments.tolist() == [2, 8.75, 2 * 0.75**2]


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k1", [1, -2]), ("k2", [0.5, 2]), ("k3", [math.exp(-1), math.exp(2) - 3])],
)
def test_kl_estimators_by_hand(estimator: str, expected: list[float]) -> None:
    shaped = reference.kl_shaped_gae(
        tensor(0, 0), tensor([-1], [-3]), tensor([-2], [-1]), tensor([0], [0]),
        kl_coef=1.0, kl_estimator=estimator,
    )  # fmt: skip
    torch.testing.assert_close(shaped.kl, torch.tensor(expected, dtype=F64))
    torch.testing.assert_close(shaped.advantages[:, 0], -shaped.kl)


def test_token_logprobs_by_hand() -> None:
    logits = torch.log(tensor([1, 2, 5], [1, 1, 0], [math.nan] * 3))  # log 0 = -inf
    targets = torch.tensor([2, 0, -100])
    logprobs, entropy = reference.token_logprobs(logits, targets, return_entropy=True)
    expected_entropy = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    torch.testing.assert_close(logprobs, tensor(math.log(5 / 8), math.log(1 / 2), 0))
    torch.testing.assert_close(entropy, tensor(expected_entropy, math.log(2), 0))
    # A temperature of 1/2 squares the probabilities: 1, 4, 25 of 30.
    hot = reference.token_logprobs(logits[:1], targets[:1], temperature=0.5)
    torch.testing.assert_close(hot, tensor(math.log(25 / 30)))


def test_token_logprobs_gradient_is_finite_and_zero_where_ignored() -> None:
    logits = torch.log(tensor([1, 1, 0], [math.nan] * 3)).requires_grad_()
    logprobs, entropy = reference.token_logprobs(
        logits, torch.tensor([0, -100]), return_entropy=True
    )
    (gradient,) = torch.autograd.grad((logprobs + entropy).sum(), logits)
    torch.testing.assert_close(gradient, tensor([0.5, -0.5, 0], [0, 0, 0]))


def token_arguments(op: str, mask: Tensor | None) -> tuple[dict[str, object], tuple[str, ...]]:
    """Random arguments of an op over `[3, 5]` tokens, and those that have a gradient."""
    x = dict(
        zip(
            ("logprobs", "old_logprobs", "ref_logprobs", "values", "rewards", "entropy"),
            -torch.rand(6, 3, 5, dtype=F64),
            strict=True,
        )
    )
    x = {name: poison(y, mask) for name, y in x.items()}
    if op == "gae":
        arguments = {"rewards": x["rewards"], "values": x["values"], "bootstrap": torch.randn(3)}
        return arguments | {"gamma": 0.9}, ("rewards", "values")
    if op == "kl_shaped_gae":
        names = ("logprobs", "ref_logprobs", "values")
        arguments = {name: x[name] for name in names} | {"scores": torch.randn(3, dtype=F64)}
        return arguments | {"kl_coef": 0.3, "kl_estimator": "k3"}, (*names, "scores")
    if op == "ppo_policy_loss":
        arguments = {name: x[name] for name in ("logprobs", "old_logprobs", "ref_logprobs")}
        arguments |= {"advantages": x["rewards"], "is_weights": x["values"], "kl_coef": 0.3}
        arguments |= {"entropy": x["entropy"], "entropy_coef": 0.1, "dual_clip": 1.2}
        return arguments | {"reduction": "sequence_mean"}, ("logprobs", "entropy")
    arguments = {"values": x["values"], "old_values": x["rewards"], "returns": x["logprobs"]}
    return arguments | {"reduction": "sequence_mean"}, ("values",)


TOKEN_OPS = ("gae", "kl_shaped_gae", "ppo_policy_loss", "ppo_value_loss")


@pytest.mark.parametrize("kind", ["none", "interior", "left"])
@pytest.mark.parametrize("op", TOKEN_OPS)
def test_gradcheck(op: str, kind: str) -> None:
    mask = make_mask(kind, (3, 5), seed=1)
    arguments, wrt = token_arguments(op, mask)

    def function(*xs: Tensor) -> tuple[Tensor, ...]:
        # NaN under the mask would fail gradcheck's numerical side only: put finite numbers there.
        given = arguments | dict(zip(wrt, xs, strict=True)) | {"mask": mask}
        outputs = getattr(reference, op)(**given)
        flat = [y for y in outputs if isinstance(y, Tensor)]
        return tuple(y for y in flat if y.requires_grad)

    inputs = [arguments[name].nan_to_num(0.5, 0.5, -0.5).requires_grad_() for name in wrt]
    assert torch.autograd.gradcheck(function, inputs)


def test_gradcheck_token_logprobs() -> None:
    logits = torch.randn(2, 3, 7, dtype=F64, requires_grad=True)
    targets = torch.tensor([[0, 6, -100], [3, 3, 1]])
    assert torch.autograd.gradcheck(
        lambda z: reference.token_logprobs(z, targets, temperature=0.7, return_entropy=True), logits
    )


def test_gradcheck_pairwise_loss() -> None:
    pairs = torch.randn(2, 5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: reference.pairwise_loss(x[0], x[1], margin=0.3, center_coef=0.1)[0], pairs
    )


@pytest.mark.parametrize("kind", MASKS[1:])
@pytest.mark.parametrize("op", TOKEN_OPS)
def test_masked_tokens_do_not_matter(op: str, kind: str) -> None:
    """NaN under the mask, a packed layout, and one with a mask: all the same numbers."""
    mask = make_mask(kind, (3, 5), seed=1)
    assert mask is not None
    arguments, wrt = token_arguments(op, mask)
    clean = {
        name: x.nan_to_num(0.5, 0.5, -0.5) if isinstance(x, Tensor) else x
        for name, x in arguments.items()
    }
    everything = torch.ones_like(mask)

    def packed(x: object, keep: Tensor) -> object:
        return pack(x, keep) if isinstance(x, Tensor) and x.shape == mask.shape else x

    def result(given: dict, keep: Tensor | None = None) -> dict[str, Tensor]:
        if keep is not None:
            cu_seqlens = cu_seqlens_of(keep)
            given = {name: packed(x, keep) for name, x in given.items()}
            given |= {"cu_seqlens": cu_seqlens, "mask": pack(mask, keep)}
        else:
            given = given | {"mask": mask}
        return run(getattr(reference, op), given, wrt if keep is None else ())

    expected = result(clean)
    for name, x in result(arguments).items():
        torch.testing.assert_close(x, expected[name], rtol=0, atol=0)
        if x.shape == mask.shape:
            assert not x[~mask].any(), name
    for keep in (mask, everything):
        for name, x in result(arguments, keep).items():
            y = expected[name]
            torch.testing.assert_close(x, y[keep] if y.shape == mask.shape else y)
