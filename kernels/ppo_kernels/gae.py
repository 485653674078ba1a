"""Generalized advantage estimation, with given rewards or with KL-shaped ones.

Advantages are constants of the PPO losses: the results carry no gradient, whatever runs.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ppo_kernels import checks, dispatch, reference
from ppo_kernels.reference import ShapedGAE

KL_ESTIMATORS = ("k1", "k2", "k3")


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each token (Schulman et al. 2016, arXiv:1506.02438).

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  returns = A + V,
    where t+1 is the next real token of the same sequence. lam=1 is Monte Carlo, lam=0 one-step TD.

    Args:
        rewards, values: `[B, T]`, or packed `[N]` with `cu_seqlens`; any floating dtype.
        gamma, lam: discount and GAE's decay, each in [0, 1].
        mask: bool, shaped like `rewards`; True is a real token. Padding may be on either side and
            masked tokens may lie in the middle: they are skipped and never read.
        bootstrap: `[B]`, the value after each sequence's last real token; default 0.
        cu_seqlens: `[B + 1]` int32 or int64, where each packed sequence starts; first 0, last N.
        impl: "auto", or one of `implementations()["gae"]`.

    Returns:
        (advantages, returns), shaped like `rewards`, float32 (float64 for float64 inputs); 0 where
        masked; without gradient.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or values that do not fit.
        RuntimeError: for an `impl` that cannot run, with the reason.
    """
    checks.tokens("gae", mask, cu_seqlens, rewards=rewards, values=values)
    if bootstrap is not None:
        checks.per_sequence("gae", "bootstrap", bootstrap, cu_seqlens, "rewards", rewards)
    impl = dispatch.resolve("gae", impl, rewards.device)
    if impl != "reference" and dispatch.eager(rewards, values, mask, bootstrap, cu_seqlens):
        return _gae(rewards, values, gamma, lam, mask, bootstrap, cu_seqlens, impl)
    with torch.no_grad():
        if impl == "reference":
            if not torch.compiler.is_compiling():
                _check_values("gae", gamma, lam, cu_seqlens, rewards)
            return reference.gae(
                rewards, values, gamma=gamma, lam=lam, mask=mask, bootstrap=bootstrap,
                cu_seqlens=cu_seqlens,
            )  # fmt: skip
        return _gae_op(rewards, values, gamma, lam, mask, bootstrap, cu_seqlens, impl)


