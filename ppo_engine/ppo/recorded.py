"""What a step learns from, as `run.rollout_record` keeps it: into arrays, and back to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ppo_engine.ppo.estimators import Evidence, estimate
from ppo_engine.ppo.experience import Experience, importance_weights, of_sampler
from ppo_engine.rollout.batch import Rollout
from ppo_engine.run.rollout_record import RolloutRecord
from ppo_engine.settings.schema import PPOSettings
from ppo_kernels.reference import MAX_LOG_RATIO
from ppo_kernels.sequences import padded, places_inside, token_means


def token_arrays(
    experience: Experience, after: Tensor, settings: PPOSettings
) -> dict[str, np.ndarray]:
    """Of each token of a step, and of all, as `RolloutRecord.arrays` has them; `after` are the
    log-probs of the policy when it has learned from them, `[B, T]` fp32."""
    rollout = experience.rollout
    log_ratio = torch.where(rollout.mask, after - experience.logprobs, 0.0)
    numbers = {
        "logprobs": experience.logprobs,
        "ref_logprobs": experience.ref_logprobs,
        "sampler_logprobs": None if experience.sampled else of_sampler(rollout),
        "entropy": experience.entropy,
        "values": experience.values,
        "returns": experience.returns,
        "advantages": experience.advantages,
        "ratio": torch.where(rollout.mask, _ratio(log_ratio), 0.0),
        "mask": rollout.mask,
        "clipped": _clipped(log_ratio, experience, settings),
    }
    prompts, responses = zip(*rollout.written, strict=True)
    real = rollout.response_mask.cpu()
    found = {name: x.cpu()[real] for name, x in numbers.items() if x is not None}
    found["moments"] = experience.moments.cpu()
    if experience.rounding is not None:
        found["rounding"] = experience.rounding.cpu()
    found |= _packed("tokens", "cu_seqlens", responses)
    found |= _packed("prompt_tokens", "prompt_cu_seqlens", prompts)
    return {name: x.numpy() for name, x in found.items()}


def restored(record: RolloutRecord, settings: PPOSettings, device: torch.device) -> Experience:
    """The experience of a recorded step, to the bit, but for tokens of padding and for columns of
    the data, which no update reads; with importance weights as `settings` have them."""
    arrays = {name: torch.from_numpy(x) for name, x in record.arrays.items()}
    prompt_starts, starts = arrays["prompt_cu_seqlens"], arrays["cu_seqlens"]
    width, update = record.update.width, record.update

    def wide(x: Tensor) -> Tensor:
        return pad(x, (0, width - x.shape[1])).to(device)

    def tokens(name: str) -> Tensor:
        return wide(padded(arrays[name], starts))

    def known(name: str) -> Tensor | None:
        return tokens(name) if name in arrays else None

    def numbers(x: Any) -> Tensor:
        return torch.as_tensor(x, dtype=torch.float32, device=device)

    mask, logprobs = tokens("mask"), tokens("logprobs")
    # Padded on the left: turned around, then back.
    prompt_mask = places_inside(prompt_starts).flip(1)
    rollout = Rollout(
        prompt_ids=arrays["prompt_tokens"]
        .new_zeros(prompt_mask.shape)
        .masked_scatter(prompt_mask, arrays["prompt_tokens"])
        .to(device),
        prompt_mask=prompt_mask.to(device),
        response_ids=tokens("tokens"),
        mask=mask,
        finished=torch.tensor(record.finished, device=device),
        prompts=record.prompts,
        responses=record.responses,
        environment_mask=wide(places_inside(starts)) & ~mask,
        logprobs=logprobs if update.sampled else known("sampler_logprobs"),
    )
    return Experience(
        rollout=rollout,
        scores=numbers(record.shaped),
        logprobs=logprobs,
        ref_logprobs=known("ref_logprobs"),
        advantages=tokens("advantages"),
        kl=numbers(record.kl),
        kl_coef=numbers(update.kl_coef),
        moments=numbers(arrays["moments"]),
        entropy=known("entropy"),
        policy_version=update.policy_version,
        values=known("values"),
        returns=known("returns"),
        is_weights=importance_weights(rollout, logprobs, settings.importance_cap),
        rounding=numbers(arrays["rounding"]) if "rounding" in arrays else None,
        sampled=update.sampled,
    )


def estimated_anew(
    experience: Experience, settings: PPOSettings, kl_coef: float | None = None
) -> Experience:
    """With the advantages that other `settings`, and perhaps another weight of the KL, make of the
    same scores, log-probs and values; not for `remax`, which compares with responses that are not
    there."""
    logprobs, ref_logprobs = experience.logprobs, experience.ref_logprobs
    coef = experience.kl_coef if kl_coef is None else torch.full_like(experience.kl_coef, kl_coef)
    shaped = estimate(
        Evidence(
            experience.scores,
            logprobs,
            logprobs if ref_logprobs is None else ref_logprobs,
            experience.rollout.mask,
            kl_coef=coef,
            rounding=experience.rounding,
            values=experience.values,
        ),
        settings,
    )
    return replace(
        experience,
        kl_coef=coef,
        advantages=shaped.advantages,
        moments=shaped.moments,
        kl=shaped.kl,
        returns=None if experience.values is None else shaped.returns,
    )


def _packed(name: str, bounds: str, rows: Any) -> dict[str, Tensor]:
    lengths = torch.tensor([0, *map(len, rows)])
    tokens = torch.tensor([token for row in rows for token in row], dtype=torch.long)
    return {name: tokens, bounds: lengths.cumsum(0)}


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _clipped(log_ratio: Tensor, experience: Experience, settings: PPOSettings) -> Tensor:
    """Which tokens `ppo.clip_range` holds, as `ppo_kernels.ppo_policy_loss` counts them."""
    mask, advantages = experience.rollout.mask, experience.advantages
    if settings.whiten_advantages:
        advantages = advantages - experience.moments[1]
    if settings.ratio_level == "sequence":
        log_ratio = token_means(log_ratio, mask, None)
    low, high = clip_bounds(settings)
    ratio = _ratio(log_ratio)
    held = ratio.clamp(1 - low, 1 + high)
    if settings.objective == "cispo":
        return mask & (ratio != held)
    return mask & (advantages * ratio > advantages * held)


def clip_bounds(settings: PPOSettings) -> tuple[float, float]:
    """How far below and above 1 the ratio counts."""
    clip = settings.clip_range
    return clip if isinstance(clip, tuple) else (clip, clip)
