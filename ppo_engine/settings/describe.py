"""Settings as people read them: config.yaml, `--dry-run` with its comments, `--help-settings` and
docs/settings.md, all from the descriptions below the fields of `schema`."""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ppo_engine.errors import UserError
from ppo_engine.settings.files import as_dict, as_yaml
from ppo_engine.settings.problems import (
    keys,
    nearest,
    section_in_list,
    section_kinds,
    section_of,
)
from ppo_engine.settings.schema import COMMANDS, LEARNING_RATES, derived
from ppo_engine.settings.schema.base import described

_WIDTH = 80
_FOLLOWS = "# not set: null lets it follow from other settings"
_PLAIN: dict[Any, str] = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    datetime.date: "date",
    type(None): "null",
}
_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


@dataclass(frozen=True)
class Setting:
    """A field of a settings class: its key, type, default and description; of a section, whose
    settings follow, the default is empty."""

    key: str
    type: str
    default: str
    text: str


def dump_config(config: Any) -> str:
    """YAML text that `load_config` reads back to the `resolved` settings: whatever later versions
    take for a default, a run's config.yaml says what it was. A comment stands behind those that
    nobody set and that follow from others. There are no descriptions: these are those of the
    version that shows them."""
    return _text(config, seen=None)


def commented(config: Any) -> str:
    """The same, with the description of each setting above it; those of a class that comes twice
    (the critic is a model as the policy is) stand where it comes first."""
    return _text(config, seen=set())


def help_settings(cls: Any, section: str = "") -> str:
    """Every setting of `cls`, or those of the `section` (or the one setting) of that key, for a
    terminal of 80 columns."""
    found = list(_settings(cls, cls(), derived(cls())))
    if section:
        chosen = [s for s in found if s.key == section or s.key.startswith(f"{section}.")]
        if not chosen:
            raise UserError(f"{section}: unknown key{nearest(section, keys(cls))}")
        found = chosen
    return "\n".join(_for_terminal(setting) for setting in found)


def markdown() -> str:
    """docs/settings.md."""
    parts = [_HEAD.format(rates=_rates())]
    uses: dict[Any, dict[str, list[str]]] = {}  # of a class: the commands by the key
    for command, cls in COMMANDS.items():
        uses[cls] = {"": [command]}
        for key, kind in keys(cls).items():
            section = section_of(kind) or section_in_list(kind)
            if section is not None:
                uses.setdefault(section, {}).setdefault(f"`{key}` of ", []).append(command)
    for cls, commands in uses.items():
        places = "; ".join(f"{key}{', '.join(names)}" for key, names in commands.items())
        doc = inspect.cleandoc(cls.__doc__).split("\n\n")[:-1]  # the last one lists the fields
        base = cls.__bases__[0]
        more = [f"All of {_link(base)}, and:"] if dataclasses.is_dataclass(base) else []
        parts += [f"## {cls.__name__}", f"Settings of {places}.", *doc, *more, _table(cls)]
    return "\n\n".join(parts) + "\n"


def _text(config: Any, seen: set[Any] | None) -> str:
    lines = _lines(type(config), as_dict(config), derived(config), seen)
    return "".join(f"{line}\n" for line in lines)


def _lines(
    cls: Any,
    tree: Mapping[str, Any],
    follows: Mapping[str, Any],
    seen: set[Any] | None,
    prefix: str = "",
) -> Iterator[str]:
    """The settings of `cls` and its sections as YAML. `follows` has the values of those that are
    not set; `seen` are classes whose descriptions stand above, None leaves out all descriptions."""
    indent = "  " * prefix.count(".")
    texts = {} if seen is None or cls in seen else described(cls)
    if seen is not None:
        seen.add(cls)
    for name, kind in section_kinds(cls).items():
        comment = f"{indent}# "
        yield from textwrap.wrap(
            texts.get(name, ""), 100, initial_indent=comment, subsequent_indent=comment
        )
        key, section, value = prefix + name, section_of(kind), tree[name]
        if section is not None and isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _lines(section, value, follows, seen, f"{key}.")
        elif key in follows:
            value = follows[key] if section is None else as_dict(follows[key])
            first, *rest = as_yaml({name: value}).strip().split("\n")
            yield f"{indent}{first}  {_FOLLOWS}"
            yield from (f"{indent}{line}" for line in rest)
        else:
            # Text that YAML folds over several lines is quoted: more indentation changes nothing.
            # Split at newlines alone: text may hold others, such as U+2028, which belong to it.
            lines = as_yaml({name: value}).removesuffix("\n").split("\n")
            yield from (f"{indent}{line}" for line in lines)


