"""The policy in training: one optimizer step on a mini-batch of responses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from ppo_engine.models.budget import Budget
from ppo_engine.models.finite import Losses
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.optimizer import Learner
from ppo_engine.models.work import passing
from ppo_engine.ppo.experience import Experience, Part, in_parts
from ppo_engine.settings.schema import PPOConfig
from ppo_engine.spans import span


class Actor:
    """Trains the policy by the loss of `ppo.objective`, in passes within the `budget`. `updates` is
    the number of optimizer steps of its schedule."""

    def __init__(
        self, policy: LanguageModel, config: PPOConfig, budget: Budget, *, updates: int
    ) -> None:
        self._policy, self._config, self._budget = policy, config, budget
        self.learner = Learner(policy.model, config.policy.optimizer, updates, "the policy")
        self.version = 0  # optimizer steps taken

    def update(
        self, experience: Experience, numbers: Sequence[int], kl_coef: float
    ) -> dict[str, Tensor]:
        """One optimizer step on the responses of these `numbers`, a mini-batch."""
        policy = self._policy
        if experience.deferred and self.version != experience.policy_version:
            raise ValueError(
                "The log-probs of this experience were to be measured by its one optimizer step "
                "(ppo.epochs is 1, and ppo.mini_batch_size holds all its responses), and the "
                "policy has been updated since: set ppo.old_logprobs=recompute."
            )
        policy.model.train()
        found, losses, measured = in_parts(
            experience.rollout,
            numbers,
            policy.reader,
            self._budget,
            lambda parts: self._backward(experience, parts, kl_coef),
        )
        policy.model.eval()
        found["policy/grad_norm"] = self.learner.step(losses)
        if experience.deferred:
            for places, logprobs in measured:
                experience.logprobs.view(-1).index_copy_(0, places, logprobs)
        self.version += 1
        return found

    def _backward(
        self, experience: Experience, parts: Sequence[Part], kl_coef: float
    ) -> tuple[dict[str, Tensor], Losses, list[tuple[Tensor, Tensor]]]:
        """The gradient of a mini-batch, in these `parts`; its metrics, each part's loss, and the
        places and log-probs of each part's tokens."""
        policy, settings = self._policy, self._config.ppo
        self.learner.clear_gradients()
        tokens = max(1, sum(len(part.places) for part in parts))
        normalizer = self._normalizer(tokens, sum(len(part.numbers) for part in parts))
        weights, ref_logprobs = experience.is_weights, experience.ref_logprobs
        found: dict[str, Tensor] = defaultdict(
            lambda: torch.zeros((), dtype=torch.float32, device=policy.device)
        )
        losses: list[tuple[list[int], Tensor]] = []
        measured: list[tuple[Tensor, Tensor]] = []
        penalized = settings.kl_in == "loss"
        for part in parts:
            # Until the first step the old log-probs are those of this same pass: computed in
            # another batch they would differ by rounding, and the ratio would not be 1.
            on_policy = self.version == experience.policy_version
            share = len(part.places) / tokens
            with span("policy"):
                loss, stats, logprobs = policy.policy_loss(
                    part.rows,
                    None if on_policy else part.of(experience.logprobs),
                    part.of(experience.advantages),
                    self._config.generation.temperature,
                    share=share,
                    cu_seqlens=part.cu_seqlens,
                    objective=settings.objective,
                    ratio_level=settings.ratio_level,
                    clip_range=settings.clip_range,
                    dual_clip=settings.dual_clip,
                    moments=experience.moments if settings.whiten_advantages else None,
                    reduction=settings.reduction,
                    normalizer=normalizer,
                    entropy_coef=settings.entropy_coef,
                    ref_logprobs=None
                    if ref_logprobs is None or not penalized
                    else part.of(ref_logprobs),
                    kl_coef=kl_coef if penalized else 0.0,
                    kl_estimator=settings.kl_estimator,
                    is_weights=None if weights is None else part.of(weights),
                )
            with span("backward"), passing():
                loss.backward()
            found["policy/loss"] += loss.detach()
            losses.append((part.numbers, loss.detach()))
            measured.append((part.places, logprobs))
            for name in (
                "approx_kl",
                "clip_fraction",
                "ratio_mean",
                "entropy",
                *["kl"] * penalized,
            ):
                found[f"policy/{name}"] += getattr(stats, name) * share
            found["policy/ratio_max"] = torch.maximum(found["policy/ratio_max"], stats.ratio_max)
        return found, losses, measured

    def _normalizer(self, tokens: int, responses: int) -> float:
        """What a mini-batch's sum of losses is divided by, whatever its passes."""
        match self._config.ppo.reduction:
            case "token_mean":
                return float(tokens)
            case "sequence_mean":
                return float(responses)
            case _:
                return float(responses * self._config.generation.max_new_tokens)
