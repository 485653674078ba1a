"""The invariants of a PPO step that design section 4 asks for, on a tiny model."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import torch
from engines import PROMPTS, experience_of, make_engine, response_logprobs, vowels
from ops import Watch
from tiny import tiny_model, tiny_model_folder, tiny_tokenizer

from ppo_engine.errors import UserError
from ppo_engine.models.value_model import score_head, value_model_from_policy
from ppo_engine.ppo.engine import PPOEngine
from ppo_engine.ppo.kl_control import KLController
from ppo_engine.pretrained import masters
from ppo_engine.rewards.model import RewardModel
from ppo_engine.rollout.batch import Rollout
from ppo_engine.settings.schema import (
    AdaptiveKLConfig,
    GenerationConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    PPOSettings,
    RewardConfig,
    RunConfig,
)
from ppo_kernels import head

CPU = torch.device("cpu")


def test_first_kl_is_exactly_zero():
    experience = experience_of(make_engine())
    assert torch.equal(experience.kl, torch.zeros(8))
    assert torch.equal(experience.logprobs, experience.ref_logprobs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loop_may_sample_in_inference_mode(dtype):
    """Inside and outside by turns: what is kept is of neither; an update records gradients."""
    found = []
    for modes in ((False,) * 4, (True, False, False, True), (False, True, True, False)):
        engine = make_engine(run={"dtype": dtype})
        torch.manual_seed(0)
        metrics = []
        for mode in (modes[:2], modes[2:]):
            with torch.inference_mode(mode[0]):
                experience = experience_of(engine)
            with torch.inference_mode(mode[1]):
                metrics.append(engine.update(experience))
        found.append(metrics)
        assert not engine.sampler.take_note()
    assert found[1] == found[0] and found[2] == found[0]


def test_first_mini_batch_has_ratio_one():
    engine = make_engine(ppo={"micro_batch_size": 3})
    experience = experience_of(engine)
    # However far rounding took those that were measured.
    moved = dataclasses.replace(experience, logprobs=experience.logprobs + 0.5)
    metrics = engine.update(moved)
    assert metrics["policy/ratio_max"] == 1.0
    assert metrics["policy/clip_fraction"] == 0.0
    assert metrics["policy/approx_kl"] == 0.0


def test_later_epochs_move_the_ratio():
    engine = make_engine(ppo={"epochs": 3, "mini_batch_size": 4})
    metrics = engine.update(experience_of(engine))
    assert metrics["policy/ratio_max"] > 1.001
    assert metrics["policy/approx_kl"] > 0
    assert engine.actor.version == 6


@pytest.mark.parametrize(
    "ppo",
    [
        {},
        {"estimator": "rloo", "group_size": 4, "reduction": "sequence_mean"},
        {"estimator": "dr_grpo", "group_size": 2, "reduction": "sum", "epochs": 2},
        {"kl_in": "loss", "kl_estimator": "k3", "epochs": 2, "clip_range": (0.01, 0.03)},
        {"dual_clip": 1.01, "epochs": 3, "importance_cap": 1.2},
        {"ratio_level": "sequence", "epochs": 3, "reduction": "sequence_mean"},
        {"objective": "cispo", "epochs": 3, "clip_range": (1.0, 0.05)},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_add_up_to_the_mini_batch(size, ppo):
    found = {}
    for micro in (8, size):
        engine = make_engine(ppo={"micro_batch_size": micro, "entropy_coef": 0.1, **ppo})
        rollout = engine.generate(PROMPTS[: 8 // engine.config.ppo.group_size])
        engine.update(engine.estimate_advantages(rollout, torch.arange(8.0)))
        found[micro] = [p.detach().clone() for p in engine.policy.model.parameters()]
        if engine.critic is not None:
            found[micro] += [p.detach().clone() for p in engine.critic.model.parameters()]
    start = [p.detach() for p in make_engine().policy.model.parameters()]
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(found[8], start, strict=False))
    for a, b in zip(found[8], found[size], strict=True):
        # Adam divides by the gradient's size: where that is about eps, rounding shows.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def clip(ratio, a, log_p, c):
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(0.9, 1.3))
    return torch.where(a < 0, torch.minimum(loss, -c * a), loss)


def cispo(ratio, a, log_p, c):
    return -ratio.clamp(0.9, 1.3).detach() * a * log_p


@pytest.mark.parametrize(
    ("ppo", "objective"),
    [
        ({"dual_clip": 2.0}, clip),
        ({"objective": "cispo"}, cispo),
        ({"ratio_level": "sequence", "dual_clip": 2.0}, clip),
        ({"objective": "cispo", "importance_cap": 1.1}, cispo),
    ],
    ids=["clip", "cispo", "sequence", "capped"],
)
def test_the_loss_is_the_one_that_is_set(ppo, objective):
    """Gradient and value of one mini-batch against the formula, written out (float64)."""
    settings = {"estimator": "dr_grpo", "group_size": 4, "kl_in": "loss", "kl_coef": 0.3}
    settings |= {"entropy_coef": 0.05, "clip_range": (0.1, 0.3)}
    engine = make_engine(ppo={**settings, **ppo})
    rollout = engine.generate(PROMPTS[:2])
    noise = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(0))
    logprobs, _, _ = engine.compare_with_reference(rollout)
    rollout = dataclasses.replace(rollout, logprobs=(logprobs - noise) * rollout.mask)
    experience = engine.estimate_advantages(rollout, torch.arange(8.0))
    experience = dataclasses.replace(
        experience,
        logprobs=experience.logprobs + noise,
        ref_logprobs=experience.ref_logprobs - noise,
        policy_version=-1,  # another than the one that is trained
    )
    before = [p.detach().clone() for p in engine.policy.model.parameters()]
    gradients: list[torch.Tensor] = []
    engine.actor.learner.step = lambda losses: (
        gradients.extend(  # type: ignore[method-assign]
            p.grad.clone() for p in engine.policy.model.parameters()
        )
        or torch.zeros(())
    )
    metrics = engine.update(experience)

    model = engine.policy.model.double()
    model.load_state_dict({n: p.double() for (n, _), p in zip(
        model.named_parameters(), before, strict=True)}, strict=False)  # fmt: skip
    model.zero_grad()
    mask = rollout.mask
    ids, real = rollout.sequences()
    positions = (real.long().cumsum(1) - 1).clamp_min(0)
    logits = model(ids, attention_mask=real.long(), position_ids=positions).logits
    log_p = logits[:, rollout.prompt_ids.shape[1] - 1 : -1].log_softmax(-1)
    logprobs = log_p.gather(2, rollout.response_ids[..., None])[..., 0]
    log_ratio = logprobs - experience.logprobs.double()
    if "ratio_level" in ppo:  # the advantage is the same for all tokens of a response
        log_ratio = ((log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)).expand(
            mask.shape
        )
    a = experience.advantages.double()
    loss = objective(log_ratio.exp(), a, logprobs, 2.0)
    if "importance_cap" in ppo:
        loss = loss * noise.double().exp().clamp(max=1.1)
    to_ref = logprobs - experience.ref_logprobs.double()
    loss = loss + 0.3 * ((-to_ref).exp() - 1 + to_ref)
    loss = loss + 0.05 * (log_p.exp() * log_p).sum(-1)
    total = loss[mask].sum() / (8 * 12)
    total.backward()
    assert metrics["policy/loss"] == pytest.approx(total.item(), rel=1e-5)
    for found, parameter in zip(gradients, model.parameters(), strict=True):
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(found.double(), parameter.grad, rtol=1e-3, atol=1e-5 * scale)


def pad_more(rollout: Rollout, left: int, right: int, pad: int) -> Rollout:
    def padded(x: torch.Tensor, amount: tuple[int, int], value: float) -> torch.Tensor:
        return torch.nn.functional.pad(x, amount, value=value)

    return dataclasses.replace(
        rollout,
        prompt_ids=padded(rollout.prompt_ids, (left, 0), pad),
        prompt_mask=padded(rollout.prompt_mask, (left, 0), False),
        response_ids=padded(rollout.response_ids, (0, right), pad),
        mask=padded(rollout.mask, (0, right), False),
    )


def test_more_padding_changes_nothing():
    engine = make_engine(critic=ModelConfig())
    rollout = engine.generate(PROMPTS)
    wide = pad_more(rollout, 5, 7, engine.policy.tokenizer.pad_token_id)
    width = rollout.mask.shape[1]
    narrow_logprobs, narrow_entropy = response_logprobs(engine.policy, rollout, 1.0)
    wide_logprobs, wide_entropy = response_logprobs(engine.policy, wide, 1.0)
    torch.testing.assert_close(wide_logprobs[:, :width], narrow_logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(wide_entropy[:, :width], narrow_entropy, rtol=1e-5, atol=1e-5)
    assert not wide_logprobs[:, width:].any()
    scores = torch.arange(8.0)
    one = engine.estimate_advantages(rollout, scores)
    two = engine.estimate_advantages(wide, scores)
    torch.testing.assert_close(two.advantages[:, :width], one.advantages, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(two.values[:, :width], one.values, rtol=1e-4, atol=1e-5)


def test_logprobs_are_those_of_the_models_own_logits():
    engine = make_engine()
    rollout = engine.generate(["Hello there"])
    assert rollout.prompt_mask.all()
    ids, _ = rollout.sequences()
    logits = engine.policy.model(ids).logits / 0.7
    start = rollout.prompt_ids.shape[1]
    expected = logits.log_softmax(-1)[:, start - 1 : -1].gather(2, ids[:, start:, None])[..., 0]
    logprobs, entropy = response_logprobs(engine.policy, rollout, 0.7)
    torch.testing.assert_close(logprobs, expected * rollout.mask, rtol=1e-5, atol=1e-5)
    probabilities = logits[:, start - 1 : -1].softmax(-1)
    torch.testing.assert_close(
        entropy,
        -(probabilities * probabilities.log()).sum(-1) * rollout.mask,
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("settings", [{}, {"trainable_layers": 1}])
def test_a_step_makes_no_tensor_of_tokens_times_vocab(settings, monkeypatch):
    """Logits there are of a decoded token, and of a chunk."""
    monkeypatch.setattr(head, "_TOKENS", {"cpu": 64})
    monkeypatch.setattr(head, "_TOKENS_OF_TILES", 64)
    config = PPOConfig(
        policy=ModelConfig(**settings),
        generation=GenerationConfig(max_new_tokens=40),
        ppo=PPOSettings(rollout_batch_size=16, mini_batch_size=16, micro_batch_size=16),
        run=RunConfig(dtype="float32"),
    )
    engine = PPOEngine(tiny_model(), vowels, config=config, tokenizer=tiny_tokenizer())
    with Watch(width=259) as watch:
        rollout = engine.generate(["A prompt", "Another prompt"] * 8)
        engine.update(engine.estimate_advantages(rollout, engine.score(rollout)))
    tokens = int(rollout.mask.sum())
    assert 64 * 259 <= watch.largest <= 80 * 259 < tokens * 259 / 4
    with Watch(width=259) as watch:  # which sees those of the model itself
        engine.policy.model(*rollout.sequences())
    assert watch.largest >= tokens * 259


def test_sampling_follows_the_temperature():
    """The sampler's frequencies are those of softmax(logits / temperature)."""
    engine = make_engine(generation=GenerationConfig(max_new_tokens=1, temperature=0.5))
    torch.manual_seed(0)
    tokens = torch.cat([engine.generate(["Hello"] * 512).response_ids[:, 0] for _ in range(8)])
    ids = torch.tensor([engine.policy.tokenizer("Hello")["input_ids"]])
    expected = (engine.policy.model(ids).logits[0, -1] / 0.5).softmax(-1)
    found = torch.bincount(tokens, minlength=len(expected)) / len(tokens)
    error = (found - expected).abs() / (expected * (1 - expected) / len(tokens)).sqrt()
    assert error.max() < 5


