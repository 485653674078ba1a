"""The commands and their options, as `--help` shows them."""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

from ppo_engine.cli import commands
from ppo_engine.cli.overrides import Flag
from ppo_engine.rewards.ready import READY

_MODEL_HELP = "Hugging Face name or folder"
_DEFAULT_MODEL = "default: the demo's embedded model"


def make_parser() -> argparse.ArgumentParser:
    """The options that it finds say what is to `run`, and which `parser` to blame for mistakes."""
    parser = argparse.ArgumentParser(
        prog="ppo-engine",
        description="RLHF: fine-tune a language model on examples, train a reward model on ranked "
        "answers, then tune the language model with PPO.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ppo-engine {_version()}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = _add(
        subparsers,
        "demo",
        commands.demo,
        "run every stage of RLHF on an embedded model",
        [Flag("--model", "model", f"{_MODEL_HELP} in place of the embedded one")],
    )
    demo.add_argument("--smoke", action="store_true", help="tiny models, within a minute")
    demo.add_argument("--algorithm", choices=("ppo", "grpo"), help="of the last stage; default ppo")
    _add(
        subparsers,
        "sft",
        commands.sft,
        "fine-tune a language model on examples of good answers",
        [
            Flag("--model", "model.path", f"{_MODEL_HELP}; {_DEFAULT_MODEL}"),
            Flag("--data", "data.path", "examples: JSONL, parquet, a saved data set"),
        ],
    )
    _add(
        subparsers,
        "reward",
        commands.reward,
        "train a reward model on preference pairs or rankings",
        [
            Flag("--model", "model.path", f"{_MODEL_HELP}; {_DEFAULT_MODEL}"),
            Flag("--data", "data.path", "pairs or rankings: JSONL, parquet, a saved data set"),
        ],
    )
    for name, summary in (
        ("ppo", "fine-tune a language model against a reward with PPO"),
        ("grpo", "the same with GRPO: groups of responses, no critic"),
    ):
        trains = _add(
            subparsers,
            name,
            commands.ppo,
            summary,
            [
                Flag("--model", "policy.path", f"{_MODEL_HELP} of the policy; {_DEFAULT_MODEL}"),
                Flag("--data", "data.path", "prompts: JSONL, parquet, a saved data set"),
            ],
        )
        _add_reward(trains, "what scores a response")
        trains.add_argument(
            "--profile", action="store_true", help="profile a step: a table of phases, and a trace"
        )
        trains.set_defaults(algorithm=name)
    generate = _add(
        subparsers,
        "generate",
        commands.generate,
        "write a model's responses to prompts as JSON lines",
        [
            Flag("--model", "model", f"{_MODEL_HELP}; {_DEFAULT_MODEL}"),
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

    ranks = _add_plain(
        subparsers,
        "rank",
        commands.rank,
        "open a page on this machine where people rank responses to prompts",
    )
    ranks.add_argument(
        "candidates", metavar="CANDIDATES", help="prompts with responses, as `generate` writes them"
    )
    ranks.add_argument(
        "--out",
        metavar="FILE",
        required=True,
        help="rankings, for `reward --data`; what is there is gone on with",
    )
    ranks.add_argument(
        "--annotator", metavar="NAME", default="", help="who ranks; default: the page asks"
    )
    ranks.add_argument(
        "--guidelines", metavar="FILE", help="text or Markdown that is shown beside the work"
    )
    ranks.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of the order of responses; default 0"
    )
    ranks.add_argument(
        "--host",
        metavar="HOST",
        default="127.0.0.1",
        help="address to listen on, 0.0.0.0 for all; default: this machine alone",
    )
    ranks.add_argument(
        "--port", metavar="N", type=int, default=0, help="default 0: any that is free"
    )
    ranks.add_argument("--no-browser", action="store_true", help="only print the address")
    agrees = _add_plain(
        subparsers,
        "agreement",
        commands.agreement,
        "tell how far people ranked alike, and where they differ most",
    )
    agrees.add_argument(
        "files", metavar="RANKINGS", nargs="+", help="files of rankings, of one person or several"
    )

    inspects = _add(
        subparsers,
        "inspect",
        commands.inspect,
        "show rows of data token by token, exactly as a command will give them to a model",
        [
            Flag("--model", "model.path", f"{_MODEL_HELP}; {_DEFAULT_MODEL}"),
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

    summary = "take the update of a recorded step again, with other settings if given"
    replays = subparsers.add_parser(
        "replay",
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="Settings of losses, advantages and optimizers can be given as key=value, such as "
        "ppo.clip_range=0.1.",
        usage="ppo-engine replay RUN --step N [key=value ...]",
        allow_abbrev=False,
    )
    replays.add_argument("folder", metavar="RUN", help="folder of a run of ppo or grpo")
    replays.add_argument("--step", metavar="N", type=int, help="a step that it has recorded")
    replays.set_defaults(run=commands.replay, parser=replays)

    views = _add_plain(
        subparsers,
        "view",
        commands.view,
        "write the page of a run, or of several over each other, anew and open it",
    )
    views.add_argument(
        "runs", metavar="RUN", nargs="+", help="folder of a run, going on, ended or dead"
    )
    views.add_argument(
        "--out",
        metavar="FILE",
        help="file to write; default: report.html in the run's folder, of several here",
    )
    views.add_argument("--no-browser", action="store_true", help="write the page alone")

    _add_plain(
        subparsers,
        "doctor",
        commands.doctor,
        "check what is installed, what runs, what is missing and what that costs",
    )
    return parser


def _add(
    subparsers: Any,
    name: str,
    run: Callable[..., Any],
    summary: str,
    flags: Sequence[Flag],
    *,
    writes: bool = True,
) -> argparse.ArgumentParser:
    """A command with settings, and the options that all of these share."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="Any setting can be given as key=value; see them all: "
        f"ppo-engine {name if writes else 'sft'} --help-settings",
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
            "--dry-run",
            action="store_true",
            help="check settings, data, model and reward, print the settings, and stop",
        )
        parser.add_argument(
            "--help-settings",
            metavar="SECTION",
            nargs="?",
            const="",
            help="explain all settings, or those of a section such as run, and stop",
        )
    parser.add_argument("--seed", metavar="N", help="random seed")
    parser.set_defaults(run=run, parser=parser, flags=flags)
    return parser


def _add_plain(
    subparsers: Any, name: str, run: Callable[..., Any], summary: str
) -> argparse.ArgumentParser:
    """A command without settings."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def _add_reward(parser: argparse.ArgumentParser, purpose: str) -> None:
    parser.add_argument(
        "--reward",
        metavar="REWARD",
        action="append",
        help=f"{purpose}: a reward model's name or folder, file.py:function, a URL, or a ready "
        f"function ({', '.join(READY)}; arguments as reward.arguments.NAME=…); repeat it for "
        "several, with weights reward.weights=[1,0.5]",
    )


def _version() -> str:
    try:
        return importlib.metadata.version("ppo-engine")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed: running from a checkout)"
