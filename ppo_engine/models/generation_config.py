"""The generation config of a language model: which tokens end its texts, and what is saved."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

# Whether another setting has an effect depends on these.
_SWITCHES = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate")


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that is declared to end a text: by the tokenizer, and by the checkpoint's
    generation config, or its model config where that names none.

    One that is the pad token too (Qwen's) ends a text as any other: padding is known by its place.
    """
    named = model.generation_config.eos_token_id
    if named is None:
        named = getattr(model.config.get_text_config(), "eos_token_id", None)
    declared = named if isinstance(named, list) else [] if named is None else [named]
    return sorted({tokenizer.eos_token_id, *declared})


def settle(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> None:
    """Write into the model's configs what is used with it, so that what is saved says the same.

    These are the tokens that end, begin and pad a text. How the checkpoint wants to be sampled from
    stays as it came, save for what has no effect (`_without_idle`).
    """
    written: dict[str, Any] = {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    if tokenizer.bos_token_id is not None:
        written["bos_token_id"] = tokenizer.bos_token_id
    for config in (model.config.get_text_config(), model.config):
        for name, value in written.items():
            with contextlib.suppress(StrictDataclassError):  # families with room for one end only
                setattr(config, name, value)
    model.generation_config.update(**written, pad_token_id=tokenizer.pad_token_id)
    model.generation_config = _without_idle(model.generation_config)


def _without_idle(config: GenerationConfig) -> GenerationConfig:
    """A copy without the settings that have no effect beside the others, such as the temperature of
    greedy search: transformers loads them with a warning, but refuses to save them."""
    found = copy.deepcopy(config)
    unset = type(config)()
    given = {name: x for name, x in vars(config).items() if x != getattr(unset, name, None)}
    for name in given:
        setattr(found, name, getattr(unset, name, None))
    for name in sorted(given, key=lambda name: name not in _SWITCHES):
        setattr(found, name, given[name])
        try:
            found.validate(strict=True)
        except ValueError:
            setattr(found, name, getattr(unset, name, None))
    return found
