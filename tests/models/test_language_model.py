"""Language models: loading and saving, heads that scale or cap, adapters, freezing, precision."""

from __future__ import annotations

import pytest
import torch
from engines import response_logprobs
from huggingface_hub.utils import are_progress_bars_disabled
from tiny import tiny_model, tiny_model_folder, tiny_tokenizer
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from ppo_engine.errors import UserError
from ppo_engine.models import freezing, precision
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.optimizer import trainable_state
from ppo_engine.models.output_head import OutputHead
from ppo_engine.models.value_model import load_value_model
from ppo_engine.pretrained import architecture
from ppo_engine.pretrained.loading import save_model
from ppo_engine.pretrained.quiet import quiet_transformers
from ppo_engine.rollout.generation import generate
from ppo_engine.rollout.sampling import Sampler
from ppo_engine.settings.schema import GenerationConfig as Sampling
from ppo_engine.settings.schema import ModelConfig
from ppo_kernels import ppo_policy_loss, token_logprobs

CPU = torch.device("cpu")


def open_policy(model, config: ModelConfig | None = None, tokenizer=None) -> LanguageModel:
    return LanguageModel.open(
        model,
        config or ModelConfig(),
        device=CPU,
        dtype=torch.float32,
        tokenizer=tokenizer or tiny_tokenizer(),
    )


def own_logprobs(policy: LanguageModel, rollout) -> torch.Tensor:
    ids, mask = rollout.sequences()
    start = rollout.prompt_ids.shape[1]
    positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
    logits = policy.model(ids, attention_mask=mask.long(), position_ids=positions).logits
    logprobs = logits.log_softmax(-1)[:, start - 1 : -1]
    return logprobs.gather(2, ids[:, start:, None])[..., 0] * rollout.mask


def capped_model() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.3,
            pad_token_id=0, eos_token_id=258, bos_token_id=None,
        )
    ).eval()  # fmt: skip


def untied_model():
    model = tiny_model()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_positions=256, n_embd=32, n_layer=2, n_head=4)
    config.eos_token_id = config.bos_token_id = 258
    return GPT2LMHeadModel(config).eval()


def scaled_model() -> CohereForCausalLM:
    torch.manual_seed(0)
    return CohereForCausalLM(
        CohereConfig(
            vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, logit_scale=0.3, pad_token_id=0,
            eos_token_id=258, bos_token_id=None,
        )
    ).eval()  # fmt: skip


def model_with_a_bias() -> PhiForCausalLM:
    torch.manual_seed(0)
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, pad_token_id=0, eos_token_id=258, bos_token_id=None,
        )
    ).eval()  # fmt: skip
    torch.nn.init.normal_(model.lm_head.bias)
    return model


@pytest.mark.parametrize("make", [tiny_model, capped_model, gpt2, scaled_model, model_with_a_bias])
def test_logprobs_equal_those_of_the_models_own_logits(make):
    policy = open_policy(make())
    assert not policy.uses_own_logits and not policy.makes_logits
    rollout = generate(Sampler(policy), ["Hello", "A longer prompt"], Sampling(max_new_tokens=5))
    found, _ = response_logprobs(policy, rollout, 1.0)
    torch.testing.assert_close(found, own_logprobs(policy, rollout), rtol=1e-4, atol=1e-4)


def test_adapters_on_the_head_are_not_passed_over():
    """The output layer is then more than its matrix: it makes the logits itself."""
    pytest.importorskip("peft")
    from ppo_engine.settings.schema import LoraConfig

    lora = LoraConfig(rank=2, target_modules=["lm_head", "q_proj"])
    policy = open_policy(untied_model(), ModelConfig(lora=lora))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert policy.makes_logits and not policy.uses_own_logits
    rollout = generate(Sampler(policy), ["Hello", "A longer prompt"], Sampling(max_new_tokens=5))
    found, _ = response_logprobs(policy, rollout, 1.0)
    torch.testing.assert_close(found, own_logprobs(policy, rollout), rtol=1e-4, atol=1e-4)
    loss, stats, _ = policy.policy_loss(
        policy.reader.stack(rollout.rows), None, torch.ones(int(rollout.mask.sum())), 1.0
    )
    loss.backward()
    assert stats.ratio_max == 1
    for name, parameter in policy.model.named_parameters():
        if "lm_head" in name and "lora" in name:
            assert parameter.grad.any()