def test_response_ends_with_its_first_eos_and_pad_is_apart():
    engine = make_engine(generation=GenerationConfig(max_new_tokens=60, temperature=3.0))
    tokenizer = engine.policy.tokenizer
    torch.manual_seed(1)
    rollout = engine.generate(PROMPTS * 8)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert rollout.finished.any() and not rollout.finished.all()
    for row in range(len(rollout)):
        real = rollout.response_ids[row][rollout.mask[row]].tolist()
        assert real.count(tokenizer.eos_token_id) == int(rollout.finished[row])
        assert rollout.finished[row] == (real[-1] == tokenizer.eos_token_id)


def test_advantages_come_from_the_score_on_the_last_token():
    """With gamma = lam = 1 and no KL every return is the score (Monte Carlo)."""
    engine = make_engine(ppo={"lam": 1.0, "kl_coef": 0.0})
    rollout = engine.generate(PROMPTS)
    scores = torch.arange(8.0)
    experience = engine.estimate_advantages(rollout, scores)
    expected = scores[:, None] * rollout.mask
    torch.testing.assert_close(experience.returns, expected, rtol=1e-5, atol=1e-4)


def test_missing_eos_and_normalization():
    reward = RewardConfig(missing_eos_score=-9.0, normalize=True)
    engine = make_engine(reward=vowels, **{"generation": GenerationConfig(max_new_tokens=3)})
    config = dataclasses.replace(engine.config, reward=reward)
    engine = PPOEngine(tiny_model(), vowels, config=config, tokenizer=tiny_tokenizer())
    rollout = engine.generate(PROMPTS)
    experience = engine.estimate_advantages(rollout, torch.arange(8.0))
    unfinished = ~rollout.finished
    assert unfinished.any()
    assert (experience.scores[unfinished] == -9.0).all()


