"""Which rewards a command line, a settings file or a Python call names, before any is loaded.

Without torch: the command line finds mistakes here at once.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from ppo_engine.errors import UserError
from ppo_engine.messages import counted, did_you_mean
from ppo_engine.rewards.arguments import ready_reward
from ppo_engine.rewards.ready import READY
from ppo_engine.settings.files import shown_url
from ppo_engine.settings.schema import RewardSource, ScoringConfig

Scoring = TypeVar("Scoring", bound=ScoringConfig)

_KINDS = ("path", "function", "url")
_NAME = re.compile(r"[\w.-]+", re.ASCII)


def parse_source(text: str, name: str = "") -> RewardSource:
    """The reward that `text` names: a URL, "file.py:function", a ready function, or a model's
    folder or name."""
    if text.startswith(("http://", "https://")):
        return RewardSource(url=text, name=name)
    if ":" in text and not Path(text).exists():
        return RewardSource(function=text, name=name)
    if text.endswith(".py"):
        raise UserError(f"{text!r} names a file; name its function too, as {text}:FUNCTION.")
    if Path(text).exists():
        if text in READY:
            raise UserError(
                f"{text!r} is a ready reward function, and something of that name stands here: "
                f"write reward.function={text} for the function, or ./{text} for a reward model."
            )
        return RewardSource(path=text, name=name)
    if text in READY:
        return RewardSource(function=text, name=name)
    # A name with a slash is a folder's or a repository's: me/last_number.
    near = [] if "/" in text else difflib.get_close_matches(text, READY, n=1, cutoff=0.8)
    if near:
        raise UserError(f"{text!r} names no reward; did you mean {near[0]!r}?")
    return RewardSource(path=text, name=name)


def configured_sources(config: ScoringConfig) -> list[RewardSource]:
    """The rewards of `config`, none where it names none; a UserError where it is ambiguous."""
    given = [key for key in (*_KINDS, "sources") if getattr(config, key)]
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(f'reward.{key}' for key in given)} are set: set one of them, or list "
            "several rewards under reward.sources."
        )
    check_arguments(config, len(config.sources))
    if given:
        check_weights(config.weights, len(config.sources) or 1)
        check_names([source.name for source in config.sources])
    if given and given != ["sources"]:
        source = RewardSource(**{given[0]: getattr(config, given[0])}, arguments=config.arguments)
        check_function(source)
        return [source]
    for index, source in enumerate(config.sources):
        kinds = [key for key in _KINDS if getattr(source, key)]
        if len(kinds) != 1:
            raise UserError(
                f"reward.sources[{index}] must set one of path, function and url, but sets "
                f"{' and '.join(kinds) or 'none of them'}."
            )
    sources = [
        replace(source, arguments=source.arguments | config.arguments) for source in config.sources
    ]
    for source in sources:
        check_function(source)
    check_token(config, sources)
    return sources


def check_arguments(config: ScoringConfig, rewards: int) -> None:
    """Raise a UserError for `reward.arguments` where there are several `rewards`."""
    if config.arguments and rewards > 1:
        raise UserError(
            "reward.arguments are those of one reward function, and there are several rewards: "
            "give them under reward.sources, to the function that takes them."
        )


def check_token(config: ScoringConfig, sources: Sequence[RewardSource]) -> None:
    """Raise a UserError where `reward.http.token_env` would go to more than one host."""
    urls = [shown_url(source.url) for source in sources if source.url]
    hosts = sorted({url.partition("://")[2].partition("/")[0] for url in urls})
    if config.http.token_env and len(hosts) > 1:
        raise UserError(
            f"reward.http.token_env is one token, which {' and '.join(hosts)} would all be sent: "
            "leave it out, and put a user and password for each host into ~/.netrc; or ask all "
            "but one from a function of your own."
        )


def check_weights(weights: Sequence[float] | None, rewards: int, names: str = "") -> None:
    """Raise a UserError where `reward.weights` are not one for each of the `rewards`."""
    if weights is not None and len(weights) != rewards:
        raise UserError(
            f"reward.weights has {counted(len(weights), 'number')} for "
            f"{counted(rewards, 'reward')}{names}; give one for each, in their order."
        )


def check_function(source: RewardSource) -> None:
    """Raise a UserError for the name of a function that cannot be one, and for arguments that its
    kind of reward, or a ready function, does not take."""
    name = source.function
    if source.arguments and not name:
        raise UserError(
            "reward.arguments are those of a function, and "
            f"{'an endpoint' if source.url else 'a reward model'} takes none."
        )
    if name and ":" not in name:
        if name not in READY:
            raise UserError(
                f"{name!r} names no function.{did_you_mean(name, READY)} Write file.py:name or "
                f"module:name, or one of the ready functions: {', '.join(READY)}."
            )
        ready_reward(name, source.arguments)


def source_settings(sources: Sequence[RewardSource]) -> dict[str, Any]:
    """`path`, `function`, `url` and `sources` of a configuration that names these rewards."""
    if len(sources) == 1 and not sources[0].name:
        return {**{kind: getattr(sources[0], kind) for kind in _KINDS}, "sources": []}
    return {**dict.fromkeys(_KINDS), "sources": [asdict(source) for source in sources]}


def with_rewards(config: Scoring, given: Any) -> Scoring:
    """`config` naming the rewards that Python was given, so that a run's settings record them;
    naming none where one is an object, which settings cannot name."""
    rewards = named_rewards(given)
    if not all(isinstance(reward, str) for _, reward in rewards):
        rewards = []
    sources = [parse_source(text, name) for name, text in rewards]
    return replace(config, **source_settings(sources))


def named_rewards(given: Any) -> list[tuple[str, Any]]:
    """(name or "", reward) of one reward, a list of rewards, or a mapping of names to rewards."""
    if isinstance(given, Mapping):
        return list(given.items())
    return [("", reward) for reward in (given if isinstance(given, list | tuple) else [given])]


def unique_names(wanted: Sequence[str], defaults: Sequence[str]) -> list[str]:
    """The rewards' names in metrics: as wanted, or by default, numbered where they repeat."""
    check_names(wanted)
    names: list[str] = []
    for name, default in zip(wanted, defaults, strict=True):
        stem = re.sub("(_se)+$", "", "_".join(_NAME.findall(default))) or "reward"
        free = (f"{stem}_{n}" if n > 1 else stem for n in itertools.count(1))
        names.append(name or next(x for x in free if x not in {*wanted, *names}))
    return names


def check_names(wanted: Sequence[str]) -> None:
    """Raise a UserError for a name that occurs twice, or cannot be used in the name of a metric."""
    for name in filter(None, wanted):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(
                f"The reward name {name!r} cannot be used in the name of a metric: use letters, "
                "digits, '_', '.' and '-'."
            )
        if name.endswith("_se"):
            raise UserError(
                f"The reward name {name!r} ends in '_se', as the metrics of standard errors do: "
                "give it another name."
            )
        if wanted.count(name) > 1:
            raise UserError(f"Two rewards are named {name!r}: give each a name of its own.")
