"""The language model that writes responses: loading, sampling, and log-probs of what it wrote."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ppo_engine import models
from ppo_engine.anatomy import span
from ppo_engine.config import GenerationConfig, ModelConfig
from ppo_engine.conversation import Environment, as_rollout, converse
from ppo_engine.data.packing import TokenRows
from ppo_engine.errors import UserError
from ppo_engine.rollout import Rollout
from ppo_engine.text import Prompt
from ppo_kernels import linear_logprobs, linear_ppo_loss, ppo_policy_loss, token_logprobs
from ppo_kernels.reference import PolicyStats

_PROBE_TEXT = "The quick brown fox jumps over the lazy dog, twice."


class Policy:
    """A causal language model with its tokenizer, device and dtype of compute.

    Weights are fp32 and `dtype` is that of compute (autocast), so that the optimizer works on fp32.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model = model.to(device)
        self.tokenizer = tokenizer
        self.device = device
        self.dtype = dtype
        models.resize_embeddings(model, tokenizer)
        models.disable_dropout(model)
        self.eos_ids = _eos_ids(model, tokenizer)
        self._head = _find_head(model, tokenizer, device)

    @classmethod
    def open(
        cls,
        model: str | Any,
        config: ModelConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Policy:
        """A policy ready to be trained, from a Hugging Face name or folder (`config.path` where
        `model` is empty) or from a loaded model with its tokenizer."""
        if isinstance(model, str):
            path = models.resolve(model or config.path)
            if models.is_classifier(models.load_model_config(path)):
                raise UserError(f"{path!r} scores texts and writes none: give a language model.")
            tokenizer = tokenizer or models.load_tokenizer(path)
            options = models.load_options(config, device, dtype)
            try:
                model = AutoModelForCausalLM.from_pretrained(path, **options)
            except (OSError, ValueError, RuntimeError) as error:
                reason = models.first_line(error)
                raise UserError(
                    f"Could not load a language model from {path!r}: {reason}"
                ) from error
        elif tokenizer is None:
            raise UserError("A policy that is handed in loaded needs its tokenizer as well.")
        else:
            models.separate_pad_from_eos(tokenizer)
            model = model.float()
        policy = cls(model, tokenizer, device=device, dtype=dtype)
        policy.model = models.prepare_for_training(model, config, "CAUSAL_LM").eval()
        return policy

    def room_for_prompts(self, settings: GenerationConfig) -> int:
        """Tokens that the model's length leaves to a prompt; a UserError where there are none."""
        positions = models.positions(self.model)
        room = positions - settings.max_new_tokens
        if room < 1:
            raise UserError(
                f"generation.max_new_tokens is {settings.max_new_tokens}, but the model reads "
                f"{positions} tokens in all: lower it."
            )
        return room

    @property
    def uses_own_logits(self) -> bool:
        """True where log-probs must come from the model's own logits (see `_find_head`)."""
        return self._head is None

    @property
    def logits_note(self) -> str:
        """What is to be said where log-probs cost more than they need; empty where they do not."""
        if self.uses_own_logits:
            return (
                "Logits are the model's own, for every position: its output layer could not be "
                "reproduced from its hidden states. More memory and time, the same results."
            )
        if self.makes_logits:
            return (
                "Logits are made for every response token, as the output layer has adapters or is "
                "quantised. More memory and time, the same results."
            )
        return ""

    @property
    def makes_logits(self) -> bool:
        """True where log-probs cannot come straight from hidden states: the model's own logits are
        used, or those of an output layer that is more than a matrix (adapters, quantisation)."""
        return self._head is None or type(self._output_layer) is not nn.Linear

    def reference(self) -> Policy | None:
        """A frozen copy; layers that the policy never trains are shared with it.

        None with adapters: the policy without them is the reference (`without_adapter`).
        """
        if hasattr(self.model, "peft_config"):
            return None
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model).requires_grad_(False)
        models.share_frozen_parameters(twin.model, self.model)
        return twin

    def without_adapter(self) -> AbstractContextManager[Any]:
        """The weights as they were loaded, while the context lasts."""
        return self.model.disable_adapter()

    def generate(
        self,
        prompts: Sequence[Prompt],
        settings: GenerationConfig,
        columns: dict[str, list[Any]] | None = None,
        *,
        environment: Environment | None = None,
        greedy: bool = False,
        record_logprobs: bool = False,
    ) -> Rollout:
        """Sample one response to each prompt from softmax(logits / temperature).

        Top-k and top-p are off unless `settings` says otherwise: with them, the log-probs of the
        full distribution are not those of the sampler (`record_logprobs` keeps these). With an
        `environment`, a response has several turns. `greedy` takes the likeliest tokens.
        """
        columns = columns or {}
        conversations = converse(
            self,
            prompts,
            settings,
            columns,
            environment=environment,
            greedy=greedy,
            record_logprobs=record_logprobs,
        )
        return as_rollout(
            conversations,
            self.tokenizer,
            self.device,
            columns,
            several=environment is not None,
        )

    def response_logprobs(self, rollout: Rollout, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the response tokens, each [B, T] fp32, 0 at padding.

        From hidden states at response positions only, one position before the token they predict.
        """
        (found,) = self.stacked_logprobs([self.states(rollout)], rollout, temperature)
        return found

    def shares_head(self, other: Policy) -> bool:
        """Whether the same output layer serves both, so that `stacked_logprobs` does."""
        if self.makes_logits or other.makes_logits or self._head != other._head:
            return False
        ours, theirs = self._output_layer, other._output_layer
        pairs = ((ours.weight, theirs.weight), (ours.bias, theirs.bias))
        return all(a is b or a.data_ptr() == b.data_ptr() for a, b in pairs)

    def stacked_logprobs(
        self, states: Sequence[Tensor], rollout: Rollout, temperature: float
    ) -> list[tuple[Tensor, Tensor]]:
        """`response_logprobs` of several `states` of the same tokens; the head is read once."""
        targets = rollout.response_ids[rollout.mask].expand(len(states), -1)
        stacked = torch.stack([*states]) if len(states) > 1 else states[0][None]  # no copy
        with span("logprobs"), models.compute(self.device, self.dtype):
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
        mask = rollout.mask
        return [
            (
                logprobs.new_zeros(mask.shape).masked_scatter(mask, of_tokens),
                entropy.new_zeros(mask.shape).masked_scatter(mask, h),
            )
            for of_tokens, h in zip(logprobs, entropy, strict=True)
        ]

    def policy_loss(
        self,
        rollout: Rollout,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        temperature: float,
        **settings: Any,
    ) -> tuple[Tensor, PolicyStats]:
        """PPO's loss of the response tokens; tensors are [B, T], `settings` those of the op.

        Without `old_logprobs`, on policy: they are the very numbers that this pass makes.
        """
        states, mask = self.states(rollout), rollout.mask
        targets, advantages = rollout.response_ids[mask], advantages[mask]
        old = None if old_logprobs is None else old_logprobs[mask]
        for name in ("ref_logprobs", "is_weights"):
            if settings.get(name) is not None:
                settings[name] = settings[name][mask]
        settings["cu_seqlens"] = pad(rollout.lengths.cumsum(0), (1, 0))
        with span("losses"), models.compute(self.device, self.dtype):
            if not self.makes_logits:
                return linear_ppo_loss(
                    states,
                    targets=targets,
                    old_logprobs=old,
                    advantages=advantages,
                    **self._linear(temperature),
                    **settings,
                )
            logprobs, entropy = token_logprobs(
                self._logits(states), targets, temperature=temperature, return_entropy=True
            )
            if old is None:
                old = logprobs.detach()
            if not settings.get("entropy_coef"):
                entropy = entropy.detach()  # measured, not trained
            return ppo_policy_loss(logprobs, old, advantages, entropy=entropy, **settings)

    def states(self, rollout: Rollout) -> Tensor:
        """The last hidden state before each response token, `[tokens, H]`; the logits there, where
        the model's own are used."""
        ids, mask = rollout.sequences()
        start = rollout.prompt_ids.shape[1] - 1
        # The last token predicts nothing that is needed.
        states: Tensor = self._run(ids[:, :-1], mask[:, :-1])[:, start:][rollout.mask]
        return states

    def row_logprobs(self, rows: TokenRows) -> Tensor:
        """Log-probs of the tokens that `rows` trains, row by row, `[tokens]` fp32."""
        states, targets = self._row_states(rows)
        with span("losses"), models.compute(self.device, self.dtype):
            if self.makes_logits:
                return token_logprobs(self._logits(states), targets)
            return linear_logprobs(states, targets=targets, **self._linear(temperature=1.0))

    def nll_loss(self, rows: TokenRows, normalizer: float) -> Tensor:
        """The negative log-likelihood of the tokens that `rows` trains, over `normalizer`: of all
        such tokens in the mini-batch, so that its passes add up to the mean of its tokens."""
        if self.makes_logits:
            return -self.row_logprobs(rows).sum() / normalizer
        states, targets = self._row_states(rows)
        with span("losses"), models.compute(self.device, self.dtype):
            loss, _ = linear_ppo_loss(
                states,
                targets=targets,
                old_logprobs=None,
                advantages=torch.ones(len(targets), device=self.device),
                objective="cispo",  # on policy, with advantages of 1: -log pi
                normalizer=normalizer,
                **self._linear(temperature=1.0),
            )
        return loss

    def _row_states(self, rows: TokenRows) -> tuple[Tensor, Tensor]:
        """The state before each trained token, and these tokens."""
        targets = rows.trained[:, 1:]
        positions = None if rows.positions is None else rows.positions[:, :-1]
        mask = rows.owners[:, :-1] >= 0 if rows.positions is None else None
        states = self._run(rows.ids[:, :-1], mask, positions)
        return states[targets], rows.ids[:, 1:][targets]

    def _run(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """The last hidden states of `[B, L]` tokens; the logits, where the model's own are used.

        Padded ones have a mask, packed ones positions and no mask."""
        model = models.unwrap(self.model)
        if mask is not None:
            inputs = models.base_inputs(model.base_model, ids, mask)
        else:
            inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        with models.compute(self.device, self.dtype):
            if self._head is None:
                found: Tensor = self.model(**inputs).logits
            else:
                found = model.base_model(**inputs).last_hidden_state
        return found

    @property
    def _output_layer(self) -> Any:
        return models.unwrap(self.model).get_output_embeddings()

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

    def save(self, folder: str | Path) -> None:
        """Write model and tokenizer in Hugging Face format, adapters merged into the weights."""
        with models.quiet_transformers():
            models.merged(self.model).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class _Head:
    """How a model's output layer becomes its logits."""

    scale: float
    softcap: float | None

    def logits(self, output_layer: Any, hidden: Tensor) -> Tensor:
        logits: Tensor = output_layer(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits


def _find_head(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> _Head | None:
    """How last hidden states become logits, or None where only the model itself knows.

    Families scale or cap their logits under different names; rather than trust a name, a probe
    text must give the model's own logits.
    """
    if model.get_output_embeddings() is None:
        return None
    text = model.config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1.0 / (getattr(text, "logits_scaling", None) or 1)
    head = _Head(scale, getattr(text, "final_logit_softcapping", None) or None)
    ids = tokenizer(_PROBE_TEXT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = ids.to(device)
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits
        output = model.base_model(input_ids=ids, use_cache=False)
        made = (
            head.logits(model.get_output_embeddings(), output.last_hidden_state)
            if hasattr(output, "last_hidden_state")
            else own[:, :0]
        )
    same = made.shape == own.shape and torch.allclose(made, own, rtol=1e-4, atol=1e-4)
    return head if same and scale > 0 else None


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a response: the tokenizer's, and those the checkpoint names."""
    named = getattr(model.generation_config, "eos_token_id", None)
    extra = named if isinstance(named, list) else [] if named is None else [named]
    return sorted({tokenizer.eos_token_id, *extra} - {tokenizer.pad_token_id})
