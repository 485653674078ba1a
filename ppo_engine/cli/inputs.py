"""What a command needs besides settings: a model, data, a reward; whether they were given, and, for
a dry run, whether they are there and fit, as far as that shows without weights.

torch and transformers are imported where they are needed, so that what was not given is told at
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ppo_engine.cli.libraries import quiet_libraries
from ppo_engine.errors import UserError
from ppo_engine.rewards.sources import configured_sources
from ppo_engine.settings.schema import (
    GenerateConfig,
    PPOConfig,
    RewardModelConfig,
    ScoringConfig,
    SFTConfig,
)

if TYPE_CHECKING:
    from ppo_engine.data.prompts import PromptExample


def check_given(config: Any) -> None:
    """A UserError where a model, data or a reward was not given that the command cannot do
    without."""
    if isinstance(config, PPOConfig):
        for value, what in (
            (config.policy.path, "policy was given: --model NAME_OR_FOLDER, or policy.path=…"),
            (config.data.path, "prompts were given: --data FILE.jsonl, or data.path=FILE"),
            (
                configured_sources(config.reward),
                "reward was given: --reward FOLDER, --reward file.py:function, --reward URL or the "
                "name of a ready function, such as --reward last_number",
            ),
        ):
            if not value:
                raise UserError(f"No {what}.")
    elif isinstance(config, GenerateConfig):
        if not config.model:
            raise UserError("No model was given: --model NAME_OR_FOLDER.")
    elif isinstance(config, SFTConfig | RewardModelConfig) and not config.data.path:
        data = "examples" if isinstance(config, SFTConfig) else "preferences"
        raise UserError(f"No {data} were given: --data FILE.jsonl, or data.path=FILE.")


def check_inputs(config: Any) -> str:
    """The same, and a UserError for a model, data or a reward that is not there or does not fit:
    all that can be seen without loading weights or sampling. Nothing is written. Returns what a
    training run takes of the memory, in words."""
    check_given(config)
    if isinstance(config, PPOConfig):
        quiet_libraries()
        return _check_ppo(config)
    if isinstance(config, GenerateConfig):
        quiet_libraries()
        _check_generate(config)
    elif isinstance(config, SFTConfig | RewardModelConfig):
        quiet_libraries()
        return _check_supervised(config)
    return ""


def _check_ppo(config: PPOConfig) -> str:
    from ppo_engine.data.forms import reading
    from ppo_engine.data.prompts import column_names, load_prompts
    from ppo_engine.pretrained import loading
    from ppo_engine.rollout.environment import load_environment
    from ppo_engine.text.renderer import Renderer
    from ppo_engine.training import fit

    _check_run(config)
    tokenizer = loading.tokenizer_at(config.policy.path)
    if config.critic.path:
        loading.load_model_config(loading.resolve(config.critic.path))
    environment = load_environment(config.environment)
    prompts: list[PromptExample] = []
    for path in filter(None, (config.data.path, config.evaluation.path)):
        examples, _ = load_prompts(
            path,
            tokenizer=tokenizer,
            on_bad_line=config.data.on_bad_line,
            **reading(config.data),
        )
        if environment is not None:
            environment.check_columns(column_names(examples))
        _check_rewards(config.reward, examples, several_turns=environment is not None)
        prompts = prompts or examples  # not those held out
    renderer = Renderer(tokenizer, arguments=config.data.chat_template_kwargs, date=config.run.date)
    lengths = fit.prompt_lengths(prompts, renderer, config.data.max_prompt_tokens)
    return "" if lengths is None else fit.report(config, lengths, fit.place_of(config))


def _check_generate(config: GenerateConfig) -> None:
    from ppo_engine.data.forms import reading
    from ppo_engine.data.prompts import load_prompts
    from ppo_engine.generate import check_asked, output_file
    from ppo_engine.models.precision import choose_device
    from ppo_engine.pretrained import loading

    check_asked(config)
    output_file(config)
    choose_device(config.device)
    tokenizer = loading.tokenizer_at(config.model)
    examples: list[PromptExample] = []
    if config.data.path:
        examples, _ = load_prompts(
            config.data.path,
            tokenizer=tokenizer,
            on_bad_line=config.data.on_bad_line,
            **reading(config.data),
        )
    _check_rewards(config.reward, examples)


def _check_supervised(config: SFTConfig | RewardModelConfig) -> str:
    from ppo_engine.data.demonstrations import encode_demonstrations, load_demonstrations
    from ppo_engine.data.encoded_rankings import encode_rankings
    from ppo_engine.data.forms import reading
    from ppo_engine.data.preferences import load_preferences
    from ppo_engine.demo.model import model_path
    from ppo_engine.pretrained import loading
    from ppo_engine.text.renderer import Renderer
    from ppo_engine.training import fit

    # As the command fills it in.
    config = replace(config, model=replace(config.model, path=config.model.path or model_path()))
    _check_run(config)
    tokenizer = loading.tokenizer_at(config.model.path)
    is_sft = isinstance(config, SFTConfig)
    load: Any = load_demonstrations if is_sft else load_preferences
    encode: Any = encode_demonstrations if is_sft else encode_rankings
    training, *_ = [
        load(
            path,
            tokenizer=tokenizer,
            on_bad_line=config.data.on_bad_line,
            **reading(config.data),
        )[0]
        for path in filter(None, (config.data.path, config.data.eval_path))
    ]
    renderer = Renderer(tokenizer, arguments=config.data.chat_template_kwargs, date=config.run.date)
    some, most = fit.sample(training), config.data.max_tokens
    encoded, *_ = encode(renderer, some, most, name="training", on_bad_line="skip")
    lengths = fit.text_lengths(encoded)
    return "" if lengths is None else fit.report(config, lengths, fit.place_of(config))


def _check_run(config: PPOConfig | SFTConfig | RewardModelConfig) -> None:
    from ppo_engine.models.precision import choose_device
    from ppo_engine.run.directory import check_output, check_resumable, dated
    from ppo_engine.run.trackers import check_trackers

    check_output(config.run.output_dir, config.run.resume)
    if config.run.resume:
        check_resumable(config.run.output_dir, dated(config))
    check_trackers(config.run.trackers)
    choose_device(config.run.device)


def _check_rewards(
    config: ScoringConfig, examples: Sequence[PromptExample], *, several_turns: bool = False
) -> None:
    """Of a reward model its folder or name, of a function whether it can be called on the columns
    of `examples`, of a ready one whether it takes their rows, of an endpoint the URL alone."""
    import torch

    from ppo_engine.data.prompts import column_names
    from ppo_engine.pretrained import loading
    from ppo_engine.rewards.function import RewardFunction
    from ppo_engine.rewards.weighted import check_rows, load_reward

    for source in configured_sources(config):
        if source.path:
            loading.load_model_config(loading.resolve(source.path))
            continue
        reward = load_reward(
            source, http=config.http, device=torch.device("cpu"), dtype=torch.float32
        )
        if isinstance(reward, RewardFunction):
            reward.check_columns(column_names(examples), several_turns=several_turns)
            check_rows(reward, examples)
