"""Whether a run fits, in words: what its phases take, and what to set where that is too much."""

from __future__ import annotations

import contextlib
import importlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ppo_engine.data.demonstrations import EncodedExample
from ppo_engine.data.encoded_rankings import EncodedRanking
from ppo_engine.data.prompts import PromptExample
from ppo_engine.memory import free_memory, used_memory, why_no_heap
from ppo_engine.messages import first_line
from ppo_engine.models import precision
from ppo_engine.models.reader import Reader
from ppo_engine.pretrained import loading
from ppo_engine.rewards.sources import configured_sources
from ppo_engine.settings.schema import LoraConfig, PPOConfig, RewardModelConfig, with_value
from ppo_engine.text.renderer import Renderer
from ppo_engine.text.template import TemplateError
from ppo_engine.training.forecast import Forecast, Lengths, forecast
from ppo_engine.training.forecast_roles import Place

SAMPLED = 256  # texts that tell the lengths of all
_GIB = 2**30
_COLUMNS = 100
_WORTH_NAMING = 0.01  # share of a phase
_WORTH_TRYING = 0.02  # share of the peak that a setting is to save
_PASS, _SLOTS = 512, 1.0  # tokens, GiB


class Change(NamedTuple):
    """A setting that takes less, and the peak with it, in bytes."""

    settings: str
    peak: float


def place_of(config: Any) -> Place:
    """Where a run with this `config` is to be, as it is now."""
    if any(getattr(x, "lora", None) for x in vars(config).values()):
        with contextlib.suppress(ImportError):  # told elsewhere
            importlib.import_module("peft")  # its 70 MB are there in any case
    device = precision.choose_device(config.run.device)
    dtype = precision.choose_dtype(config.run.dtype, device)
    heap = device.type == "cpu" and not why_no_heap()
    return Place(device, dtype, free_memory(device), used_memory(device), heap)


