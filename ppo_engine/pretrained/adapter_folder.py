"""Folders of adapters without their base, as `peft` saves them: the models that they make of it.

They are merged into the base as it is loaded, and the result is a model like any other; or put on
one that others share (`models.shared_base`).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, cached_file

from ppo_engine.errors import UserError
from ppo_engine.messages import reason
from ppo_engine.pretrained.adapters import untie, untie_adapted
from ppo_engine.pretrained.architecture import is_classifier
from ppo_engine.pretrained.hub import silence

_TASKS = ("CAUSAL_LM", "SEQ_CLS", None)
_WHOLE = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # fmt: skip
_TOKENIZER = "tokenizer_config.json"
_PREFIX = "base_model.model."  # in peft's files, before the name that a weight has in the base
_WRAPPER = re.compile(r"\.(base_layer|modules_to_save)\.")  # around a layer of the base
_HEADS = ("score.weight", "classifier.weight")


@dataclass(frozen=True)
class AdapterFolder:
    """Adapters at `path`, a folder or name, for the model at `base`."""

    path: str
    base: str
    task: str | None  # None: that of the base

    def describe(self, config: Any) -> None:
        """Make the base's configuration say what its adapters make of it."""
        if self.task != "SEQ_CLS":
            return
        heads = [x for name, x in self._weights().items() if name.endswith(_HEADS)]
        if heads:
            config.num_labels = len(heads[0])
        elif not is_classifier(config):
            config.num_labels = 1  # of the head that is to be made
        config.architectures = ["AutoModelForSequenceClassification"]

    def merge_into(self, model: Any) -> set[str]:
        """Merge the adapters into the base `model`; the names of the weights that they replace
        whole, such as those of a score head."""
        settings, weights = self._settings(), self._weights()
        with self._explained(f"({settings.peft_type}) cannot be merged into"):
            whole = _replace_whole(model, weights, settings)
            # What they were trained for does not matter to a merge, and whole weights are in place.
            settings.task_type = settings.modules_to_save = None
            settings.base_model_name_or_path = model.name_or_path
            adapted = self._put(model, settings, weights)
            untie_adapted(adapted)
            adapted.merge_and_unload().requires_grad_(True)  # peft froze it
        return whole

    def put_on(self, model: Any) -> Any:
        """The classifier `model` with the adapters and their score head, not merged. Nothing is
        trained, and the tensors of the base stay as they are: other models may hold them."""
        settings, weights = self._settings(), self._weights()
        own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        whole = {name for name in map(_inner, weights) if name in own}
        if other := sorted(name for name in whole if not name.endswith(_HEADS)):
            raise UserError(
                f"The adapters in {self.path!r} replace {other[0]} of their base whole, so it "
                "cannot be shared: leave share_base unset, or train them without modules_to_save."
            )
        if not whole:
            raise UserError(
                f"The adapters in {self.path!r} come without a score head: train a reward model "
                "(`ppo-engine reward`, with run.save_adapters=true)."
            )
        with self._explained("do not fit"):
            return self._put(model, settings, weights).requires_grad_(False)

    def _put(self, model: Any, settings: Any, weights: dict[str, Tensor]) -> Any:
        """`peft`'s model of the two; a UserError where not all `weights` have a place in it, or
        not all of its adapters have weights."""
        import peft

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tied layers, which `untie` sees to
            adapted: Any = peft.get_peft_model(model, settings)
        found: Any = peft.set_peft_model_state_dict(adapted, weights)
        # A value model has no output layer; what belongs to one is left out with it.
        inside = f"{_PREFIX}{model.base_model_prefix}."
        has_output = model.get_output_embeddings() is not None
        left = [x for x in found.unexpected_keys if has_output or x.startswith(inside)]
        if left:
            raise UserError(
                f"The adapters in {self.path!r} do not fit their base {self.base!r}, which has no "
                f"place for {left[0]}: correct base_model_name_or_path in its "
                f"{ADAPTER_CONFIG_NAME}."
            )
        if lost := [x for x in found.missing_keys if f".{adapted.base_model.prefix}" in x]:
            raise UserError(
                f"The weights of the adapters in {self.path!r} are not all there ({lost[0]} is "
                f"missing): save them again, or correct target_modules in {ADAPTER_CONFIG_NAME}."
            )
        return adapted

    def _settings(self) -> Any:
        import peft

        settings = peft.PeftConfig.from_pretrained(self.path)
        settings.inference_mode = True
        return settings

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"The adapters in {self.path!r} {what} their base {self.base!r}: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error

    def _weights(self) -> dict[str, Tensor]:
        import peft

        try:
            weights = peft.load_peft_weights(self.path, device="cpu")
        except Exception as error:  # what is in the file may fail anywhere within the library
            raise UserError(
                f"The weights of the adapters in {self.path!r} could not be read: {reason(error)}"
            ) from error
        return {name: x for name, x in weights.items() if ".original_module." not in name}


