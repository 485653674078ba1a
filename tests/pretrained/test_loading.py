"""Checkpoints that are not whole, or belong to another configuration: never random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_model_folder, tiny_tokenizer
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ppo_engine.errors import UserError
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.value_model import load_value_model
from ppo_engine.pretrained.loading import load_model_config, save_model
from ppo_engine.rewards.model import load_reward_model
from ppo_engine.settings.schema import ModelConfig

CPU = torch.device("cpu")
Weights = dict[str, Tensor]


def save_changed(folder: Path, change: Callable[[Weights], Any], model: Any) -> str:
    save_model(model, tiny_tokenizer(), folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def untied_model() -> Any:
    model = tiny_model()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def open_policy(path: str) -> Any:
    return LanguageModel.open(path, ModelConfig(), device=CPU, dtype=torch.float32).model


def open_critic(path: str) -> Any:
    return load_value_model(path, tiny_tokenizer(), device=CPU)


def without(part: str) -> Callable[[Weights], Any]:
    return lambda weights: [weights.pop(name) for name in [*weights] if part in name]


@pytest.mark.parametrize("read", [open_policy, open_critic])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("embed_tokens"), r"lacks the weights .*embed_tokens"),
        (without("layers.1.mlp"), r"lacks the weights .*layers\.1\.mlp"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(8)}),
            r"model\.norm\.weight in the shape \[8\], .* describes \[32\]",
        ),
        (
            lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}),
            r"does not describe: model\.layers\.0\.self_attn\.q_proj\.bias",
        ),
        (
            lambda w: w.update({"model.layers.2.mlp.up_proj.weight": torch.ones(64, 32)}),
            r"does not describe: model\.layers\.2\.mlp",
        ),
        (
            lambda w: [w.update({f"module.{name}": w.pop(name)}) for name in [*w]],
            r"lacks the weights .* It has others: module\.model\.embed_tokens",
        ),
        (
            lambda w: w["model.norm.weight"][3:4].fill_(float("nan")),
            r"weights that are not finite: model\.norm\.weight\.",
        ),
        (
            lambda w: w["model.layers.1.mlp.up_proj.weight"][:1, :1].fill_(float("-inf")),
            r"weights that are not finite: model\.layers\.1\.mlp\.up_proj",
        ),
    ],
    ids=[
        *("no embedding", "no layer", "another shape", "a bias", "another layer"),
        *("names of a wrapper", "nan", "infinity"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, read, change, message):
    folder = save_changed(tmp_path / "model", change, tiny_model())
    with pytest.raises(UserError, match=message):
        read(folder)


def test_an_untied_models_missing_head_is_refused(tmp_path):
    folder = save_changed(tmp_path / "model", without("lm_head"), untied_model())
    with pytest.raises(UserError, match=r"lacks the weights lm_head\.weight: they would be random"):
        open_policy(folder)


def test_a_reward_models_missing_head_is_refused(tmp_path):
    """Where a language model is given, a new head is made."""
    save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    folder = save_changed(
        tmp_path / "rewards", without("score"), open_critic(str(tmp_path / "model"))
    )
    for read in (
        open_critic,
        lambda path: load_reward_model(path, device=CPU, dtype=torch.float32),
    ):
        with pytest.raises(UserError, match=r"lacks the weights score\.weight"):
            read(folder)


def test_a_score_head_is_named_where_the_configuration_hides_it(tmp_path):
    folder = save_changed(
        tmp_path / "model", lambda w: w.update({"score.weight": torch.ones(1, 32)}), tiny_model()
    )
    with pytest.raises(UserError, match="has a score head: it is a reward model"):
        open_policy(folder)


def test_what_other_models_keep_beside_theirs_is_left_out(tmp_path):
    """Masks that older versions saved, and heads beside the language model's."""

    def change(weights: Weights) -> None:
        weights["model.layers.0.self_attn.masked_bias"] = torch.tensor(-1e4)
        weights["v_head.summary.weight"] = torch.ones(1, 32)

    folder = save_changed(tmp_path / "model", change, untied_model())
    one, two = open_policy(folder), open_policy(folder)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_file_that_was_cut_off_is_named(tmp_path):
    folder = save_changed(tmp_path / "model", lambda _: None, tiny_model())
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="Could not load a model from"):
        open_policy(folder)


@pytest.mark.parametrize("shown", [True, False])
def test_no_bar_is_shown_and_those_of_others_stay(shown, tmp_path, capfd):
    """Nor do downloads of others get bars for it that their user had hidden."""
    bar, hidden = transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    folder = save_changed(tmp_path / "model", lambda _: None, tiny_model())
    transformers_logging.enable_progress_bar()
    (enable_progress_bars if shown else disable_progress_bars)()
    try:
        capfd.readouterr()
        for opened in (open_policy, open_critic):
            opened(folder)
            assert transformers_logging.is_progress_bar_enabled()
            assert are_progress_bars_disabled() != shown
        assert capfd.readouterr() == ("", "")
    finally:
        if not bar:
            transformers_logging.disable_progress_bar()
        (disable_progress_bars if hidden else enable_progress_bars)()


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_weights_that_are_quantized_already_are_refused(tmp_path: Path, method: str) -> None:
    folder = tiny_model_folder(tmp_path)
    file = Path(folder, "config.json")
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(UserError, match=rf"are quantized already \({method}\).*quantization=4bit"):
        load_model_config(folder)
