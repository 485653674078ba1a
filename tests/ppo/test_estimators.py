"""Every advantage estimator against its formula, written out in plain Python (float64)."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from engines import PROMPTS, experience_of, make_engine

from ppo_engine.errors import UserError
from ppo_engine.ppo.estimators import ESTIMATORS, Evidence, equal_groups
from ppo_engine.rewards.shaping import ScoreNormalizer
from ppo_engine.settings.checks import check_settings
from ppo_engine.settings.schema import (
    AdaptiveKLConfig,
    GenerationConfig,
    PPOConfig,
    PPOSettings,
    resolved,
)

B, T, G = 6, 5, 3
KL = 0.3


def evidence(kl_coef: float = KL, dtype: torch.dtype = torch.float64) -> Evidence:
    """Two groups of three; ragged, with environment's tokens in the middle of some."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 2:4] = mask[2, 3:] = mask[4, 1] = False
    return Evidence(
        scores=draw(B),
        logprobs=draw(B, T).where(mask, math.nan),
        ref_logprobs=draw(B, T).where(mask, math.nan),
        mask=mask,
        kl_coef=torch.tensor(kl_coef),
        values=draw(B, T),
        greedy_scores=draw(B // G).repeat_interleave(G),
    )


def responses(x: Evidence) -> list[dict]:
    """Of each response: its score, per-token KL (k1), values, and the places of its tokens."""
    found = []
    for b in range(B):
        places = [t for t in range(T) if x.mask[b, t]]
        kl = [float(x.logprobs[b, t] - x.ref_logprobs[b, t]) for t in places]
        values = [float(x.values[b, t]) for t in places]
        found.append(
            {"score": float(x.scores[b]), "kl": kl, "values": values, "places": places, "row": b}
        )
    return found


def token_rewards(response: dict, score: float) -> list[float]:
    rewards = [-KL * k for k in response["kl"]]
    rewards[-1] += score
    return rewards


def to_go(rewards: list[float], gamma: float = 1.0) -> list[float]:
    return [
        sum(gamma ** (s - t) * rewards[s] for s in range(t, len(rewards)))
        for t in range(len(rewards))
    ]


def of_gae(response: dict, gamma: float, lam: float) -> list[float]:
    rewards, values = token_rewards(response, response["score"]), [*response["values"], 0.0]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return to_go(deltas, gamma * lam)


def of_group(x: Evidence, compare) -> list[list[float]]:
    """`compare(own reward, all rewards of the group)` for every token."""
    rows = responses(x)
    rewards = [row["score"] - KL * sum(row["kl"]) for row in rows]
    return [
        [compare(rewards[b], rewards[b // G * G : b // G * G + G])] * len(row["places"])
        for b, row in enumerate(rows)
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def unbiased_std(values: list[float]) -> float:
    return math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))


EXPECTED = {
    "gae": lambda x: [of_gae(row, 0.9, 0.7) for row in responses(x)],
    "monte_carlo": lambda x: [of_gae(row, 0.9, 1.0) for row in responses(x)],
    "td": lambda x: [of_gae(row, 0.9, 0.0) for row in responses(x)],
    # As in verl and OpenRLHF: discounted rewards to go, whitened later over the batch.
    "reinforce_pp": lambda x: [
        to_go(token_rewards(row, row["score"]), 0.9) for row in responses(x)
    ],
    # As in verl: rewards to go less the greedy response's score.
    "remax": lambda x: [
        [g - float(x.greedy_scores[row["row"]]) for g in to_go(token_rewards(row, row["score"]))]
        for row in responses(x)
    ],
    # As in verl (eps 1e-6) and, but for its eps of 1e-4, TRL.
    "grpo": lambda x: of_group(x, lambda r, rs: (r - mean(rs)) / (unbiased_std(rs) + 1e-6)),
    "dr_grpo": lambda x: of_group(x, lambda r, rs: r - mean(rs)),
    # As in TRL: the baseline is the mean of the other rewards.
    "rloo": lambda x: of_group(x, lambda r, rs: r - (sum(rs) - r) / (len(rs) - 1)),
}


def settings_of(name: str, **more) -> PPOSettings:
    # Those that discount do so here by 0.9.
    settings = PPOSettings(
        estimator=name, group_size=G, rollout_batch_size=B, gamma=0.9, lam=0.7, **more
    )
    discounts = not (settings.compares_groups or settings.needs_greedy)
    settings = settings if discounts else dataclasses.replace(settings, gamma=1.0)
    return resolved(PPOConfig(ppo=settings)).ppo


@pytest.mark.parametrize("name", ESTIMATORS)
def test_advantages_are_those_of_the_formula(name):
    x = evidence()
    if not PPOSettings(estimator=name).has_critic:
        x = x._replace(values=None)
    shaped = ESTIMATORS[name](x, settings_of(name))
    expected = torch.zeros(B, T, dtype=torch.float64)
    for row, advantages in zip(responses(evidence()), EXPECTED[name](evidence()), strict=True):
        expected[row["row"], row["places"]] = torch.tensor(advantages, dtype=torch.float64)
    torch.testing.assert_close(shaped.advantages, expected, rtol=1e-6, atol=1e-6)
    real = expected[x.mask]
    count, average, m2 = shaped.moments.tolist()
    assert count == x.mask.sum()
    assert average == pytest.approx(real.mean().item(), abs=1e-6)
    assert m2 / count == pytest.approx(real.var(unbiased=False).item(), rel=1e-5)
    kl = torch.tensor([sum(row["kl"]) for row in responses(evidence())], dtype=torch.float64)
    torch.testing.assert_close(shaped.kl, kl, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "lam"), [("gae", 0.7), ("monte_carlo", 1.0), ("td", 0.0)])
def test_whitened_rewards_are_discounted_as_others(name, lam):
    """The rewards of all tokens, the score's among them, are divided by their deviation first."""
    x = evidence()
    rows = responses(x)
    every = [r for row in rows for r in token_rewards(row, row["score"])]
    scale = math.sqrt(sum((r - mean(every)) ** 2 for r in every) / len(every))
    shaped = ESTIMATORS[name](x, settings_of(name, whiten_rewards=True))
    for row in rows:
        rewards = [r / scale for r in token_rewards(row, row["score"])]
        values = [*row["values"], 0.0]
        deltas = [r + 0.9 * values[t + 1] - values[t] for t, r in enumerate(rewards)]
        expected = torch.tensor(to_go(deltas, 0.9 * lam), dtype=torch.float64)
        found = shaped.advantages[row["row"], row["places"]]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_no_penalty_in_the_rewards_where_it_is_in_the_loss(name):
    found = ESTIMATORS[name](evidence(kl_coef=0.0), settings_of(name))
    other = evidence(kl_coef=0.0)._replace(ref_logprobs=evidence().ref_logprobs + 3.0)
    shaped = ESTIMATORS[name](other, settings_of(name))
    assert torch.equal(shaped.advantages, found.advantages)
    assert not torch.equal(shaped.kl, found.kl)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_equal_scores_have_no_advantage(name):
    """Also where their mean is not exactly representable."""
    x = evidence(kl_coef=0.0, dtype=torch.float32)._replace(scores=torch.full((B,), 7.3))
    shaped = ESTIMATORS[name](x, settings_of(name))
    assert shaped.advantages.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("scores", "rounding", "counts"),
    [
        ([0.7, 0.700001, 0.699999], None, False),
        ([-300.0, -300.0005, -300.0], None, False),
        ([0.001, 0.002, 0.001], None, True),
        ([1000.0, 1000.01, 1000.0], None, True),
        ([0.0, 1e-6, 0.0], None, True),  # nothing here is rounded to 1e-6
        ([1.0, 1.01, 0.995], 0.016, False),  # as of a reward model in bf16
        ([1.0, 1.05, 0.95], 0.016, True),
    ],
)
@pytest.mark.parametrize("name", [n for n in ESTIMATORS if not PPOSettings(estimator=n).has_critic])
def test_a_spread_of_rounding_is_none(name, scores, rounding, counts):
    x = evidence(kl_coef=0.0, dtype=torch.float32)
    given = torch.tensor([*scores, *scores])
    of_each = None if rounding is None else torch.full((B,), rounding)
    x = x._replace(scores=given, greedy_scores=given[:1].expand(B), values=None, rounding=of_each)
    settings = dataclasses.replace(settings_of(name, kl_in="loss"), gamma=1.0)
    shaped = ESTIMATORS[name](x, settings)
    _, mean, m2 = shaped.moments
    found = shaped.advantages[x.mask] - (mean if settings.whiten_advantages else 0.0)
    assert bool(found.any()) == counts and (counts or m2 == 0)
    if settings.compares_groups:
        assert equal_groups(given, settings, of_each) == (not counts)


@pytest.mark.parametrize(("relative", "counts"), [(1e-7, False), (1e-3, True)])
def test_a_penalty_of_rounding_is_none(relative, counts):
    """Of equal scores, beside a reference that adds in another order."""
    x = evidence(dtype=torch.float32)._replace(scores=torch.zeros(B))
    noise = torch.randn(B, T, generator=torch.Generator().manual_seed(0))
    x = x._replace(ref_logprobs=x.logprobs * (1 + relative * noise))
    shaped = ESTIMATORS["grpo"](x, settings_of("grpo"))
    assert bool(shaped.advantages[x.mask].abs().max() > 0.1) == counts
    assert counts or not shaped.advantages[x.mask].any()


@pytest.mark.parametrize("normalize", [False, True])
def test_rounding_is_that_of_the_rewards(normalize):
    """Normalized, scores are as far apart as their noise on the scale that they come to."""
    engine = make_engine(ppo={"estimator": "grpo", "group_size": 2, "kl_in": "loss"})
    engine.normalizer = ScoreNormalizer() if normalize else None
    rollout = engine.generate(PROMPTS[:4])
    scores = [7.0, 7.05, 7.0, 7.00001, 9.0, 7.0, 7.0, 7.0]
    for rounding, equal in ((None, 0.5), (torch.full((8,), 0.1), 0.75)):
        experience = engine.estimate_advantages(rollout, scores, rounding)
        signal = experience.advantages[:, 0].view(4, 2).abs().amax(1) > 0
        assert signal.tolist() == [rounding is None, False, True, False]
        assert engine.update(experience)["objective/equal_groups"] == equal


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if not PPOSettings(estimator=n).has_critic])
def test_critic_free_estimators_make_no_critic(name):
    engine = make_engine(ppo={"estimator": name, "group_size": 4, "epochs": 2})
    assert engine.critic is None
    rollout = engine.generate(PROMPTS[:2])
    assert [rollout.prompts[i] for i in (0, 3, 4, 7)] == [*PROMPTS[:1] * 2, *PROMPTS[1:2] * 2]
    experience = engine.estimate_advantages(rollout, torch.arange(8.0) ** 2)
    assert experience.values is None and experience.returns is None
    metrics = engine.update(experience)
    assert not any(metric.startswith("value/") for metric in metrics)
    assert math.isfinite(metrics["policy/loss"]) and metrics["policy/grad_norm"] > 0
    assert engine.state_dict()["critic"] is None
    with pytest.raises(ValueError, match="no critic"):
        engine.values(rollout)


