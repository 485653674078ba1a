"""The command line: `ppo-engine demo | sft | reward | ppo | grpo | generate | inspect | doctor`.

Settings come from --config, then from the flags, then from `key=value`. torch and transformers are
imported by the commands that need them, so that help and errors in settings are instant.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from ppo_engine.errors import UserError
from ppo_engine.memory import keep_freed_memory

DEBUG_VARIABLE = "PPO_ENGINE_DEBUG"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 (doctor: broken), 2 (user error), 130."""
    parser = _parser()
    # `key=value` may stand between options, where argparse's own positionals cannot.
    options, rest = parser.parse_known_args(arguments)
    wrong = [text for text in rest if text.startswith("-") or "=" not in text]
    if wrong:
        options.parser.error(
            f"unknown argument {wrong[0]!r}; settings are written key=value, such as run.seed=1"
        )
    keep_freed_memory()
    try:
        return int(options.run(options, rest) or 0)
    except UserError as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        print("\n".join([f"error: {error}", *_notes(error)]), file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print("\n".join(["interrupted", *_notes(error)]), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _notes(error: BaseException) -> list[str]:
    """What was kept of the work, and how to go on, as it was added to the exception."""
    return list(getattr(error, "__notes__", ()))


@dataclass(frozen=True)
class Flag:
    """A command-line option that sets the key of the same meaning."""

    name: str
    key: str
    help: str
    metavar: str = "PATH"


_MODEL_HELP = "Hugging Face name or folder"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ppo-engine",
        description="RLHF: fine-tune a language model on examples, train a reward model on ranked "
        "answers, then tune the language model with PPO.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ppo-engine {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = _add(
        commands,
        "demo",
        _demo,
        "run every stage of RLHF on an embedded model",
        [Flag("--model", "model", f"{_MODEL_HELP} in place of the embedded one")],
    )
    demo.add_argument("--smoke", action="store_true", help="tiny models, within a minute")
    demo.add_argument("--algorithm", choices=("ppo", "grpo"), help="of the last stage; default ppo")
    _add(
        commands,
        "sft",
        _sft,
        "fine-tune a language model on examples of good answers",
        [
            Flag("--model", "model.path", f"{_MODEL_HELP}; default: the demo's embedded model"),
            Flag("--data", "data.path", "examples: JSONL, parquet, a saved data set"),
        ],
    )
    _add(
        commands,
        "reward",
        _reward,
        "train a reward model on preference pairs or rankings",
        [
            Flag("--model", "model.path", f"{_MODEL_HELP}; default: the demo's embedded model"),
            Flag("--data", "data.path", "pairs or rankings: JSONL, parquet, a saved data set"),
        ],
    )
    for name, summary in (
        ("ppo", "fine-tune a language model against a reward with PPO"),
        ("grpo", "the same with GRPO: groups of responses, no critic"),
    ):
        trains = _add(
            commands,
            name,
            _ppo,
            summary,
            [
                Flag("--model", "policy.path", f"{_MODEL_HELP} of the policy"),
                Flag("--data", "data.path", "prompts: JSONL, parquet, a saved data set"),
            ],
        )
        _add_reward(trains, "what scores a response")
        trains.add_argument(
            "--profile", action="store_true", help="profile a step: a table of phases, and a trace"
        )
        trains.set_defaults(algorithm=name)
    generate = _add(
        commands,
        "generate",
        _generate,
        "write a model's responses to prompts as JSON lines",
        [
            Flag("--model", "model", _MODEL_HELP),
            Flag("--data", "data.path", "prompts: JSONL, parquet, a saved data set"),
            Flag("--prompt", "prompt", "one prompt, instead of --data", "TEXT"),
            Flag("--out", "output", "file to write; default: standard output", "FILE"),
        ],
    )
    generate.add_argument(
        "--resume",
        action="store_true",
        help="go on from the rows that a failure left: FILE.partial",
    )
    generate.add_argument("--n", metavar="K", help="responses to each prompt")
    _add_reward(generate, "score the responses, and show best-of-n scores")

    inspects = _add(
        commands,
        "inspect",
        _inspect,
        "show rows of data token by token, exactly as a command will give them to a model",
        [
            Flag("--model", "model.path", f"{_MODEL_HELP}; default: the demo's embedded model"),
            Flag("--data", "data.path", "any data: JSONL, parquet, a saved data set"),
        ],
        writes=False,
    )
    inspects.add_argument(
        "--as",
        dest="kind",
        choices=("sft", "preferences", "prompts"),
        help="what the rows are: for sft, reward, or ppo and grpo; default: guessed",
    )
    inspects.add_argument("--rows", metavar="N", type=int, default=3, help="rows shown; default 3")

    doctor = commands.add_parser(
        "doctor", help="check what is installed, what runs, what is missing and what that costs"
    )
    doctor.set_defaults(run=_doctor, parser=doctor)
    return parser


def _add(
    commands: Any,
    name: str,
    run: Callable[..., Any],
    summary: str,
    flags: Sequence[Flag],
    *,
    writes: bool = True,
) -> argparse.ArgumentParser:
    """A command with settings, and the options that all of these share."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="Any setting can be given as key=value; see them all: "
        f"ppo-engine {name if writes else 'sft'} --dry-run",
        usage=f"ppo-engine {name} [options] [key=value ...]",
        allow_abbrev=False,
    )
    for flag in flags:
        parser.add_argument(flag.name, metavar=flag.metavar, help=flag.help)
    parser.add_argument("--config", metavar="FILE.yaml", help="settings")
    parser.set_defaults(output_dir=None)
    if writes:
        parser.add_argument(
            "--output-dir", metavar="DIR", help="folder for the results; must be new"
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="print the resolved settings and stop"
        )
    parser.add_argument("--seed", metavar="N", help="random seed")
    parser.set_defaults(run=run, parser=parser, flags=flags)
    return parser


def _add_reward(parser: argparse.ArgumentParser, purpose: str) -> None:
    parser.add_argument(
        "--reward",
        metavar="REWARD",
        action="append",
        help=f"{purpose}: a reward model's name or folder, file.py:function, or a URL; repeat "
        "it for several, with weights reward.weights=[1,0.5]",
    )


def _reward_overrides(options: argparse.Namespace) -> list[str]:
    """--reward, instead of the rewards that a settings file names."""
    from ppo_engine.rewards.sources import parse_source, source_settings

    if options.reward is None:
        return []
    settings = source_settings([parse_source(text) for text in options.reward])
    return [f"reward.{key}={json.dumps(value)}" for key, value in settings.items()]


def _overrides(options: argparse.Namespace, rest: list[str], **keys: str) -> list[str]:
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


def _load(
    cls: Any,
    options: argparse.Namespace,
    overrides: Sequence[str],
    defaults: Mapping[str, Any] | None = None,
    check: Callable[[Any], None] | None = None,
) -> Any:
    """The command's settings, after `check`; None when a dry run has printed them."""
    from ppo_engine.settings.files import dump_config, load_config

    config = load_config(cls, options.config, overrides, defaults)
    if check is not None:
        check(config)
    if options.dry_run:
        print(dump_config(config), end="")
        return None
    return config


def _demo(options: argparse.Namespace, rest: list[str]) -> None:
    from ppo_engine.settings.schema import DemoConfig

    overrides = _overrides(options, rest, output_dir="output_dir", seed="seed")
    if options.smoke:
        overrides.insert(0, "smoke=true")
    if options.algorithm is not None:
        overrides.insert(0, f"algorithm={options.algorithm}")
    config = _load(DemoConfig, options, overrides)
    if config is not None:
        _quiet_libraries()
        from ppo_engine.demo import run_demo

        run_demo(config)


def _sft(options: argparse.Namespace, rest: list[str]) -> None:
    from ppo_engine.settings.schema import SFTConfig

    config = _load_supervised(SFTConfig, options, rest, "examples")
    if config is not None:
        from ppo_engine.training.sft import SFTTrainer

        SFTTrainer(config=config).train()


def _reward(options: argparse.Namespace, rest: list[str]) -> None:
    from ppo_engine.settings.schema import RewardModelConfig

    config = _load_supervised(RewardModelConfig, options, rest, "preferences")
    if config is not None:
        from ppo_engine.training.reward import RewardModelTrainer

        RewardModelTrainer(config=config).train()


def _load_supervised(cls: Any, options: argparse.Namespace, rest: list[str], data: str) -> Any:
    """Settings of a command that learns from `data`, by default with the demo's model."""
    config = _load(cls, options, _overrides(options, rest))
    if config is None:
        return None
    if not config.data.path:
        raise UserError(f"No {data} were given: --data FILE.jsonl, or data.path=FILE.")
    _quiet_libraries()
    if not config.model.path:
        config = replace(config, model=replace(config.model, path=_demo_model()))
    return config


def _demo_model() -> str:
    from ppo_engine.demo.model import model_path

    return model_path()


def _ppo(options: argparse.Namespace, rest: list[str]) -> None:
    from ppo_engine.rewards.sources import configured_sources
    from ppo_engine.settings.checks import check_settings
    from ppo_engine.settings.schema import GRPO_DEFAULTS, PPOConfig

    overrides = _reward_overrides(options) + _overrides(options, rest)
    if options.profile:
        overrides.insert(0, "profile=true")
    defaults = GRPO_DEFAULTS if options.algorithm == "grpo" else None
    config = _load(PPOConfig, options, overrides, defaults, check_settings)
    if config is None:
        return
    for value, what in (
        (config.policy.path, "policy was given: --model NAME_OR_FOLDER, or policy.path=…"),
        (config.data.path, "prompts were given: --data FILE.jsonl, or data.path=FILE"),
        (
            configured_sources(config.reward),
            "reward was given: --reward FOLDER, --reward file.py:function or --reward URL",
        ),
    ):
        if not value:
            raise UserError(f"No {what}.")
    _quiet_libraries()
    from ppo_engine.training.ppo import PPOTrainer

    PPOTrainer(config=config).train()


def _generate(options: argparse.Namespace, rest: list[str]) -> None:
    from ppo_engine.settings.schema import GenerateConfig

    if options.output_dir is not None:
        options.out = options.out or str(Path(options.output_dir) / "responses.jsonl")
        options.output_dir = None
    overrides = _reward_overrides(options) + _overrides(options, rest, seed="seed")
    if options.resume:
        overrides.insert(0, "resume=true")
    if options.n is not None:
        overrides.insert(0, f"responses={options.n}")
    config = _load(GenerateConfig, options, overrides)
    if config is None:
        return
    if not config.model:
        raise UserError("No model was given: --model NAME_OR_FOLDER.")
    _quiet_libraries()
    from ppo_engine.generate import generate

    generate(config)


def _inspect(options: argparse.Namespace, rest: list[str]) -> None:
    """With the settings of each command whose rows these may be: where the kind is not given, it is
    guessed among those that have all the settings that are."""
    from ppo_engine.settings.files import load_config
    from ppo_engine.settings.schema import PPOConfig, RewardModelConfig, SFTConfig

    if options.rows < 0:
        raise UserError(f"--rows must be 0 or more, not {options.rows}.")
    classes: dict[str, Any] = {
        "preferences": RewardModelConfig,
        "sft": SFTConfig,
        "prompts": PPOConfig,
    }
    configs: dict[str, Any] = {}
    problems = []
    for kind in [options.kind] if options.kind else classes:
        model = "policy.path" if kind == "prompts" else "model.path"
        options.flags = [Flag("--model", model, ""), Flag("--data", "data.path", "")]
        try:
            configs[kind] = load_config(classes[kind], options.config, _overrides(options, rest))
        except UserError as problem:
            problems.append(problem)
    if not configs:
        raise problems[0]
    config = next(iter(configs.values()))
    if not config.data.path:
        raise UserError("No data were given: --data FILE.jsonl, or data.path=FILE.")
    _quiet_libraries()
    from ppo_engine.inspection.page import inspect

    if isinstance(sys.stdout, TextIOWrapper):  # data holds any character, an encoding perhaps not
        sys.stdout.reconfigure(errors="backslashreplace")
    trained = config.policy if isinstance(config, PPOConfig) else config.model
    inspect(configs, trained.path or _demo_model(), options.rows, options.kind)


def _doctor(options: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        raise UserError("doctor takes no settings.")
    from ppo_engine.doctor import examine

    return examine()


def _quiet_libraries() -> None:
    """Their progress bars and advice would break the live display; errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    from ppo_engine.pretrained.loading import hide_loading_bars

    hide_loading_bars()
    logging.set_verbosity_error()
    # Meant for developers of other libraries.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")


def _version() -> str:
    try:
        return importlib.metadata.version("ppo-engine")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed: running from a checkout)"
