"""What each command does with its options.

torch and transformers are imported by the commands that need them, after the settings have been
read, so that help and errors in settings are instant.
"""

from __future__ import annotations

import argparse
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from ppo_engine.cli.libraries import set_up_libraries
from ppo_engine.cli.overrides import Flag, load, overrides_of, reward_overrides
from ppo_engine.errors import UserError


def demo(options: argparse.Namespace, rest: list[str]) -> None:
    from ppo_engine.settings.schema import DemoConfig

    overrides = overrides_of(options, rest, output_dir="output_dir", seed="seed")
    if options.smoke:
        overrides.insert(0, "smoke=true")
    if options.algorithm is not None:
        overrides.insert(0, f"algorithm={options.algorithm}")
    config = load(DemoConfig, options, overrides)
    if config is not None:
        set_up_libraries()
        from ppo_engine.demo import run_demo

        run_demo(config)


def sft(options: argparse.Namespace, rest: list[str]) -> None:
    from ppo_engine.settings.schema import SFTConfig

    config = _load_supervised(SFTConfig, options, rest)
    if config is not None:
        from ppo_engine.training.sft import SFTTrainer

        SFTTrainer(config=config).train()


def reward(options: argparse.Namespace, rest: list[str]) -> None:
    from ppo_engine.settings.schema import RewardModelConfig

    config = _load_supervised(RewardModelConfig, options, rest)
    if config is not None:
        from ppo_engine.training.reward import RewardModelTrainer

        RewardModelTrainer(config=config).train()


def ppo(options: argparse.Namespace, rest: list[str]) -> None:
    from ppo_engine.settings.checks import check_settings
    from ppo_engine.settings.schema import GRPOConfig, PPOConfig

    overrides = reward_overrides(options) + overrides_of(options, rest)
    if options.profile:
        overrides.insert(0, "profile=true")
    grpo = options.algorithm == "grpo"
    asked = any(override.startswith("ppo.estimator=") for override in overrides)

    def check(config: PPOConfig) -> None:
        if grpo and config.ppo.has_critic and not asked:
            raise UserError(
                f"The settings say ppo.estimator={config.ppo.estimator}, which is PPO with a "
                "critic: run it with `ppo-engine ppo`, or add ppo.estimator=grpo."
            )
        check_settings(config)

    config = load(GRPOConfig if grpo else PPOConfig, options, overrides, check)
    if config is None:
        return
    set_up_libraries()
    from ppo_engine.cli.inputs import with_model
    from ppo_engine.training.ppo import PPOTrainer

    PPOTrainer(config=with_model(config)).train()


def generate(options: argparse.Namespace, rest: list[str]) -> None:
    from ppo_engine.settings.checks import check_generate
    from ppo_engine.settings.schema import GenerateConfig

    if options.output_dir is not None:
        if options.out:
            raise UserError(
                "--out and --output-dir say two places: --output-dir DIR stands for "
                "--out DIR/responses.jsonl. Leave one out."
            )
        options.out = str(Path(options.output_dir) / "responses.jsonl")
        options.output_dir = None
    overrides = reward_overrides(options) + overrides_of(options, rest, seed="seed")
    if options.resume:
        overrides.insert(0, "resume=true")
    if options.n is not None:
        overrides.insert(0, f"responses={options.n}")
    config = load(GenerateConfig, options, overrides, check_generate)
    if config is None:
        return
    set_up_libraries()
    from ppo_engine.cli.inputs import with_model
    from ppo_engine.generate import generate as write_responses

    write_responses(with_model(config))


def rank(options: argparse.Namespace, rest: list[str]) -> None:
    if rest:
        raise UserError("rank takes no settings.")
    try:
        from ppo_engine.pages.ranking.rank import rank as serve_page
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("starlette", "uvicorn"):
            raise
        raise UserError(
            f"The ranking page needs the package {package}: pip install 'ppo-engine[pages]'"
        ) from None
    serve_page(
        options.candidates,
        options.out,
        annotator=options.annotator,
        guidelines=options.guidelines,
        seed=options.seed,
        host=options.host,
        port=options.port,
        browser=not options.no_browser,
    )


def agreement(options: argparse.Namespace, rest: list[str]) -> None:
    if rest:
        raise UserError("agreement takes no settings.")
    from ppo_engine.pages.ranking.compare import compare
    from ppo_engine.run.progress import print_plain

    for line in compare(options.files):
        print_plain(line, sys.stdout)


def inspect(options: argparse.Namespace, rest: list[str]) -> None:
    """With the settings of each command whose rows these may be: where the kind is not given, it is
    guessed among those that have all the settings that are."""
    from ppo_engine.cli.given import check_there
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
    problems: dict[str, str] = {}
    for kind in [options.kind] if options.kind else classes:
        model = "policy.path" if kind == "prompts" else "model.path"
        options.flags = [Flag("--model", model, ""), Flag("--data", "data.path", "")]
        try:
            configs[kind] = load_config(classes[kind], options.config, overrides_of(options, rest))
        except UserError as problem:
            problems[kind] = str(problem)
    if not configs:
        if len({*problems.values()}) == 1:
            raise UserError(problems.popitem()[1])
        raise UserError("\n".join(f"As {kind}: {problem}" for kind, problem in problems.items()))
    config = next(iter(configs.values()))
    if not config.data.path:
        raise UserError("No data were given: --data FILE.jsonl, or data.path=FILE.")
    check_there(config)
    set_up_libraries()
    from ppo_engine.demo.model import model_path
    from ppo_engine.inspection.page import inspect as show_rows

    if isinstance(sys.stdout, TextIOWrapper):  # data holds any character, an encoding perhaps not
        sys.stdout.reconfigure(errors="backslashreplace")
    trained = config.policy if isinstance(config, PPOConfig) else config.model
    path, trust = trained.path or model_path(), trained.trust_remote_code
    show_rows(configs, path, options.rows, options.kind, trust=trust)


def replay(options: argparse.Namespace, rest: list[str]) -> None:
    from ppo_engine.run.replayable import plan_replay

    plan = plan_replay(Path(options.folder).expanduser(), options.step, rest)
    set_up_libraries()
    from ppo_engine.training.replay import replay as take_again

    take_again(plan)


def view(options: argparse.Namespace, rest: list[str]) -> None:
    if rest:
        raise UserError("view takes no settings.")
    from ppo_engine.pages.report.view import view as open_page

    open_page(options.runs, options.out, browser=not options.no_browser)


def doctor(options: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        raise UserError("doctor takes no settings.")
    from ppo_engine.doctor import examine

    return examine()


def _load_supervised(cls: Any, options: argparse.Namespace, rest: list[str]) -> Any:
    """Settings of a command that learns from given data."""
    config = load(cls, options, overrides_of(options, rest))
    if config is None:
        return None
    set_up_libraries()
    from ppo_engine.cli.inputs import with_model

    return with_model(config)