@pytest.mark.parametrize("make", [tiny_model, capped_model, scaled_model, model_with_a_bias])
def test_the_loss_is_that_of_the_models_own_logits(make):
    """Values and the gradients of every weight."""
    policy = open_policy(make())
    rollout = generate(Sampler(policy), ["Hello", "A longer prompt"], Sampling(max_new_tokens=7))
    advantages = torch.randn(rollout.mask.shape)
    old = own_logprobs(policy, rollout).detach() + 0.1 * torch.randn(rollout.mask.shape)
    found = []
    for own in (False, True):
        policy.model.zero_grad()
        if own:
            logprobs = own_logprobs(policy, rollout)
            loss, stats = ppo_policy_loss(logprobs, old, advantages, mask=rollout.mask)
            logprobs = logprobs[rollout.mask].detach()
        else:
            loss, stats, logprobs = policy.policy_loss(
                policy.reader.stack(rollout.rows), old[rollout.mask], advantages[rollout.mask], 1.0
            )
        loss.backward()
        gradients = [p.grad.clone() for p in policy.model.parameters()]
        found.append((loss.detach(), stats.approx_kl, stats.clip_fraction, logprobs, *gradients))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_a_head_that_scales_and_caps():
    """Both at once, as no family here does: c tanh(s z / c)."""
    policy = open_policy(model_with_a_bias())
    policy._head = OutputHead(scale=0.3, softcap=0.8)
    rollout = generate(Sampler(policy), ["Hello", "A longer prompt"], Sampling(max_new_tokens=5))
    with torch.no_grad():
        states = policy.states(policy.reader.stack(rollout.rows))
        logits = policy._head.logits(policy.model.lm_head, states)
    found, _ = response_logprobs(policy, rollout, 0.6)
    expected = token_logprobs(logits, rollout.response_ids[rollout.mask], temperature=0.6)
    torch.testing.assert_close(found[rollout.mask], expected)


def test_a_trained_bias_is_not_the_references():
    """Also where the weight is tied to the embedding, frozen, and shared."""
    model = model_with_a_bias()
    model.lm_head.weight = model.model.embed_tokens.weight
    policy = open_policy(model, ModelConfig(trainable_layers=1))
    reference = policy.reference()
    assert policy.model.lm_head.weight.data_ptr() == reference.model.lm_head.weight.data_ptr()
    assert policy.model.lm_head.bias.requires_grad and not policy.shares_head(reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_of_the_dtype_of_compute_and_the_references_not_trained(dtype):
    policy = LanguageModel.open(
        tiny_model(), ModelConfig(), device=CPU, dtype=dtype, tokenizer=tiny_tokenizer()
    )
    reference = policy.reference()
    for model, trained in ((policy.model, True), (reference.model, False)):
        assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(dtype, trained)}
        kept = {hasattr(p, "master_remainder") for p in model.parameters()}
        assert kept == {trained and dtype == torch.bfloat16}
    with torch.no_grad():
        policy.model.model.norm.weight.add_(1)
    assert not torch.equal(policy.model.model.norm.weight, reference.model.model.norm.weight)


def test_only_frozen_and_equal_parameters_are_shared():
    one, other = tiny_model(), tiny_model()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    for model in (one, other):
        model.requires_grad_(False)
    other.model.norm.weight.requires_grad_(True)
    expected = {name: p.clone() for name, p in other.named_parameters()}
    freezing.share_frozen_parameters(other, one)
    theirs = dict(one.named_parameters())
    apart = {n for n, p in other.named_parameters() if p.data_ptr() != theirs[n].data_ptr()}
    assert apart == {"model.layers.0.mlp.up_proj.weight", "model.norm.weight"}
    assert all(torch.equal(p, expected[name]) for name, p in other.named_parameters())


def test_states_under_one_head_are_compared_at_once():
    policy = open_policy(tiny_model(), ModelConfig(trainable_layers=1))
    reference = policy.reference()
    assert policy.shares_head(reference) and not open_policy(tiny_model()).shares_head(reference)
    with torch.no_grad():
        policy.model.model.layers[1].mlp.up_proj.weight.mul_(2)
    rollout = generate(Sampler(policy), ["Hello", "A longer prompt"], Sampling(max_new_tokens=5))
    rows = policy.reader.stack(rollout.rows)
    states = [p.states(rows) for p in (policy, reference)]
    both = policy.stacked_logprobs(states, rows.targets, 0.7)
    for one, found in zip((policy, reference), both, strict=True):
        torch.testing.assert_close(found, one.logprobs(rows, 0.7))
    assert not torch.equal(both[0][0], both[1][0])


