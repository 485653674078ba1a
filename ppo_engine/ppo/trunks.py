"""Frozen lower layers in a step: whoever shares them, they are run once for each text.

With `trainable_layers`, policy, reference, critic and reward model hold the same tensors in their
lower layers, where they come from one checkpoint (`freezing.share_frozen_parameters`). Each of them
reads the texts of a rollout, policy and critic in every epoch. Here the states above these layers
are kept as long as the rollout is learned from: tokens times the hidden size, in the dtype in which
the layers give them, for each different number of frozen layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ppo_engine.errors import UserError
from ppo_engine.models import probes
from ppo_engine.models.experts import asks_for_balance
from ppo_engine.models.offload import address
from ppo_engine.models.reader import Reader
from ppo_engine.models.token_rows import TokenRows, scored
from ppo_engine.models.trunk import Kept, Level, Trunk
from ppo_engine.models.work import counting
from ppo_engine.pretrained.architecture import decoder_layers, states_of, unwrap


class Role(Protocol):
    """A model at work, perhaps with adapters, and what reads with it."""

    model: Any

    @property
    def reader(self) -> Reader: ...


class Trunks:
    """Those of models that are `trained`, shared by them and the `frozen` ones.

    Where no trained model has frozen layers, nothing is kept.
    """

    def __init__(self, trained: Sequence[Role], frozen: Sequence[Role]) -> None:
        self._trained = [role for role in trained if _frozen_layers(role)]
        self._roles = [*trained, *frozen] if self._trained else []
        # As they are trained: without its adapters, all of a model would be frozen.
        self._frozen = [
            parameter
            for role in self._roles
            for parameter in role.model.parameters()
            if not parameter.requires_grad
        ]
        self._trunks: list[tuple[Reader, Trunk]] = []
        self._kept: list[Kept] = []
        self._weights: list[tuple[int, int]] | None = None  # of which these are
        self._rollout: object = None

    @property
    def keep(self) -> bool:
        """Whether any states are kept."""
        return bool(self._trained)

    @contextmanager
    def of(self, rollout: object) -> Iterator[None]:
        """Inside, what is found of texts of this `rollout` is kept and, where it was kept, taken.
        Another rollout, or other weights, begin anew."""
        if not self.keep:
            yield
            return
        # What changes a weight where it lies raises its version.
        weights = [(address(parameter), parameter._version) for parameter in self._frozen]
        if weights != self._weights:
            self.clear()
            with counting(None):
                self._find()
            self._weights = weights
        if rollout is not self._rollout:
            self.clear()
            self._rollout = rollout
        try:
            for reader, trunk in self._trunks:
                reader.trunk = trunk
            yield
        finally:
            for reader, _ in self._trunks:
                reader.trunk = None

    def clear(self) -> None:
        """Free what was kept."""
        self._rollout = None
        for kept in self._kept:
            kept.clear()

    def _find(self) -> None:
        """Who shares which layers: a level for each trained model whose frozen layers are no other
        one's, and for each model all levels from which it can be read."""
        levels: dict[Role, list[Level]] = {role: [] for role in self._roles}
        self._kept = []
        for owner in self._trained:
            depth = _frozen_layers(owner)
            if any(level.depth == depth for level in levels[owner]):  # another's is the same
                continue
            level = Level(depth, Kept())
            self._kept.append(level.kept)
            for role in self._roles:
                with role.reader.on_device():
                    if _shares(owner, role, depth) and _continues(owner, role, depth):
                        levels[role].append(level)
        self._trunks = [
            (role.reader, Trunk(_layers(role), found)) for role, found in levels.items() if found
        ]


def _layers(role: Role) -> nn.ModuleList:
    return decoder_layers(unwrap(role.model))


def _frozen_layers(role: Role) -> int:
    """How many of the lowest decoder layers are frozen, with the embeddings."""
    if unwrap(role.model).get_input_embeddings().weight.requires_grad:
        return 0
    try:
        layers = _layers(role)
    except UserError:  # none were found
        return 0
    trained = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    return [*trained, True].index(True)


def _shares(owner: Role, role: Role, depth: int) -> bool:
    """Whether the frozen parameters of `owner`, up to that depth, are those of `role`."""
    above = {id(x) for layer in _layers(owner)[depth:] for x in layer.parameters()}
    theirs = dict(unwrap(role.model).base_model.named_parameters())
    return all(
        name in theirs
        and theirs[name].data_ptr() == parameter.data_ptr()
        and not theirs[name].requires_grad
        for name, parameter in unwrap(owner.model).base_model.named_parameters()
        if id(parameter) not in above and not parameter.requires_grad
    )


def _continues(owner: Role, role: Role, depth: int) -> bool:
    """Whether a model, from the states of `owner` on, gives what it gives by itself: not where more
    than these goes from layer to layer, or something below them is trained."""
    layers = _layers(role)
    # The balance loss counts the experts of all layers.
    if asks_for_balance(unwrap(role.model)) or any("forward" in vars(x) for x in layers):
        return False
    ids = probes.probe_ids(owner.model)[0].tolist()
    texts, others = [ids, ids[1:-1]], [ids[::-1], ids[-2:0:-1]]
    # What the readers' `packs` reads is read before any trunk is theirs.
    rows, other = (role.reader.stack([scored(x) for x in found]) for found in (texts, others))
    of_owner = owner.reader.stack([scored(text) for text in texts])
    level = Level(depth, Kept())
    with torch.enable_grad():  # which shows whether anything below is trained
        _read(owner, of_owner, level)
    if level.kept.find(texts) is None:
        return False
    with torch.no_grad():
        expected = _read(role, rows)
        _read(role, other)  # so that nothing of `rows` remains in the model itself
        try:
            found = _read(role, rows, level)
        except (AttributeError, KeyError, RuntimeError, TypeError):  # a family's own
            return False
    # As in `probes.check_repeatable`.
    limit = torch.finfo(expected.dtype).eps ** 0.5 * expected.norm()
    return bool((found - expected).norm() <= limit)


def _read(role: Role, rows: TokenRows, *levels: Level) -> Tensor:
    """The states or logits of all tokens, `[tokens, ...]`."""
    reader = role.reader
    try:
        reader.trunk = Trunk(_layers(role), levels)
        output = reader.read(rows)
        found = states_of(output)
        return found[rows.mask]
    finally:
        reader.trunk = None
