"""One set of base weights for several models: a policy with adapters, and classifiers that have
adapters and heads of their own on the same tensors.

Each model has its own tree of modules, so that none sees another's adapters. What is frozen in all
of them, bases of 8 and 4 bits too, is held once.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_engine.errors import UserError
from ppo_engine.models import freezing, value_model
from ppo_engine.pretrained import architecture, loading
from ppo_engine.pretrained.adapter_folder import unstack
from ppo_engine.pretrained.adapters import train_adapters
from ppo_engine.pretrained.classifier import value_model_class
from ppo_engine.pretrained.quiet import quiet_transformers
from ppo_engine.settings.schema import ModelConfig


class SharedBase:
    """The base of `policy`, a causal language model with adapters in the compute `dtype`."""

    def __init__(
        self,
        policy: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._policy = policy
        self._tokenizer, self._device, self._dtype = tokenizer, device, dtype

    def reward_model(self, path: str, *, trust: bool = False) -> Any:
        """The reward model that the adapters at `path`, a folder or name, make of the base, all of
        it frozen. A UserError where there are none, or where they are for another base."""
        path = loading.resolve(path)
        loading.load_model_config(path, trust=trust)  # which says what is wrong with a path
        _, adapters = unstack(path)
        if not adapters or adapters[-1].task != "SEQ_CLS":
            raise UserError(
                f"share_base needs a reward model that is adapters on the policy's base, and "
                f"{path!r} is none: train it with `ppo-engine reward --model "
                f"{self._name or 'POLICY'} model.lora.rank=16 run.save_adapters=true`, or leave "
                "share_base unset."
            )
        if not _same_place(adapters[-1].base, self._name):
            raise UserError(
                f"share_base needs a reward model on the policy's base, which is "
                f"{self._name or 'a model object'!r}; the adapters in {path!r} are for "
                f"{adapters[-1].base!r}: train them on the policy's, or set policy.path to that."
            )
        return adapters[-1].put_on(self._classifier(seed=0))

    def critic(self, config: ModelConfig, reward_model: Any, seed: int) -> Any:
        """The critic, ready to be trained: it goes on with the adapters and the head of
        `reward_model`, if there is one; else they are new, made from `seed`."""
        if reward_model is None:
            critic = value_model.ready_value_model(
                self._classifier(seed), self._tokenizer, self._device
            )
        else:
            critic = copy.deepcopy(reward_model, _itself(self._policy))
            train_adapters(critic, config.trainable_layers)
            config = replace(config, lora=None, trainable_layers=None)  # as that has done
        return freezing.prepare_for_training(critic, config, "SEQ_CLS", self._dtype)

    @property
    def _name(self) -> str:
        """The folder or name that the base came from; empty where it was a model object."""
        return str(architecture.unwrap(self._policy).name_or_path)

    def _classifier(self, seed: int) -> PreTrainedModel:
        """One of the policy's base, under a new head in float32."""
        plain = copy.deepcopy(self._policy, _itself(self._policy)).unload()
        architecture.keep_activations(plain)
        plain.config.num_labels = 1
        with torch.device("meta"), quiet_transformers():
            model = value_model_class(plain.config)._from_config(copy.deepcopy(plain.config))
        prefix = model.base_model_prefix
        setattr(model, prefix, getattr(plain, prefix))
        model.config = plain.config  # one for all modules, as where a model is loaded
        for name in ("name_or_path", "stored_dtype", "hf_quantizer", "has_new_tokens"):
            if hasattr(plain, name):
                setattr(model, name, getattr(plain, name))
        head = value_model.score_head(model)
        head.to_empty(device=self._device).float()
        value_model.init_head(head, seed)
        if any(x.is_meta for x in itertools.chain(model.parameters(), model.buffers())):
            raise UserError(
                f"share_base cannot be used with {type(plain).__name__}: "
                f"{type(model).__name__} has other weights. Leave it unset."
            )
        return model


def _itself(model: Any) -> dict[int, Any]:
    """What a deep copy of `model` is not to copy, by its `id`: frozen tensors, with what
    bitsandbytes keeps beside them."""
    return {id(x): x for x in _frozen(model)}


def _frozen(model: Any) -> Iterator[Any]:
    for x in itertools.chain(model.parameters(), model.buffers()):
        if not x.requires_grad:
            yield x
    for module in model.modules():
        if hasattr(module, "source_cls"):  # a quantized layer
            yield from (
                vars(module)[name] for name in ("state", "quant_state") if name in vars(module)
            )


def _same_place(one: str, other: str) -> bool:
    """Whether two folders or names are of one model."""
    if Path(one).is_dir() and Path(other).is_dir():
        return Path(one).samefile(other)
    return one == other
