"""The models of a run, from its settings and their configurations: what each holds, which weights
are another's too, and what is there for a moment while it is loaded or saved. Bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ppo_engine.models.footprint import Footprint
from ppo_engine.pretrained import loading
from ppo_engine.pretrained.storage import named_dtype
from ppo_engine.rewards.sources import configured_sources
from ppo_engine.settings.schema import ModelConfig, PPOConfig, resolved

_LIBRARIES = "Python and its libraries"


class Place(NamedTuple):
    """Where a run is to be, before it has loaded anything; in bytes."""

    device: torch.device
    dtype: torch.dtype
    free: float  # what could be allocated
    used: float = 0.0  # by this process
    heap: bool = False  # of large tensors (`memory.keep_freed_memory`)

    @property
    def room(self) -> float:
        return self.free + self.used


class Role(NamedTuple):
    """A model of the run: what it holds, and what is there beside it while it is loaded."""

    name: str
    of: Footprint
    held: float
    beside: float
    rounding: float = 0.0  # beside it, while its largest weight is rounded
    saved: float = 0.0  # a copy that is made to save it, on the CPU


def trained_role(
    name: str,
    settings: ModelConfig,
    place: Place,
    *,
    path: str = "",
    scores: bool = False,
    save: str = "auto",
) -> Role:
    """A model that is trained, from the settings' path or another one."""
    path = loading.resolve(path or settings.path)
    config = loading.load_model_config(path, trust=settings.trust_remote_code)
    of = Footprint.of(config, place.dtype, settings, scores=scores)
    # As it comes in fp32; in fp32 it stays.
    beside = 0.0 if place.dtype == torch.float32 or settings.quantization else of.loaded
    stored = named_dtype(config) or torch.float32
    dtype = {"auto": stored}.get(save) or getattr(torch, save)
    saved = 0.0
    if place.device.type == "cpu":
        saved += of.fp32 if settings.lora is not None else 0.0  # merged
        if settings.lora is not None or dtype != place.dtype:
            saved += of.fp32 / 4 * dtype.itemsize
    rounding = of.rounding
    if beside and settings.lora is not None and not scores:  # it comes as it computes
        beside, rounding = of.widened, 0.0
    return Role(name, of, of.weights, beside, rounding, saved)


def frozen_roles(config: PPOConfig, policy: Role, place: Place) -> list[Role]:
    """The reference, where it is no policy without adapters, and reward models."""
    found, shared = [], config.share_base
    if config.policy.lora is None:  # what is never trained is the policy's
        of = policy.of
        found.append(Role("reference", of, of.gradients, of.frozen))
    for source in configured_sources(config.reward):
        if source.path and shared:  # adapters about as large as the policy's, and a head
            found.append(Role("reward model", policy.of, policy.of.gradients, 0.0))
        elif source.path:
            path, trust = loading.resolve(source.path), config.reward.trust_remote_code
            base = loading.load_model_config(path, trust=trust)
            of = Footprint.of(base, place.dtype, None, scores=True)
            beside = 0.0 if place.dtype == torch.float32 else of.loaded
            found.append(Role("reward model", of, of.weights, beside, of.rounding))
    return found


def critic_role(config: PPOConfig, policy: Role, place: Place) -> Role:
    """The critic: what it never trains is the policy's or the reward model's, whose weights it
    starts from."""
    if config.share_base:
        settings = resolved(config).critic
        role = trained_role("critic", settings, place, path=config.policy.path, scores=True)
        return role._replace(held=role.of.weights - role.of.frozen, beside=0.0, rounding=0.0)
    sources = [source.path for source in configured_sources(config.reward) if source.path]
    path = config.critic.path or next(iter(sources), "") or config.policy.path
    role = trained_role(
        "critic", config.critic, place, path=path, scores=True, save=config.run.save_dtype
    )
    held, beside = role.held, role.beside
    if not config.critic.path:
        if sources:  # copied in the compute dtype, then widened
            held -= role.of.frozen
            beside += 0.0 if place.dtype == torch.float32 else role.of.loaded / 2
        else:
            held -= min(role.of.frozen, policy.of.frozen)
            beside += role.of.loaded if config.policy.lora is not None else 0.0  # merged
    elif path == config.policy.path:
        held -= min(role.of.frozen, policy.of.frozen)
    return role._replace(held=held, beside=beside)


def held_by(roles: list[Role], place: Place) -> dict[str, float]:
    """What is there from the first step to the last."""
    libraries = {_LIBRARIES: place.used} if place.device.type == "cpu" else {}
    found: dict[str, float] = {}
    for role in roles:
        found[role.name] = found.get(role.name, 0.0) + role.held
    return libraries | {name: held for name, held in found.items() if held}
