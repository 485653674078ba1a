"""`ppo-engine generate`: responses of a model to prompts, as JSON lines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console

from ppo_engine.data.prompts import (
    PromptExample,
    columns_of,
    limit_prompts,
    load_prompts,
    prompts_from_sequence,
)
from ppo_engine.data.rows import SkippedLines
from ppo_engine.errors import UserError
from ppo_engine.models import loading, precision
from ppo_engine.models.adapter_folder import tokenizer_source
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.rewards.best_of_n import best_of_n_table
from ppo_engine.rewards.sources import configured_sources
from ppo_engine.rewards.weighted import Rewards, load_rewards
from ppo_engine.rollout import generation
from ppo_engine.run.progress import Progress
from ppo_engine.settings.schema import GenerateConfig, ModelConfig
from ppo_engine.text.tokenizer import load_tokenizer


def generate(config: GenerateConfig) -> None:
    """Write `{"prompt", "responses", "finished"}` for each prompt, its other columns kept.

    `finished` says whether each response ended with EOS; with a reward, `scores` has their scores,
    and the best-of-n scores are shown. The file appears only when it is complete.
    """
    if bool(config.prompt) == bool(config.data.path):
        raise UserError("Give either prompts (--data FILE) or one prompt (--prompt TEXT).")
    if config.output and Path(config.output).expanduser().exists():
        raise UserError(f"{config.output} exists; remove it or choose another --out.")
    device = precision.choose_device(config.device)
    path = loading.resolve(config.model)
    loading.load_model_config(path)
    tokenizer = load_tokenizer(tokenizer_source(path))
    data = config.data
    if config.prompt:
        text = config.prompt
        chat = [{"role": "user", "content": text}]
        examples, _ = prompts_from_sequence([chat if tokenizer.chat_template else text])
        skipped = SkippedLines()
    else:
        examples, skipped = load_prompts(data.path, on_bad_line=data.on_bad_line)
    dtype = precision.choose_dtype(config.dtype, device)
    rewards = None
    if configured_sources(config.reward):
        rewards = load_rewards(None, config.reward, tokenizer, device=device, dtype=dtype)
    policy = LanguageModel.open(
        config.model, ModelConfig(), device=device, dtype=dtype, tokenizer=tokenizer
    )
    examples, too_long = limit_prompts(
        examples,
        tokenizer,
        data.max_prompt_tokens,
        room=generation.room_for_prompts(policy, config.generation),
        on_bad_line=data.on_bad_line,
    )
    torch.manual_seed(config.seed)
    size = max(1, config.batch_size // config.responses)
    batches = [examples[start : start + size] for start in range(0, len(examples), size)]
    console = Console(stderr=True, highlight=False)
    scores: list[list[float]] = []
    with (
        _output(config.output) as out,
        Progress(len(batches), "generate", console=console) as progress,
    ):
        for report in (skipped, too_long):
            if report.total:
                progress.note(f"Prompts: {report}.")
        for step, batch in enumerate(batches, start=1):
            rows = _respond(policy, rewards, batch, config, progress)
            scores += [row["scores"] for row in rows if rewards is not None]
            out.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
            out.flush()
            progress.step(step, {})
        if config.output:
            progress.note(
                f"{len(examples)} prompts, with {config.responses} of the model's responses to "
                f"each, are in {config.output}"
            )
    if scores:
        console.print(best_of_n_table(torch.tensor(scores)))


def _respond(
    policy: LanguageModel,
    rewards: Rewards | None,
    batch: list[PromptExample],
    config: GenerateConfig,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The row of each prompt in `batch`."""
    asked = [example for example in batch for _ in range(config.responses)]
    found: dict[str, list[Any]] = {"responses": [], "finished": []}
    for start in range(0, len(asked), config.batch_size):
        part = asked[start : start + config.batch_size]
        with progress.phase("generate"):
            prompts = [example.prompt for example in part]
            rollout = generation.generate(policy, prompts, config.generation, columns_of(part))
        found["responses"] += rollout.responses
        found["finished"] += rollout.finished.tolist()
        if rewards is not None:
            with progress.phase("score"):
                scores = rewards.total(rewards.score_each(rollout))
            found.setdefault("scores", []).extend(scores.tolist())
    rows = []
    for index, example in enumerate(batch):
        own = slice(index * config.responses, (index + 1) * config.responses)
        row = {"prompt": example.prompt, **{name: column[own] for name, column in found.items()}}
        rows.append(row | {k: v for k, v in example.columns.items() if k not in row})
    return rows


@contextmanager
def _output(name: str) -> Iterator[TextIO]:
    if not name:
        yield sys.stdout
        return
    path = Path(name).expanduser()
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
