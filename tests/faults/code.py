"""Model folders that bring code: none runs, whatever standard input answers."""

from __future__ import annotations

import io
import json
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny import tiny_model_folder

from faults import REFUSED, SURVIVED, Try
from ppo_engine.cli import main

RAN = "it-ran"  # a file beside the model, which its code makes
LIMIT = 10.0  # seconds


class _Calls:
    """Pickled, a call that is made when it is read."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> Any:
        return exec, (self.code,)


def _code(folder: Path) -> str:
    return f"open({str(folder.parent / RAN)!r}, 'w').close()\n"


def _edit(file: Path, **values: Any) -> None:
    there = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(there | values))


def _module(folder: Path) -> None:
    classes = (
        "from transformers import *\n"
        "class Config(LlamaConfig): model_type = 'evil'\n"
        "class Model(LlamaForCausalLM): config_class = Config\n"
        "class Tokenizer(PreTrainedTokenizerFast): pass\n"
    )
    (folder / "evil.py").write_text(_code(folder) + classes)


def _models_code(folder: Path, **values: Any) -> None:
    _module(folder)
    heads = ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel")
    auto_map = {"AutoConfig": "evil.Config"} | dict.fromkeys(heads, "evil.Model")
    _edit(folder / "config.json", **{"auto_map": auto_map} | values)


def _tokenizers_code(folder: Path, **values: Any) -> None:
    _module(folder)
    auto_map = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    _edit(folder / "tokenizer_config.json", auto_map=auto_map, **values)


def _processors_code(folder: Path) -> None:
    _module(folder)
    auto_map = {"AutoProcessor": "evil.Tokenizer", "AutoImageProcessor": "evil.Tokenizer"}
    for name in ("processor_config.json", "preprocessor_config.json"):
        _edit(folder / name, auto_map=auto_map, processor_class="Tokenizer")


def _bin(folder: Path, *, archive: bool = True, whole: bool = False) -> None:
    file = folder / "model.safetensors"
    weights: dict[str, Any] = load_file(file) if whole else {}
    file.unlink()
    weights["model.norm.weight"] = _Calls(_code(folder))
    if archive:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(weights))


def _shards(folder: Path) -> None:
    names = list(load_file(folder / "model.safetensors"))
    _bin(folder)
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
    where = dict.fromkeys(names, "pytorch_model-00001-of-00001.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _adapters(folder: Path, **values: Any) -> None:
    """Adapters in the folder, on the model that was there."""
    base = folder.with_name("base")
    folder.rename(base)
    folder.mkdir()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "target_modules": ["q_proj"]}
    settings |= {"base_model_name_or_path": str(base)} | values
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    torch.save({"x": _Calls(_code(folder))}, folder / "adapter_model.bin")


def _adapters_base(folder: Path) -> None:
    _models_code(folder, model_type="evil")
    _adapters(folder)


def _mapped_adapters(folder: Path) -> None:
    _module(folder)
    _adapters(folder, auto_mapping={"base_model_class": "Model", "parent_library": "evil"})


def _shadows(folder: Path) -> None:
    for name in ("torch", "json", "sitecustomize", "transformers", "modeling_llama", "setup"):
        (folder / f"{name}.py").write_text(_code(folder))


def _generates(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    text = f"{_code(folder)}def generate(model, **kwargs):\n    {_code(folder)}"
    (folder / "custom_generate" / "generate.py").write_text(text)
    _edit(folder / "generation_config.json", custom_generate=str(folder))


def _left_by_a_trainer(folder: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save(_Calls(_code(folder)), folder / name)


def _template(text: str) -> Callable[[Path], None]:
    def written(folder: Path) -> None:
        code = _code(folder).strip().replace("'", "\\'")
        (folder / "chat_template.jinja").write_text(text.replace("CODE", code))

    return written


FOLDERS: dict[str, Callable[[Path], None]] = {
    "a model's own class": lambda folder: _models_code(folder, model_type="evil"),
    "a known family's own class": _models_code,
    "a class in another repository": lambda folder: _models_code(
        folder, model_type="evil", auto_map={"AutoConfig": "someone/else--evil.Config"}
    ),
    "a tokenizer's own class": lambda folder: _tokenizers_code(folder, tokenizer_class="Evil"),
    "a known tokenizer's own class": _tokenizers_code,
    "a processor's own class": _processors_code,
    "pickled weights": _bin,
    "pickled weights among others": lambda folder: _bin(folder, whole=True),
    "a bare pickle": lambda folder: _bin(folder, archive=False),
    "pickled shards": _shards,
    "pickled adapters": _adapters,
    "adapters on a base with code": _adapters_base,
    "adapters that name a module": _mapped_adapters,
    "modules named as a library's": _shadows,
    "a generate function": _generates,
    "what a trainer left": _left_by_a_trainer,
    "a name that is code": lambda folder: _edit(
        folder / "config.json", dtype=f"__import__('os') or {_code(folder)}", hidden_act="exec"
    ),
    "a kernel from elsewhere": lambda folder: _edit(
        folder / "config.json", attn_implementation="evil/evil", _attn_implementation="evil/evil"
    ),
    "a template that reaches classes": _template(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages[0].content }}"
    ),
    "a template that reaches globals": _template(
        "{{ cycler.__init__.__globals__.os.system('CODE') }}"
        "{{ lipsum.__globals__['os'].popen('CODE') }}{{ messages[0].content }}"
    ),
    "a template that calls eval": _template(
        "{{ ''|attr('__class__')|attr('__base__') }}{{ namespace.__init__.__globals__ }}"
        "{{ raise_exception.__globals__.__builtins__.eval('CODE') }}{{ messages[0].content }}"
    ),
}


def tried(name: str, parent: Path) -> Try:
    """Generate with the model, everything on standard input a yes."""
    folder = Path(tiny_model_folder(parent))
    FOLDERS[name](folder)
    given = ["generate", "--model", str(folder), "--prompt", "q", "generation.max_new_tokens=2"]
    said, before, began = io.StringIO(), sys.stdin, time.monotonic()
    sys.stdin = io.StringIO("y\n" * 99)
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            status = main(given)
        left = len(sys.stdin.read())
    except BaseException as error:
        return Try("code in a model's folder", f"{name}: {type(error).__name__}: {error}")
    finally:
        sys.stdin = before
    ending = {0: SURVIVED, 2: REFUSED}.get(status, f"{name}: exit {status}, {said.getvalue()}")
    if (parent / RAN).exists():
        ending = f"{name}: its code ran"
    elif left != len("y\n" * 99):
        ending = f"{name}: standard input was asked"
    elif (took := time.monotonic() - began) > LIMIT:
        ending = f"{name}: took {took:.0f} s"
    elif "weights_only" in said.getvalue().partition("error: ")[2]:
        ending = f"{name}: torch's advice: {said.getvalue()}"
    return Try("code in a model's folder", ending)


def tries() -> Iterator[Try]:
    for name in FOLDERS:
        with tempfile.TemporaryDirectory() as parent:
            yield tried(name, Path(parent))
