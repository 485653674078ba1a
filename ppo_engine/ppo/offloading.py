"""Which models wait in the memory of the CPU between their uses (`run.offload`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from ppo_engine.errors import UserError
from ppo_engine.models.offload import Offloaded
from ppo_engine.ppo.trunks import Role


def check_offload(wanted: Sequence[str], device: torch.device) -> None:
    """A `UserError` where there is nowhere else to wait."""
    if wanted and device.type == "cpu":
        raise UserError(
            f"run.offload={[*wanted]} would have no effect: it lets models wait in the memory of "
            "the CPU, and this run is on the CPU. Leave it empty, or set run.device=cuda."
        )


def let_wait(
    wanted: Iterable[str],
    frozen: Mapping[str, Sequence[Role]],
    trained: Iterable[Role],
    device: torch.device,
) -> None:
    """Move what the `wanted` ones of the `frozen` models have to the CPU, from where it comes to
    the `device` when they read. Weights that a `trained` model has, too, stay there. A
    `UserError` where there is no such model."""
    for name in wanted:
        if not frozen[name]:
            raise UserError(
                f"run.offload has {name!r}, but no {name} here has weights of its own: with LoRA "
                "the reference is the policy itself, and functions and endpoints have none. Leave "
                "it out."
            )
    waiting = [role for name in dict.fromkeys(wanted) for role in frozen[name]]
    staying = {p.data_ptr() for role in trained for p in role.model.parameters()}
    for role in waiting:
        role.reader.offloaded = Offloaded(role.model, device, staying)
