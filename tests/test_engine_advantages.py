"""From a rollout and its scores to advantages, by hand in float64: responses of unequal lengths, of
several turns, finished and cut, of a policy that samples at 0.7 and has left its reference."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from rollouts import (
    ROWS,
    SCORES,
    TOKENIZER,
    Row,
    alone,
    double,
    length,
    moved_engine,
    own_logits,
    read,
    rollout_of,
    sharp_model,
    values_of,
)
from torch import Tensor

from ppo_engine.config import AdaptiveKLConfig, LoraConfig, RewardConfig
from ppo_engine.engine import PPOEngine
from ppo_engine.rewards.model import RewardModel
from ppo_engine.rollout import Rollout
from ppo_engine.value_model import value_model_from_policy

B = len(ROWS)


def readings(engine: PPOEngine, rollout: Rollout) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each response: (log-probs, reference's log-probs, entropies) of the policy's tokens."""
    policy = double(engine.policy.model)
    if engine.reference is None:
        reference = double(engine.policy.model)
        reference.disable_adapter_layers()
    else:
        reference = double(engine.reference.model)
    found = []
    with torch.no_grad():
        for b in range(len(rollout)):
            logprobs, entropy = read(policy, rollout, b)
            found.append((logprobs, read(reference, rollout, b)[0], entropy))
    return found


def assert_rows(found: Tensor, expected: list[Tensor], mask: Tensor) -> None:
    """`expected` stands at the policy's tokens, row by row, and 0 everywhere else."""
    assert found.shape == mask.shape and not found[~mask].any()
    for b, row in enumerate(expected):
        torch.testing.assert_close(found[b][mask[b]].double(), row, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "policy"),
    [
        (None, {}),
        (None, {"trainable_layers": 1}),
        (None, {"lora": LoraConfig(rank=4)}),
        (own_logits, {}),
    ],
    ids=["whole", "shared head", "adapters", "own logits"],
)
@pytest.mark.parametrize("micro_batch_size", [2, 6])
def test_logprobs_and_entropies_are_those_at_the_sampling_temperature(
    model, policy, micro_batch_size
):
    if "lora" in policy:
        pytest.importorskip("peft")
    engine = moved_engine(
        model=model and model(), policy=policy, ppo={"micro_batch_size": micro_batch_size}
    )
    assert engine.policy.uses_own_logits == (model is own_logits)
    rollout = rollout_of()
    expected = [list(column) for column in zip(*readings(engine, rollout), strict=True)]
    apart = [p - q for p, q in zip(*expected[:2], strict=True)]
    assert torch.cat(apart).abs().mean() > 0.02
    for found, column in zip(engine.compare_with_reference(rollout), expected, strict=True):
        assert_rows(found, column, rollout.mask)


def test_values_are_the_critics_own_logits_of_what_came_before():
    """What its class pools at the last token, of the text before each of the policy's tokens."""
    engine = moved_engine(ppo={"micro_batch_size": 2})
    rollout = rollout_of()
    critic = double(engine.critic.model)
    found = engine.values(rollout)
    for b in range(B):
        text, own = alone(rollout, b)
        pooled = [critic(input_ids=text[None, :n]).logits[0, 0] for n in own.nonzero()[:, 0]]
        expected = torch.stack(pooled).detach()
        torch.testing.assert_close(values_of(critic, rollout, b).detach(), expected)
        at_own = found[b][rollout.mask[b]].double()
        torch.testing.assert_close(at_own, expected, rtol=1e-4, atol=1e-4)


