"""The sides of `bench/passes.py`: what makes the blocks around the matrix products of a pass."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AttentionInterface

from ppo_engine.models import fused
from ppo_engine.models.attention import ATTENTION
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.token_rows import Row, predicting
from ppo_engine.pretrained import architecture

PLAIN, OURS, COMPILE, LIGER = "plain", "ours", "compile", "liger"
SIDES = {
    PLAIN: "transformers' own modules",
    OURS: "the kernels of `models.fused`, as the engine has it",
    COMPILE: "plain, each decoder layer by `layer.compile(dynamic=True)`, attention outside",
    LIGER: "Liger's `rms_norm`, `rope` and `swiglu` in the places of ours",
}
Gradients = Mapping[str, Tensor]  # by the parameter's name, on the CPU


class Sides:
    """One update pass as each side runs it: the policy's loss over packed rows, forward and
    backward, no optimizer. All share the model, and the engine's attention, head and loss."""

    def __init__(self, policy: LanguageModel, texts: int, prompt: int, response: int) -> None:
        """Over so many `texts` of random tokens, each of a `prompt` and a `response` so long."""
        self._policy = policy
        rows = random_rows(policy.model.config.vocab_size, texts, prompt, response)
        self.lengths = [len(row.ids) for row in rows]
        self.targets = texts * response
        self._rows = policy.reader.stack(rows)
        # Of one sign: gradients that nearly cancel would be little but rounding.
        self._advantages = torch.ones(self.targets, device=policy.device)
        ends = range(0, self.targets + 1, response)
        self._cu_seqlens = torch.tensor(ends, device=policy.device)
        self._layers: Any = architecture.decoder_layers(architecture.unwrap(policy.model))
        self._compiled: list[Callable[..., Any]] = []  # of each layer, once they are asked for

    def call(self, name: str) -> Callable[[], None]:
        """A pass of that side, whose gradients are dropped."""
        return lambda: self._pass(name, lambda: None)

    def gradients(self, name: str) -> Gradients:
        """Those of a pass of that side."""
        parameters = dict(self._policy.model.named_parameters())
        found: dict[str, Tensor] = {}

        def keep() -> None:
            for parameter, x in parameters.items():
                if x.grad is not None:
                    found[parameter] = x.grad.cpu()

        self._pass(name, keep)
        return found

    def _pass(self, name: str, keep: Callable[[], None]) -> None:
        contexts = {PLAIN: self._plain, OURS: nullcontext, COMPILE: self._compile, LIGER: _liger}
        model = self._policy.model.train()
        try:
            with contexts[name]():
                loss, *_ = self._policy.policy_loss(
                    self._rows, None, self._advantages, 1.0,
                    cu_seqlens=self._cu_seqlens, normalizer=float(self.targets),
                )  # fmt: skip
                loss.backward()
            keep()
        finally:
            model.zero_grad()

    def _plain(self) -> AbstractContextManager[object]:
        nothing = SimpleNamespace(active=nullcontext, remade=SimpleNamespace(active=nullcontext))
        return mock.patch.object(self._policy.reader, "_fused", nothing)

    @contextmanager
    def _compile(self) -> Iterator[None]:
        if not self._compiled:
            for layer in self._layers:
                layer.compile(dynamic=True)
            self._compiled = [layer._compiled_call_impl for layer in self._layers]
        # Traced, it would be compiled anew for other lengths of texts.
        outside = torch.compiler.disable(AttentionInterface()[ATTENTION])
        known = AttentionInterface._global_mapping
        try:
            for layer, compiled in zip(self._layers, self._compiled, strict=True):
                layer._compiled_call_impl = compiled
            with self._plain(), mock.patch.dict(known, {ATTENTION: outside}):
                yield
        finally:
            for layer in self._layers:
                layer._compiled_call_impl = None


def random_rows(vocabulary: int, texts: int, prompt: int, response: int) -> list[Row]:
    """Rows of random tokens, of which those of the response are predicted."""
    trained = [False] * prompt + [True] * response
    ids = torch.randint(vocabulary, (texts, len(trained))).tolist()
    return [predicting(text, trained) for text in ids]


def reason_to_skip(name: str, device: torch.device) -> str:
    """Why a side cannot run here; '' where it can."""
    if name != LIGER:
        return ""
    if device.type != "cuda":
        return "its kernels are for GPUs"
    found = importlib.util.find_spec("liger_kernel")
    return "" if found else "it is not installed: pip install liger-kernel"


def _liger() -> AbstractContextManager[object]:
    # Here, as it is optional and needs a GPU.
    from liger_kernel.transformers.functional import liger_rms_norm, liger_rope, liger_swiglu

    def rms_norm(x: Tensor, weight: Tensor, *, eps: float, added: float) -> Tensor:
        found: Tensor = liger_rms_norm(x, weight, eps, added)
        return found

    return mock.patch.multiple(
        fused, rms_norm=rms_norm, rotary_embedding=liger_rope, swiglu=liger_swiglu
    )


def difference(found: Gradients, expected: Gradients) -> float:
    """The largest ‖found - expected‖ / ‖expected‖ of any kind of parameter, such as
    "layers.mlp.up_proj.weight", all layers together: in one alone there may be little but
    rounding."""
    sums: dict[str, Tensor] = {}
    for name, wanted in expected.items():
        kind = ".".join(part for part in name.split(".") if not part.isdigit())
        squares = [x.float().square().sum() for x in (found[name] - wanted, wanted)]
        sums[kind] = sums.get(kind, 0) + torch.stack(squares)
    return max(float((apart / size).sqrt()) for apart, size in sums.values())
