"""What a run will take, phase by phase, from its settings and the models' configurations: before
any weight is loaded.

A phase is told as it is once optimizers have their moments, from the second step on. On a CPU the
process keeps what it has freed, as a command does (`memory.keep_freed_memory`), so that loading,
after which it is given back, leaves fp32 copies behind until its end; whether large tensors have a
heap of their own, or malloc's room, is `Place.heap`. Pages that a phase has left there, and that a
later one does not need, are not counted. Every response is taken to be as long as it may be.

Not counted: held-out prompts beyond a step's, a reward function, what families that are sampled by
`generate` keep, and whether a reward model's frozen layers are the policy's, which only weights
tell.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from ppo_engine.models.footprint import Footprint, Texts
from ppo_engine.models.reader import enough
from ppo_engine.pretrained import loading
from ppo_engine.pretrained.architecture import find_base
from ppo_engine.pretrained.quiet import quiet_transformers
from ppo_engine.rollout.decoder import STAYING, STEPS, heads_of
from ppo_engine.rollout.sampling import ALIGNED, SHARE_OF_FREE
from ppo_engine.rollout.schedule import row_bucket
from ppo_engine.rollout.slots import Heads, bytes_per_token
from ppo_engine.settings.schema import PPOConfig, RewardModelConfig, SFTConfig
from ppo_engine.training.forecast_roles import (
    Place,
    Role,
    critic_role,
    frozen_roles,
    held_by,
    trained_role,
)
from ppo_kernels import can_pack

# Measured on a CPU (docs/choosing.md). What one pass, and several of a mini-batch, take beside what
# the largest has, as malloc's room is in pieces: between those of one stand the gradients of
# another. And with a heap for large tensors, where the gradients of a mini-batch's only pass take
# the room of what it keeps, as that is freed, but for a part.
_IN_PIECES, _IN_PIECES_OF_SEVERAL = 0.2, 0.75
_IN_HEAP, _BESIDE_KEPT = 0.05, 1 / 3

_OFFLOADED = {"reference": "reference", "reward": "reward model"}  # as `run.offload` calls them

_known_heads: dict[str, list[Heads]] = {}  # by the model's configuration


class Lengths(NamedTuple):
    """Of the data's texts, in tokens: prompts of `ppo`, else whole texts."""

    mean: float
    longest: int
    trained: float = 1.0  # share of the tokens that have a loss
    each: int = 1  # texts of an example


@dataclass(frozen=True)
class Phase:
    """A phase, and what is there within it: bytes by what they are."""

    name: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Forecast:
    """The phases of a run in their order."""

    phases: tuple[Phase, ...]

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    def __getitem__(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)


def forecast(config: Any, lengths: Lengths, place: Place) -> Forecast:
    """Of `ppo` and its relatives, `sft` or `reward`. Raises what a model's family raises that
    cannot be made without weights."""
    if isinstance(config, PPOConfig):
        return _of_ppo(config, lengths, place)
    return _of_supervised(config, lengths, place)


def _of_supervised(
    config: SFTConfig | RewardModelConfig, lengths: Lengths, place: Place
) -> Forecast:
    scores = isinstance(config, RewardModelConfig)
    settings = config.reward if isinstance(config, RewardModelConfig) else config.sft
    role = trained_role("model", config.model, place, scores=scores, save=config.run.save_dtype)
    most = config.data.max_tokens
    lengths = lengths._replace(mean=min(lengths.mean, most), longest=min(lengths.longest, most))
    tokens = settings.batch_size * lengths.each * lengths.mean
    limit = _limit(settings, role.of, _seen(config, place))
    longest = lengths.each * lengths.longest
    texts = _texts(tokens, limit, longest, lengths.mean, lengths.trained)
    held = held_by([role], place) | {"moments": role.of.moments}
    return Forecast(
        (
            _loading([role], place),
            Phase("update", held | _pass(role, texts, place)),
            Phase("save", held | {"copies to be saved": role.saved}),
        )
    )


def _of_ppo(config: PPOConfig, lengths: Lengths, place: Place) -> Forecast:
    settings, save = config.ppo, config.run.save_dtype
    policy = trained_role("policy", config.policy, place, save=save)
    frozen = frozen_roles(config, policy, place)
    trained, roles = [policy], [policy, *frozen]
    if settings.has_critic:
        trained.append(critic_role(config, policy, place))
        roles.append(trained[-1])

    new = config.generation.max_new_tokens
    new *= config.environment.max_turns if config.environment.function else 1
    seen = _seen(config, place)
    limit, responses = _limit(settings, policy.of, seen), settings.rollout_batch_size
    length, longest = lengths.mean + new, lengths.longest + new
    wanted = new / length
    whole = _texts(responses * length, limit, longest, length, wanted)
    mini = min(settings.mini_batch_size, responses)
    part = _texts(mini * length, limit, longest, length, wanted)

    away = {_OFFLOADED[name] for name in config.run.offload}
    moments = {"moments": sum(role.of.moments for role in trained)}
    held = held_by([role for role in roles if role.name not in away], place) | moments
    back = {role.name: role.held for role in roles if role.name in away}
    slots = _slots(config, responses, longest, seen, sum(held.values()))
    staying = place.device.type == "cuda" and slots <= STAYING
    in_slots = {"keys and values": slots}
    kept = {"kept states": _kept_states(trained, responses * length)}
    after = held | kept | (in_slots if staying else {})
    load = _loading(roles, place, away)
    generate = Phase("generate", held | in_slots | _sampling(policy.of, responses, place))
    after["freed by generate"] = _left_behind(load, generate, held, place)
    passing = {"a pass": max(role.of.working(whole, place.device) for role in roles)}
    both = 2 if frozen and frozen[0].name == "reference" else 1
    of_head = policy.of.losses(whole, place.device, gradients=False)
    states = both * whole.wanted * policy.of.config.hidden_size * place.dtype.itemsize
    heads = {"log-probs": of_head + states}
    updates = [_pass(role, part, place) for role in trained]
    phases = (
        load,
        generate,
        Phase("score", after | _of(back, "reward model") | passing),
        Phase("advantages", after | _of(back, "reference") | passing | heads),
        Phase("update", after | max(updates, key=lambda parts: sum(parts.values()))),
        Phase("save", after | {"copies to be saved": sum(role.saved for role in trained)}),
    )
    return Forecast(phases)


