"""Causal language models: the policy, its frozen reference, what supervised fine-tuning trains.

They read rows of tokens (`TokenRows`), and give log-probs and losses of the trained ones.
Sampling from them is in `rollout.generation`.
"""

from __future__ import annotations

import copy
import datetime
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ppo_engine.errors import UserError
from ppo_engine.models import probes
from ppo_engine.models.experts import BalanceLoss
from ppo_engine.models.freezing import prepare_for_training, share_frozen_parameters
from ppo_engine.models.output_head import find_output_head
from ppo_engine.models.reader import Reader
from ppo_engine.models.token_rows import TokenRows
from ppo_engine.models.work import passing
from ppo_engine.pretrained import adapters, architecture, generation_config, loading, masters
from ppo_engine.pretrained.storage import in_fp32
from ppo_engine.pretrained.weights import read_language_model, refuse_not_finite_weights
from ppo_engine.settings.schema import GenerationConfig, ModelConfig
from ppo_engine.spans import span
from ppo_engine.text.renderer import Renderer
from ppo_engine.text.tokenizer import separate_pad_from_eos
from ppo_kernels import linear_logprobs, linear_ppo_loss, ppo_policy_loss, token_logprobs
from ppo_kernels.reference import PolicyStats


class LanguageModel:
    """A causal language model with its tokenizer, device and compute dtype.

    Weights are in `dtype`; those that are trained in bf16 have the rest of their fp32 masters
    beside them (`pretrained.masters`).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: torch.device,
        dtype: torch.dtype,
        template_arguments: Mapping[str, Any] | None = None,
        date: datetime.date | None = None,
    ) -> None:
        """Of a `model` in fp32, whose weights `open` then turns into `dtype`, or frozen in that.
        `template_arguments` and `date` go to the chat template, see `text.template`."""
        architecture.find_base(model)
        self.model = model.to(device)
        self.tokenizer = tokenizer
        self.device = device
        self.dtype = dtype
        loading.resize_embeddings(model, tokenizer)
        self.renderer = Renderer(
            tokenizer,
            end_ids=generation_config.declared_ends(model.generation_config, model.config),
            arguments=template_arguments,
            date=date,
        )
        generation_config.settle(model, tokenizer, self.renderer.end_ids)
        architecture.make_repeatable(model)
        self.balance = BalanceLoss.of(model)
        with masters.computing_in_fp32(model):
            probes.check_causal(model)
            self.heeds_padding = probes.heeds_padding(model)
            self._head = find_output_head(model, tokenizer, device)

    @classmethod
    def open(
        cls,
        model: str | Any,
        config: ModelConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **template: Any,
    ) -> LanguageModel:
        """One that is ready to be trained, from a Hugging Face name or folder (`config.path` where
        `model` is empty) or from a loaded model with its tokenizer; `template` as its
        constructor takes it."""
        if isinstance(model, str):
            path = loading.resolve(model or config.path)
            trust = config.trust_remote_code
            if architecture.is_classifier(loading.load_model_config(path, trust=trust)):
                raise UserError(f"{path!r} is a classifier: give a causal language model.")
            tokenizer = tokenizer or loading.tokenizer_at(path, trust=trust)
            options = loading.load_options(config, device, dtype)
            if config.lora is not None and config.quantization is None:
                options["dtype"] = dtype  # frozen, it needs no masters, nor the memory for them
            model = read_language_model(path, options)
        elif tokenizer is None:
            raise UserError("A model object needs its tokenizer: pass tokenizer=….")
        else:
            loading.check_given(model, config)
            separate_pad_from_eos(tokenizer)
            refuse_not_finite_weights(model, "The given model")
            model = in_fp32(model)
        opened = cls(model, tokenizer, device=device, dtype=dtype, **template)
        opened.model = prepare_for_training(model, config, "CAUSAL_LM", dtype).eval()
        opened.reader = Reader(opened.model)  # now, with its adapters: it counts what is trained
        return opened

    def save(
        self,
        folder: str | Path,
        dtype: str = "auto",
        sampling: GenerationConfig | None = None,
        *,
        as_adapters: bool = False,
    ) -> None:
        """Write weights or adapters, and tokenizer, as `loading.save_model`; with `sampling`, that
        by which it was trained takes the place of the checkpoint's (adapters have their base's)."""
        loading.save_model(self.model, self.tokenizer, folder, dtype, as_adapters=as_adapters)
        if sampling is not None and not as_adapters:
            model = architecture.unwrap(self.model)
            generation_config.as_sampled(model, sampling).save_pretrained(folder)

    def reference(self) -> LanguageModel | None:
        """A frozen copy, without masters; layers that this one never trains are shared with it.

        None with adapters: the model without them is the reference (`without_adapter`).
        """
        if adapters.is_adapted(self.model):
            return None
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model).requires_grad_(False)
        share_frozen_parameters(twin.model, self.model)
        twin.reader = Reader(twin.model)
        return twin

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The weights as they were loaded, inside the context."""
        frozen = [x for x in self.model.parameters() if not x.requires_grad]
        try:
            with self.model.disable_adapter():
                yield
        finally:
            for x in frozen:  # adapters of frozen layers among them, which peft would train again
                x.requires_grad_(False)

    @property
    def uses_own_logits(self) -> bool:
        """True where log-probs must come from the model's own logits (see `find_output_head`)."""
        return self._head is None

    @property
    def makes_logits(self) -> bool:
        """True where log-probs cannot come straight from hidden states: the model's own logits are
        used, or those of an output layer that is more than a matrix (adapters, quantization)."""
        return self._head is None or type(self._output_layer) is not nn.Linear

    @cached_property
    def reader(self) -> Reader:
        """How it reads rows of tokens."""
        return Reader(self.model)

    @cached_property
    def continues_from_cache(self) -> bool:
        """Whether sampling may keep what the model has read (`probes.continues_from_cache`)."""
        return probes.continues_from_cache(self.model)

    def states(self, rows: TokenRows) -> Tensor:
        """The last hidden state before each trained token of `rows`, `[tokens, H]`; the logits
        there, where the model's own are used."""
        return self._read(rows)[0]

    def logprobs(self, rows: TokenRows, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the trained tokens of `rows`, row by row, `[tokens]` fp32."""
        (found,) = self.stacked_logprobs([self.states(rows)], rows.targets, temperature)
        return found

    def stacked_logprobs(
        self, states: Sequence[Tensor], targets: Tensor, temperature: float
    ) -> list[tuple[Tensor, Tensor]]:
        """`logprobs` from several `states` before the same `targets`; the head is read once."""
        stacked = torch.stack([*states]) if len(states) > 1 else states[0][None]  # no copy
        targets = targets.expand(len(states), -1)
        with span("logprobs"), passing():
            if self.makes_logits:
                logprobs, entropy = token_logprobs(
                    self._logits(stacked),
                    targets,
                    temperature=temperature,
                    return_entropy=True,
                )
            else:
                logprobs, entropy = linear_logprobs(
                    stacked,
                    targets=targets,
                    return_entropy=True,
                    **self._linear(temperature),
                )
        return list(zip(logprobs, entropy, strict=True))

    def shares_head(self, other: LanguageModel) -> bool:
        """Whether the same output layer serves both, so that `stacked_logprobs` does."""
        if self.makes_logits or other.makes_logits or self._head != other._head:
            return False
        ours, theirs = self._output_layer, other._output_layer
        pairs = ((ours.weight, theirs.weight), (ours.bias, theirs.bias))
        return all(a is b or a.data_ptr() == b.data_ptr() for a, b in pairs)

    def policy_loss(
        self,
        rows: TokenRows,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        temperature: float,
        *,
        share: Tensor | float = 1.0,
        **settings: Any,
    ) -> tuple[Tensor, PolicyStats, Tensor]:
        """PPO's loss of the trained tokens of `rows`, its statistics, and the log-probs of this
        pass, without a gradient; tensors are `[tokens]`, row by row, and `settings` those of the
        op. A balance loss (`experts`) is added to the loss, weighted by the `share` that `rows`
        have in their mini-batch.

        Without `old_logprobs`, on policy: the log-probs of this same pass are used.
        """
        (states, routed), targets = self._read(rows), rows.targets
        balance = share * self.balance(routed, rows.mask)
        with span("losses"), passing():
            if not self.makes_logits:
                loss, stats, logprobs = linear_ppo_loss(
                    states,
                    targets=targets,
                    old_logprobs=old_logprobs,
                    advantages=advantages,
                    return_logprobs=True,
                    **self._linear(temperature),
                    **settings,
                )
                return loss + balance, stats, logprobs
            logprobs, entropy = token_logprobs(
                self._logits(states), targets, temperature=temperature, return_entropy=True
            )
            measured = logprobs.detach()
            if old_logprobs is None:
                old_logprobs = measured
            if not settings.get("entropy_coef"):
                entropy = entropy.detach()  # measured, not trained
            loss, stats = ppo_policy_loss(
                logprobs, old_logprobs, advantages, entropy=entropy, **settings
            )
            return loss + balance, stats, measured

    def nll(self, rows: TokenRows) -> Tensor:
        """-log pi of each trained token of `rows`, row by row, `[tokens]` fp32."""
        return self._nll(self.states(rows), rows.targets)

    def nll_loss(self, rows: TokenRows, normalizer: float) -> Tensor:
        """The sum of `nll` over `normalizer`: the number of all trained tokens in the mini-batch,
        so that its passes add up to the mean over its tokens. A balance loss (`experts`) is added,
        weighted by these rows' share of them."""
        (states, routed), targets = self._read(rows), rows.targets
        balance = len(targets) / normalizer * self.balance(routed, rows.mask)
        if self.makes_logits:
            return self._nll(states, targets).sum() / normalizer + balance
        with span("losses"), passing():
            loss, _ = linear_ppo_loss(
                states,
                targets=targets,
                old_logprobs=None,
                advantages=torch.ones(len(targets), dtype=torch.float32, device=self.device),
                objective="cispo",  # on policy, with advantages of 1: -log pi
                normalizer=normalizer,
                **self._linear(temperature=1.0),
            )
        return loss + balance

    def _nll(self, states: Tensor, targets: Tensor) -> Tensor:
        with span("losses"), passing():
            if self.makes_logits:
                return -token_logprobs(self._logits(states), targets)
            return -linear_logprobs(states, targets=targets, **self._linear(temperature=1.0))

    def _read(self, rows: TokenRows) -> tuple[Tensor, Any]:
        """What `states` gives, and the logits of the experts' routers, where they are recorded."""
        output = self.reader.read(rows, self.model if self._head is None else None)
        found = output.logits if self._head is None else output.last_hidden_state
        return rows.wanted(found), getattr(output, "router_logits", None)

    @property
    def _output_layer(self) -> Any:
        return architecture.unwrap(self.model).get_output_embeddings()

    def _linear(self, temperature: float) -> dict[str, Any]:
        """Arguments of `linear_logprobs` and `linear_ppo_loss`."""
        assert self._head is not None
        # c tanh(s z / c) / T = s (c / s) tanh(z / (c / s)) / T
        scale, cap = self._head.scale, self._head.softcap
        return {
            "weight": self._output_layer.weight,
            "bias": self._output_layer.bias,
            "temperature": temperature / scale,
            "softcap": None if cap is None else cap / scale,
        }

    def _logits(self, states: Tensor) -> Tensor:
        return states if self._head is None else self._head.logits(self._output_layer, states)
