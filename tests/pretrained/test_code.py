"""Nothing that comes with a model or with data is run as code, unless a setting says so."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faults.code import RAN, tried
from tiny import tiny_model_folder

import ppo_engine
from ppo_engine.cli import main
from ppo_engine.models.value_model import load_value_model
from ppo_engine.pretrained import loading

SOURCE = Path(ppo_engine.__file__).parent
# Which may, and why.
ALLOWED = {
    ("rewards/ready/harness.py", "exec"),  # a program that is tested, in a process of its own
}


@pytest.mark.parametrize(
    "name",
    [
        "a model's own class",
        "a known family's own class",
        "a tokenizer's own class",
        "pickled weights among others",
        "a template that reaches globals",
    ],
)
def test_a_models_code_is_not_run(name: str, tmp_path: Path) -> None:
    assert not tried(name, tmp_path).wrong


OWN = """open({ran!r}, "w").close()
from transformers import (
    AutoModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
)
class Config(LlamaConfig):
    model_type = "own"
class Base(LlamaModel):
    config_class = Config
AutoModel.register(Config, Base)
class Model(LlamaForCausalLM):
    config_class = Config
class Scores(LlamaForSequenceClassification):
    config_class = Config
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A language model and, in `scores`, a reward model, each of a class that comes with it."""
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    folder = Path(tiny_model_folder(tmp_path)).rename(tmp_path / "own")
    tokenizer = loading.tokenizer_at(str(folder))
    head = load_value_model(str(folder), tokenizer, device=torch.device("cpu"))
    loading.save_model(head, tokenizer, tmp_path / "scores")
    auto_map = {
        "AutoConfig": "own.Config",
        "AutoModelForCausalLM": "own.Model",
        "AutoModelForSequenceClassification": "own.Scores",
    }
    for inside in (folder, tmp_path / "scores"):
        (inside / "own.py").write_text(OWN.format(ran=str(tmp_path / RAN)))
        config = json.loads((inside / "config.json").read_text())
        config |= {"model_type": "own", "auto_map": auto_map}
        (inside / "config.json").write_text(json.dumps(config))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "What?", "response": "Yes."}\n')
    return tmp_path


SHORT = ["generation.max_new_tokens=2", "--prompt", "What?"]


@pytest.mark.parametrize("given", [
    ["generate", "--model", "own", *SHORT, "trust_remote_code=true"],
    ["generate", "--model", "plain", *SHORT, "--reward", "scores", "reward.trust_remote_code=true"],
    ["inspect", "--model", "own", "--data", "rows.jsonl", "model.trust_remote_code=true"],
    ["inspect", "--model", "own", "--data", "rows.jsonl", "--as", "prompts",
     "policy.trust_remote_code=true"],
    ["ppo", "--model", "own", "--data", "rows.jsonl", "--reward", "scores", "--dry-run",
     "policy.trust_remote_code=true", "reward.trust_remote_code=true"],
    ["ppo", "--model", "plain", "--data", "rows.jsonl", "--reward", "scores", "--output-dir", "run",
     "reward.trust_remote_code=true", "generation.max_new_tokens=2", "steps=1", "run.dtype=float32",
     "ppo.rollout_batch_size=2", "ppo.mini_batch_size=2"],
])  # fmt: skip
def test_a_models_code_runs_where_a_setting_says_so(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    given: list[str],
) -> None:  # fmt: skip
    tiny_model_folder(own)
    (own / "tiny-chat").rename(own / "plain")
    monkeypatch.chdir(own)
    untrusted = [x for x in given if "trust_remote_code" not in x]
    assert main(untrusted) == 2
    said = capsys.readouterr().err
    assert "This code is not run. Where you have read it" in said
    assert all(x.removesuffix("=true") in said for x in given if x.startswith("reward.trust"))
    assert not (own / RAN).exists()
    assert main(given) == 0, capsys.readouterr().err
    assert (own / RAN).exists()


def _uses(tree: ast.AST) -> Iterator[str]:
    """What a module imports, and calls by a plain or dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_the_source_runs_no_code_from_data() -> None:
    refused = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "torch.load"}
    refused |= {"eval", "exec", "yaml.unsafe_load", "numpy.load", "runpy"}
    found = {
        (str(file.relative_to(SOURCE)), use)
        for file in SOURCE.rglob("*.py")
        for use in _uses(ast.parse(file.read_text(encoding="utf-8")))
        if use in refused
    }
    assert found == ALLOWED


def test_transformers_is_told_each_time_whose_code_to_run() -> None:
    """Where it is not, it asks on standard input."""
    classes = {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "model_class"}
    calls = [
        ast.unparse(node)
        for file in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config")
        and ast.unparse(node.func.value) in classes
    ]
    assert len(calls) >= 5
    assert not [call for call in calls if "trust_remote_code" not in call]
