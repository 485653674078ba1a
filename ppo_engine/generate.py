"""`ppo-engine generate`: responses of a model to prompts, as JSON lines; as text in a terminal."""

from __future__ import annotations

import datetime
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from typing import Any, TextIO

import torch
from rich.console import Console

from ppo_engine.data.digest import describe_rows
from ppo_engine.data.forms import reading, text_note
from ppo_engine.data.prompts import (
    PromptExample,
    column_names,
    columns_of,
    limit_prompts,
    load_prompts,
    prompts_from_sequence,
)
from ppo_engine.errors import UserError
from ppo_engine.messages import shown
from ppo_engine.models import precision
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.pretrained import loading
from ppo_engine.pretrained.masters import to_compute_dtype
from ppo_engine.rewards.best_of_n import best_of_n_table
from ppo_engine.rewards.sources import configured_sources
from ppo_engine.rewards.weighted import Rewards, load_rewards
from ppo_engine.rollout import generation
from ppo_engine.rollout.sampling import Sampler
from ppo_engine.run.checkpoint import seeded
from ppo_engine.run.progress import Progress, print_plain, printable
from ppo_engine.run.row_file import RowFile, as_line
from ppo_engine.settings.checks import check_generate
from ppo_engine.settings.files import as_dict
from ppo_engine.settings.schema import GenerateConfig, ModelConfig
from ppo_engine.text.prompt import show_prompt

# What the rows do not depend on.
_FREE_KEYS = ("output", "resume", "device", "reward.http.timeout")


def generate(config: GenerateConfig) -> None:
    """Write `{"prompt", "responses", "finished"}` for each prompt, its other columns kept.

    `finished` says whether each response ended by itself, not truncated; with a reward, `scores`
    has their scores, and the best-of-n scores are shown.

    The file appears only when it is complete: until then its rows are in `OUTPUT.partial`, where a
    failure leaves them, and `config.resume` goes on from there to the same rows. Each batch has
    random numbers of its own for that. Without a file they are printed: as lines of JSON, or, in a
    terminal, as text once the progress has ended.
    """
    out = sys.stdout
    # Rows alone reach standard output: whatever a reward function prints goes with the progress.
    with redirect_stdout(sys.stderr):
        _generate(config, out)


