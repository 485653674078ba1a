"""Policy, critic and reward model as adapters and heads on one base, whose bare form is the
reference."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import of_family
from reading import sequence_scores, token_values
from rich.console import Console
from rollouts import length, move, moved_engine, record, rollout_of
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokenizer
from torch import nn
from trainers import PROMPTS, as_if_killed, config, length_reward, planted_pairs, same, untimed
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ppo_engine import (
    LoraConfig,
    ModelConfig,
    PPOConfig,
    PPOEngine,
    PPOTrainer,
    RewardConfig,
    RewardModelConfig,
    RewardModelTrainer,
    RunConfig,
)
from ppo_engine.errors import UserError
from ppo_engine.models.optimizer import trainable_state
from ppo_engine.pretrained.architecture import unwrap
from ppo_engine.pretrained.masters import master
from ppo_engine.pretrained.quiet import quiet_transformers
from ppo_engine.rewards.model import RewardModel, load_reward_model
from ppo_engine.settings.checks import check_settings
from ppo_engine.settings.schema import resolved

peft = pytest.importorskip("peft", reason="the optional package peft is not installed")
CPU = torch.device("cpu")
LORA = LoraConfig(rank=2, alpha=8)
IDS = torch.arange(40).view(2, 20)
ONES = torch.ones_like(IDS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model of four layers."""
    folder = tmp_path_factory.mktemp("models") / "base"
    of_family("llama", num_hidden_layers=4).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def trained_reward(base: str, run: Path, dtype: Any = "float32", **settings: Any) -> Any:
    """A reward model of adapters, as it was trained; `run`/reward_model has what was saved."""
    model = ModelConfig(path=base, lora=LORA, **settings)
    made = RewardModelTrainer(
        None,
        planted_pairs(8),
        RewardModelConfig(
            model=model, run=RunConfig(output_dir=str(run), dtype=dtype, save_adapters=True)
        ),
        console=Console(file=io.StringIO()),
    )
    move(made.model)
    made.train()
    return made.model.eval()


