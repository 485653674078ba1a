"""AdamW, the learning-rate schedule and gradient clipping, the same for every trained model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ppo_engine.errors import UserError
from ppo_engine.memory import is_out_of_memory
from ppo_engine.messages import first_line
from ppo_engine.models.adamw import AdamW
from ppo_engine.models.finite import Losses, NotFiniteError, refuse_bad_gradient
from ppo_engine.pretrained.masters import set_master
from ppo_engine.pretrained.weights import some, weights_not_finite
from ppo_engine.settings.schema import OptimizerConfig
from ppo_engine.spans import span
from ppo_kernels import join_master

_NORM_PIECE = 1 << 18  # elements: 1 MB in fp32


class Learner:
    """A model in training: its optimizer and schedule, and the state to resume from.

    `updates` is the number of steps that the schedule is for; `name` stands in messages.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, updates: int, name: str) -> None:
        self.model = model
        self.config = config
        self.name = name
        self.optimizer = make_optimizer(model, config)
        self.scheduler = make_scheduler(self.optimizer, config, updates)
        self.begun = 0  # steps that may have changed weights, the one that failed included

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @span("optimizer")
    def step(self, losses: Losses = ()) -> Tensor:
        """Take a step with the clipped gradients, clear them; returns the norm before clipping.

        Where it or one of the `losses` is not finite, a NotFiniteError comes before anything has
        changed; the gradients are cleared all the same, for the step after it.
        """
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm, factor = clip_factor(parameters, self.config.max_grad_norm)
        where = f"{self.name} (update {self.updates + 1})"
        try:
            refuse_bad_gradient(where, norm, losses)
        except NotFiniteError:
            self.clear_gradients()
            raise
        self.begun += 1
        try:
            self.optimizer.step(factor)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"Memory ran out in the optimizer of {where} ({first_line(error)}), which cannot "
                "be divided. Keep less for each weight, optimizer.moments=8bit, or train fewer: "
                "lora.rank=16 or trainable_layers."
            ) from error
        self.clear_gradients()
        self.scheduler.step()
        return norm

    def clear_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def updates(self) -> int:
        """Steps that were taken."""
        return self.scheduler.last_epoch

    def refuse_bad_weights(self, step: int) -> None:
        """Raise a UserError where the run's `step` has left a weight that is not finite. Nothing
        undoes that, so it is not skipped either."""
        if bad := weights_not_finite(self.model, trained=True):
            rate = float(self.config.learning_rate)
            raise UserError(
                f"Step {step} has made weights of {self.name} that are not finite: "
                f"{some(set(bad))}. They are not saved. Lower its learning rate ({rate:g}), or "
                "raise its eps."
            )

    def state_dict(self) -> dict[str, Any]:
        """What to resume from: tensors are the model's and the optimizer's own, not copies."""
        return {
            "weights": trainable_state(self.model),
            "remainders": remainders(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Settings are this learner's: a run may be resumed for more steps than it began with, a
        step replayed with another rate. Nor need it be in the same compute dtype: masters and
        moments are the same in both."""
        load_trainable_state(self.model, state["weights"], state.get("remainders", {}))
        groups, base_rates = self.optimizer.param_groups, self.scheduler.base_lrs
        settings = [{x: value for x, value in g.items() if x != "params"} for g in groups]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scheduler.base_lrs = base_rates
        places = zip(groups, settings, base_rates, self.scheduler.lr_lambdas, strict=True)
        for group, own, base, factor in places:
            group |= own
            group["lr"] = base * factor(self.scheduler.last_epoch)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW over the parameters that require gradients; biases and norms are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UserError(f"{type(model).__name__} has no parameter to train: all are frozen.")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        eight_bits=config.moments == "8bit",
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )


def make_scheduler(optimizer: AdamW, config: OptimizerConfig, total_steps: int) -> LambdaLR:
    """Warm-up over `warmup_fraction` of the steps, then decay to 0 at `total_steps`, or constant.

    Every step has a learning rate above 0 (the usual library schedules waste the first one).
    """
    warmup = int(config.warmup_fraction * total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if config.schedule == "linear":
            return 1.0 - progress
        if config.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        return 1.0

    return LambdaLR(optimizer, factor)


def clip_factor(parameters: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """The total norm of the gradients, and what to multiply them by so that it is at most
    `max_norm`, both 0-dim: `clip_grad_norm_`, but in fp32 for gradients of any dtype."""
    grads = [x.grad for x in parameters if x.grad is not None]
    norms: Sequence[Tensor]
    if grads and grads[0].is_cuda:  # one launch
        norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
    else:
        # torch widens all of a bf16 tensor first: in pieces, so that its fp32 copy stays in cache.
        pieces = (piece for x in grads for piece in x.reshape(-1).split(_NORM_PIECE))
        norms = [torch.linalg.vector_norm(piece, dtype=torch.float32) for piece in pieces]
    norm = torch.linalg.vector_norm(torch.stack([*norms] or [torch.zeros((), dtype=torch.float32)]))
    return norm, (max_norm / (norm + 1e-6)).clamp(max=1.0)


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def remainders(model: nn.Module) -> dict[str, Tensor]:
    """What is missing of them to their fp32 masters, by name, where they are bf16."""
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: p.master_remainder for name, p in trained if hasattr(p, "master_remainder")}


def load_trainable_state(
    model: nn.Module, state: dict[str, Tensor], remainders: dict[str, Tensor]
) -> None:
    """Copy saved parameters, with their `remainders` if they have any, into `model`, which must
    train exactly these, in whichever compute dtype."""
    mine = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if mine.keys() != state.keys() or any(mine[n].shape != state[n].shape for n in mine):
        raise UserError(
            "The checkpoint was made by another model or with other trainable layers: resume with "
            "the model and settings of the run's config.yaml."
        )
    for name, parameter in mine.items():
        saved, rest = state[name], remainders.get(name)
        set_master(parameter, saved if rest is None else join_master(saved, rest))
