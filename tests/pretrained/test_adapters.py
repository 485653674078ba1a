"""Adapters in every command, on a base in fp32 or quantized: policy, critic and reward model.

The quantized ones need bitsandbytes, whose kernels run on CPUs too.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from engines import response_logprobs
from reading import token_values
from rich.console import Console
from tiny import tiny_model, tiny_model_folder, tiny_tokenizer
from trainers import planted_pairs
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from ppo_engine.errors import UserError
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.value_model import score_head
from ppo_engine.ppo.engine import PPOEngine
from ppo_engine.ppo.experience import Experience
from ppo_engine.pretrained.loading import save_model
from ppo_engine.rollout.generation import generate
from ppo_engine.rollout.sampling import Sampler
from ppo_engine.settings.schema import (
    GenerationConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    PPOSettings,
    PreferenceDataConfig,
    RewardModelConfig,
    RewardModelSettings,
    RunConfig,
)
from ppo_engine.training.reward import RewardModelTrainer

peft = pytest.importorskip("peft", reason="the optional package peft is not installed")
CPU = torch.device("cpu")
PROMPTS = ["Hello", "A longer prompt", "Hi", "x y"]
Bits = Literal["8bit", "4bit"]
BASES = [
    None,
    *(
        pytest.param(
            bits,
            marks=pytest.mark.skipif(
                importlib.util.find_spec("bitsandbytes") is None,
                reason="the optional package bitsandbytes is not installed",
            ),
        )
        for bits in ("8bit", "4bit")
    ),
]
# Weights are the same, but 8-bit products round what comes in as well.
TOLERANCE = {None: 1e-5, "4bit": 1e-5, "8bit": 1e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def test_what_libraries_tell_developers_is_not_shown(folder, monkeypatch):
    def warns(*given):
        for kind, module in ((FutureWarning, "transformers.x"), (UserWarning, "peft.y")):
            warnings.warn_explicit("old", kind, f"{module}.py", 1, module)
        return wrapped(*given)

    wrapped = peft.get_peft_model
    monkeypatch.setattr(peft, "get_peft_model", warns)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        LanguageModel.open(folder, ModelConfig(lora=LoraConfig()), device=CPU, dtype=torch.float32)
    assert [one.category for one in seen] == [UserWarning]


def adapted(path: str = "", bits: Bits | None = None, **settings: Any) -> ModelConfig:
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant")
    lora = LoraConfig(rank=4)
    return ModelConfig(path=path, lora=lora, quantization=bits, optimizer=optimizer, **settings)


def vowels(prompts: list[str], responses: list[str]) -> list[float]:
    return [sum(c in "aeiou" for c in response) / 10 for response in responses]


def make_engine(path: str, bits: Bits | None, **settings: Any) -> PPOEngine:
    config = PPOConfig(
        policy=adapted(path, bits, **settings),
        critic=adapted(path, bits, **settings),
        generation=GenerationConfig(max_new_tokens=6),
        ppo=PPOSettings(rollout_batch_size=4, mini_batch_size=4, micro_batch_size=2),
        run=RunConfig(dtype="float32"),
    )
    return PPOEngine("", vowels, config=config)


def experience_of(engine: PPOEngine) -> Experience:
    rollout = engine.generate(PROMPTS)
    return engine.estimate_advantages(rollout, engine.score(rollout))


def refuse_copy(parameter: Any, memo: Any) -> Any:
    """In place of a copy where the parameter is, which may be a GPU without room for it."""
    raise AssertionError("a parameter was copied on its device")


def critic_of(engine: PPOEngine) -> Any:
    assert engine.critic is not None
    return engine.critic.model


def frozen(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("bits", BASES)
def test_a_step_trains_adapters_and_head_alone(folder: str, bits: Bits | None) -> None:
    engine = make_engine(folder, bits)
    models = (engine.policy.model, critic_of(engine))
    for model in models:
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert all("lora_" in name or "score" in name for name in trained)
        stored = {p.dtype for n, p in model.named_parameters() if n.endswith("base_layer.weight")}
        expected = {None: torch.float32, "8bit": torch.int8, "4bit": torch.uint8}[bits]
        assert stored == {expected}
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert score_head(critic_of(engine)).weight.dtype == torch.float32
    before = [frozen(model) for model in models]

    experience = experience_of(engine)
    assert experience.kl.abs().max() == 0  # the reference is the base without adapters
    metrics = engine.update(experience)
    assert metrics["policy/ratio_max"] == 1.0 and metrics["policy/grad_norm"] > 0
    assert metrics["value/grad_norm"] > 0
    assert experience_of(engine).kl.abs().sum() > 0
    for model, weights in zip(models, before, strict=True):
        assert all(torch.equal(weights[name], p) for name, p in frozen(model).items())


@pytest.mark.parametrize("bits", BASES)
def test_what_is_saved_is_what_was_trained(
    folder: str, tmp_path: Path, bits: Bits | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(folder, bits)
    experience = experience_of(engine)
    for _ in range(2):
        engine.update(experience)
    rollout = experience.rollout
    with torch.no_grad():
        logprobs, _ = response_logprobs(engine.policy, rollout, 1.0)
        values = engine.values(rollout)
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", refuse_copy)
    for name in ("Params4bit", "Int8Params") if bits else ():
        monkeypatch.setattr(f"bitsandbytes.nn.{name}.__deepcopy__", refuse_copy)
    engine.policy.save(tmp_path / "policy")
    save_model(critic_of(engine), engine.policy.tokenizer, tmp_path / "critic")

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert all(p.dtype == torch.float32 for p in plain.parameters())
    again = LanguageModel.open(
        plain, ModelConfig(), device=CPU, dtype=torch.float32, tokenizer=tiny_tokenizer()
    )
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    ids, mask = rollout.sequences()
    start = rollout.prompt_ids.shape[1] - 1
    with torch.no_grad():
        found, _ = response_logprobs(again, rollout, 1.0)
        found_values = token_values(critic, ids[:, :-1], mask[:, :-1], start)
    tolerance = TOLERANCE[bits]
    torch.testing.assert_close(found, logprobs, atol=tolerance, rtol=tolerance)
    real = rollout.mask
    torch.testing.assert_close(found_values[real], values[real], atol=tolerance, rtol=tolerance)
    # Training goes on as if nothing had been saved.
    with torch.no_grad():
        assert torch.equal(response_logprobs(engine.policy, rollout, 1.0)[0], logprobs)


@pytest.mark.parametrize("bits", BASES)
def test_padding_changes_no_logprob(folder: str, bits: Bits | None) -> None:
    engine = make_engine(folder, bits)
    rollout = experience_of(engine).rollout
    with torch.no_grad():
        together, _ = response_logprobs(engine.policy, rollout, 1.0)
        for row in range(len(rollout)):
            alone, _ = response_logprobs(engine.policy, rollout.select(torch.tensor([row])), 1.0)
            width = alone.shape[1]
            torch.testing.assert_close(together[row, :width], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", BASES)
def test_a_restored_engine_goes_on_as_the_first(folder: str, bits: Bits | None) -> None:
    one, two = make_engine(folder, bits), make_engine(folder, bits)
    one.update(experience_of(one))
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    found = []
    for engine in (one, two):
        torch.manual_seed(7)
        found.append(engine.update(experience_of(engine)))
    assert found[0] == found[1]


@pytest.mark.parametrize("bits", BASES)
def test_checkpointing_gives_the_same_gradients(folder: str, bits: Bits | None) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = LanguageModel.open(
            folder,
            adapted(bits=bits, gradient_checkpointing=checkpointing),
            device=CPU,
            dtype=torch.float32,
        )
        torch.manual_seed(0)
        for name, parameter in policy.model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        rollout = generate(Sampler(policy), PROMPTS, GenerationConfig(max_new_tokens=5))
        policy.model.train()
        response_logprobs(policy, rollout, 1.0)[0].sum().backward()
        gradients.append([p.grad for p in policy.model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 28  # two for each of 7 products in 2 layers
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bits", BASES)
def test_a_reward_model_of_adapters_learns_and_loads_elsewhere(
    folder: str, tmp_path: Path, bits: Bits | None
) -> None:
    config = RewardModelConfig(
        model=adapted(folder, bits),
        data=PreferenceDataConfig(eval_fraction=0.25),
        reward=RewardModelSettings(batch_size=8, micro_batch_size=8, epochs=2),
        run=RunConfig(output_dir=str(tmp_path / "run"), device="cpu", dtype="float32"),
    )
    quiet = Console(file=io.StringIO())
    trainer = RewardModelTrainer(None, planted_pairs(96), config, console=quiet)
    assert trainer.train()["eval/accuracy"] > 0.9
    saved = str(tmp_path / "run" / "reward_model")
    assert AutoModelForSequenceClassification.from_pretrained(saved).dtype == torch.float32

    # It scores in a PPO run, whose critic, of adapters too, starts as its copy.
    run = PPOConfig(
        policy=adapted(folder, bits), critic=adapted(), run=RunConfig(dtype="float32"),
        ppo=PPOSettings(rollout_batch_size=4, mini_batch_size=4, micro_batch_size=4),
        generation=GenerationConfig(max_new_tokens=4),
    )  # fmt: skip
    engine = PPOEngine("", saved, config=run)
    assert engine.update(experience_of(engine))["value/grad_norm"] > 0


@pytest.mark.parametrize("bits", BASES[1:])
def test_a_critic_in_full_precision_starts_from_a_quantised_policy(
    folder: str, bits: Bits | None
) -> None:
    config = PPOConfig(policy=adapted(folder, bits), run=RunConfig(dtype="float32"))
    critic = critic_of(PPOEngine("", vowels, config=config))
    weight = critic.model.layers[0].mlp.up_proj.weight
    source = tiny_model().model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.float32 and weight.requires_grad
    # The policy's, as it was rounded: by less than the widest gap between two levels. Half of it is
    # exceeded: of 4 bits on a CPU, bitsandbytes gives the least of a block the second level.
    gap = {"8bit": 1 / 127, "4bit": 0.304}[str(bits)]
    rounding = (weight - source).abs().max()
    assert 0 < rounding < 1.1 * gap * source.abs().max()


def test_a_quantised_base_needs_adapters(folder: str) -> None:
    for settings in (
        PPOConfig(policy=ModelConfig(path=folder, quantization="4bit")),
        PPOConfig(
            policy=ModelConfig(path=folder), critic=ModelConfig(path=folder, quantization="8bit")
        ),
    ):
        with pytest.raises(UserError, match=r"quantization: \dbit needs lora.*lora\.rank=16"):
            PPOEngine("", vowels, config=settings)
    config = RewardModelConfig(model=ModelConfig(path=folder, quantization="4bit"))
    with pytest.raises(UserError, match="needs lora"):
        RewardModelTrainer(None, planted_pairs(8), config)


@pytest.mark.parametrize("missing", ["bitsandbytes", "accelerate"])
def test_a_missing_package_is_named(
    folder: str, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else name)
    with pytest.raises(UserError, match=rf"package {missing}: pip install 'ppo-engine\[quant\]'"):
        make_engine(folder, "4bit")


def test_a_model_without_a_path_is_not_quantised(folder: str) -> None:
    config = PPOConfig(policy=adapted(bits="4bit"))
    with pytest.raises(UserError, match="quantization: 4bit needs a path"):
        PPOEngine(tiny_model(), vowels, config=config, tokenizer=tiny_tokenizer())
    config = PPOConfig(policy=ModelConfig(path=folder), critic=adapted(bits="8bit"))
    with pytest.raises(UserError, match=r"8bit needs a path.*critic"):
        PPOEngine("", vowels, config=config)
    reward = RewardModelConfig(model=adapted(bits="8bit"))
    with pytest.raises(UserError, match="8bit needs a path"):
        RewardModelTrainer(
            tiny_model_for_scores(folder), planted_pairs(8), reward, tiny_tokenizer()
        )


def tiny_model_for_scores(folder: str) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)


@pytest.mark.parametrize("bits", BASES[1:])
def test_layers_that_could_not_be_saved_again_are_refused(tmp_path: Path, bits: Bits) -> None:
    tokenizer = tiny_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64,
                        bos_token_id=None, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = replace(adapted(bits=bits), path=str(tmp_path))
    with pytest.raises(UserError, match="GPT2LMHeadModel cannot be quantized"):
        LanguageModel.open("", settings, device=CPU, dtype=torch.float32)