def test_reward_whitening_scales_and_does_not_shift():
    plain = make_engine(ppo={"lam": 1.0, "kl_coef": 0.0})
    white = make_engine(ppo={"lam": 1.0, "kl_coef": 0.0, "whiten_rewards": True})
    rollout = plain.generate(PROMPTS)
    scores = torch.arange(8.0) - 2
    before = plain.estimate_advantages(rollout, scores).returns
    after = white.estimate_advantages(rollout, scores).returns
    rewards = torch.zeros_like(before)
    rewards[torch.arange(8), rollout.lengths - 1] = scores
    scale = rewards[rollout.mask].std(unbiased=False)
    torch.testing.assert_close(after, before / scale, rtol=1e-4, atol=1e-4)


def test_kl_moves_once_the_policy_has_and_the_reference_stays():
    engine = make_engine(ppo={"kl_coef": 0.1}, lr=1e-2)
    reference = [p.clone() for p in engine.reference.model.parameters()]
    engine.update(experience_of(engine))
    experience = experience_of(engine)
    assert experience.kl.abs().sum() > 1e-3
    for a, b in zip(reference, engine.reference.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_adaptive_kl_follows_its_rule():
    control = KLController(0.2, AdaptiveKLConfig(target=6.0, horizon=100), torch.device("cpu"))
    control.update(torch.tensor(60.0), 10)  # error clipped to 0.2
    assert control.coef.item() == pytest.approx(0.2 * (1 + 0.2 * 10 / 100))
    control.update(torch.tensor(6.6), 10)
    assert control.coef.item() == pytest.approx(0.2 * 1.02 * (1 + 0.1 * 10 / 100))
    many = KLController(0.2, AdaptiveKLConfig(target=6.0, horizon=10), torch.device("cpu"))
    many.update(torch.tensor(0.0), 1000)
    assert many.coef.item() == pytest.approx(0.2 * 0.8)
    fixed = KLController(0.2, None, torch.device("cpu"))
    fixed.update(torch.tensor(60.0), 10)
    assert fixed.coef.item() == pytest.approx(0.2)


def test_frozen_layers_stay_and_are_shared_with_the_reference():
    policy = ModelConfig(trainable_layers=1, optimizer=OptimizerConfig(learning_rate=1e-2))
    engine = make_engine(policy=policy)
    before = {n: p.detach().clone() for n, p in engine.policy.model.named_parameters()}
    twins = dict(engine.reference.model.named_parameters())
    engine.update(experience_of(engine))
    changed = {
        n for n, p in engine.policy.model.named_parameters() if not torch.equal(p, before[n])
    }
    assert changed == {
        n
        for n in before
        if "layers.1." in n or (n.endswith("norm.weight") and "layers.0." not in n)
    }
    frozen = set(before) - changed
    params = dict(engine.policy.model.named_parameters())
    assert all(params[n].data_ptr() == twins[n].data_ptr() for n in frozen)
    assert experience_of(make_engine(policy=policy)).kl.abs().max() == 0


def test_learning_rate_decays_to_zero():
    optimizer = OptimizerConfig(learning_rate=1e-3)
    engine = make_engine(policy=ModelConfig(optimizer=optimizer), steps=2)
    engine.update(experience_of(engine))
    assert engine.actor.learner.learning_rate == pytest.approx(5e-4)
    experience = experience_of(engine)
    with warnings.catch_warnings(action="error"):
        engine.update(experience)
    assert engine.actor.learner.learning_rate == 0.0
    with pytest.warns(UserWarning, match=r"of the policy has .* config\.steps=2 ") as told:
        for _ in range(2):
            engine.update(experience)
    assert [warning.filename for warning in told] == [__file__]


def test_an_update_of_a_half_precision_run_changes_fp32_masters():
    config = PPOConfig(
        policy=ModelConfig(optimizer=OptimizerConfig(learning_rate=1e-5, warmup_fraction=0.0)),
        ppo=PPOSettings(rollout_batch_size=8, mini_batch_size=8),
        generation=GenerationConfig(max_new_tokens=6),
        run=RunConfig(dtype="bfloat16"),
    )
    engine = PPOEngine(tiny_model(), vowels, config=config, tokenizer=tiny_tokenizer())
    experience = experience_of(engine)
    assert experience.kl.abs().max() == 0
    matrix = engine.policy.model.model.layers[0].mlp.up_proj.weight
    before = masters.master(matrix)
    engine.update(experience)
    assert {p.dtype for p in engine.policy.model.parameters()} == {torch.bfloat16}
    states = engine.actor.learner.optimizer.state.values()
    assert {s["exp_avg"].dtype for s in states} == {torch.float32}
    # By a learning rate, of which bf16 weights themselves would not see most.
    change = (masters.master(matrix) - before).abs()
    assert 0.5 * 1e-5 < change.mean() < 1.01 * 1e-5 * 2


def bytes_of(model, learner=None):
    """Of weights, remainders and moments, each tensor once."""
    found = [*model.parameters()]
    found += [x.master_remainder for x in found if hasattr(x, "master_remainder")]
    states = learner.optimizer.state.values() if learner else ()
    found += [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    return sum({x.data_ptr(): x.nbytes for x in found}.values())


@pytest.mark.parametrize(("dtype", "trained", "frozen"), [("float32", 12, 4), ("bfloat16", 12, 2)])
def test_bytes_of_every_role(dtype, trained, frozen):
    """Trained: 2 + 2 or 4 of a master, 8 of moments. A critic's head is fp32."""
    config = PPOConfig(
        ppo=PPOSettings(rollout_batch_size=8, mini_batch_size=8),
        generation=GenerationConfig(max_new_tokens=6),
        run=RunConfig(dtype=dtype),
    )
    tokenizer = tiny_tokenizer()
    judge = value_model_from_policy(tiny_model(), tokenizer, seed=0)
    reward = RewardModel(judge, tokenizer, device=CPU, dtype=getattr(torch, dtype))
    engine = PPOEngine(tiny_model(), reward, config=config, tokenizer=tokenizer)
    engine.update(experience_of(engine))
    count = sum(x.numel() for x in engine.policy.model.parameters())
    of_critic = sum(x.numel() for x in engine.critic.model.parameters())
    head = score_head(engine.critic.model).weight.numel()
    assert bytes_of(engine.policy.model, engine.actor.learner) == trained * count
    assert bytes_of(engine.critic.model, engine.critic.learner) == trained * of_critic
    assert bytes_of(engine.reference.model) == frozen * count
    assert bytes_of(reward.model) == frozen * (of_critic - head) + 4 * head


def test_lora_reference_is_the_policy_without_adapter():
    pytest.importorskip("peft")
    from ppo_engine.settings.schema import LoraConfig

    policy = ModelConfig(lora=LoraConfig(rank=4), optimizer=OptimizerConfig(learning_rate=1e-2))
    engine = make_engine(policy=policy)
    experience = experience_of(engine)
    assert experience.kl.abs().max() == 0
    engine.update(experience)
    assert experience_of(engine).kl.abs().sum() > 0


def test_state_restores_to_the_same_bits():
    one = make_engine(ppo={"adaptive_kl": AdaptiveKLConfig(), "mini_batch_size": 4})
    one.update(experience_of(one))
    state = {k: v for k, v in one.state_dict().items()}
    two = make_engine(ppo={"adaptive_kl": AdaptiveKLConfig(), "mini_batch_size": 4})
    import copy

    two.load_state_dict(copy.deepcopy(state))
    torch.manual_seed(7)
    first = one.update(experience_of(one))
    torch.manual_seed(7)
    second = two.update(experience_of(two))
    assert first == second


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda prompts, responses: [1.0], "1 score for 8"),
        (lambda prompts, responses: [math.nan] * 8, "finite number"),
    ],
)
def test_bad_rewards_are_named(reward, message):
    engine = make_engine(reward)
    with pytest.raises(UserError, match=message):
        engine.score(engine.generate(PROMPTS))


def test_scores_of_ones_own_are_checked():
    engine = make_engine()
    rollout = engine.generate(PROMPTS)
    engine.estimate_advantages(rollout, [0.5] * 8)
    for wrong, what in (([0.5] * 7, "8 numbers"), (0.5, "8 numbers"), ([math.nan] * 8, "finite")):
        with pytest.raises(ValueError, match=what):
            engine.estimate_advantages(rollout, wrong)


def test_chat_prompts_need_a_chat_template(tmp_path):
    folder = tiny_model_folder(tmp_path, chat_template=False)
    engine = PPOEngine(folder, vowels, config=PPOConfig(run=RunConfig(dtype="float32")))
    with pytest.raises(UserError, match="no chat template"):
        engine.generate([[{"role": "user", "content": "hi"}]])
    with pytest.raises(UserError, match="empty"):
        engine.generate([""])