def _of(parts: Mapping[str, float], name: str) -> dict[str, float]:
    return {name: parts[name]} if name in parts else {}


def _loading(roles: list[Role], place: Place, away: Collection[str] = ()) -> Phase:
    """A GPU takes again what was freed; on a CPU pieces in between are smaller than what comes.
    Those that are `away` leave it as soon as they are loaded."""
    beside = [role.beside + (role.held if role.name in away else 0.0) for role in roles]
    every, roles = roles, [role for role in roles if role.name not in away]
    most = sum(beside) if place.device.type == "cpu" else max(beside)
    rounding = max(role.rounding for role in every)
    return Phase("load", held_by(roles, place) | {"copies in float32": most + rounding})


def _left_behind(load: Phase, generate: Phase, held: Mapping[str, float], place: Place) -> float:
    """Of malloc: pages of what `generate` has freed. What comes after it takes as readily the room
    of what was freed and given back after loading, as far as there is some."""
    if place.device.type != "cpu" or place.heap:
        return 0.0
    before = sum(held.values())
    return min(generate.total - before, max(0.0, load.total - before))


def _seen(config: Any, place: Place) -> Place:
    """What sizes follow from: a deterministic run does not look at the memory."""
    return place._replace(free=float(sys.maxsize)) if config.run.deterministic else place


def _limit(settings: Any, of: Footprint, place: Place) -> tuple[int, float]:
    """Tokens and rows of a pass; the first is chosen when its model is there."""
    tokens = settings.micro_batch_tokens
    if tokens == "auto":
        in_use = max(of.weights, of.loaded) if place.device.type == "cpu" else of.weights
        free = place.free - in_use
        tokens = enough(of.config, of.dtype, place.device, free)
    return tokens, settings.micro_batch_size or math.inf


def _texts(
    tokens: float, limit: tuple[int, float], longest: int, length: float, wanted: float
) -> Texts:
    """The largest of the passes over so many tokens, which are about even (`reader.plan`)."""
    most = min(max(limit[0], longest), limit[1] * length)
    passes = max(1, math.ceil(tokens / most))
    of_pass = max(tokens / passes, longest)
    return Texts(math.ceil(of_pass), math.ceil(length), math.ceil(of_pass * wanted), passes)


def _pass(role: Role, texts: Texts, place: Place) -> dict[str, float]:
    """Of a pass that makes gradients."""
    of, gradients = role.of, role.of.gradients
    kept = of.kept(texts, place.device)
    logits = of.losses(texts, place.device, gradients=True) if of.has_output else 0.0
    in_pieces = 0.0
    if place.heap:
        in_pieces = _IN_HEAP
        if texts.passes == 1:
            gradients -= (1 - _BESIDE_KEPT) * min(gradients, kept + logits)
    elif place.device.type == "cpu":
        in_pieces = _IN_PIECES_OF_SEVERAL if texts.passes > 1 else _IN_PIECES
    return {
        f"gradients of the {role.name}": gradients,
        "a pass": kept,
        "room in pieces": in_pieces * kept,
        "logits": logits,
    }


def _sampling(of: Footprint, rows: int, place: Place) -> dict[str, float]:
    """Beside the slots: logits, and on a CPU the packed weights (`rollout.products`)."""
    logits = 2 * rows * of.config.vocab_size * place.dtype.itemsize
    packed = place.device.type == "cpu" and can_pack(place.dtype)
    return {"logits": logits} | ({"packed weights": of.matrices} if packed else {})


def _slots(config: PPOConfig, rows: int, longest: int, place: Place, held: float) -> float:
    """Keys and values of as many rows as there is room for."""
    path, trust = loading.resolve(config.policy.path), config.policy.trust_remote_code
    heads = _heads(loading.load_model_config(path, trust=trust), trust)
    each = -(-longest // ALIGNED) * ALIGNED * bytes_per_token(heads, place.dtype)
    budget = config.generation.kv_cache_gib
    room = SHARE_OF_FREE * (place.room - held) if budget is None else budget * 2**30
    return float(each * row_bucket(rows, max(1, int(room / each)), STEPS[place.device.type]))


def _heads(config: Any, trust: bool) -> list[Heads]:
    key = config.to_json_string(use_diff=False)
    if key not in _known_heads:
        with torch.device("meta"), quiet_transformers():
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust)
        find_base(model)
        _known_heads[key] = heads_of(model, torch.device("meta"))
    return _known_heads[key]


def _kept_states(trained: list[Role], tokens: float) -> float:
    """Of the layers that are never trained, for each model that has its own (`ppo.trunks`)."""
    found = 0.0
    for role in trained:
        if role.of.trained_layers < role.of.config.num_hidden_layers:
            apart = role.name == "policy" or role.held == role.of.weights
            found += apart * tokens * role.of.config.hidden_size * role.of.dtype.itemsize
    return found
