"""Folders of adapters without their base, as `peft` saves them."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from reading import sequence_scores
from rich.console import Console
from tiny import tiny_model_folder, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ppo_engine import (
    DemonstrationDataConfig,
    ModelConfig,
    PPOConfig,
    PPOEngine,
    RunConfig,
    SFTConfig,
    SFTTrainer,
)
from ppo_engine.errors import UserError
from ppo_engine.generate import generate
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.value_model import load_value_model
from ppo_engine.pretrained.adapter_folder import tokenizer_source
from ppo_engine.pretrained.loading import load_model_config
from ppo_engine.pretrained.quiet import quiet_transformers
from ppo_engine.pretrained.weights import read_language_model
from ppo_engine.rewards.model import load_reward_model
from ppo_engine.settings.schema import GenerateConfig, GenerationConfig, ScoringConfig

peft = pytest.importorskip("peft")

CPU = torch.device("cpu")
IDS = torch.arange(40).view(2, 20)


def open_policy(path: str | Path, config: ModelConfig | None = None) -> LanguageModel:
    return LanguageModel.open(str(path), config or ModelConfig(), device=CPU, dtype=torch.float32)


def adapt(base: str, folder: Path, kind: str = "LoraConfig", **settings: Any) -> Tensor:
    """Random adapters on `base` in `folder`; the logits of the model with them."""
    task = settings.setdefault("task_type", "CAUSAL_LM")
    rows = settings.pop("rows", None)
    classes = {"SEQ_CLS": AutoModelForSequenceClassification}
    more = {"num_labels": settings.pop("labels", 1)} if task == "SEQ_CLS" else {}
    with quiet_transformers():
        model = classes.get(task, AutoModelForCausalLM).from_pretrained(base, **more)
    if rows:
        model.resize_token_embeddings(rows)
    model = peft.get_peft_model(model, getattr(peft, kind)(**settings)).eval()
    for name, x in model.named_parameters():
        if x.requires_grad:
            torch.nn.init.normal_(x, 0.5 * ("lora_magnitude" in name), 0.3)
    model.save_pretrained(folder)
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.detach()


@pytest.fixture
def base(tmp_path: Path) -> str:
    return tiny_model_folder(tmp_path)


FORMS: dict[str, dict[str, Any]] = {
    "all products": {"target_modules": "all-linear", "r": 2},
    "DoRA": {"target_modules": ["q_proj"], "r": 2, "use_dora": True},
    "LoHa": {"kind": "LoHaConfig", "target_modules": ["q_proj"]},
    "IA3": {"kind": "IA3Config", "target_modules": ["down_proj"], "feedforward_modules": []},
    "a norm trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "a tied embedding trained whole": {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]
    },
    "a tied output layer": {"target_modules": ["lm_head", "q_proj"]},
    "no task": {"target_modules": ["q_proj"], "task_type": None},
    "added tokens": {"target_modules": ["q_proj", "embed_tokens"], "rows": 270},
    "added tokens, saved whole": {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "rows": 270
    },
    "single tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_policy_of_adapters_is_the_model_that_they_make(
    base: str, tmp_path: Path, form: dict[str, Any]
) -> None:
    expected = adapt(base, tmp_path / "adapters", **form)
    policy = open_policy(tmp_path / "adapters")
    plain = AutoModelForCausalLM.from_pretrained(base)(IDS).logits
    assert plain.shape != expected.shape or (plain - expected).abs().max() > 2e-3
    torch.testing.assert_close(policy.model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    # A model like any other: whole once saved.
    policy.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "adapter_config.json").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_reward_model_of_adapters_scores_with_its_own_head(base: str, tmp_path: Path) -> None:
    expected = adapt(base, tmp_path / "adapters", target_modules=["q_proj"], task_type="SEQ_CLS")
    for model in (
        load_reward_model(str(tmp_path / "adapters"), device=CPU, dtype=torch.float32).model,
        load_value_model(str(tmp_path / "adapters"), tiny_tokenizer(), device=CPU),
    ):
        scores = sequence_scores(model, IDS, torch.ones_like(IDS))
        torch.testing.assert_close(scores, expected[:, 0], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="is a classifier: give a causal language model"):
        open_policy(tmp_path / "adapters")


def test_a_critic_starts_from_a_policys_adapters(base: str, tmp_path: Path) -> None:
    adapt(base, tmp_path / "adapters", target_modules=["q_proj", "lm_head"])
    critic = load_value_model(str(tmp_path / "adapters"), tiny_tokenizer(), device=CPU)
    policy = open_policy(tmp_path / "adapters")
    for name, x in critic.base_model.named_parameters():
        assert torch.equal(x, policy.model.base_model.get_parameter(name))
    with pytest.raises(UserError, match="has no score head"):
        load_reward_model(str(tmp_path / "adapters"), device=CPU, dtype=torch.float32)


def test_a_head_that_was_not_saved_is_missed(base: str, tmp_path: Path) -> None:
    adapt(base, tmp_path / "adapters", target_modules=["q_proj"])
    edit(tmp_path / "adapters", task_type="SEQ_CLS")
    with pytest.raises(UserError, match=r"lacks the weights score\.weight"):
        load_reward_model(str(tmp_path / "adapters"), device=CPU, dtype=torch.float32)
    adapt(base, tmp_path / "two", target_modules=["q_proj"], task_type="SEQ_CLS", labels=2)
    with pytest.raises(UserError, match="classifier with 2 labels"):
        load_reward_model(str(tmp_path / "two"), device=CPU, dtype=torch.float32)


def test_adapters_on_adapters_are_merged_in_their_order(base: str, tmp_path: Path) -> None:
    adapt(base, tmp_path / "one", target_modules=["q_proj"])
    open_policy(tmp_path / "one").save(tmp_path / "merged")
    scales = {"kind": "IA3Config", "target_modules": ["q_proj"], "feedforward_modules": []}
    expected = adapt(str(tmp_path / "merged"), tmp_path / "two", **scales)
    edit(tmp_path / "two", base_model_name_or_path=str(tmp_path / "one"))
    found = open_policy(tmp_path / "two").model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", ["../tiny-chat", "tiny-chat", "~/tiny-chat"])
def test_the_base_is_found_from_here_and_from_the_adapters(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    expected = adapt(base, tmp_path / "run" / "adapters", target_modules=["q_proj"])
    if place.startswith(".."):
        shutil.move(base, tmp_path / "run" / "tiny-chat")
    else:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
    edit(tmp_path / "run" / "adapters", base_model_name_or_path=place)
    found = open_policy(tmp_path / "run" / "adapters").model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_trls_checkpoint_brings_its_tokenizer_and_leaves_its_value_head(
    base: str, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint-8"
    adapt(base, folder, target_modules=["q_proj"])
    assert tokenizer_source(str(folder)) == base
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder)
    torch.save({"v_head.summary.weight": torch.ones(1, 32)}, folder / "pytorch_model.bin")
    policy = open_policy(folder)
    assert "<tool>" in policy.tokenizer.get_vocab()
    assert policy.model.get_input_embeddings().num_embeddings == len(tokenizer) == 260


def test_every_part_of_a_run_takes_adapters(base: str, tmp_path: Path) -> None:
    """Policy, reward and critic; and the trainers, which read the tokenizer first."""
    paths = {task: str(tmp_path / task) for task in ("CAUSAL_LM", "SEQ_CLS")}
    for task, path in paths.items():
        adapt(base, Path(path), target_modules=["q_proj"], task_type=task)
    config = PPOConfig(critic=ModelConfig(path=paths["SEQ_CLS"]), run=RunConfig(dtype="float32"))
    engine = PPOEngine(paths["CAUSAL_LM"], paths["SEQ_CLS"], config=config)
    assert engine.rewards.by_tokens  # the policy's tokens, read from the same base
    assert engine.critic is not None
    rewards = next(iter(engine.rewards.by_tokens.values())).model
    for model in (engine.critic.model, rewards):
        assert not hasattr(model, "peft_config")
    assert torch.equal(engine.critic.model.score.weight, rewards.score.weight)

    run = RunConfig(output_dir=str(tmp_path / "run"), dtype="float32")
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]
    data = DemonstrationDataConfig(eval_fraction=0)
    console = Console(file=io.StringIO())
    SFTTrainer(paths["CAUSAL_LM"], rows, SFTConfig(data=data, run=run), console=console).train()
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")

    answers = tmp_path / "answers.jsonl"
    scored = ScoringConfig(path=paths["SEQ_CLS"])
    sampled = GenerationConfig(max_new_tokens=2)
    options = {"generation": sampled, "reward": scored, "output": str(answers), "dtype": "float32"}
    generate(GenerateConfig(model=paths["CAUSAL_LM"], prompt="a", **options))
    assert len(json.loads(answers.read_text())["scores"]) == 1


def edit(folder: Path, **settings: Any) -> None:
    """Write other settings into a folder of adapters."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no base": ({"base_model_name_or_path": None}, "do not say which model they adapt"),
    "a base that is not there": (
        {"base_model_name_or_path": "./elsewhere"},
        r"base of the adapters in .*elsewhere.* does not exist.*base_model_name_or_path",
    ),
    "themselves": ({"base_model_name_or_path": "."}, "name themselves as their base"),
    "another task": ({"task_type": "TOKEN_CLS"}, "for the task TOKEN_CLS: give those of"),
    "prompts": ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING, which cannot be merged"),
    "an unknown type": ({"peft_type": "NONE_SUCH"}, "adapter_config.json could not be read"),
    "other modules": ({"target_modules": ["c_attn"]}, "cannot be merged into their base"),
    "fewer modules": ({"target_modules": ["q_proj"]}, "which has no place for .*v_proj"),
    "more modules": ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "not all there .*o_proj"),
    "another rank": ({"r": 3}, "cannot be merged into their base .*size mismatch"),
    "a revision": (
        {"base_model_name_or_path": "some/model", "revision": "v2"},
        "the revision v2 of 'some/model': download that",
    ),
}