def _generate(config: GenerateConfig, out: TextIO) -> None:
    check_generate(config)
    sources = configured_sources(config.reward)
    date, file = config.date or datetime.date.today(), output_file(config)
    if file is not None:
        date = datetime.date.fromisoformat(file.settings["date"])
    device = precision.choose_device(config.device)
    model = ModelConfig(config.model, trust_remote_code=config.trust_remote_code)
    tokenizer = loading.open_tokenizer(None, model, None)
    data = config.data
    if config.prompt:
        text = config.prompt
        chat = [{"role": "user", "content": text}]
        asked = chat if tokenizer.chat_template else text
        examples, skipped = prompts_from_sequence(
            [asked], tokenizer=tokenizer, **reading(replace(data, columns={}))
        )
    else:
        examples, skipped = load_prompts(
            data.path, tokenizer=tokenizer, on_bad_line=data.on_bad_line, **reading(data)
        )
    # Every column is in the output: nothing is lost that nobody reads.
    notes = skipped.notes("Prompts", reads=lambda column: True)
    notes += text_note(examples, tokenizer, "prompts")
    dtype = precision.choose_dtype(config.dtype, device)
    policy = LanguageModel.open(
        config.model,
        model,
        device=device,
        dtype=dtype,
        tokenizer=tokenizer,
        template_arguments=data.chat_template_kwargs,
        date=date,
    )
    to_compute_dtype(policy.model.requires_grad_(False), dtype)  # no masters: none is trained
    sampler = Sampler(policy)
    notes += sampler.notes
    rewards = None
    if sources:
        rewards = load_rewards(None, config.reward, policy.renderer, device=device, dtype=dtype)
    examples, too_long = limit_prompts(
        examples,
        policy.renderer,
        data.max_prompt_tokens,
        room=generation.room_for_prompts(policy.model, config.generation),
        on_bad_line=data.on_bad_line,
    )
    if rewards is not None:
        rewards.check_columns(column_names(examples))
        rewards.check_prompts(examples)
        rewards.check_rows(examples)
        with seeded(f"{config.seed}/trial"):
            rewards.try_functions(examples, config.responses)
    size = max(1, config.batch_size // config.responses)
    batches = [examples[start : start + size] for start in range(0, len(examples), size)]
    console = Console(stderr=True, highlight=False)
    output = file.open(describe_rows(examples), size) if file else _printing(out, config)
    with output as write:
        there = file.rows if file else []
        scores = [row["scores"] for row in there if rewards is not None]
        done = len(there) // size
        with Progress(len(batches), "generate", start=done, console=console) as progress:
            for note in (*notes, *too_long.notes("Prompts")):
                progress.note(note)
            for step, batch in enumerate(batches[done:], start=done + 1):
                with seeded(f"{config.seed}/generate/{step}"):
                    rows = _respond(sampler, rewards, batch, config, progress)
                write(rows)
                scores += [row["scores"] for row in rows if rewards is not None]
                progress.step(step, {})
                told = [model.budget.take_note() for model in (rewards.models if rewards else [])]
                for note in filter(None, (sampler.take_note(), *told)):
                    progress.note(note)
            if config.output:
                progress.note(
                    f"{len(examples)} prompts, with {config.responses} of the model's responses to "
                    f"each, are in {config.output}"
                )
    if scores:
        console.print(best_of_n_table(torch.tensor(scores)))


def output_file(config: GenerateConfig) -> RowFile | None:
    """The file to write, checked; None for standard output."""
    if not config.output:
        return None
    free = (*_FREE_KEYS, "date") if config.date is None else _FREE_KEYS
    settings = as_dict(replace(config, date=config.date or datetime.date.today()))
    return RowFile(config.output, settings, free, resume=config.resume)


def _respond(
    sampler: Sampler,
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
            rollout = generation.generate(sampler, prompts, config.generation, columns_of(part))
        _check_finite("its log-probs", rollout.logprobs, part)
        found["responses"] += rollout.responses
        found["finished"] += rollout.finished.tolist()
        if rewards is not None:
            with progress.phase("score"):
                scores = rewards.total(rewards.score_each(rollout))
            _check_finite("the rewards' scores", scores, part)
            found.setdefault("scores", []).extend(scores.tolist())
    rows = []
    for index, example in enumerate(batch):
        own = slice(index * config.responses, (index + 1) * config.responses)
        row = {"prompt": example.prompt, **{name: column[own] for name, column in found.items()}}
        rows.append(row | {k: v for k, v in example.columns.items() if k not in row})
    return rows


def _check_finite(what: str, x: torch.Tensor | None, asked: list[PromptExample]) -> None:
    """Raise a UserError where these numbers of the answers to `asked`, `[B, …]`, are not finite."""
    if x is None or bool(x.isfinite().all()):
        return
    [number, *_] = (~x.isfinite()).nonzero()[0].tolist()
    raise UserError(
        f"In an answer to {shown(asked[number].prompt)} {what} are not finite: a model computes "
        "beyond its dtype. Try dtype=float32, or a generation.temperature nearer 1."
    )


@contextmanager
def _printing(
    out: TextIO, config: GenerateConfig
) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Writes rows to `out`: at once as JSON; as text at the block's end where a person reads them,
    as a live display in the same terminal would overwrite them until then."""

    def write(rows: list[dict[str, Any]]) -> None:
        out.writelines(map(as_line, rows))
        out.flush()

    if not out.isatty():
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(encoding="utf-8")  # as JSON is, whatever the locale
        yield write
        return
    there: list[dict[str, Any]] = []
    try:
        yield there.extend
    finally:  # also what there is when a later batch fails
        for row in there:
            print_plain(_readable(row, config), out)


def _readable(row: dict[str, Any], config: GenerateConfig) -> str:
    """A row as text: the answers alone where one prompt was asked on the command line."""
    paragraphs = [] if config.prompt else [f"Prompt: {printable(show_prompt(row['prompt']))}"]
    scores = row.get("scores") or [None] * len(row["responses"])
    for number, (response, finished, score) in enumerate(
        zip(row["responses"], row["finished"], scores, strict=True), start=1
    ):
        facts = [] if score is None else [f"score {score:+.3f}"]
        if not finished:
            facts.append(f"cut at generation.max_new_tokens={config.generation.max_new_tokens}")
        count = len(row["responses"])
        label = f"Answer {number} of {count}: " if count > 1 else "Answer: " * (not config.prompt)
        told = f" [{', '.join(facts)}]" if facts else ""
        paragraphs.append(f"{label}{printable(response) or '(empty)'}{told}")
    return "\n".join(paragraphs) + "\n" * (len(paragraphs) > 1)
