"""Bytes that a model takes at work, from its configuration alone: it is made without weights.

Weights, gradients and moments are counted parameter by parameter, by the rules by which they are
frozen, rounded and optimized. What a pass keeps is a formula of the configuration, measured on
Llama-like layers (`numbers_kept`).
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ppo_engine.models.adamw import moment_bytes
from ppo_engine.models.attention import SHORT
from ppo_engine.models.freezing import freeze_lower_layers
from ppo_engine.pretrained.adapters import add_lora
from ppo_engine.pretrained.architecture import unwrap
from ppo_engine.pretrained.classifier import value_model_class
from ppo_engine.pretrained.masters import compute_dtypes
from ppo_engine.pretrained.quiet import quiet_transformers
from ppo_engine.settings.schema import ModelConfig
from ppo_kernels.head import chunk_tokens

# Bytes of a quantized weight, with its block's scale: of 8 bits (a row), of 4 (64 weights, and the
# scales in 8 bits; Dettmers et al. 2023, arXiv:2305.14314, section 3).
_QUANTIZED = {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256)}
_ROUNDING = 12  # bytes a weight, of `ppo_kernels.split_master`
# What a layer at work has at once, beside what it keeps, as a share of that (measured: 1.2 to 1.5).
_WORKING = 1.5


def numbers_kept(config: Any) -> int:
    """Numbers a token that a layer keeps for its gradients: what both norms and the output layer
    of attention read, query, key and value, gate and up. Norms and gates are made again
    (`remade`).

    By torch's memory profile 5,800 of SmolLM2-135M, where this is 5,760.
    """
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return 2 * int(config.hidden_size + (heads + groups) * size + inner)


# Those that were counted: which settings help takes some dozens.
_known: dict[tuple[Any, ...], Footprint] = {}


@dataclass(frozen=True)
class Texts:
    """What a pass reads, the largest of some."""

    tokens: int
    length: int  # of a text, about
    wanted: int  # tokens of which log-probs are
    passes: int = 1


@dataclass(frozen=True)
class Footprint:
    """Bytes of one model. All are of the compute dtype's sizes, but for `loaded`."""

    config: Any
    dtype: torch.dtype
    loaded: float  # as it comes, in fp32 or quantized
    fp32: float  # its masters, adapters merged
    widened: float  # in fp32, what probes widen at once: all but the layers, and one of them
    rounding: float  # what stands beside its largest weight while that is rounded
    weights: float  # those that are trained with what is missing to their fp32 masters
    frozen: float  # of these, those that are not trained
    gradients: float
    moments: float
    matrices: float  # its linear layers, in the compute dtype
    head: float  # the gradient of the output layer, in fp32; 0 where it has none
    has_output: bool  # logits over the vocabulary, not a score
    trained_layers: int  # through which gradients go
    adapters: float  # numbers a token that those of a layer keep
    checkpointed: bool

    @classmethod
    def of(
        cls, config: Any, dtype: torch.dtype, settings: ModelConfig | None, *, scores: bool = False
    ) -> Footprint:
        """Of a language model, or one that `scores`, of this Hugging Face `config`, trained by the
        `settings`; frozen where they are None. Raises what a family raises that cannot be made
        without weights."""
        key = config.to_json_string(use_diff=False), dtype, repr(settings), scores
        if key not in _known:
            _known[key] = cls._counted(config, dtype, settings, scores=scores)
        return _known[key]

    @classmethod
    def _counted(
        cls, config: Any, dtype: torch.dtype, settings: ModelConfig | None, *, scores: bool
    ) -> Footprint:
        model, trained = _made(config, settings, scores)
        inner, wanted = unwrap(model), compute_dtypes(unwrap(model), dtype)
        small = 1.0
        if settings is not None and settings.quantization is not None:
            small = _QUANTIZED[settings.quantization]
        linear = {id(x.weight): x.weight for x in inner.modules() if isinstance(x, nn.Linear)}
        head = None if scores else inner.get_output_embeddings()
        ends = {id(inner.get_input_embeddings().weight)} | ({id(head.weight)} if head else set())
        largest = max(x.numel() for x in inner.parameters())
        in_layers = 4.0 * sum(
            x.numel()
            for name, x in inner.base_model.named_parameters()
            if re.search(r"\.\d+\.", f".{name}") and "lora_" not in name
        )
        loaded = fp32 = frozen = masters = gradients = moments = adapters = 0.0
        for name, parameter in inner.named_parameters():
            count, size = parameter.numel(), wanted(name).itemsize
            base = "lora_" not in name
            quantized = small != 1.0 and id(parameter) in linear and id(parameter) not in ends
            if base:
                fp32 += 4 * count
                loaded += count * (small if quantized else 4)
            if id(parameter) not in trained:
                frozen += count * (small if quantized else size)
                continue
            masters += 4 * count  # bf16 and the rest, or fp32
            gradients += count * size
            eight = settings is not None and settings.optimizer.moments == "8bit"
            moments += moment_bytes(parameter, eight)
            if not base and name.endswith("lora_A.default.weight"):
                adapters += len(parameter)
        layers = config.get_text_config().num_hidden_layers
        through = 0 if not trained else layers
        if settings is not None and settings.trainable_layers is not None:
            through = settings.trainable_layers
        return cls(
            config=config.get_text_config(),
            dtype=dtype,
            loaded=loaded,
            fp32=fp32,
            widened=fp32 - in_layers * (1 - 1 / layers),
            rounding=0.0 if dtype == torch.float32 else _ROUNDING * largest,
            weights=frozen + masters,
            frozen=frozen,
            gradients=gradients,
            moments=moments,
            matrices=sum(x.numel() for x in linear.values()) * dtype.itemsize,
            head=4.0 * head.weight.numel() if head is not None and id(head.weight) in trained
            else 0.0,
            has_output=not scores,
            trained_layers=through,
            adapters=adapters / layers,
            checkpointed=settings is not None and settings.gradient_checkpointing is True,
        )  # fmt: skip

    def kept(self, texts: Texts, device: torch.device) -> float:
        """What a pass over `texts` keeps for its gradients, and has at once beside it."""
        layer = self._of_layer(texts, device)
        layers, width = self.trained_layers, self.config.hidden_size * self.dtype.itemsize
        if self.checkpointed:
            return layers * width * texts.tokens + (1 + _WORKING) * layer
        return (layers + _WORKING) * layer

    def working(self, texts: Texts, device: torch.device) -> float:
        """What a pass without gradients has at once."""
        return _WORKING * self._of_layer(texts, device)

    def losses(self, texts: Texts, device: torch.device, *, gradients: bool) -> float:
        """Of log-probs from hidden states: a chunk of logits, and gradients until they are added to
        those that there are (`ppo_kernels.head`)."""
        vocab, wanted = self.config.vocab_size, max(1, texts.wanted)
        if not gradients and device.type == "cpu":
            return 0.0  # tiles that fit into a cache
        chunk = chunk_tokens(wanted, vocab, self.dtype, device, math.inf)
        logits = chunk * vocab * self.dtype.itemsize
        if not gradients:
            return float(logits)
        in_halves = device.type == "cpu" and self.dtype.itemsize == 2 and wanted <= 2 * chunk
        states = 4 * wanted * self.config.hidden_size
        return logits + states + self.head / (2 if in_halves else 1)

    def _of_layer(self, texts: Texts, device: torch.device) -> float:
        numbers = numbers_kept(self.config) + self.adapters
        if device.type == "cpu" and self.dtype == torch.bfloat16 and texts.length <= SHORT:
            numbers += self.config.num_attention_heads * texts.length  # softmax, kept whole
        return float(numbers * texts.tokens * self.dtype.itemsize)


def _made(config: Any, settings: ModelConfig | None, scores: bool) -> tuple[Any, set[int]]:
    """A model without weights, wrapped and frozen as `settings` say, and the ids of the parameters
    that are trained."""
    config = copy.deepcopy(config)  # which making a model changes
    with torch.device("meta"), quiet_transformers():
        if scores:
            config.num_labels = 1
            model: Any = value_model_class(config)._from_config(config, dtype=torch.float32)
        else:
            trust = settings is not None and settings.trust_remote_code
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust
            )
        if settings is None:
            return model, set()
        if settings.lora is not None:
            model = add_lora(
                model,
                settings.lora,
                "SEQ_CLS" if scores else "CAUSAL_LM",
                settings.trainable_layers,
            )
        else:
            freeze_lower_layers(model, settings.trainable_layers)
    return model, {id(x) for x in model.parameters() if x.requires_grad}