def test_scores_are_the_weighted_sum_of_a_models_and_a_functions():
    """The reward model's own pooled logit of prompt and response, whoever wrote it, cut or not."""
    model = value_model_from_policy(sharp_model(2), TOKENIZER, seed=3)
    judge = RewardModel(model, TOKENIZER, device=torch.device("cpu"), dtype=torch.float32)
    engine = moved_engine([judge, length], reward=RewardConfig(weights=[2.0, -0.5]))
    rollout = rollout_of()
    expected = []
    for b in range(B):
        text, _ = alone(rollout, b)
        with torch.no_grad():
            pooled = double(model)(input_ids=text[None]).logits.item()
        expected.append(2 * pooled - 0.5 * len(rollout.responses[b]))
    assert engine.score(rollout).tolist() == pytest.approx(expected, rel=1e-4)


K = {
    "k1": lambda d: d,
    "k2": lambda d: 0.5 * d * d,
    "k3": lambda d: math.exp(-d) - 1 + d,
}


def to_go(rewards: list[float], decay: float) -> list[float]:
    found, total = [], 0.0
    for reward in reversed(rewards):
        total = reward + decay * total
        found.insert(0, total)
    return found


def by_hand(
    engine: PPOEngine, rollout: Rollout, scores: tuple[float, ...], lam: float, kl_coef: float
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """(advantages, returns, sums of the KL) of each response, with the engine's discount."""
    settings = engine.config.ppo
    gamma = settings.gamma
    critic = double(engine.critic.model)
    rewards, values, sums = [], [], []
    for b, (logprobs, ref_logprobs, _) in enumerate(readings(engine, rollout)):
        kl = [K[settings.kl_estimator](d) for d in (logprobs - ref_logprobs).tolist()]
        rewards.append([-kl_coef * k for k in kl])
        rewards[-1][-1] += scores[b]
        values.append([*values_of(critic, rollout, b).tolist(), 0.0])
        sums.append(sum(kl))
    if settings.whiten_rewards:
        of_all = torch.tensor([r for row in rewards for r in row], dtype=torch.float64)
        scale = of_all.std(unbiased=False).item()
        rewards = [[r / scale for r in row] for row in rewards]
    advantages, returns = [], []
    for row, v in zip(rewards, values, strict=True):
        deltas = [r + gamma * v[t + 1] - v[t] for t, r in enumerate(row)]
        a = torch.tensor(to_go(deltas, gamma * lam), dtype=torch.float64)
        advantages.append(a)
        returns.append(a + torch.tensor(v[:-1], dtype=torch.float64))
    return advantages, returns, sums


@pytest.mark.parametrize(
    ("ppo", "lam", "kl_coef"),
    [
        ({"gamma": 0.9, "lam": 0.7, "kl_coef": 0.4}, 0.7, 0.4),
        ({"kl_coef": 0.4, "kl_estimator": "k3", "whiten_rewards": True}, 0.95, 0.4),
        ({"estimator": "monte_carlo", "kl_coef": 0.4, "kl_estimator": "k2"}, 1.0, 0.4),
        ({"estimator": "td", "kl_coef": 0.4, "gamma": 0.9}, 0.0, 0.4),
        # The penalty is then a part of the loss, and must not be paid twice.
        ({"kl_coef": 0.4, "kl_in": "loss", "whiten_rewards": True}, 0.95, 0.0),
        ({"kl_coef": 0.4, "kl_in": "loss", "lam": 0.7}, 0.7, 0.0),
    ],
    ids=str,
)
def test_advantages_and_returns_are_those_of_the_formula(ppo, lam, kl_coef):
    engine = moved_engine(ppo={"micro_batch_size": 2, **ppo})
    rollout = rollout_of()
    experience = engine.estimate_advantages(rollout, SCORES)
    advantages, returns, kl = by_hand(engine, rollout, SCORES, lam, kl_coef)
    assert_rows(experience.advantages, advantages, rollout.mask)
    assert_rows(experience.returns, returns, rollout.mask)
    assert experience.kl.tolist() == pytest.approx(kl, rel=1e-3, abs=1e-4)
    real = torch.cat(advantages)
    count, mean, m2 = experience.moments.tolist()
    assert count == len(real)
    assert mean == pytest.approx(real.mean().item(), rel=1e-4)
    assert m2 / count == pytest.approx(real.var(unbiased=False).item(), rel=1e-4)
    assert experience.kl_coef.item() == pytest.approx(0.4)


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_groups_are_compared_by_score_less_the_penalty(estimator, kl_in):
    ppo = {"estimator": estimator, "group_size": 3, "kl_coef": 0.4, "kl_in": kl_in}
    engine = moved_engine(ppo=ppo)
    rollout = rollout_of()
    experience = engine.estimate_advantages(rollout, SCORES)
    rewards = list(SCORES)
    if kl_in == "reward":
        for b, (logprobs, ref_logprobs, _) in enumerate(readings(engine, rollout)):
            rewards[b] -= 0.4 * (logprobs - ref_logprobs).sum().item()
    expected = []
    for b in range(B):
        group = rewards[b // 3 * 3 : b // 3 * 3 + 3]
        mean = sum(group) / 3
        advantage = rewards[b] - mean
        if estimator == "grpo":
            advantage /= math.sqrt(sum((r - mean) ** 2 for r in group) / 2) + 1e-6
        if estimator == "rloo":
            advantage *= 3 / 2
        own = int(rollout.mask[b].sum())
        expected.append(torch.full((own,), advantage, dtype=torch.float64))
    assert_rows(experience.advantages, expected, rollout.mask)


def test_adaptive_kl_follows_the_mean_kl_of_a_response():
    """Of the whole response in nats, policy against reference; the step itself uses the old one."""
    plain = moved_engine(ppo={"kl_coef": 0.4})
    rollout = rollout_of()
    kl = sum((p - q).sum().item() for p, q, _ in readings(plain, rollout)) / B
    assert kl > 0.1
    control = AdaptiveKLConfig(target=kl / 1.1, horizon=50)  # an error of 0.1, which is not clipped
    for kl_in in ("reward", "loss"):
        engine = moved_engine(ppo={"kl_coef": 0.4, "adaptive_kl": control, "kl_in": kl_in})
        experience = engine.estimate_advantages(rollout, SCORES)
        assert engine.kl.coef.item() == pytest.approx(0.4 * (1 + 0.1 * B / 50), rel=1e-5)
        assert experience.kl_coef.item() == pytest.approx(0.4)
        in_reward = 0.4 if kl_in == "reward" else 0.0
        advantages, _, _ = by_hand(engine, rollout, SCORES, 0.95, in_reward)
        assert_rows(experience.advantages, advantages, rollout.mask)
        again = engine.estimate_advantages(rollout, SCORES)
        assert again.kl_coef.item() == pytest.approx(0.4 * (1 + 0.1 * B / 50), rel=1e-5)


def test_objective_metrics_are_those_of_the_responses():
    """KL per response and entropy per token: neither with the padding, nor the environment's."""
    engine = moved_engine(ppo={"kl_estimator": "k3", "gamma": 0.9, "importance_cap": 1.1})
    rollout = rollout_of()
    found = readings(engine, rollout)
    own = torch.zeros(rollout.mask.shape)
    for b, (logprobs, _, _) in enumerate(found):
        own[b][rollout.mask[b]] = logprobs.float()
    apart = torch.linspace(-0.5, 0.5, own.numel()).view_as(own)
    rollout = dataclasses.replace(rollout, logprobs=own - apart)
    experience = engine.estimate_advantages(rollout, SCORES)
    advantages, returns, _ = by_hand(engine, rollout, SCORES, 0.95, 0.05)
    metrics = engine.update(experience)

    kl = [(p - q).sum().item() for p, q, _ in found]
    assert metrics["objective/kl"] == pytest.approx(sum(kl) / B, rel=1e-3)
    entropy = torch.cat([h for _, _, h in found])
    assert metrics["objective/entropy"] == pytest.approx(entropy.mean().item(), rel=1e-5)
    scores = torch.tensor(SCORES, dtype=torch.float64)
    assert metrics["objective/scores"] == pytest.approx(scores.mean().item(), rel=1e-5)
    deviation = scores.std(unbiased=False).item()
    assert metrics["objective/scores_std"] == pytest.approx(deviation, rel=1e-5)
    assert metrics["objective/kl_coef"] == pytest.approx(0.05)
    assert metrics["objective/response_length"] == pytest.approx(len(entropy) / B)
    assert metrics["objective/finished"] == pytest.approx(4 / 6)
    weights = apart[rollout.mask].double().exp().clamp(max=1.1)
    assert_rows(
        torch.where(rollout.mask, experience.is_weights, 0.0),
        list(weights.split([len(p) for p, _, _ in found])),
        rollout.mask,
    )
    assert metrics["objective/importance_weight"] == pytest.approx(weights.mean().item(), rel=1e-4)
    errors, targets = torch.cat(advantages), torch.cat(returns)
    explained = 1 - errors.var(unbiased=False) / targets.var(unbiased=False)
    assert metrics["value/explained_variance"] == pytest.approx(explained.item(), rel=1e-3)


def test_normalized_scores_of_two_steps_and_missing_eos():
    """The statistics are of the scores as they came, finished or not; penalties are not in them."""
    engine = moved_engine(
        ppo={"kl_coef": 0.0, "lam": 1.0},
        reward=RewardConfig(normalize=True, missing_eos_penalty=0.5, length_penalty=0.1),
    )
    rollout = rollout_of()
    seen: list[float] = []
    for scores in (SCORES, tuple(2 * s + 3 for s in SCORES)):
        seen += scores
        mean = sum(seen) / len(seen)
        deviation = math.sqrt(sum((s - mean) ** 2 for s in seen) / len(seen))
        expected = [
            (score - mean) / deviation - 0.5 * (not row.finished) - 0.1 * int(rollout.mask[b].sum())
            for b, (score, row) in enumerate(zip(scores, ROWS, strict=True))
        ]
        # An evaluation is on the same scale, and leaves it alone.
        experience = engine.estimate_advantages(rollout, scores)
        assert experience.scores.tolist() == pytest.approx(expected, rel=1e-5)
        engine.shaped_scores(rollout, torch.tensor(scores) * 7 + 1)
        advantages, _, _ = by_hand(engine, rollout, tuple(expected), 1.0, 0.0)
        assert_rows(experience.advantages, advantages, rollout.mask)


def test_remax_compares_with_the_greedy_response_to_its_own_prompt():
    """Each prompt's, on the scale of the sampled scores, of which it learns nothing."""
    table = {"yes": 4.0, "no": -3.0}

    def reward(prompts, responses, row):
        return [table[response] for response in responses]

    engine = moved_engine(
        reward,
        ppo={"estimator": "remax", "group_size": 3, "kl_coef": 0.4},
        reward=RewardConfig(normalize=True, missing_eos_penalty=0.5),
    )
    greedy = rollout_of((Row("Hi", ("yes",)), Row("A longer prompt", ("no",), finished=False)))
    rollout = dataclasses.replace(rollout_of(), greedy=greedy)
    mean = sum(SCORES) / B
    deviation = math.sqrt(sum((s - mean) ** 2 for s in SCORES) / B)
    baselines = [(4.0 - mean) / deviation] * 3 + [(-3.0 - mean) / deviation - 0.5] * 3
    expected = []
    for b, (logprobs, ref_logprobs, _) in enumerate(readings(engine, rollout)):
        rewards = (-0.4 * (logprobs - ref_logprobs)).tolist()
        rewards[-1] += (SCORES[b] - mean) / deviation - 0.5 * (not ROWS[b].finished) - baselines[b]
        expected.append(torch.tensor(to_go(rewards, 1.0), dtype=torch.float64))
    experience = engine.estimate_advantages(rollout, SCORES)
    assert_rows(experience.advantages, expected, rollout.mask)
    assert engine.normalizer.count == B
