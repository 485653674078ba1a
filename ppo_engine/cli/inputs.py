"""What a dry run looks at besides what was given: whether model, data and rewards fit each other,
as far as that shows without weights; and the model of a command to which none was given.

torch and transformers are imported where they are needed.
"""

from __future__ import annotations

import datetime
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ppo_engine.cli.given import check_given
from ppo_engine.cli.libraries import set_up_libraries
from ppo_engine.errors import UserError
from ppo_engine.rewards.sources import configured_sources
from ppo_engine.settings.schema import (
    DemoConfig,
    GenerateConfig,
    ModelConfig,
    PPOConfig,
    RewardModelConfig,
    ScoringConfig,
    SFTConfig,
)

if TYPE_CHECKING:
    from ppo_engine.data.prompts import PromptExample
    from ppo_engine.training.forecast import Lengths

Config = TypeVar("Config", bound=Any)


def with_model(config: Config) -> Config:
    """`config` of a command with the demo's model where none was given, which standard error is
    told: a new user needs none, and nobody trains another than they think."""
    name = "policy" if isinstance(config, PPOConfig) else "model"
    section = getattr(config, name)
    if section if isinstance(section, str) else section.path:
        return config
    if isinstance(config, PPOConfig | SFTConfig | RewardModelConfig) and config.run.resume:
        from ppo_engine.run.directory import settings_file
        from ppo_engine.settings.files import load_config

        recorded = load_config(type(config), str(settings_file(config.run.output_dir)))
        if not getattr(recorded, name).path:
            raise UserError(
                f"{config.run.output_dir} was trained from a model that was given to Python as an "
                "object: only the program that made it can resume the run."
            )
    from ppo_engine.demo.model import model_path

    path = model_path()
    print(
        f"No model was given: {Path(path).name}, the demo's, is taken; --model NAME_OR_FOLDER "
        "takes another.",
        file=sys.stderr,
    )
    filled = path if isinstance(section, str) else replace(section, path=path)
    return replace(config, **{name: filled})


def check_inputs(config: Any) -> list[str]:
    """A UserError for a model, data or a reward that was not given, is not there or does not fit:
    all that can be seen without loading weights or sampling. Returns what a run would say of its
    data. Nothing is written."""
    check_given(config)
    if isinstance(config, PPOConfig):
        set_up_libraries()
        return _check_ppo(with_model(config))
    if isinstance(config, GenerateConfig):
        set_up_libraries()
        return _check_generate(with_model(config))
    if isinstance(config, SFTConfig | RewardModelConfig):
        set_up_libraries()
        return _check_supervised(with_model(config))
    if isinstance(config, DemoConfig) and config.model:
        set_up_libraries()
        from ppo_engine.pretrained import loading

        loading.load_model_config(loading.resolve(config.model))
    return []


def _check_ppo(config: PPOConfig) -> list[str]:
    from ppo_engine.data.prompts import column_names
    from ppo_engine.data.split import overlap
    from ppo_engine.pretrained import loading
    from ppo_engine.rollout.environment import load_environment
    from ppo_engine.text.renderer import Renderer
    from ppo_engine.training import fit
    from ppo_engine.training.batch_notes import batch_notes
    from ppo_engine.training.evaluation import hold_out

    _check_run(config)
    if config.critic.path:
        path, trust = loading.resolve(config.critic.path), config.critic.trust_remote_code
        loading.load_model_config(path, trust=trust)
    environment = load_environment(config.environment)
    notes: list[str] = []

    def prompts(path: str) -> list[PromptExample]:
        found = _prompts(path, config, config.policy, config.run.date, notes)
        if environment is not None:
            environment.check_columns(column_names(found))
        _check_rewards(config.reward, found, several_turns=environment is not None)
        return found

    training = prompts(config.data.path)
    if config.evaluation.path:
        notes += overlap(training, prompts(config.evaluation.path), "evaluation.path")
    elif config.evaluation.prompts:
        training, _ = hold_out(training, config.evaluation.prompts, config.run.seed)
    notes += batch_notes(config.ppo, len(training))
    tokenizer = loading.open_tokenizer(None, config.policy, None)
    renderer = Renderer(tokenizer, arguments=config.data.chat_template_kwargs, date=config.run.date)
    return notes + _memory(config, fit.prompt_lengths(training, renderer))


def _check_generate(config: GenerateConfig) -> list[str]:
    from ppo_engine.generate import output_file
    from ppo_engine.models.precision import choose_device
    from ppo_engine.pretrained import loading

    output_file(config)
    choose_device(config.device)
    notes: list[str] = []
    examples: list[PromptExample] = []
    model = ModelConfig(config.model, trust_remote_code=config.trust_remote_code)
    if config.data.path:
        examples = _prompts(config.data.path, config, model, config.date, notes)
    else:
        loading.open_tokenizer(None, model, None)
    _check_rewards(config.reward, examples)
    return notes


