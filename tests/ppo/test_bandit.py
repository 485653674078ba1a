"""A one-token bandit of fixed rewards, through the whole engine: every estimator must find the
optimum that is known in closed form."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from torch import Tensor

from ppo_engine.ppo.engine import PPOEngine
from ppo_engine.settings.schema import (
    GenerationConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    PPOSettings,
    RunConfig,
)

BETA, ACTIONS = 0.5, 8
REWARDS = torch.linspace(-0.5, 0.5, ACTIONS)


def trained(**ppo) -> tuple[Tensor, Tensor]:
    """The bandit's policy after training, and before: probabilities of the actions."""
    tokenizer, model = tiny_tokenizer(), tiny_model()
    allowed = torch.tensor(tokenizer("abcdefgh")["input_ids"])
    assert len(allowed) == ACTIONS

    # Only eight tokens can be drawn: a bias on the output makes the others impossible.
    head = torch.nn.Linear(32, len(tokenizer))
    head.weight = torch.nn.Parameter(torch.zeros_like(head.weight))
    bias = torch.full((len(tokenizer),), -1e4)
    bias[allowed] = torch.randn(ACTIONS, generator=torch.Generator().manual_seed(3)) * 0.5
    head.bias = torch.nn.Parameter(bias.clone())
    model.config.tie_word_embeddings = False
    model.set_output_embeddings(head)

    scores = {tokenizer.decode([t]): r.item() for t, r in zip(allowed, REWARDS, strict=True)}
    settings = {"rollout_batch_size": 256, "mini_batch_size": 128, "micro_batch_size": 128}
    settings |= {"epochs": 2, "kl_coef": BETA, "whiten_advantages": False, **ppo}
    config = PPOConfig(
        policy=ModelConfig(optimizer=OptimizerConfig(learning_rate=0.03)),
        critic=ModelConfig(optimizer=OptimizerConfig(learning_rate=0.01)),
        generation=GenerationConfig(max_new_tokens=1),
        ppo=PPOSettings(**settings),
        run=RunConfig(dtype="float32"),
        steps=60,
    )
    engine = PPOEngine(
        model, lambda prompts, responses: [scores[r] for r in responses],
        config=config, tokenizer=tokenizer,
    )  # fmt: skip
    for name, parameter in engine.policy.model.named_parameters():
        parameter.requires_grad_(name == "lm_head.bias")  # the bandit's own logits, nothing else
    for _ in range(config.steps):
        rollout = engine.generate(["go"] * (256 // config.ppo.group_size))
        engine.update(engine.estimate_advantages(rollout, engine.score(rollout)))
    return engine.policy.model.lm_head.bias.detach()[allowed].softmax(0), bias[allowed].softmax(0)


def reverse_kl_optimum(reference: Tensor) -> Tensor:
    """Of E[r] - beta KL(pi, ref): pi proportional to ref exp(r / beta)."""
    return (reference.log() + REWARDS / BETA).softmax(0)


def forward_kl_optimum(reference: Tensor) -> Tensor:
    """Of E[r] - beta KL(ref, pi): pi = beta ref / (l - r), with l so that it sums to 1."""
    low, high = REWARDS.max().double(), REWARDS.max().double() + 10
    for _ in range(100):
        middle = (low + high) / 2
        total = (BETA * reference.double() / (middle - REWARDS)).sum()
        low, high = (middle, high) if total > 1 else (low, middle)
    return (BETA * reference.double() / (high - REWARDS)).float()


@pytest.mark.parametrize(
    ("ppo", "optimum"),
    [
        ({"estimator": "gae"}, reverse_kl_optimum),
        ({"estimator": "monte_carlo"}, reverse_kl_optimum),
        ({"estimator": "td"}, reverse_kl_optimum),
        ({"estimator": "grpo", "group_size": 8}, reverse_kl_optimum),
        ({"estimator": "dr_grpo", "group_size": 8, "reduction": "sum"}, reverse_kl_optimum),
        ({"estimator": "rloo", "group_size": 4}, reverse_kl_optimum),
        ({"estimator": "reinforce_pp"}, reverse_kl_optimum),
        ({"estimator": "remax"}, reverse_kl_optimum),
        ({"estimator": "rloo", "group_size": 8, "objective": "cispo"}, reverse_kl_optimum),
        ({"estimator": "rloo", "group_size": 8, "ratio_level": "sequence"}, reverse_kl_optimum),
        # In the loss, k2 has the gradient of the KL, and k3 that of the KL the other way around
        # (E[(1 - ref / pi) grad log pi] = -sum ref grad log pi).
        (
            {"estimator": "rloo", "group_size": 8, "kl_in": "loss", "kl_estimator": "k2"},
            reverse_kl_optimum,
        ),
        (
            {"estimator": "rloo", "group_size": 8, "kl_in": "loss", "kl_estimator": "k3"},
            forward_kl_optimum,
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_the_optimum_is_found(ppo, optimum):
    found, start = trained(**ppo)
    best = optimum(start)
    assert best.sum() == pytest.approx(1, abs=1e-5)
    assert (start - best).abs().sum() > 0.3  # there is something to learn
    assert (found - best).abs().sum() < 0.05
