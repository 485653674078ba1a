"""`ops.assert_products_rule` passes all right roundings of the products, and sees wrong kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ops
import pytest
import torch
from roundings import Rounded
from torch import Tensor

from ppo_kernels import linear_logprobs, linear_ppo_loss, reference

WRT = ("hidden", "weight", "bias")
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
Op = Callable[..., Any]


def of_head(dtype: torch.dtype, shape: tuple[int, int]) -> dict[str, Any]:
    hidden, weight, bias = torch.randn(*shape, 12), torch.randn(71, 12), torch.randn(71)
    given = {"hidden": hidden, "weight": weight, "bias": bias, "temperature": 0.7, "softcap": 6.0}
    return ops.in_dtype(given, dtype) | {"targets": torch.randint(0, 71, shape)}


def of_loss(dtype: torch.dtype) -> dict[str, Any]:
    """Sequences of other lengths, and ratios on both sides of the clip range."""
    shape = (6, 9)
    given = of_head(dtype, shape)
    logprobs = reference.linear_logprobs(**ops.in_dtype(given, torch.float32))
    mask = torch.arange(9) < torch.tensor([[9], [2], [5], [7], [1], [4]])
    padding = 3.0 * ~mask  # all clipped, or none
    return given | {
        "old_logprobs": logprobs + 0.3 * torch.randn(shape) - 0.1 - padding,
        "ref_logprobs": logprobs + torch.randn(shape),
        "advantages": torch.randn(shape) + 0.3 + padding,
        "is_weights": torch.rand(shape) + 0.5,
        "moments": torch.tensor([10.0, 0.2, 9.0]),
        "mask": mask, "clip_range": (0.2, 0.28), "dual_clip": 1.3, "entropy_coef": 0.05,
        "kl_coef": 0.1,
    }  # fmt: skip


def check_loss(op: Op, dtype: torch.dtype) -> None:
    ops.assert_products_rule(op, reference.linear_ppo_loss, of_loss(dtype), WRT)


def check_logprobs(op: Op, dtype: torch.dtype) -> None:
    given = of_head(dtype, (5, 9)) | {"return_entropy": True}
    ops.assert_products_rule(op, reference.linear_logprobs, given, WRT)


# --- Right ones -----------------------------------------------------------------------------------


@HALVES
@pytest.mark.usefixtures("products")
def test_the_right_ops_pass(dtype: torch.dtype) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        check_loss(linear_ppo_loss, dtype)
        check_logprobs(linear_logprobs, dtype)


@HALVES
def test_plain_pytorch_passes(dtype: torch.dtype) -> None:
    """Its products, as this CPU and its libraries make them."""
    for seed in range(3):
        torch.manual_seed(seed)
        check_loss(reference.linear_ppo_loss, dtype)
        check_logprobs(reference.linear_logprobs, dtype)


def rounded_otherwise(name: str, dtype: torch.dtype, seed: int) -> Op:
    """The op of a machine that rounds to `dtype` in its own way, at random, as far as rounding to
    the nearest goes: half a unit."""

    def op(**arguments: Any) -> Any:
        def back(x: Any) -> Any:
            return x.to(torch.float32) if isinstance(x, Tensor) else x

        with Rounded(dtype, seed, units=0.5):
            found = getattr(reference, name)(**ops.in_dtype(arguments, torch.float64))
        return torch.utils._pytree.tree_map(back, found)

    return op


@HALVES
def test_other_roundings_pass(dtype: torch.dtype) -> None:
    for seed in range(100, 106):  # none of the rule's own
        torch.manual_seed(seed)
        check_loss(rounded_otherwise("linear_ppo_loss", dtype, seed), dtype)
        check_logprobs(rounded_otherwise("linear_logprobs", dtype, seed), dtype)


@HALVES
def test_a_ratio_at_the_bound_may_be_clipped_or_not(dtype: torch.dtype) -> None:
    """Where the exact ratio is 1.2 and the bound 1.2, half of the right roundings clip."""
    given = of_head(dtype, (4, 6))
    logprobs = reference.linear_logprobs(**ops.in_dtype(given, torch.float64))
    given |= {"old_logprobs": logprobs - 0.5, "advantages": torch.ones(4, 6)}
    given["old_logprobs"][1, 2] = logprobs[1, 2] - torch.tensor(1.2).double().log()
    exact = ops.in_dtype(given, torch.float64)
    _, stats = reference.linear_ppo_loss(**exact)
    for share in (23 / 24, 1.0):
        clipped = stats.clip_fraction.new_tensor(share)

        def op(clipped: Tensor = clipped, **arguments: Any) -> Any:
            loss, stats = reference.linear_ppo_loss(**arguments)
            return loss, stats._replace(clip_fraction=clipped)

        ops.assert_products_rule(op, reference.linear_ppo_loss, given, WRT)
    with pytest.raises(AssertionError, match="clip_fraction"):
        op = partial(op, clipped=stats.clip_fraction.new_tensor(20 / 24))
        ops.assert_products_rule(op, reference.linear_ppo_loss, given, WRT)


# --- Wrong ones -----------------------------------------------------------------------------------


def with_other(**change: Any) -> Op:
    """The loss of other arguments than those that were given."""
    return lambda **arguments: linear_ppo_loss(**arguments | change)


def without(*names: str) -> Op:
    def op(**arguments: Any) -> Any:
        return linear_ppo_loss(**{n: x for n, x in arguments.items() if n not in names})

    return op


def with_statistics(*names: str, **change: Any) -> Op:
    """The right loss; some of its statistics of other arguments."""

    def op(**arguments: Any) -> Any:
        loss, stats = linear_ppo_loss(**arguments)
        _, wrong = linear_ppo_loss(**arguments | change)
        return loss, stats._replace(**{name: getattr(wrong, name) for name in names})

    return op


def with_gradient_of(name: str, change: Callable[[Tensor], Tensor], op: Op) -> Op:
    def changed(**arguments: Any) -> Any:
        if arguments[name].requires_grad:
            arguments[name] = arguments[name].view_as(arguments[name])
            arguments[name].register_hook(change)
        return op(**arguments)

    return changed


def nowhere_clipped(loss: Op) -> Op:
    return lambda **a: (loss(**a)[0], loss(**a | {"clip_range": (1.0, 9.0)})[1])


def last_token_lost(**arguments: Any) -> Any:
    mask = arguments["mask"].clone()
    mask[0, 8] = False
    return linear_ppo_loss(**arguments | {"mask": mask})


def targets_shifted(**arguments: Any) -> Any:
    return linear_ppo_loss(**arguments | {"targets": arguments["targets"].roll(1)})


def loss_of_the_unclipped(**arguments: Any) -> Any:
    loss, _ = linear_ppo_loss(**arguments | {"clip_range": (1.0, 9.0)})
    return loss, linear_ppo_loss(**arguments)[1]


def first_row_zeroed(x: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(x[:1]), x[1:]))


WRONG_LOSSES = {
    "the clip range's sides changed over": with_other(clip_range=(0.28, 0.2)),
    "clipped above alone": with_other(clip_range=(1.0, 0.28)),
    "clipped below alone": with_other(clip_range=(0.2, 9.0)),
    "not clipped": loss_of_the_unclipped,
    "no clip counted": nowhere_clipped(linear_ppo_loss),
    "no dual clip": with_other(dual_clip=None),
    "the mean over sequences": with_other(reduction="sequence_mean"),
    "the mean with one token more": with_other(normalizer=29.0),
    "the mean over the padding too": with_other(normalizer=54.0),
    "a loss with the padding": with_other(mask=None),
    **{
        f"{name} with the padding": with_statistics(name, mask=None)
        for name in ("approx_kl", "clip_fraction", "ratio_mean", "kl", "entropy")
    },
    "the largest ratio of the first sequence": with_statistics(
        "ratio_max", mask=(torch.arange(54) < 2).view(6, 9)
    ),
    "the other KL estimator": with_other(kl_estimator="k2"),
    "no KL": without("ref_logprobs"),
    "no entropy bonus": with_other(entropy_coef=0.0),
    "the entropy bonus's sign": with_other(entropy_coef=-0.05),
    "not whitened": without("moments"),
    "no importance weights": without("is_weights"),
    "no temperature": with_other(temperature=1.0),
    "no softcap": with_other(softcap=None),
    "no bias": without("bias"),
    "on policy": with_other(old_logprobs=None),
    "ratios of sequences": with_other(ratio_level="sequence"),
    "CISPO": with_other(objective="cispo", dual_clip=None),
    "other targets": targets_shifted,
    "the last token lost": last_token_lost,
    **{
        f"{factor} times the gradient of {name}": with_gradient_of(
            name, lambda x, factor=factor: x * factor, linear_ppo_loss
        )
        for name in WRT
        for factor in (-1.0, 0.0, 0.7, 1.04)
    },
    "a token's hidden state without gradient": with_gradient_of(
        "hidden", first_row_zeroed, linear_ppo_loss
    ),
    "a class without gradient": with_gradient_of("weight", first_row_zeroed, linear_ppo_loss),
}


@HALVES
@pytest.mark.usefixtures("either_cpu")
@pytest.mark.parametrize("wrong", WRONG_LOSSES)
def test_a_wrong_loss_is_seen(dtype: torch.dtype, wrong: str) -> None:
    with pytest.raises(AssertionError, match="err too much"):
        check_loss(WRONG_LOSSES[wrong], dtype)


def entropy_of_temperature_1(**arguments: Any) -> Any:
    logprobs, _ = linear_logprobs(**arguments)
    return logprobs, linear_logprobs(**arguments | {"temperature": 1.0})[1]


def entropy_without_gradient(**arguments: Any) -> Any:
    logprobs, entropy = linear_logprobs(**arguments)
    return logprobs, entropy.detach() + 0 * logprobs


def padded_vocabulary(**arguments: Any) -> Any:
    """Classes of logit 0 beyond the last one (verl #2656)."""
    padded = {
        name: torch.cat((arguments[name], torch.zeros_like(arguments[name][:9])))
        for name in ("weight", "bias")
    }
    return linear_logprobs(**arguments | padded)


WRONG_LOGPROBS = {
    "the entropy of another temperature": entropy_of_temperature_1,
    "the entropy without gradient": entropy_without_gradient,
    "a padded vocabulary": padded_vocabulary,
    "no softcap": lambda **arguments: linear_logprobs(**arguments | {"softcap": None}),
    "1.04 times the gradient": with_gradient_of("hidden", lambda x: 1.04 * x, linear_logprobs),
}


@HALVES
@pytest.mark.usefixtures("either_cpu")
@pytest.mark.parametrize("wrong", WRONG_LOGPROBS)
def test_wrong_logprobs_are_seen(dtype: torch.dtype, wrong: str) -> None:
    with pytest.raises(AssertionError, match="err too much"):
        check_logprobs(WRONG_LOGPROBS[wrong], dtype)
