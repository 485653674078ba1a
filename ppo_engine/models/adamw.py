"""`ppo_kernels.adamw` as a torch optimizer, for schedules and checkpoints."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from ppo_kernels import adamw


class AdamW(torch.optim.Optimizer):
    """AdamW over parameters in fp32, and in bf16 with remainders (`pretrained.masters`): the same
    step of both, on the fp32 masters. Moments are fp32."""

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
                    state["step"] = 0
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = torch.zeros_like(parameter, dtype=torch.float32)
                state["step"] += 1
                kind = parameter.dtype, parameter.grad.dtype, state["step"]
                alike[kind].append(parameter)
            for (dtype, _, step), parameters in alike.items():
                states = [self.state[x] for x in parameters]
                halves = dtype != torch.float32
                adamw(
                    parameters,
                    [x.grad for x in parameters],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    remainder=[x.master_remainder for x in parameters] if halves else None,
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
                if place not in state_dict["state"]:
                    continue
                found = state_dict["state"][place]
                self.state[parameter] = {
                    name: found[name].to(parameter.device) for name in ("exp_avg", "exp_avg_sq")
                } | {"step": int(found["step"])}