def test_a_head_that_cannot_be_reproduced_uses_the_models_own_logits():
    model = tiny_model()
    inner = model.forward

    def shifted(*args, **kwargs):
        output = inner(*args, **kwargs)
        output.logits = output.logits * 3 + torch.arange(output.logits.shape[-1]) / 100
        return output

    model.forward = shifted
    policy = open_policy(model)
    assert policy.uses_own_logits
    rollout = generate(Sampler(policy), ["Hello"], Sampling(max_new_tokens=5))
    found, _ = response_logprobs(policy, rollout, 1.0)
    torch.testing.assert_close(found, own_logprobs(policy, rollout), rtol=1e-4, atol=1e-4)


def test_a_missing_pad_token_is_added_apart_from_eos():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    policy = open_policy(gpt2(), tokenizer=tokenizer)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert policy.model.get_input_embeddings().num_embeddings >= len(tokenizer)
    rollout = generate(Sampler(policy), ["Hello", "Hi there"], Sampling(max_new_tokens=4))
    assert rollout.mask[:, 0].all()


def test_an_added_pad_token_has_a_row_of_its_own(tmp_path):
    """Where the vocabulary has no token that could serve."""
    vocabulary = tiny_tokenizer().get_vocab()
    backend = Tokenizer(BPE(vocab={t: i for t, i in vocabulary.items() if i < 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens(["<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    config = GPT2Config(vocab_size=257, n_positions=256, n_embd=32, n_layer=2, n_head=4)
    config.eos_token_id = config.bos_token_id = 256
    policy = open_policy(GPT2LMHeadModel(config), tokenizer=tokenizer)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257)
    assert policy.model.get_input_embeddings().num_embeddings == 258
    assert policy.model.config.pad_token_id == 257
    rollout = generate(Sampler(policy), ["Hello", "Hi there"], Sampling(max_new_tokens=4))
    assert rollout.prompt_ids[0, 0] == 257
    policy.save(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert saved.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "saved")) == 258
    assert saved.generation_config.pad_token_id == saved.config.pad_token_id == 257


def test_the_checkpoints_own_sampling_habits_are_off_and_come_back(tmp_path):
    model = tiny_model()
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, repetition_penalty=5.0, eos_token_id=258
    )
    policy = open_policy(model)
    rollout = generate(Sampler(policy), ["Hello"] * 64, Sampling(max_new_tokens=1))
    assert len(set(rollout.response_ids[:, 0].tolist())) > 20  # top_k=1 would give one
    policy.save(tmp_path / "saved")
    assert GenerationConfig.from_pretrained(tmp_path / "saved").top_k == 1


def test_dropout_is_off_in_every_model():
    policy = open_policy(gpt2())  # its configuration has dropout 0.1
    rollout = generate(Sampler(policy), ["Hello"], Sampling(max_new_tokens=5))
    policy.model.train()
    first, _ = response_logprobs(policy, rollout, 1.0)
    second, _ = response_logprobs(policy, rollout, 1.0)
    assert torch.equal(first, second)


def opt() -> OPTForCausalLM:
    """A family that hands its own dropout probability to `F.dropout`, and drops whole layers."""
    torch.manual_seed(0)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=259, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            word_embed_proj_dim=32, dropout=0.5, layerdrop=0.5, eos_token_id=258, pad_token_id=256,
        )
    )  # fmt: skip


def test_dropout_is_off_whatever_a_family_calls_it():
    model = opt()
    ids = torch.arange(20)[None]
    assert not torch.equal(model.train()(ids).logits, model(ids).logits)
    architecture.make_repeatable(model)
    expected = model.eval()(ids).logits
    model.train()
    for _ in range(8):  # a dropped layer shows in some passes only
        assert torch.equal(model(ids).logits, expected)