def sample(rows: Sequence[Any]) -> list[Any]:
    """At most `SAMPLED` of them, from all over the data."""
    return [*rows[:: -(-len(rows) // SAMPLED) or 1]]


def prompt_lengths(examples: Sequence[PromptExample], renderer: Renderer) -> Lengths | None:
    """Of some prompts; None where none is read."""
    found = []
    for example in sample(examples):
        try:
            found.append(len(renderer.prompt(example.prompt, example.options)))
        except TemplateError:  # which reading the data tells
            continue
    return Lengths(sum(found) / len(found), max(found)) if found else None


def text_lengths(encoded: Sequence[EncodedExample | EncodedRanking]) -> Lengths | None:
    """Of examples or rankings; None where there are none."""
    if not encoded:
        return None
    if isinstance(encoded[0], EncodedRanking):
        each = max(len(x.rows) for x in encoded if isinstance(x, EncodedRanking))
        rows = [row for x in encoded if isinstance(x, EncodedRanking) for row in x.rows]
        return Lengths(sum(map(len, rows)) / len(rows), max(map(len, rows)), each=each)
    texts = [x for x in encoded if isinstance(x, EncodedExample)]
    tokens = sum(map(len, texts))
    trained = sum(sum(x.trained) for x in texts)
    return Lengths(tokens / len(texts), max(map(len, texts)), trained=trained / tokens)


def settled(config: Any, lengths: Lengths | None, place: Place) -> Any:
    """`config` with true or false in place of `gradient_checkpointing=auto`: true where the run
    does not fit without it, and takes less with it. What cannot be told, as of a model that was
    given as an object, is false."""
    unset = [n for n in _trained(config) if getattr(config, n).gradient_checkpointing == "auto"]
    off, on = config, config
    for name in unset:
        off = with_value(off, f"{name}.gradient_checkpointing", False)
        on = with_value(on, f"{name}.gradient_checkpointing", True)
    if not unset or lengths is None or not getattr(config, _trained(config)[0]).path:
        return off
    try:
        without = forecast(off, lengths, place).peak.total
        if without <= place.room:
            return off
        helps = forecast(on, lengths, place).peak.total < (1 - _WORTH_TRYING) * without
    except Exception:  # as in `report`
        return off
    return on if helps else off


def checkpoint(config: Any, found: Any, readers: Mapping[str, Reader]) -> list[str]:
    """Turn gradient checkpointing on, where `settled` has `found` it necessary, in these models of
    the run; says so."""
    names = _switched_on(config, found)
    for name in names:
        readers[name].checkpoint_gradients()
    return _of_checkpointing(names)


def _switched_on(config: Any, found: Any) -> list[str]:
    return [
        name
        for name in _trained(config)
        if getattr(config, name).gradient_checkpointing == "auto"
        and getattr(found, name).gradient_checkpointing is True
    ]


def _of_checkpointing(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    settings = " ".join(f"{name}.gradient_checkpointing=false" for name in names)
    return [
        "Gradient checkpointing is on, as the run would not fit without it: an update computes "
        f"activations twice. {settings} turns it off."
    ]


def report(config: Any, lengths: Lengths, place: Place) -> str:
    """Lines for `--dry-run`: each phase with what it is made of, the largest first; where it does
    not fit, what to set. A sentence where a model's family cannot be told of without weights."""
    given, config = config, settled(config, lengths, place)
    try:
        found = forecast(config, lengths, place)
    except Exception as error:  # whatever a family raises that is made on no device
        return f"What the run takes cannot be told without weights: {first_line(error)}"
    name = str(place.dtype).removeprefix("torch.")
    lines = [
        f"Memory, estimated: GiB on {place.device} in {name}, where {_gib(place.room)} can be had"
    ]
    for phase in found.phases:
        parts = sorted(phase.parts.items(), key=lambda part: -part[1])
        named = [(x, size) for x, size in parts if size >= _WORTH_NAMING * phase.total]
        told = ", ".join(f"{x} {_gib(size)}" for x, size in named)
        mark = "*" if phase is found.peak else " "
        first = f"{mark} {phase.name:<10} {_gib(phase.total):>6}  "
        lines += textwrap.wrap(told, _COLUMNS, initial_indent=first, subsequent_indent=" " * 21)
    lines += _of_checkpointing(_switched_on(given, config))
    return "\n".join([*lines, *_verdict(config, lengths, place, found)])


def note(config: Any, lengths: Lengths | None, place: Place) -> list[str]:
    """For a run that is about to begin: a sentence where it will not fit, else nothing. Nothing
    either where it cannot be told, as for a model that was given as an object."""
    if lengths is None or not getattr(config, _trained(config)[0]).path:
        return []
    try:
        found = forecast(config, lengths, place)
    except Exception:  # as in `report`; the run itself tells what is wrong with a model
        return []
    if found.peak.total <= place.room:
        return []
    return [" ".join(line.strip() for line in _verdict(config, lengths, place, found))]


def changes(config: Any, lengths: Lengths, place: Place) -> list[Change]:
    """Settings that take less, each by itself, what helps most first."""
    now = forecast(config, lengths, place).peak.total
    found = []
    for settings, changed in _candidates(config):
        peak = forecast(changed, lengths, place).peak.total
        if now - peak > _WORTH_TRYING * now:
            found.append(Change(settings, peak))
    return sorted(found, key=lambda change: change.peak)


def _verdict(config: Any, lengths: Lengths, place: Place, found: Forecast) -> list[str]:
    peak = found.peak
    if peak.total <= place.room:
        return [f"It fits: {_gib(peak.total)} GiB at most, in {peak.name}."]
    lines = [
        f"It does not fit: {peak.name} takes {_gib(peak.total)} GiB, and there are "
        f"{_gib(place.room)}. What helps, most first, each by itself:"
    ]
    helping = changes(config, lengths, place)
    lines += [f"  {change.settings} ({_gib(change.peak)} GiB)" for change in helping]
    return lines if helping else [lines[0].partition(" What")[0] + " Take a smaller model."]


def _candidates(config: Any) -> Iterator[tuple[str, Any]]:
    """Settings as they are written on a command line, and the configuration with them."""
    method, names = "ppo", _trained(config)
    if not isinstance(config, PPOConfig):
        method = "reward" if isinstance(config, RewardModelConfig) else "sft"
    first = getattr(config, names[0])

    def each(key: str, value: Any, shown: str) -> tuple[str, Any]:
        changed = config
        for name in names:
            changed = with_value(changed, f"{name}.{key}", value)
        return " ".join(f"{name}.{shown}" for name in names), changed

    if first.optimizer.moments == "float32":
        yield each("optimizer.moments", "8bit", "optimizer.moments=8bit")
    if first.lora is None:
        path, trust = loading.resolve(first.path), first.trust_remote_code
        whole = loading.load_model_config(path, trust=trust).get_text_config()
        few = max(1, whole.num_hidden_layers // 4)
        if first.trainable_layers is None or first.trainable_layers > few:
            yield each("trainable_layers", few, f"trainable_layers={few}")
        # Adapters want a frozen base.
        adapted = each("trainable_layers", None, "")[1]
        for name in names:
            adapted = with_value(adapted, f"{name}.lora", LoraConfig())
        yield " ".join(f"{name}.lora.rank=16" for name in names), adapted
    if first.gradient_checkpointing is not True:
        yield each("gradient_checkpointing", True, "gradient_checkpointing=true")
    tokens = getattr(config, method).micro_batch_tokens
    if tokens == "auto" or tokens > _PASS:
        settings = f"{method}.micro_batch_tokens"
        yield f"{settings}={_PASS}", with_value(config, settings, _PASS)
    if isinstance(config, PPOConfig):
        whole = any(source.path for source in configured_sources(config.reward))
        if len(names) > 1 and not whole and not config.share_base:
            lora = config.policy.lora or LoraConfig()
            shared = replace(config, policy=replace(config.policy, lora=lora), share_base=True)
            yield f"share_base=true policy.lora.rank={lora.rank}", shared
        if (config.generation.kv_cache_gib or _SLOTS + 1) > _SLOTS:
            settings = "generation.kv_cache_gib"
            yield f"{settings}={_SLOTS:g}", with_value(config, settings, _SLOTS)
        half = max(1, config.generation.max_new_tokens // 2)
        settings = "generation.max_new_tokens"
        yield f"{settings}={half}", with_value(config, settings, half)
    elif config.data.max_tokens > _PASS:
        yield f"data.max_tokens={_PASS}", with_value(config, "data.max_tokens", _PASS)


def _trained(config: Any) -> list[str]:
    """The sections of the models that are trained."""
    if isinstance(config, PPOConfig):
        return ["policy", *(["critic"] if config.ppo.has_critic else [])]
    return ["model"]


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f}" if size < 10 * _GIB else f"{size / _GIB:.1f}"