@pytest.mark.parametrize(("settings", "message"), WRONG.values(), ids=WRONG)
def test_adapters_that_cannot_be_used_are_named(
    base: str, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "adapters"
    adapt(base, folder, target_modules=["q_proj", "v_proj"])
    if settings.get("base_model_name_or_path") == ".":
        settings = {"base_model_name_or_path": str(folder)}
    edit(folder, **settings)
    with pytest.raises(UserError, match=message):
        open_policy(folder)


def test_a_whole_model_beside_adapters_is_refused(base: str, tmp_path: Path) -> None:
    """Are they merged into it? transformers would apply them, and save them alone."""
    adapt(base, tmp_path / "adapters", target_modules=["q_proj"])
    shutil.copytree(base, tmp_path / "adapters", dirs_exist_ok=True)
    with pytest.raises(UserError, match="both a whole model and adapters"):
        open_policy(tmp_path / "adapters")
    (tmp_path / "adapters" / "model.safetensors").unlink()
    index = tmp_path / "adapters" / "pytorch_model.bin.index.json"
    index.write_text("{}")
    with pytest.raises(UserError, match="both a whole model and adapters"):
        open_policy(tmp_path / "adapters")
    index.unlink()
    open_policy(tmp_path / "adapters")  # a configuration alone is no model


def test_adapters_need_peft_and_a_base_that_is_not_quantized(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapt(base, tmp_path / "adapters", target_modules=["q_proj"])
    quantized = {"quantization_config": object()}
    with pytest.raises(UserError, match="cannot be merged into a quantized base"):
        read_language_model(str(tmp_path / "adapters"), quantized)
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda x: None if x == "peft" else found(x))
    with pytest.raises(UserError, match=r"need the package peft: pip install 'ppo-engine\[lora\]'"):
        open_policy(tmp_path / "adapters")


def test_adapters_on_repeated_layers_are_refused(tmp_path: Path) -> None:
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somewhere",
        "layer_replication": [[0, 2], [0, 2]],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"repeat layers of their base \(layer_replication\)"):
        load_model_config(str(tmp_path))
