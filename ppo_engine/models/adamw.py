"""`ppo_kernels.adamw` as a torch optimizer, for schedules and checkpoints."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from ppo_kernels import adamw, zero_moments

_FEWEST_OF_EIGHT_BITS = 4096


class AdamW(torch.optim.Optimizer):
    """AdamW over parameters in fp32, and in bf16 with remainders (`pretrained.masters`): the same
    step of both, on the fp32 masters. Moments are fp32, or with `eight_bits` 8 bits, but of small
    tensors, as in Dettmers et al. 2022 (arXiv:2110.02861)."""

    def __init__(self, params: Any, *, eight_bits: bool = False, **settings: Any) -> None:
        super().__init__(params, settings)
        self._eight_bits = eight_bits

    @torch.no_grad()
    def step(self, grad_scale: float | Tensor = 1.0) -> None:  # type: ignore[override]
        """Of the parameters that have a gradient, times `grad_scale`; no gradient is changed."""
        for group in self.param_groups:
            alike: dict[Any, list[Any]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {"step": 0, **_no_moments(parameter, self._eight_bits)}
                state["step"] += 1
                scaled = "moment_scales" in state
                kind = parameter.dtype, scaled, state["step"], parameter.grad.dtype
                alike[kind].append(parameter)
            for (dtype, scaled, step, _), parameters in alike.items():
                states = [self.state[x] for x in parameters]
                halves = dtype != torch.float32
                adamw(
                    parameters,
                    [x.grad for x in parameters],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    remainder=[x.master_remainder for x in parameters] if halves else None,
                    moment_scales=[state["moment_scales"] for state in states] if scaled else None,
                    step=step,
                    learning_rate=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    grad_scale=grad_scale,
                )

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave, of as many parameters; also that of torch's own AdamW. Torch's
        method would round the moments to the weights' dtype."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group |= {name: saved[name] for name in group.keys() - {"params"}}
            for parameter, place in zip(group["params"], saved["params"], strict=True):
                self.state.pop(parameter, None)
                found = state_dict["state"].get(place)
                if found is not None:
                    moments = {
                        name: found[name].to(parameter.device, copy=True)
                        for name in found.keys() - {"step"}
                    }
                    self.state[parameter] = {"step": int(found["step"]), **moments}


def moment_bytes(parameter: Tensor, eight_bits: bool) -> int:
    """Of the moments of a parameter, which may be on the meta device."""
    moments = _no_moments(parameter.detach().to("meta"), eight_bits)
    return sum(x.nbytes for x in moments.values())


def _no_moments(parameter: Tensor, eight_bits: bool) -> dict[str, Tensor]:
    if eight_bits and parameter.numel() >= _FEWEST_OF_EIGHT_BITS:
        names = ("exp_avg", "exp_avg_sq", "moment_scales")
        return dict(zip(names, zero_moments(parameter), strict=True))
    zeros = torch.zeros_like(parameter, dtype=torch.float32)
    return {"exp_avg": zeros, "exp_avg_sq": zeros.clone()}