def _settings(
    cls: Any, made: Any, follows: Mapping[str, Any], prefix: str = ""
) -> Iterator[Setting]:
    """The settings of `cls` and its sections, in their order; `made` holds the defaults, and
    `follows` what those come to that are null."""
    texts = described(cls)
    for name, kind in section_kinds(cls).items():
        section, in_list, value = section_of(kind), section_in_list(kind), getattr(made, name)
        key, default = prefix + name, _default(value)
        if key in follows:
            default += f", here {_default(follows[key])}"
        yield Setting(key, type_text(kind), default, texts.get(name, ""))
        if section is not None:
            inside = section() if value is None else value
            yield from _settings(section, inside, follows, f"{key}.")
        if in_list is not None:
            yield from _settings(in_list, in_list(), follows, f"{key}[].")


def _default(value: Any) -> str:
    """A default as one writes it behind `key=`."""
    return "" if dataclasses.is_dataclass(value) else json.dumps(value)


def _for_terminal(setting: Setting) -> str:
    default = f" = {setting.default}" if setting.default else ""
    title = f"{setting.key}{default}   ({setting.type})"
    return f"{_wrapped(title, '', ' ' * 8)}\n{_wrapped(setting.text, ' ' * 4, ' ' * 4)}"


def _wrapped(text: str, first: str, others: str) -> str:
    return textwrap.fill(
        text, _WIDTH, initial_indent=first, subsequent_indent=others, break_on_hyphens=False
    )


def type_text(kind: Any) -> str:
    """A field's type in words, with its bounds."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is None:
        return "section" if dataclasses.is_dataclass(kind) else _PLAIN[kind]
    if origin is typing.Annotated:
        return " ".join([type_text(arguments[0]), *_bounds(arguments[1:])])
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(type_text, arguments))
    if origin is dict:
        return "keys and values"
    of = [type_text(argument) for argument in arguments if argument is not Ellipsis]
    if origin is list or Ellipsis in arguments:
        return f"list of {of[0]}"
    return f"[{', '.join(of)}]"


def _bounds(metadata: tuple[Any, ...]) -> list[str]:
    """Of an Annotated number; pydantic's Field keeps them in a list of its own."""
    found = []
    for constraint in [c for field in metadata for c in getattr(field, "metadata", [])]:
        for name, sign in _BOUNDS.items():
            bound = getattr(constraint, name, None)
            if bound is not None:
                found.append(f"{sign} {bound}")
    return [" and ".join(found)] if found else []


def _table(cls: Any) -> str:
    """The settings of one class; of one that is made of another, those that differ."""
    made, texts = cls(), described(cls)
    lines = ["| name | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, kind in section_kinds(cls).items():
        if name not in cls.__annotations__:
            continue
        value = getattr(made, name)
        default = f"`{_default(value)}`"
        if dataclasses.is_dataclass(value):
            default = _link(type(value))
        cells = [f"`{name}`", type_text(kind), default, texts.get(name, "")]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _link(cls: Any) -> str:
    return f"[{cls.__name__}](#{cls.__name__.lower()})"


def _rates() -> str:
    lines = ["| trained | all weights | LoRA | all weights as in |", "| --- | --- | --- | --- |"]
    for use, (full, lora, source) in LEARNING_RATES.items():
        cells = [use, *(f"`{rate:.0e}`".replace("e-0", "e-") for rate in (full, lora)), source]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


_HEAD = """# Settings

Written by `python docs/settings.py` from `ppo_engine/settings/schema/`. In a terminal:
`ppo-engine ppo --help-settings`, or `--help-settings ppo` for one section; `--dry-run` prints what
a command would run with. In Python: `help(PPOConfig)`.

One setting has one name everywhere: `ppo.kl_coef=0.02` on the command line,
`ppo: {{kl_coef: 0.02}}` in a file for `--config`, `PPOConfig(ppo=PPOSettings(kl_coef=0.02))` or
`PPOConfig(ppo={{"kl_coef": 0.02}})` in Python. `null` is `None`. A section that is `null` by
default is switched on by setting one of its keys: `policy.lora.rank=8`.

## Learning rates

Where `optimizer.learning_rate` is not set, it follows from what is trained:

{rates}

LoRA wants ten times the rate of all weights and more (Schulman et al. 2025, "LoRA Without Regret");
`1e-4` to `2e-4` are those of QLoRA (Dettmers et al. 2023). All warm up over 3 % of the run's
optimizer steps, as in OpenRLHF, and then fall linearly to 0. A good rate depends on model, reward
and batch: these are where others start from, not what was tuned here.

What `--dry-run` prints and a run's `config.yaml` have every setting as it came out. Behind one that
nobody set and that follows from others (`learning_rate`, `ppo.whiten_advantages`,
`ppo.kl_estimator`, `ppo.reduction`) a comment says so: whoever changes such a file to LoRA, or to
another `ppo.estimator`, writes `null` in its place or takes the line out. In Python they are None
as long as nobody sets them, and go on following through `dataclasses.replace`; `PPOEngine.config`
has the values themselves."""
