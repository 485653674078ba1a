"""The generation config of a language model: which tokens end its texts, and what is saved."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ppo_engine.errors import UserError
from ppo_engine.pretrained.adapter_folder import unstack
from ppo_engine.settings.schema import GenerationConfig as Sampling

# Whether another setting has an effect depends on these.
_SWITCHES = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate")


def read_generation_config(path: str) -> GenerationConfig:
    """The generation config of the folder `path` (of adapters, of their base's), without loading
    the model; one that says nothing where there is none."""
    try:
        return GenerationConfig.from_pretrained(unstack(path)[0])
    except (OSError, ValueError, TypeError, AttributeError):  # the last two of what is no object
        return GenerationConfig()


def declared_ends(generation: GenerationConfig, config: Any) -> list[int]:
    """Every token that a checkpoint declares to end a text: in its generation config, or in its
    model config where that names none.

    One that is the pad token too (Qwen's) ends a text as any other: padding is known by its place.
    """
    named = generation.eos_token_id
    if named is None:
        named = getattr(config.get_text_config(), "eos_token_id", None)
    ends = named if isinstance(named, list) else [] if named is None else [named]
    for end in ends:
        if not isinstance(end, int) or isinstance(end, bool):
            raise UserError(
                f"The model's eos_token_id must be a token's id, or a list of such, but is "
                f"{named!r}: mend it in its generation_config.json, or config.json."
            )
    return [end for end in ends if end >= 0]  # -1 stands for none


def declared_stops(generation: GenerationConfig) -> list[str]:
    """Every string that a checkpoint declares to end a text."""
    given = generation.stop_strings
    strings = [given] if isinstance(given, str) else given or []
    if not isinstance(strings, list) or not all(isinstance(x, str) for x in strings):
        raise UserError(
            f"The model's stop_strings must be text, or a list of such, but are {given!r}: mend "
            "them in its generation_config.json."
        )
    return strings


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


def as_sampled(model: PreTrainedModel, settings: Sampling) -> GenerationConfig:
    """The generation config with which plain transformers samples as the engine did: from the
    model's distribution as it is, with none of the checkpoint's habits (repetition penalty, …).

    Without stop strings: `generate` would refuse to run unless it were given the tokenizer too."""
    shipped = model.generation_config
    stops = [stop for stop in settings.stop if isinstance(stop, int)]
    ends = sorted({*declared_ends(shipped, model.config), *stops})
    return GenerationConfig(
        eos_token_id=ends if stops else shipped.eos_token_id,
        bos_token_id=shipped.bos_token_id,
        pad_token_id=shipped.pad_token_id,
        do_sample=True,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens or None,
    )


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