def test_learned_positions_are_frozen_with_the_lower_layers():
    model = opt()
    freezing.freeze_lower_layers(model, 1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("layers.1." in name or "norm" in name for name in trained)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        policy = open_policy(tiny_model(), ModelConfig(gradient_checkpointing=checkpointing))
        torch.manual_seed(0)
        rollout = generate(Sampler(policy), ["Hello"], Sampling(max_new_tokens=5))
        policy.model.train()
        response_logprobs(policy, rollout, 1.0)[0].sum().backward()
        gradients.append([p.grad.clone() for p in policy.model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointed_layers_run_again_in_the_backward_pass(checkpointing):
    policy = open_policy(tiny_model(), ModelConfig(gradient_checkpointing=checkpointing))
    rollout = generate(Sampler(policy), ["Hello"], Sampling(max_new_tokens=5))
    policy.model.train()
    assert policy.reader.packs  # a probe, which runs them too
    runs = []
    policy.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    response_logprobs(policy, rollout, 1.0)[0].sum().backward()
    assert len(runs) == 1 + checkpointing


def test_adapters_have_the_rank_and_the_scale_that_are_set():
    pytest.importorskip("peft")
    from ppo_engine.settings.schema import LoraConfig

    lora = LoraConfig(rank=2, alpha=6, target_modules=["q_proj"])
    policy = open_policy(tiny_model(), ModelConfig(lora=lora))
    adapters = {n: m for n, m in policy.model.named_modules() if hasattr(m, "lora_A") and m.lora_A}
    assert len(adapters) == 2 and all(name.endswith("q_proj") for name in adapters)
    for module in adapters.values():
        assert module.scaling["default"] == 6 / 2
        assert module.lora_A["default"].out_features == 2


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "embed_tokens"], r".*\.(q|up)_proj"])
def test_adapters_in_the_last_layers_only(modules):
    pytest.importorskip("peft")
    from ppo_engine.settings.schema import LoraConfig

    lora = LoraConfig(rank=2, target_modules=modules)
    policy = open_policy(tiny_model(), ModelConfig(lora=lora, trainable_layers=1))
    trained = trainable_state(policy.model)
    assert trained and all(".layers.1." in name and ".lora_" in name for name in trained)
    assert not [name for name, _ in policy.model.named_parameters() if ".layers.0.lora" in name]
    with pytest.raises(UserError, match="trainable_layers=0 leaves lora no layer"):
        open_policy(tiny_model(), ModelConfig(lora=lora, trainable_layers=0))
    with pytest.raises(UserError, match="trainable_layers is 3"):
        open_policy(tiny_model(), ModelConfig(lora=lora, trainable_layers=3))


def test_adapters_are_merged_where_the_policy_is_saved(tmp_path):
    pytest.importorskip("peft")
    from ppo_engine.settings.schema import LoraConfig

    policy = open_policy(tiny_model(), ModelConfig(lora=LoraConfig(rank=2)))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    rollout = generate(Sampler(policy), ["Hello"], Sampling(max_new_tokens=5))
    found, _ = response_logprobs(policy, rollout, 1.0)
    policy.save(tmp_path / "saved")
    again = open_policy(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    torch.testing.assert_close(
        response_logprobs(again, rollout, 1.0)[0], found, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_adapters_on_one_of_two_tied_layers_are_merged_into_that_one(tmp_path, module):
    pytest.importorskip("peft")
    from ppo_engine.settings.schema import LoraConfig

    lora = LoraConfig(rank=2, target_modules=[module, "q_proj"])
    policy = open_policy(tiny_model(), ModelConfig(lora=lora))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    ids = torch.arange(20)[None]
    policy.save(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(saved(ids).logits, policy.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_saved_policy_brings_its_tokenizer_which_pads_as_the_engine_does(tmp_path):
    given = tiny_tokenizer()
    given.padding_side = "right"
    open_policy(tiny_model(), tokenizer=given).save(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (saved.pad_token, saved.padding_side) == ("<|pad|>", "left")
    assert saved.chat_template == given.chat_template and given.padding_side == "right"


def test_a_reward_model_is_no_policy(tmp_path):
    tokenizer = tiny_tokenizer()
    scores = load_value_model(tiny_model_folder(tmp_path), tokenizer, device=CPU)
    save_model(scores, tokenizer, tmp_path / "reward_model")
    with pytest.raises(UserError, match="reward_model' is a classifier: give a causal"):
        open_policy(str(tmp_path / "reward_model"))


def test_trainable_layers_beyond_the_model_are_refused():
    with pytest.raises(UserError, match="2 decoder layers"):
        open_policy(tiny_model(), ModelConfig(trainable_layers=3))


def test_bf16_is_chosen_only_where_it_is_fast(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert precision.choose_dtype("auto", CPU) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert precision.choose_dtype("auto", CPU) == torch.bfloat16


def test_downloads_show_how_far_they_are():
    with quiet_transformers():
        assert not transformers_logging.is_progress_bar_enabled()
        assert not are_progress_bars_disabled()