def unstack(path: str) -> tuple[str, list[AdapterFolder]]:
    """The model at the bottom of `path`, a folder or name, and the adapters on it, in order."""
    adapters: list[AdapterFolder] = []
    while (found := _find(path)) is not None:
        if found in adapters:
            raise UserError(
                f"The adapters in {found.path!r} name themselves as their base: set "
                f"base_model_name_or_path in its {ADAPTER_CONFIG_NAME} to the model they adapt."
            )
        adapters.insert(0, found)
        path = found.base
    return path, adapters


def tokenizer_source(path: str) -> str:
    """Where the tokenizer of the model at `path` is: with its adapters, else with their base."""
    base, adapters = unstack(path)
    with_one = (adapter.path for adapter in reversed(adapters) if _file(adapter.path, _TOKENIZER))
    return next(with_one, base)


def _find(path: str) -> AdapterFolder | None:
    """The adapters at `path`; None where there is a whole model, or nothing."""
    file = _file(path, ADAPTER_CONFIG_NAME)
    if file is None:
        return None
    if _file(path, CONFIG_NAME) and any(_file(path, name) for name in _WHOLE):
        raise UserError(
            f"{path!r} holds both a whole model and adapters ({ADAPTER_CONFIG_NAME}), so it is not "
            "clear whether these are merged into it: move one of them to a folder of its own."
        )
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            f"{path!r} holds adapters without their base, which need the package peft: "
            "pip install 'ppo-engine[lora]', or merge them into their base where it is installed "
            "(`merge_and_unload`, `save_pretrained`) and give the folder of the merged model."
        )
    import peft

    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
        kind = peft.PeftConfig.from_pretrained(path)
        base, task = settings["base_model_name_or_path"], settings.get("task_type")
    except Exception as error:  # what is in the file may fail anywhere within the library
        raise UserError(
            f"{path!r} holds adapters, but its {ADAPTER_CONFIG_NAME} could not be read: "
            f"{reason(error)}"
        ) from error
    if kind.is_prompt_learning or kind.is_adaption_prompt:
        raise UserError(
            f"The adapters in {path!r} are of the type {settings['peft_type']}, which cannot be "
            "merged into the weights of a model: give the model itself, or adapters such as LoRA."
        )
    if getattr(kind, "layer_replication", None):
        raise UserError(
            f"The adapters in {path!r} repeat layers of their base (layer_replication), whose "
            "weights cannot be merged apart: give adapters of a model without that."
        )
    if task not in _TASKS:
        raise UserError(
            f"The adapters in {path!r} are for the task {task}: give those of a language model "
            "(CAUSAL_LM) or of a reward model (SEQ_CLS)."
        )
    if not base:
        raise UserError(
            f"The adapters in {path!r} do not say which model they adapt: set "
            f"base_model_name_or_path in its {ADAPTER_CONFIG_NAME} to its folder or name."
        )
    base = _locate(base, path)
    if settings.get("revision") not in (None, "main") and not Path(base).is_dir():
        raise UserError(
            f"The adapters in {path!r} are for the revision {settings['revision']} of {base!r}: "
            f"download that, and set base_model_name_or_path in {ADAPTER_CONFIG_NAME} to its "
            "folder."
        )
    return AdapterFolder(path, base, task)


def _locate(base: str, path: str) -> str:
    """The base's folder: from here, or from the adapters' folder; else its name, as given."""
    expanded = Path(base).expanduser()
    places = (expanded, Path(path, expanded))
    return next((str(place) for place in places if place.is_dir()), base)


def _file(path: str, name: str) -> str | None:
    """The file `name` at `path`, a folder or name, if there is one."""
    if Path(path).is_dir():
        file = Path(path, name)
        return str(file) if file.is_file() else None
    return _downloaded(path, name)


@functools.cache
def _downloaded(repository: str, name: str) -> str | None:
    try:
        return cached_file(repository, name, local_files_only=bool(silence(repository)))
    except (OSError, ValueError):  # no such file, no such repository, no connection
        return None


def _inner(name: str) -> str:
    """The name in the base of a weight in peft's files."""
    return _WRAPPER.sub(".", name.removeprefix(_PREFIX))


def _replace_whole(model: Any, weights: dict[str, Tensor], settings: Any) -> set[str]:
    """Move the weights that are saved whole from `weights` into the model, with room for tokens
    that were added; their names in the model."""
    own = dict(model.named_parameters(remove_duplicate=False))
    inner = {name: _inner(name) for name in weights}
    whole = {inner[name]: weights.pop(name) for name in sorted(weights) if inner[name] in own}
    names = {module: name for name, module in model.named_modules()}
    ins, outs = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [whole.get(f"{names[layer]}.weight") for layer in (ins, outs) if layer is not None]
    given = [x for x in ends if x is not None]
    if given and len(given[0]) != ins.num_embeddings:
        model.resize_token_embeddings(len(given[0]))
    apart = len(given) < len(ends) or not all(torch.equal(x, given[0]) for x in given)
    if given and apart and not getattr(settings, "ensure_weight_tying", False):
        untie(model)
    with torch.no_grad():
        for name, x in whole.items():
            model.get_parameter(name).copy_(x)
    return set(whole)