def _prompts(
    path: str,
    config: PPOConfig | GenerateConfig,
    model: ModelConfig,
    date: datetime.date | None,
    notes: list[str],
) -> list[PromptExample]:
    """The prompts of a file that the `model` can answer; `notes` say what is said of them."""
    from ppo_engine.data.forms import reading, text_note
    from ppo_engine.data.prompts import limit_prompts, load_prompts
    from ppo_engine.pretrained import loading
    from ppo_engine.rollout.generation import room_for_prompts
    from ppo_engine.text.renderer import Renderer

    data, tokenizer = config.data, loading.open_tokenizer(None, model, None)
    examples, left_out = load_prompts(
        path, tokenizer=tokenizer, on_bad_line=data.on_bad_line, **reading(data)
    )
    kept, refused = limit_prompts(
        examples,
        Renderer(
            tokenizer, arguments=data.chat_template_kwargs, date=date or datetime.date.today()
        ),
        data.max_prompt_tokens,
        room=room_for_prompts(
            loading.load_model_config(loading.resolve(model.path), trust=model.trust_remote_code),
            config.generation,
        ),
        on_bad_line=data.on_bad_line,
    )
    notes += text_note(examples, tokenizer, "prompts")
    # Which columns are read is seen when the rewards are loaded.
    notes += left_out.notes("Prompts", reads=lambda column: True) + refused.notes("Prompts")
    return kept


def _check_supervised(config: SFTConfig | RewardModelConfig) -> list[str]:
    from ppo_engine.data.demonstrations import encode_demonstrations, load_demonstrations
    from ppo_engine.data.encoded_rankings import encode_rankings
    from ppo_engine.data.forms import reading, text_note
    from ppo_engine.data.preferences import load_preferences, sample_rankings
    from ppo_engine.data.split import overlap, split_by_prompt
    from ppo_engine.pretrained import loading
    from ppo_engine.text.renderer import Renderer
    from ppo_engine.training import fit
    from ppo_engine.training.batch_notes import few_steps_note

    _check_run(config)
    data, tokenizer = config.data, loading.open_tokenizer(None, config.model, None)
    of_sft = isinstance(config, SFTConfig)
    load: Any = load_demonstrations if of_sft else load_preferences
    unit = "examples" if of_sft else "preferences"
    notes: list[str] = []

    def rows(path: str) -> list[Any]:
        found, left_out = load(
            path, tokenizer=tokenizer, on_bad_line=data.on_bad_line, **reading(data)
        )
        notes.extend(left_out.notes(unit.capitalize()))
        notes.extend(text_note(found, tokenizer, unit))
        return list(found)

    training = rows(data.path)
    if isinstance(config, RewardModelConfig) and config.data.max_pairs is not None:
        training = sample_rankings(training, config.data.max_pairs, config.run.seed)
    if data.eval_path is not None:
        notes += overlap(training, rows(data.eval_path), "data.eval_path")
    else:
        training, _ = split_by_prompt(training, data.eval_fraction, config.run.seed, unit)
    settings = config.sft if isinstance(config, SFTConfig) else config.reward
    steps = math.ceil(len(training) / settings.batch_size) * settings.epochs
    command = "sft" if of_sft else "reward"
    notes += few_steps_note(command, steps, len(training), settings.batch_size, unit)
    encode: Any = encode_demonstrations if of_sft else encode_rankings
    renderer = Renderer(tokenizer, arguments=data.chat_template_kwargs, date=config.run.date)
    some = fit.sample(training)
    encoded, *_ = encode(renderer, some, data.max_tokens, name="training", on_bad_line="skip")
    return notes + _memory(config, fit.text_lengths(encoded))


def _memory(config: Any, lengths: Lengths | None) -> list[str]:
    """What a run takes, where the lengths of its texts are known."""
    from ppo_engine.training import fit

    return [] if lengths is None else [fit.report(config, lengths, fit.place_of(config))]


def _check_run(config: PPOConfig | SFTConfig | RewardModelConfig) -> None:
    from ppo_engine.models.precision import choose_device, choose_dtype
    from ppo_engine.ppo.offloading import check_offload
    from ppo_engine.pretrained.loading import load_options
    from ppo_engine.run.directory import check_resumable, dated
    from ppo_engine.run.trackers import check_trackers

    if config.run.resume:
        check_resumable(config.run.output_dir, dated(config))
    check_trackers(config.run.trackers)
    device = choose_device(config.run.device)
    check_offload(config.run.offload, device)
    sections = ["policy"] if isinstance(config, PPOConfig) else ["model"]
    if isinstance(config, PPOConfig) and config.ppo.has_critic:
        sections.append("critic")
    for name in sections:
        load_options(getattr(config, name), device, choose_dtype(config.run.dtype, device))


def _check_rewards(
    config: ScoringConfig, examples: Sequence[PromptExample], *, several_turns: bool = False
) -> None:
    """Of a reward model whether it can score, by its configuration, of a function whether it can be
    called on the columns of `examples`, of a ready one whether it takes their rows, of an endpoint
    the URL alone."""
    import torch

    from ppo_engine.data.prompts import column_names
    from ppo_engine.models.value_model import check_scores
    from ppo_engine.rewards.function import RewardFunction
    from ppo_engine.rewards.weighted import check_rows, load_reward

    for source in configured_sources(config):
        if source.path:
            check_scores(source.path, trust=config.trust_remote_code)
            continue
        reward = load_reward(
            source, http=config.http, device=torch.device("cpu"), dtype=torch.float32
        )
        if isinstance(reward, RewardFunction):
            reward.check_columns(column_names(examples), several_turns=several_turns)
            check_rows(reward, examples)