def test_remax_compares_with_the_greedy_response():
    engine = make_engine(ppo={"estimator": "remax", "group_size": 2, "kl_coef": 0.0})
    rollout = engine.generate(PROMPTS[:4])
    greedy = rollout.greedy
    assert list(greedy.prompts) == PROMPTS[:4]
    ids, mask = greedy.sequences()
    start = greedy.prompt_ids.shape[1]
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    logits = engine.policy.model(ids, attention_mask=mask.long(), position_ids=positions).logits
    likeliest = logits[:, start - 1 : -1].argmax(-1)
    assert torch.equal(likeliest[greedy.mask], greedy.response_ids[greedy.mask])
    scores = engine.score(rollout)
    expected = scores - engine.score(greedy).repeat_interleave(2)
    experience = engine.estimate_advantages(rollout, scores)
    first = experience.advantages[:, 0]
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("ppo", "whitens", "reduction", "kl_estimator"),
    [
        ({}, True, "token_mean", "k1"),
        ({"estimator": "reinforce_pp"}, True, "token_mean", "k1"),
        ({"estimator": "rloo", "kl_in": "loss"}, False, "token_mean", "k3"),
        ({"estimator": "grpo"}, False, "sequence_mean", "k1"),
        ({"estimator": "dr_grpo", "kl_estimator": "k2"}, False, "sum", "k2"),
        ({"estimator": "remax", "reduction": "sum"}, False, "sum", "k1"),
        ({"estimator": "grpo", "whiten_advantages": True}, True, "sequence_mean", "k1"),
    ],
)
def test_what_is_not_set_is_as_the_source_has_it(ppo, whitens, reduction, kl_estimator):
    settings = resolved(PPOConfig(ppo=PPOSettings(**ppo))).ppo
    assert settings.whiten_advantages == whitens
    assert (settings.reduction, settings.kl_estimator) == (reduction, kl_estimator)