@pytest.fixture(scope="module")
def reward(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Adapters in the last layer of `base`."""
    run = tmp_path_factory.mktemp("reward") / "run"
    trained_reward(base, run, trainable_layers=1)
    return str(run / "reward_model")


def engine_of(base: str, reward: Any, **settings: Any) -> PPOEngine:
    policy = {"lora": LORA, "trainable_layers": 1} | settings.pop("policy", {})
    return moved_engine(reward, model=base, policy=policy, **{"share_base": True} | settings)


def roles(engine: PPOEngine) -> list[Any]:
    return [engine.policy, *([engine.critic] if engine.critic else []), *engine.rewards.models]


def numbers(model: nn.Module) -> int:
    return sum(x.numel() for x in model.parameters())


def held(engine: PPOEngine) -> int:
    """Bytes of all roles' weights, the shared ones once."""
    everything = (x for role in roles(engine) for x in role.model.parameters())
    return sum({x.data_ptr(): x.nbytes for x in everything}.values())


@pytest.mark.parametrize("scored_by", ["adapters", "function"])
@pytest.mark.parametrize("layers", [1, None])
def test_the_base_is_held_once(base: str, reward: str, layers: int | None, scored_by: str) -> None:
    engine = engine_of(
        base,
        reward if scored_by == "adapters" else length,
        policy={"trainable_layers": layers},
    )
    assert engine.reference is None and len(roles(engine)) == 2 + (scored_by == "adapters")
    own = {x.data_ptr() for x in engine.policy.model.parameters() if not x.requires_grad}
    plain = AutoModelForCausalLM.from_pretrained(base)
    for role in roles(engine):
        shared = [x for x in unwrap(role.model).model.parameters() if x.data_ptr() in own]
        assert sum(x.numel() for x in shared) == numbers(plain.model)
    assert 1 < held(engine) / (4 * numbers(plain)) < 1.3
    one, other = (trainable_state(role.model) for role in (engine.policy, engine.critic))
    assert not {x.data_ptr() for x in one.values()} & {x.data_ptr() for x in other.values()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_adapters_score_as_they_did_in_training(
    base: str, tmp_path: Path, dtype: str
) -> None:
    trained = trained_reward(base, tmp_path / "run", dtype)
    folder = str(tmp_path / "run/reward_model")
    expected = sequence_scores(trained, IDS, ONES)
    assert same(
        peft.load_peft_weights(folder, device="cpu"),
        {  # unrounded
            re.sub(r"(\.modules_to_save)?\.default", "", name): master(x)
            for name, x in trained.named_parameters()
            if x.requires_grad
        },
    )
    run = PPOConfig(
        policy=ModelConfig(path=base, lora=LORA), run=RunConfig(dtype=dtype), share_base=True
    )
    engine = PPOEngine("", folder, config=run)
    [scorer] = engine.rewards.models
    assert torch.equal(sequence_scores(scorer.model, IDS, ONES), expected)
    # The critic begins as the reward model.
    assert torch.equal(sequence_scores(engine.critic.model, IDS, ONES), expected)
    if dtype == "float32":  # merged, weights in bf16 round otherwise
        with quiet_transformers():
            plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        elsewhere = peft.PeftModel.from_pretrained(plain, folder).merge_and_unload().eval()
        here = load_reward_model(folder, device=CPU, dtype=torch.float32).model
        for model in (elsewhere, here):
            found = sequence_scores(model, IDS, ONES)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_saved_adapters_of_policy_and_critic_are_those_that_were_trained(
    base: str, reward: str, tmp_path: Path
) -> None:
    engine = engine_of(base, reward)
    move(engine.critic.model)
    engine.config = replace(engine.config, run=replace(engine.config.run, save_adapters=True))
    for _ in range(2):  # the second in place of the first
        engine.save(tmp_path)
    assert not [*tmp_path.rglob("model*.safetensors")]
    logits = engine.policy.model(IDS).logits
    values = token_values(engine.critic.model, IDS, ONES)
    plain = AutoModelForCausalLM.from_pretrained(base)
    policy = peft.PeftModel.from_pretrained(plain, tmp_path / "policy").merge_and_unload()
    again = PPOEngine(
        str(tmp_path / "policy"),
        length,
        config=PPOConfig(
            critic=ModelConfig(path=str(tmp_path / "critic")), run=RunConfig(dtype="float32")
        ),
    )
    for model in (policy, again.policy.model):
        torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    found = token_values(again.critic.model, IDS, ONES)
    torch.testing.assert_close(found, values, rtol=1e-4, atol=1e-4)
    # Merged, they are the same models.
    engine.config = replace(engine.config, run=RunConfig())
    engine.save(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged/policy")
    torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-4, atol=1e-4)


def test_no_role_changes_another(base: str, reward: str) -> None:
    engine = engine_of(base, reward)
    plain = AutoModelForCausalLM.from_pretrained(base)
    [scorer] = engine.rewards.models
    before = sequence_scores(scorer.model, IDS, ONES)
    values = token_values(engine.critic.model, IDS, ONES)
    rollout = rollout_of()
    experience = engine.estimate_advantages(rollout, engine.score(rollout))
    engine.update(experience)
    assert not torch.equal(token_values(engine.critic.model, IDS, ONES), values)
    assert torch.equal(sequence_scores(scorer.model, IDS, ONES), before)
    after = engine.estimate_advantages(rollout, engine.score(rollout))
    assert torch.equal(after.ref_logprobs, experience.ref_logprobs)
    assert not torch.equal(after.logprobs, experience.logprobs)
    frozen = unwrap(engine.policy.model).model.layers[3].mlp.up_proj.base_layer.weight
    assert torch.equal(frozen, plain.model.layers[3].mlp.up_proj.weight)


def test_frozen_layers_run_once_for_all_four(base: str, reward: str) -> None:
    engine = engine_of(base, reward, ppo={"epochs": 2})
    rollout = rollout_of()
    engine.update(engine.estimate_advantages(rollout, engine.score(rollout)))
    read: Counter[int] = Counter()

    def add(number: int) -> Callable[..., None]:
        return lambda *args: read.update({number: args[2].shape[:-1].numel()})

    for role in roles(engine):
        for number, layer in enumerate(unwrap(role.model).model.layers):
            layer.mlp.register_forward_hook(add(number))
    rollout = rollout_of()
    engine.update(engine.estimate_advantages(rollout, engine.score(rollout)))
    tokens = sum(len(row.ids) for row in rollout.rows)
    scored = sum(len(a) + len(b) for a, b in rollout.written)  # with their ends
    # The last layer: reward model, reference, and policy and critic before and in two epochs.
    assert [read[n] for n in range(4)] == [scored] * 3 + [scored + 7 * tokens]


def test_the_critic_goes_on_in_its_own_layers(base: str, tmp_path: Path) -> None:
    trained_reward(base, tmp_path / "run")  # adapters in all layers
    engine = engine_of(base, str(tmp_path / "run/reward_model"))
    [scorer] = engine.rewards.models
    trained = trainable_state(engine.critic.model)
    # Two matrices for each of seven products of the last layer, and the head.
    assert len(trained) == 15 and all(".layers.3." in x or ".score." in x for x in trained)
    below = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    ours, theirs = (x.model.get_parameter(below) for x in (engine.critic, scorer))
    assert ours.data_ptr() == theirs.data_ptr() or torch.equal(ours, theirs)


@pytest.mark.parametrize("scored_by", ["adapters", "function"])
def test_a_resumed_run_is_the_same_run(
    base: str, reward: str, tmp_path: Path, scored_by: str
) -> None:
    def run(folder: Path, **more: Any) -> None:
        made = config(folder, steps=4, checkpoint_every=2, save_adapters=True, **more)
        made = replace(
            made,
            policy=replace(made.policy, lora=LORA, trainable_layers=1),
            share_base=True,
        )
        rewards = reward if scored_by == "adapters" else length_reward
        PPOTrainer(base, rewards, PROMPTS, config=made).train()

    run(tmp_path / "whole")
    run(tmp_path / "halves")
    as_if_killed(tmp_path / "halves")
    run(tmp_path / "halves", resume=True)
    whole, halves = (untimed(tmp_path / name / "metrics.jsonl") for name in ("whole", "halves"))
    assert len(whole) == 4 and whole == halves
    for role in ("policy", "critic"):
        found = [
            peft.load_peft_weights(str(tmp_path / name / role), device="cpu")
            for name in ("whole", "halves")
        ]
        assert found[0] and same(*found)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_four_roles_on_one_quantized_base(base: str, tmp_path: Path, bits: Any) -> None:
    pytest.importorskip("bitsandbytes", reason="the optional package is not installed")
    trained = trained_reward(base, tmp_path / "run", quantization=bits, trainable_layers=1)
    engine = engine_of(base, str(tmp_path / "run/reward_model"), policy={"quantization": bits})
    [scorer] = engine.rewards.models
    found, expected = (sequence_scores(x, IDS, ONES) for x in (scorer.model, trained))
    torch.testing.assert_close(found, expected)
    layers = [unwrap(role.model).model.layers[0].mlp.up_proj for role in roles(engine)]
    assert len({layer.weight.data_ptr() for layer in layers}) == 1
    beside = "quant_state" if bits == "4bit" else "state"
    assert len({id(getattr(layer, beside)) for layer in layers}) == 1
    rollout = rollout_of()
    metrics = engine.update(engine.estimate_advantages(rollout, engine.score(rollout)))
    assert metrics["policy/grad_norm"] > 0 and metrics["value/grad_norm"] > 0


def test_a_base_is_loaded_in_the_dtype_it_computes_in(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no weight but the adapters is ever in float32, outside of the probes' passes."""
    seen = []
    put = peft.get_peft_model

    def look(model: Any, *args: Any) -> Any:
        seen.append({x.dtype for x in model.base_model.parameters()})
        return put(model, *args)

    monkeypatch.setattr(peft, "get_peft_model", look)
    run = PPOConfig(
        policy=ModelConfig(path=base, lora=LORA), run=RunConfig(dtype="bfloat16"), share_base=True
    )
    engine = PPOEngine("", length, config=run)
    assert seen == [{torch.bfloat16}] * 2  # policy and critic
    assert {x.dtype for x in engine.critic.model.base_model.model.model.parameters()} == {
        torch.bfloat16
    }
    assert engine.policy._head is not None and not engine.policy.makes_logits


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells of the memory")
def test_loading_holds_the_base_once(tmp_path: Path) -> None:
    """At no moment a second copy of it, nor one in float32: measured 1.2 of its bytes, and 58 MiB
    of all else."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    model = of_family("llama", **sizes).bfloat16()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    script = Path(__file__).parents[1] / "loaded_memory.py"
    shown = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], check=True, capture_output=True, text=True
    ).stdout
    weights = 2 * numbers(model)
    assert weights > 90e6
    assert int(shown.split()[-1]) < 1.3 * weights + 80e6


def test_settings_of_a_critic_on_the_shared_base() -> None:
    policy = ModelConfig(lora=LORA, trainable_layers=3)
    critic = resolved(PPOConfig(policy=policy, share_base=True)).critic
    assert (critic.lora, critic.trainable_layers) == (LORA, 3)
    assert critic.optimizer.learning_rate == 1e-4
    others = ModelConfig(lora=LoraConfig(rank=7))
    critic = resolved(replace(PPOConfig(policy=policy, share_base=True), policy=others)).critic
    assert (critic.lora, critic.trainable_layers) == (others.lora, None)
    own = ModelConfig(lora=LoraConfig(rank=3))
    critic = resolved(PPOConfig(policy=policy, critic=own, share_base=True)).critic
    assert (critic.lora, critic.trainable_layers) == (LoraConfig(rank=3), None)
    for settings, message in (
        ({}, r"policy\.lora\.rank=16"),
        ({"policy": policy, "critic": ModelConfig(path="x")}, r"critic\.path=x would be of"),
        (
            {"policy": policy, "critic": ModelConfig(quantization="4bit")},
            r"critic\.quantization=4bit would be of another base",
        ),
    ):
        with pytest.raises(UserError, match=message):
            check_settings(PPOConfig(share_base=True, **settings))


def test_reward_models_that_are_not_on_the_base_are_refused(
    base: str, reward: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"is none: train it with `ppo-engine reward --model .*/ba"):
        engine_of(base, base)
    other = tmp_path / "other"
    of_family("llama", num_hidden_layers=4).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    with pytest.raises(
        UserError, match=r"which is '.*/other'; the adapters in '.*' are for '.*/ba"
    ):
        engine_of(str(other), reward)
    scorer = load_reward_model(reward, device=CPU, dtype=torch.float32)
    assert isinstance(scorer, RewardModel)
    with pytest.raises(UserError, match="no place for a RewardModel with weights of its own"):
        engine_of(base, scorer)
    with pytest.raises(UserError, match=r"critic\.lora would have no effect"):
        engine_of(base, reward, critic={"lora": LoraConfig(rank=3)})


def test_adapters_that_are_more_or_less_are_refused(base: str, tmp_path: Path) -> None:
    def saved(name: str, **settings: Any) -> str:
        with quiet_transformers():
            plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        options = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], **settings)
        peft.get_peft_model(plain, options).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    with pytest.raises(
        UserError, match=r"replace model\.layers\.0\.input_layernorm\.weight of their base whole"
    ):
        engine_of(base, saved("whole", modules_to_save=["norm"]))
    headless = saved("headless")
    weights = peft.load_peft_weights(headless, device="cpu")
    kept = {name: x for name, x in weights.items() if "score" not in name}
    save_file(kept, Path(headless) / "adapter_model.safetensors")
    with pytest.raises(UserError, match="come without a score head"):
        engine_of(base, headless)


def test_adapters_that_could_not_be_loaded_again_are_not_saved() -> None:
    run = RunConfig(dtype="float32", save_adapters=True)

    def engine(**policy: Any) -> PPOEngine:
        made = PPOConfig(policy=ModelConfig(**policy), run=run, reward=RewardConfig())
        return PPOEngine(tiny_model(), length, config=made, tokenizer=tiny_tokenizer())

    with pytest.raises(UserError, match="there are no adapters: set lora"):
        engine()
    with pytest.raises(UserError, match="give the model's folder or name"):
        engine(lora=LORA)


def test_a_step_is_that_of_roles_apart(
    base: str, reward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients, with the layers below run once, and with each role reading all by itself; of the
    policy also with a reward model and a critic in bases of their own."""
    found = []
    for kind in ("shared", "each by itself", "apart"):
        engine = engine_of(base, reward, share_base=kind != "apart")
        if kind == "each by itself":
            monkeypatch.setattr(engine.trunks, "of", lambda _: nullcontext())
        with monkeypatch.context() as patch:
            steps = record(engine, patch)
            rollout = rollout_of()
            scores = engine.score(rollout)
            engine.update(engine.estimate_advantages(rollout, scores))
        found.append((scores, steps.policy[0].gradients, steps.critic[0].gradients))
    (scores, *ours), (_, *alone), (expected, theirs, _) = found
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(ours[0] + ours[1], alone[0] + alone[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item() + 1e-7)
    for a, b in zip(ours[0], theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item() + 1e-7)
