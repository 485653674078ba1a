"""Families that read padding, that are random in training, or whose cache is another's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import response_logprobs
from families import of_family
from reading import sequence_scores, token_values
from tiny import tiny_model, tiny_tokenizer
from torch.nn.utils.rnn import pad_sequence

from ppo_engine.errors import UserError
from ppo_engine.models import probes
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.notes import sampling_notes
from ppo_engine.models.value_model import value_model_from_policy
from ppo_engine.pretrained import architecture
from ppo_engine.rollout.generation import generate
from ppo_engine.rollout.sampling import Sampler
from ppo_engine.settings.schema import GenerationConfig, ModelConfig

CPU = torch.device("cpu")
READ_PADDING = ["rwkv", "xlstm", "recurrent_gemma"]
PROMPTS = ["Hello", "A longer prompt, beside which the others are padded", "Hi"]


def open_policy(model: Any) -> LanguageModel:
    return LanguageModel.open(
        model, ModelConfig(), device=CPU, dtype=torch.float32, tokenizer=tiny_tokenizer()
    )


@pytest.mark.parametrize("family", [*READ_PADDING, "llama", "gpt2", "mamba", "lfm2", "mixtral"])
def test_which_families_read_padding(family):
    assert probes.heeds_padding(of_family(family)) == (family not in READ_PADDING)


@pytest.mark.parametrize("family", [*READ_PADDING, "llama", "mamba"])
def test_the_sampler_draws_from_the_distribution_whose_logprobs_are_taken(family):
    """Beside rows of other lengths as alone."""
    policy = open_policy(of_family(family))
    rollout = generate(Sampler(policy), PROMPTS, GenerationConfig(max_new_tokens=8))
    with torch.no_grad():
        together, _ = response_logprobs(policy, rollout, 1.0)
        for row, length in enumerate(rollout.lengths):
            part = rollout.select(torch.tensor([row]))
            alone, _ = response_logprobs(policy, part, 1.0)
            torch.testing.assert_close(
                together[row, :length], alone[0, :length], rtol=1e-4, atol=1e-4
            )
    torch.testing.assert_close(together, rollout.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", READ_PADDING)
def test_padding_changes_no_value_and_no_score(family, side):
    model = value_model_from_policy(of_family(family), tiny_tokenizer(), seed=0)
    texts = [torch.tensor(tiny_tokenizer()(text)["input_ids"]) for text in PROMPTS]
    ids = pad_sequence(texts, batch_first=True, padding_value=256, padding_side=side)
    real = pad_sequence([torch.ones_like(t) for t in texts], batch_first=True, padding_side=side)
    with torch.no_grad():
        values, scores = token_values(model, ids, real), sequence_scores(model, ids, real)
        for row, text in enumerate(texts):
            alone = token_values(model, text[None], torch.ones(1, len(text)))[0]
            torch.testing.assert_close(values[row][real[row] > 0], alone, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(scores[row], alone[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "right"), [("rwkv", False), ("xlstm", False), ("llama", True)])
def test_a_cache_that_gives_other_logits_is_not_used(family, right):
    model = of_family(family)
    model.generation_config.num_beams = 3  # which is not looked at
    policy = open_policy(model)
    assert policy.continues_from_cache == right
    assert policy.model.generation_config.num_beams == 3
    assert any("without a cache" in note for note in sampling_notes(policy)) != right


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}),
        ("minimax", {"router_jitter_noise": 0.1}),
        ("phimoe", {"input_jitter_noise": 0.1}),  # which also draws its experts
    ],
)
def test_routers_do_not_jitter(family, settings):
    model, ids = of_family(family, **settings), torch.arange(20)[None]
    assert not torch.equal(model.train()(ids).logits, model(ids).logits)
    policy = open_policy(model.eval())
    expected = policy.model.eval()(ids).logits
    policy.model.train()
    for _ in range(2):
        torch.testing.assert_close(policy.model(ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("noise", [1.0, 1e-2])
def test_a_model_that_stays_random_in_training_is_refused(noise):
    model = tiny_model()
    model.model.norm.register_forward_hook(
        lambda module, _, x: x + noise * torch.randn_like(x) if module.training else None
    )
    with pytest.raises(UserError, match="LlamaForCausalLM cannot be trained"):
        open_policy(model)


def test_a_model_that_is_another_in_training_is_refused():
    model = tiny_model()
    model.model.norm.register_forward_hook(lambda module, _, x: 2 * x if module.training else None)
    with pytest.raises(UserError, match="other hidden states in evaluation mode"):
        open_policy(model)


@pytest.mark.parametrize("family", ["bert", "rembert", "cpmant"])
def test_a_model_that_reads_later_tokens_is_refused(family):
    settings = {"output_embedding_size": 32} if family == "rembert" else {}
    with pytest.raises(UserError, match="is no causal language model"):
        open_policy(of_family(family, **settings))
    if family == "bert":  # RemBERT heeds it in newer versions of transformers only
        open_policy(of_family(family, is_decoder=True, **settings))


@pytest.mark.parametrize("used", [False, True])
def test_evaluation_does_not_change_the_weights_that_are_saved(used):
    """RWKV halves those of its upper layers; also before it is given to us."""
    model = of_family("rwkv", num_hidden_layers=8)
    expected = {name: p.clone() for name, p in model.named_parameters()}
    if used:
        model.eval()(torch.arange(5)[None])
    policy = open_policy(model)
    generate(Sampler(policy), PROMPTS, GenerationConfig(max_new_tokens=2))
    assert all(torch.equal(p, expected[name]) for name, p in policy.model.named_parameters())


@pytest.mark.parametrize("positions", [16, 40, 64])
def test_probes_fit_into_short_contexts(positions):
    model = of_family("gpt2", max_position_embeddings=positions)
    assert model.transformer.wpe.num_embeddings == positions
    assert open_policy(model).reader.packs
    value_model_from_policy(model, tiny_tokenizer(), seed=0)


def test_padding_goes_behind():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 0]])
    order = architecture.real_tokens_first(mask)
    assert order.tolist() == [[2, 3, 0, 1], [0, 1, 2, 3], [1, 2, 0, 3]]
