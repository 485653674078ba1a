"""The loss that balances experts: transformers' own, in every loss of a language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import PROMPTS, vowels
from families import of_family
from tiny import tiny_tokenizer

from ppo_engine import GenerationConfig, PPOConfig, PPOEngine, PPOSettings, RunConfig
from ppo_engine.errors import UserError
from ppo_engine.models.experts import BalanceLoss
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.notes import training_notes
from ppo_engine.models.token_rows import Row, TokenRows, predicting, stack
from ppo_engine.settings.schema import ModelConfig

CPU = torch.device("cpu")
FAMILIES = ["mixtral", "olmoe", "granitemoe", "jetmoe"]


def open_policy(family: str, coefficient: float, **config: Any) -> LanguageModel:
    name = "aux_loss_coef" if family == "jetmoe" else "router_aux_loss_coef"
    model = of_family(family, **{"output_router_logits": True, name: coefficient})
    return LanguageModel.open(
        model, ModelConfig(**config), device=CPU, dtype=torch.float32, tokenizer=tiny_tokenizer()
    )


def texts(lengths: list[int]) -> list[Row]:
    """Texts whose last three tokens are trained."""
    random = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 256, (length,), generator=random).tolist() for length in lengths]
    return [predicting(text, [False] * (len(text) - 3) + [True] * 3) for text in ids]


def token_rows(lengths: list[int], packed: bool = False) -> TokenRows:
    return stack(texts(lengths), pad=256, device=CPU, packed=packed)


def balance(policy: LanguageModel, rows: TokenRows) -> torch.Tensor:
    """As the library has it, at coefficient 1; of rows that are padded."""
    return policy.model(rows.ids, attention_mask=rows.mask.long(), use_cache=False).aux_loss


def losses(policy: LanguageModel, rows: TokenRows, method: str) -> torch.Tensor:
    tokens = len(rows.targets)
    if method == "sft":
        return policy.nll_loss(rows, tokens)
    loss, *_ = policy.policy_loss(rows, None, torch.linspace(-1, 1, tokens), 1.0)
    return loss


@pytest.mark.parametrize("method", ["sft", "ppo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_and_its_gradient_are_those_of_transformers(family, method):
    without, policy = open_policy(family, 0.0), open_policy(family, 0.5)
    rows = token_rows([5, 12, 9])
    if not balance(without, rows):
        pytest.skip("this version of transformers has no balance loss of the family")
    expected = losses(without, rows, method) + 0.5 * balance(without, rows)
    found = losses(policy, rows, method)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found > losses(without, rows, method) + 0.1
    for loss in (found, expected):
        loss.backward()
    for (name, p), q in zip(
        policy.model.named_parameters(), without.model.parameters(), strict=True
    ):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", ["sft", "ppo"])
def test_passes_of_a_mini_batch_weigh_by_their_tokens(method):
    policy, rows = open_policy("mixtral", 0.5), texts([5, 12, 9])
    without = open_policy("mixtral", 0.0)
    tokens, added = 9, torch.zeros(())
    for part, share in ((slice(0, 1), 1 / 3), (slice(1, 3), 2 / 3)):
        few = stack(rows[part], pad=256, device=CPU, packed=False)
        for model, sign in ((policy, 1), (without, -1)):
            if method == "sft":
                loss = model.nll_loss(few, tokens)
            else:
                loss, *_ = model.policy_loss(
                    few, None, torch.zeros(len(few.targets)), 1.0, share=share
                )
            added = added + sign * loss
        added = added - share * 0.5 * balance(without, few)
    assert added.abs() < 1e-5


def test_packed_and_padded_rows_balance_alike():
    """What stands in the padding does not matter, either."""
    policy = open_policy("mixtral", 0.5)
    packed, padded = (token_rows([5, 12, 9], packed) for packed in (True, False))
    found = [policy.nll_loss(packed, 9), policy.nll_loss(padded, 9)]
    padded.ids[~padded.mask] = 7
    found.append(policy.nll_loss(padded, 9))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_checkpointing_changes_no_gradient_of_the_balance():
    gradients = []
    for checkpointing in (False, True):
        policy = open_policy("mixtral", 0.5, gradient_checkpointing=checkpointing)
        policy.model.train()
        policy.nll_loss(token_rows([5, 12]), 6).backward()
        gradients.append([p.grad for p in policy.model.parameters()])
    torch.testing.assert_close(*gradients)


def test_the_notes_say_what_is_trained():
    policy = open_policy("olmoe", 0.25)
    [note] = training_notes(policy)
    assert "balance loss, times 0.25, is part of the language model's loss" in note
    silent = LanguageModel.open(
        of_family("olmoe"), ModelConfig(), device=CPU, dtype=torch.float32,
        tokenizer=tiny_tokenizer(),
    )  # fmt: skip
    assert training_notes(silent) == []


@pytest.mark.parametrize(
    ("family", "settings", "name"),
    # Doge's has an argument of its own; a part of its router's logits are those of other tokens.
    [("doge", {"is_moe": True, "num_experts": 16}, "Doge"), ("glm4_moe", {}, "Glm4Moe")],
)
def test_a_balance_loss_that_is_not_known_is_noted(family, settings, name):
    model = of_family(family, output_router_logits=True, **settings)
    balance = BalanceLoss.of(model)
    assert f"without the experts' balance loss: how {name}ForCausalLM" in balance.note
    assert balance((), torch.ones(1, 1)) == 0
    if family == "doge":
        return
    policy = LanguageModel.open(
        model, ModelConfig(), device=CPU, dtype=torch.float32, tokenizer=tiny_tokenizer()
    )
    assert balance.note in training_notes(policy)


def test_router_logits_that_are_not_there_are_no_balance():
    with pytest.raises(UserError, match="no router logits"):
        BalanceLoss.of(of_family("mixtral", output_router_logits=True))((), torch.ones(1, 1))


@pytest.mark.parametrize("micro_batch_size", [1, 8])
def test_a_step_of_ppo_balances_once(micro_batch_size):
    """Whatever its passes: the shares of a mini-batch add up to 1."""
    found = []
    for coefficient in (0.0, 0.5):
        engine = PPOEngine(
            of_family("mixtral", output_router_logits=True, router_aux_loss_coef=coefficient),
            vowels,
            tokenizer=tiny_tokenizer(),
            config=PPOConfig(
                generation=GenerationConfig(max_new_tokens=6),
                ppo=PPOSettings(
                    estimator="rloo", group_size=2, rollout_batch_size=8, mini_batch_size=8,
                    micro_batch_size=micro_batch_size,
                ),
                run=RunConfig(dtype="float32"),
            ),
        )  # fmt: skip
        rollout = engine.generate(PROMPTS[:4])
        experience = engine.estimate_advantages(rollout, engine.score(rollout))
        found.append(engine.update(experience)["policy/loss"])
    with torch.no_grad():
        expected = 0.5 * balance(
            engine.policy, stack(rollout.rows, pad=256, device=CPU, packed=False)
        )
    # Of the updated weights, and of a product of means over each pass.
    assert found[1] - found[0] == pytest.approx(expected.item(), rel=0.1)
