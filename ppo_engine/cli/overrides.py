"""Settings from the command line: the file, then the flags, then `key=value`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Flag:
    """A command-line option that sets the key of the same meaning."""

    name: str
    key: str
    help: str
    metavar: str = "PATH"


def reward_overrides(options: argparse.Namespace) -> list[str]:
    """--reward, instead of the rewards that a settings file names."""
    from ppo_engine.rewards.sources import parse_source, source_settings

    if options.reward is None:
        return []
    settings = source_settings([parse_source(text) for text in options.reward])
    settings["arguments"] = {}  # they are those of a reward that is not meant
    return [f"reward.{key}={json.dumps(value)}" for key, value in settings.items()]


def overrides_of(options: argparse.Namespace, rest: list[str], **keys: str) -> list[str]:
    """Flags as overrides, ahead of the `key=value` ones; `keys` names those of shared flags."""
    found = []
    for flag in options.flags:
        value = getattr(options, flag.name.removeprefix("--").replace("-", "_"))
        if value is not None:
            found.append(f"{flag.key}={json.dumps(value)}")  # JSON is YAML: taken literally
    if options.output_dir is not None:
        found.append(f"{keys.get('output_dir', 'run.output_dir')}={json.dumps(options.output_dir)}")
    if options.seed is not None:
        found.append(f"{keys.get('seed', 'run.seed')}={options.seed}")
    return found + rest


def load(
    cls: Any,
    options: argparse.Namespace,
    overrides: Sequence[str],
    check: Callable[[Any], None] | None = None,
) -> Any:
    """The command's settings, after `check` and with what it needs given and there; None where they
    were only shown, by --help-settings or by a dry run, which has checked its inputs too and says
    what a run would say of them.

    A run that is resumed without a settings file goes on with those in its folder.
    """
    from ppo_engine.cli.given import check_given
    from ppo_engine.cli.inputs import check_inputs
    from ppo_engine.run.directory import settings_file
    from ppo_engine.settings.files import load_config

    if options.help_settings is not None:
        from ppo_engine.settings.describe import help_settings

        print(help_settings(cls, options.help_settings))
        return None
    config = load_config(cls, options.config, overrides)
    run = getattr(config, "run", None)
    if run is not None and run.resume and run.output_dir and options.config is None:
        config = load_config(cls, str(settings_file(run.output_dir)), overrides)
    if check is not None:
        check(config)
    if options.dry_run:
        from ppo_engine.settings.describe import commented

        with redirect_stdout(sys.stderr):  # a reward's file may print as it is imported
            for note in check_inputs(config):
                print(note)
        print(commented(config), end="")
        return None
    check_given(config)
    return config