def kl_shaped_gae(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    *,
    kl_coef: float | Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl_estimator: str = "k1",
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> ShapedGAE:
    """GAE of RLHF's rewards, in one pass (Ziegler et al. 2019; Ouyang et al. 2022).

    r_t = -kl_coef k_t, plus the sequence's score on its last real token; then `gae`. With
    x = log pi - log pi_ref, k_t is `k1` x, `k2` x^2 / 2, or `k3` exp(-x) - 1 + x (x within +-20).

    Args:
        scores: `[B]`, one for each sequence; not read where a sequence has no real token.
        logprobs, ref_logprobs, values: `[B, T]`, or packed `[N]` with `cu_seqlens`.
        kl_coef: a number, or a 0-dim tensor, so that an adaptive one costs neither a
            synchronization nor a recompilation.
        kl_estimator: "k1", "k2" or "k3".
        gamma, lam, mask, bootstrap, cu_seqlens, impl: as for `gae`.

    Returns:
        `ShapedGAE`: advantages and returns as `gae` gives them; `kl` `[B]`, each sequence's sum of
        k_t; `moments` `[3]`, (count, mean, M2) of the advantages of real tokens, which
        `ppo_policy_loss` whitens with and which ranks can merge.

    Raises:
        As `gae`.
    """
    op = "kl_shaped_gae"
    checks.tokens(op, mask, cu_seqlens, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values)
    checks.per_sequence(op, "scores", scores, cu_seqlens, "logprobs", logprobs)
    if bootstrap is not None:
        checks.per_sequence(op, "bootstrap", bootstrap, cu_seqlens, "logprobs", logprobs)
    checks.choice(op, "kl_estimator", kl_estimator, KL_ESTIMATORS)
    impl = dispatch.resolve(op, impl, logprobs.device)
    rest = (gamma, lam, kl_estimator, mask, bootstrap, cu_seqlens, impl)
    if impl != "reference" and dispatch.eager(
        scores, logprobs, ref_logprobs, values, mask, bootstrap, cu_seqlens
    ):
        return ShapedGAE(*_kl_shaped_gae(scores, logprobs, ref_logprobs, values, kl_coef, *rest))
    with torch.no_grad():
        if impl == "reference":
            if not torch.compiler.is_compiling():
                checks.scalar(op, "kl_coef", kl_coef, like=("logprobs", logprobs))
                _check_values(op, gamma, lam, cu_seqlens, logprobs)
            return reference.kl_shaped_gae(
                scores, logprobs, ref_logprobs, values, kl_coef=kl_coef, gamma=gamma, lam=lam,
                kl_estimator=kl_estimator, mask=mask, bootstrap=bootstrap, cu_seqlens=cu_seqlens,
            )  # fmt: skip
        coef = dispatch.traced(kl_coef)
        return ShapedGAE(*_kl_shaped_gae_op(scores, logprobs, ref_logprobs, values, coef, *rest))


def _check_values(
    op: str, gamma: float, lam: float, cu_seqlens: Tensor | None, tokens: Tensor
) -> None:
    checks.number(op, "gamma", gamma, ge=0.0, le=1.0)
    checks.number(op, "lam", lam, ge=0.0, le=1.0)
    checks.boundaries(op, cu_seqlens, tokens.shape[0])


# --- C++ on the CPU: csrc/cpu/gae.cpp; on a GPU CUDA: csrc/cuda/gae.cu, Triton: triton/gae.py -----


def _gae(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    lam: float,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    _check_values("gae", gamma, lam, cu_seqlens, rewards)
    dtype, (rewards, values, bootstrap) = dispatch.in_one_dtype(rewards, values, bootstrap)
    cu_seqlens = dispatch.offsets(cu_seqlens)
    advantages = dispatch.empty_like(rewards, dispatch.accumulator(dtype))
    returns = torch.empty_like(advantages)
    if impl == "triton":
        dispatch.triton_kernels("gae").gae(
            rewards, None, None, None, values, mask, bootstrap, cu_seqlens, None, 0.0, gamma, lam,
            advantages, returns, None, None,
        )  # fmt: skip
        return advantages, returns
    arguments = (
        mask, cu_seqlens, values, bootstrap, rewards, None, None, None, 0, 0.0, gamma, lam,
        advantages, returns, None, None,
    )  # fmt: skip
    if impl == "cuda":
        _on_gpu(*arguments)
    else:
        dispatch.cpu.gae(*arguments, torch.get_num_threads())
    return advantages, returns


def _kl_shaped_gae(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    kl_coef: float | Tensor,
    gamma: float,
    lam: float,
    kl_estimator: str,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "kl_shaped_gae"
    coef = checks.scalar(op, "kl_coef", kl_coef, like=("logprobs", logprobs))
    _check_values(op, gamma, lam, cu_seqlens, logprobs)
    dtype, inputs = dispatch.in_one_dtype(scores, logprobs, ref_logprobs, values, bootstrap)
    scores, logprobs, ref_logprobs, values, bootstrap = inputs
    cu_seqlens = dispatch.offsets(cu_seqlens)
    advantages, returns, kl, moments = _outputs(scores, logprobs, dispatch.accumulator(dtype))
    if impl == "triton":
        dispatch.triton_kernels("gae").gae(
            None, scores, logprobs, ref_logprobs, values, mask, bootstrap, cu_seqlens,
            kl_estimator, coef, gamma, lam, advantages, returns, kl, moments,
        )  # fmt: skip
        return advantages, returns, kl, moments
    arguments = (
        mask, cu_seqlens, values, bootstrap, None, scores, logprobs, ref_logprobs,
        1 + KL_ESTIMATORS.index(kl_estimator), coef, gamma, lam, advantages, returns, kl, moments,
    )  # fmt: skip
    if impl == "cuda":
        _on_gpu(*arguments)
    else:
        dispatch.cpu.gae(*arguments, torch.get_num_threads())
    return advantages, returns, kl, moments


def _on_gpu(
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    values: Tensor,
    bootstrap: Tensor | None,
    rewards: Tensor | None,
    scores: Tensor | None,
    logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    kl_estimator: int,
    kl_coef: float | Tensor,
    gamma: float,
    lam: float,
    *outputs: Tensor | None,
) -> None:
    tokens = (mask, values, rewards, logprobs, ref_logprobs)
    mask, wide, rewards, logprobs, ref_logprobs = map(dispatch.side_by_side, tokens)
    coef, coef_on_gpu = (0.0, kl_coef) if isinstance(kl_coef, Tensor) else (kl_coef, None)
    if coef_on_gpu is not None and coef_on_gpu.dtype not in checks.FLOAT_DTYPES:
        coef_on_gpu = coef_on_gpu.double()
    device = values.device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    empty = functools.partial(torch.empty, dtype=torch.uint8, device=device)
    with dispatch.on(device):
        dispatch.cuda.gae(
            mask, cu_seqlens, wide, bootstrap, rewards, scores, logprobs, ref_logprobs,
            kl_estimator, coef, coef_on_gpu, gamma, lam, *outputs, stream, empty,
        )  # fmt: skip


def _outputs(
    scores: Tensor, logprobs: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    advantages = dispatch.empty_like(logprobs, dtype)
    returns = torch.empty_like(advantages)
    return advantages, returns, dispatch.empty_like(scores, dtype), advantages.new_empty(3)


# --- The same under torch.compile -----------------------------------------------------------------


@torch.library.custom_op("ppo_kernels::gae", mutates_args=(), device_types=dispatch.DEVICES)
def _gae_op(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    lam: float,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return _gae(rewards, values, gamma, lam, mask, bootstrap, cu_seqlens, impl)


@_gae_op.register_fake
def _(rewards, values, gamma, lam, mask, bootstrap, cu_seqlens, impl):  # type: ignore[no-untyped-def]
    dtype = dispatch.accumulator(dispatch.common_dtype(rewards, values, bootstrap))
    advantages = dispatch.empty_like(rewards, dtype)
    return advantages, torch.empty_like(advantages)


@torch.library.custom_op(
    "ppo_kernels::kl_shaped_gae", mutates_args=(), device_types=dispatch.DEVICES
)
def _kl_shaped_gae_op(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    kl_coef: Tensor,
    gamma: float,
    lam: float,
    kl_estimator: str,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _kl_shaped_gae(
        scores, logprobs, ref_logprobs, values, kl_coef, gamma, lam, kl_estimator, mask, bootstrap,
        cu_seqlens, impl,
    )  # fmt: skip


@_kl_shaped_gae_op.register_fake
def _(scores, logprobs, ref_logprobs, values, *rest):  # type: ignore[no-untyped-def]
    bootstrap = rest[-3]
    dtype = dispatch.common_dtype(scores, logprobs, ref_logprobs, values, bootstrap)
    return _outputs(scores, logprobs, dispatch.accumulator(dtype))