@pytest.mark.parametrize(
    ("ppo", "message"),
    [
        ({"estimator": "grpo"}, "set ppo.group_size to 2 or more"),
        ({"estimator": "rloo", "group_size": 3}, "not a multiple of ppo.group_size=3"),
        ({"estimator": "grpo", "group_size": 2, "whiten_rewards": True}, "leave it unset"),
        ({"estimator": "remax", "critic_warmup_steps": 1}, "has no critic"),
        ({"critic_warmup_steps": 100}, "leaves none of the 100 steps for the policy"),
        ({"objective": "cispo", "dual_clip": 3.0}, "bounds the clipped objective"),
        ({"kl_in": "loss", "kl_estimator": "k1"}, "is no penalty"),
        ({"estimator": "rloo", "group_size": 2, "gamma": 0.9}, "leave ppo.gamma at 1"),
        ({"estimator": "remax", "gamma": 0.9}, "leave ppo.gamma at 1"),
        ({"kl_coef": 0.0, "adaptive_kl": AdaptiveKLConfig()}, "set it above 0"),
    ],
)
def test_settings_that_do_not_go_together(ppo, message):
    with pytest.raises(UserError, match=message):
        check_settings(PPOConfig(ppo=PPOSettings(**ppo)))


def test_groups_must_be_whole_and_of_one_prompt():
    engine = make_engine(ppo={"estimator": "rloo", "group_size": 2})
    rollout = engine.generate(PROMPTS[:4])
    engine.estimate_advantages(rollout, [0.5] * 8)
    for order in (torch.tensor([0, 2, 1, 3]), torch.arange(7)):
        with pytest.raises(ValueError, match="groups of 2 consecutive responses to a prompt"):
            engine.estimate_advantages(rollout.select(order), [0.5] * len(order))


