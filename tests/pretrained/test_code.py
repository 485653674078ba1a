"""Nothing that comes with a model or with data is run as code, unless a setting says so."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.code import RAN, tried
from tiny import tiny_model_folder

import ppo_engine
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


def test_a_models_code_runs_where_a_setting_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(tiny_model_folder(tmp_path))
    (folder / "own.py").write_text(
        f"open({str(tmp_path / RAN)!r}, 'w').close()\n"
        "from transformers import LlamaConfig\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert loading.load_model_config(str(folder), trust=True).model_type == "own"
    assert (tmp_path / RAN).exists()


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
