"""What every loss says of wrong arguments: the op, the argument, what it must be and what it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ops import implementations_of

import ppo_kernels
from ppo_kernels import ppo_policy_loss

INF, NAN = math.inf, math.nan
IMPLS = pytest.mark.parametrize("impl", implementations_of("ppo_policy_loss"))
X, S = torch.zeros(2, 3), torch.zeros(4)
RIGHT: dict[str, dict[str, Any]] = {
    "ppo_policy_loss": {"logprobs": X, "old_logprobs": X, "advantages": X},
    "ppo_value_loss": {"values": X, "old_values": X, "returns": X},
    "pairwise_loss": {"chosen": S, "rejected": S},
}
WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("ppo_policy_loss", {"advantages": torch.zeros(2, 4)}, ValueError,
     r"ppo_policy_loss: advantages must have the shape of logprobs, \(2, 3\), but has \(2, 4\)"),
    ("ppo_policy_loss", {"advantages": torch.zeros(2, 1)}, ValueError, "advantages must have the"),
    ("ppo_policy_loss", {"mask": torch.ones(2, 3)}, TypeError, "mask must be bool, but is float32"),
    ("ppo_policy_loss", {"logprobs": torch.zeros(2, 3, dtype=torch.long)}, TypeError,
     "logprobs must be .*float32.*, but is int64"),
    ("ppo_policy_loss", {"old_logprobs": [0.0]}, TypeError, "must be a tensor, but is list"),
    ("ppo_policy_loss", {"entropy": torch.zeros(2, 3, device="meta")}, ValueError,
     "entropy must be on the device of logprobs, cpu, but is on meta"),
    ("ppo_policy_loss", {"moments": torch.zeros(2)}, ValueError, r"moments must have shape \(3,\)"),
    ("ppo_policy_loss", {"reduction": "mean"}, ValueError, "or 'sum', but is 'mean'"),
    ("ppo_policy_loss", {"kl_estimator": "k4"}, ValueError, "'k1', 'k2' or 'k3', but is"),
    ("ppo_policy_loss", {"clip_range": -0.1}, ValueError, "clip_range must be .*>= 0.*but is -0.1"),
    ("ppo_policy_loss", {"clip_range": (1.5, 0.2)}, ValueError, "clip_range must be .*<= 1"),
    ("ppo_policy_loss", {"clip_range": (0.1, 0.2, 0.3)}, TypeError, r"a pair \(low, high\)"),
    ("ppo_policy_loss", {"clip_range": None}, TypeError, "clip_range must be a number"),
    ("ppo_policy_loss", {"dual_clip": 1.0}, ValueError, "dual_clip must be .*> 1, but is 1.0"),
    ("ppo_policy_loss", {"kl_coef": NAN}, ValueError, "kl_coef must be .*, but is nan"),
    ("ppo_policy_loss", {"entropy_coef": INF}, ValueError, "entropy_coef must be a finite number"),
    ("ppo_policy_loss", {"entropy_coef": "1"}, TypeError, "entropy_coef must be a number"),
    ("ppo_policy_loss", {"normalizer": -1}, ValueError, "normalizer must be .*>= 0, but is -1"),
    ("ppo_policy_loss", {"normalizer": torch.ones(1)}, ValueError, "a number or a 0-dim tensor"),
    ("ppo_policy_loss", {"cu_seqlens": torch.tensor([0, 3])}, ValueError,
     r"logprobs must be \[N\] where cu_seqlens is given, but has shape \(2, 3\)"),
    ("ppo_policy_loss", {"impl": "fast"}, ValueError, "impl must be"),
    ("ppo_value_loss", {"returns": torch.zeros(3, 2)}, ValueError,
     r"ppo_value_loss: returns must have the shape of values, \(2, 3\), but has \(3, 2\)"),
    ("ppo_value_loss", {"clip_range": -1.0}, ValueError, "clip_range must be .*>= 0"),
    ("ppo_value_loss", {"clip_range": True}, TypeError, "clip_range must be a number, but is True"),
    ("ppo_value_loss", {"normalizer": INF}, ValueError, "normalizer must be a finite number"),
    ("pairwise_loss", {"chosen": torch.zeros(4, 1)}, ValueError,
     r"pairwise_loss: chosen must have shape \[P\], but has \(4, 1\)"),
    ("pairwise_loss", {"rejected": torch.zeros(4, 1)}, ValueError,
     r"pairwise_loss: rejected must have shape \(4,\), but has \(4, 1\)"),
    ("pairwise_loss", {"rejected": torch.zeros(4, dtype=torch.int32)}, TypeError, "is int32"),
    ("pairwise_loss", {"margin": torch.tensor(1.0)}, ValueError, r"margin must have shape \(4,\)"),
    ("pairwise_loss", {"margin": NAN}, ValueError, "margin must be a finite number, but is nan"),
    ("pairwise_loss", {"center_coef": None}, TypeError, "center_coef must be a number"),
]  # fmt: skip


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("op", "wrong", "error", "message"), WRONG)
def test_wrong_arguments(
    op: str, wrong: dict[str, Any], error: type[Exception], message: str, impl: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(ppo_kernels, op)(**RIGHT[op] | {"impl": impl} | wrong)


@IMPLS
@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 4, 2, 6], r"cu_seqlens\[2\] = 2 follows 4"),
        ([1, 6], "from 0 to the number of tokens, 6, but runs from 1 to 6"),
        ([0, 7], "but runs from 0 to 7"),
        ([], r"cu_seqlens must have shape \[B \+ 1\]"),
    ],
)
def test_wrong_boundaries(cu_seqlens: list[int], message: str, impl: str) -> None:
    x = torch.zeros(6)
    with pytest.raises(ValueError, match=message):
        ppo_policy_loss(x, x, x, cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32), impl=impl)
