"""What a command needs besides settings: data and a reward, whether they were given; and whether
the files and folders that its settings name are there. All without torch, so at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ppo_engine.data.rows import data_file
from ppo_engine.errors import UserError
from ppo_engine.pretrained.folder import check_folder
from ppo_engine.rewards.sources import configured_sources
from ppo_engine.run.directory import check_output
from ppo_engine.run.row_file import check_place
from ppo_engine.settings.schema import (
    DemoConfig,
    GenerateConfig,
    PPOConfig,
    RewardModelConfig,
    SFTConfig,
)
from ppo_engine.user_functions.importing import function_file


def check_given(config: Any) -> None:
    """A UserError where data or a reward was not given that the command cannot do without, or where
    something that it names is not there."""
    if isinstance(config, PPOConfig):
        for value, what in (
            (config.data.path, "prompts were given: --data FILE.jsonl, or data.path=FILE"),
            (
                configured_sources(config.reward),
                "reward was given: --reward FOLDER, --reward file.py:function, --reward URL or the "
                "name of a ready function, such as --reward last_number",
            ),
        ):
            if not value:
                raise UserError(f"No {what}.")
    elif isinstance(config, SFTConfig | RewardModelConfig) and not config.data.path:
        data = "examples" if isinstance(config, SFTConfig) else "preferences"
        raise UserError(f"No {data} were given: --data FILE.jsonl, or data.path=FILE.")
    if isinstance(config, PPOConfig | SFTConfig | RewardModelConfig):
        check_output(config.run.output_dir, config.run.resume)
    if isinstance(config, DemoConfig):
        check_output(config.output_dir, setting="output_dir")
    if isinstance(config, GenerateConfig) and config.output:
        check_place(config.output, resume=config.resume)
    check_there(config)


def check_there(config: Any) -> None:
    """A UserError for a data file, a model's folder or a function's file that is not there."""
    for path in filter(None, _models(config)):
        check_folder(path)
    for path in filter(None, _data(config)):
        data_file(path)
    for function in filter(None, _functions(config)):
        source = function.rpartition(":")[0]
        if source.endswith(".py"):
            function_file(source)


def _models(config: Any) -> Iterator[str | None]:
    if isinstance(config, DemoConfig | GenerateConfig):
        yield config.model
    elif isinstance(config, PPOConfig):
        yield from (config.policy.path, config.critic.path)
    else:
        yield config.model.path
    if isinstance(config, PPOConfig | GenerateConfig):
        yield from (source.path for source in configured_sources(config.reward))


def _data(config: Any) -> Iterator[str | None]:
    if isinstance(config, DemoConfig):
        return
    yield config.data.path
    if isinstance(config, PPOConfig):
        yield config.evaluation.path
    elif isinstance(config, SFTConfig | RewardModelConfig):
        yield config.data.eval_path


def _functions(config: Any) -> Iterator[str | None]:
    if isinstance(config, PPOConfig | GenerateConfig):
        yield from (source.function for source in configured_sources(config.reward))
    if isinstance(config, PPOConfig):
        yield config.environment.function