def test_groups_without_a_signal_are_counted():
    engine = make_engine(ppo={"estimator": "grpo", "group_size": 2})
    rollout = engine.generate(PROMPTS[:4])
    scores = [1.0, 1.0, 0.5, 0.6, 2.0, 2.0, 3.0, 3.0]
    metrics = engine.update(engine.estimate_advantages(rollout, scores))
    assert metrics["objective/equal_groups"] == 0.75
    of_four = torch.tensor([1.0, 1.0, 2.0, 3.0, 4.0, 4.0, 4.0, 4.0])  # two alike are no group
    assert equal_groups(of_four, PPOSettings(estimator="grpo", group_size=4)) == 0.5


def test_rows_without_their_groups_can_be_learned_from():
    engine = make_engine(ppo={"estimator": "grpo", "group_size": 4})
    experience = engine.estimate_advantages(engine.generate(PROMPTS[:2]), [0.1, 0.2, 0.3, 0.9] * 2)
    metrics = engine.update(experience.select(torch.tensor([0, 3, 5])))
    assert "policy/loss" in metrics and "objective/equal_groups" not in metrics


def test_the_critic_warms_up_alone():
    kl = {"adaptive_kl": AdaptiveKLConfig(horizon=10)}
    engine = make_engine(ppo={"critic_warmup_steps": 1, "mini_batch_size": 4, **kl})
    before = [p.detach().clone() for p in engine.policy.model.parameters()]
    values = [p.detach().clone() for p in engine.critic.model.parameters()]
    metrics = engine.update(experience_of(engine))
    assert "policy/loss" not in metrics and metrics["value/loss"] > 0
    same = zip(before, engine.policy.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    changed = zip(values, engine.critic.model.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in changed)
    assert engine.kl.coef.item() == pytest.approx(0.05)  # of a policy that does not move
    assert engine.update(experience_of(engine))["policy/grad_norm"] > 0
    assert engine.kl.coef.item() < 0.05


def test_importance_weights_are_truncated():
    engine = make_engine(ppo={"importance_cap": 1.5})
    rollout = engine.generate(PROMPTS)
    logprobs, _, _ = engine.compare_with_reference(rollout)
    torch.testing.assert_close(rollout.logprobs, logprobs, rtol=1e-4, atol=1e-4)
    shift = torch.where(rollout.mask, torch.linspace(-1, 1, rollout.mask.shape[1]), 0.0)
    moved = dataclasses.replace(rollout, logprobs=logprobs - shift)
    experience = engine.estimate_advantages(moved, engine.score(moved))
    expected = shift.exp().clamp(max=1.5)
    torch.testing.assert_close(
        experience.is_weights[rollout.mask], expected[rollout.mask], rtol=1e-5, atol=1e-5
    )
    assert engine.update(experience)["objective/importance_weight"] == pytest.approx(
        expected[rollout.mask].mean().item(), rel=1e-4
    )
    with pytest.raises(ValueError, match=r"needs Rollout\.logprobs"):
        engine.estimate_advantages(dataclasses.replace(rollout, logprobs=None), [0.0] * 8)


def test_the_samplers_logprobs_are_those_it_drew_from(tmp_path):
    """With a temperature and top-k, in conversations: 0 where the environment speaks."""
    generation = GenerationConfig(max_new_tokens=6, temperature=0.7, top_k=7)
    engine = make_engine(
        ppo={"importance_cap": 2.0},
        generation=generation,
        environment_function=lambda prompts, turns: ["go on"] * len(turns),
    )
    engine.policy.renderer.end_ids = list(range(100, 259))
    rollout = engine.generate(PROMPTS)
    assert rollout.environment_mask.any()
    ids, real = rollout.sequences()
    positions = (real.long().cumsum(1) - 1).clamp_min(0)
    logits = engine.policy.model(ids, attention_mask=real.long(), position_ids=positions).logits
    logits = logits[:, rollout.prompt_ids.shape[1] - 1 : -1] / 0.7
    kept = logits >= logits.topk(7).values[..., -1:]
    log_p = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)
    expected = log_p.gather(2, rollout.response_ids[..., None])[..., 0]
    expected = torch.where(rollout.mask, expected, 0.0)
    torch.testing.assert_close(rollout.logprobs, expected, rtol=1e-4, atol=1e-4)
