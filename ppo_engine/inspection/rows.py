"""Rows of data as the commands that train make token ids of them, without a model's weights.

Everything here is read and encoded by the functions that the trainers call, with their settings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from ppo_engine.data.demonstrations import (
    EncodedExample,
    encode_demonstrations,
    load_demonstrations,
)
from ppo_engine.data.encoded_rankings import EncodedRanking, encode_rankings
from ppo_engine.data.forms import reading, text_note
from ppo_engine.data.preferences import load_preferences, sample_rankings
from ppo_engine.data.prompts import PromptExample, limit_prompts, load_prompts
from ppo_engine.pretrained import architecture, loading
from ppo_engine.pretrained.generation_config import declared_ends, read_generation_config
from ppo_engine.rollout.generation import room_for_prompts
from ppo_engine.settings.schema import PPOConfig, RewardModelConfig, SFTConfig
from ppo_engine.text.prompt import Prompt
from ppo_engine.text.renderer import Renderer

_NAME = "inspected"  # of these rows, in notes


@dataclass(frozen=True)
class Model:
    """What there is to know of a model without its weights."""

    path: str
    tokenizer: PreTrainedTokenizerBase
    config: Any
    declared_ends: list[int]

    def renderer(self, config: SFTConfig | RewardModelConfig | PPOConfig) -> Renderer:
        """What renders for it under these settings."""
        # A reward model is read, not sampled from: its training asks for no declared ends.
        sampled = not isinstance(config, RewardModelConfig)
        return Renderer(
            self.tokenizer,
            end_ids=self.declared_ends if sampled else (),
            arguments=config.data.chat_template_kwargs,
            date=config.run.date,
        )


@dataclass(frozen=True)
class Part:
    """Tokens in a row, some of them marked: learned, or where a score is read."""

    title: str
    ids: list[int]
    marked: list[bool]
    truncated: tuple[int, int] = (0, 0)  # tokens at the start and at the end
    then: str = ""  # what comes behind it


@dataclass(frozen=True)
class Shown:
    """A row of the data as the model will see it."""

    place: str
    facts: list[str]
    parts: list[Part]


@dataclass
class Inspection:
    """What became of a file, and its first rows."""

    end_ids: list[int]  # of answers
    usable: int
    chats: int  # of the usable rows; the others are text
    tokens: dict[str, list[int]]  # by what they are
    per: str  # what each of these counts is of
    rows: list[Shown]
    skipped: int  # rows, for the reasons in `notes`
    notes: list[str]


def open_model(path: str, *, trust: bool = False) -> Model:
    """A UserError where there is no model, or no usable tokenizer, at `path`; with `trust`, by code
    that comes with it."""
    tokenizer = loading.tokenizer_at(path, trust=trust)
    folder = loading.resolve(path)
    config = loading.load_model_config(folder, trust=trust)
    ends = declared_ends(read_generation_config(folder), config)
    return Model(path, tokenizer, config, ends)


def inspect_examples(config: SFTConfig, model: Model, count: int) -> Inspection:
    """Examples as `ppo-engine sft` learns them, the first `count` of them in full."""
    data = config.data
    rows, skipped = load_demonstrations(
        data.path, tokenizer=model.tokenizer, on_bad_line="skip", **reading(data)
    )
    limit = min(data.max_tokens, architecture.context_length(model.config))
    renderer = model.renderer(config)
    encoded, refused, notes = encode_demonstrations(
        renderer, rows, limit, name=_NAME, on_bad_line="skip"
    )
    there = Counter(example.place for example in encoded)
    prompts = {row.place: row.prompt for row in rows if row.place in there}
    return Inspection(
        end_ids=renderer.end_ids,
        usable=len(prompts),
        chats=_chats(list(prompts.values())),
        tokens={
            "tokens": [len(example) for example in encoded],
            "learned": [sum(example.trained) for example in encoded],
        },
        per="of each example",
        rows=_shown_examples(encoded, prompts, model, count),
        skipped=skipped.total + refused.total,
        notes=[
            *skipped.notes("Examples"),
            *text_note(rows, model.tokenizer, "examples"),
            *refused.notes("Examples"),
            *notes,
        ],
    )


def _shown_examples(
    encoded: Sequence[EncodedExample], prompts: dict[str, Prompt], model: Model, count: int
) -> list[Shown]:
    parts: dict[str, list[Part]] = {place: [] for place in list(prompts)[:count]}
    for example in encoded:
        if example.place in parts:
            end = _spelled_end(model, example.ids, example.truncated[1])
            title = f"{len(example)} tokens, {sum(example.trained)} of them learned, {end}"
            part = Part(title, example.ids, example.trained, example.truncated)
            parts[example.place].append(part)
    return [Shown(place, _form(prompts[place], model), found) for place, found in parts.items()]


def inspect_preferences(config: RewardModelConfig, model: Model, count: int) -> Inspection:
    """Pairs and rankings as `ppo-engine reward` scores them, the first `count` of them in full."""
    data = config.data
    rows, skipped = load_preferences(
        data.path, tokenizer=model.tokenizer, on_bad_line="skip", **reading(data)
    )
    sampled = []
    if data.max_pairs is not None:
        there = len(rows)
        rows = sample_rankings(rows, data.max_pairs, config.run.seed)
        sampled.append(f"{len(rows)} of {there} preferences were drawn (data.max_pairs).")
    limit = min(data.max_tokens, architecture.context_length(model.config))
    renderer = model.renderer(config)
    encoded, refused, notes = encode_rankings(renderer, rows, limit, name=_NAME, on_bad_line="skip")
    given = {row.place: row for row in rows}
    shown = []
    for ranking in encoded[:count]:
        row = given[ranking.place]
        facts = _form(row.prompt, model)
        if not row.prompt_given:
            facts.append("no prompt is given: the texts' common start is taken for it")
        if ranking.margin is not None:
            facts.append(f"margin {ranking.margin:g}")
        start = renderer.prompt(row.prompt, row.options)
        shown.append(Shown(ranking.place, facts, _shown_ranking(ranking, start)))
    return Inspection(
        end_ids=renderer.end_ids,
        usable=len(encoded),
        chats=_chats([given[ranking.place].prompt for ranking in encoded]),
        tokens={"tokens": [len(row) for ranking in encoded for row in ranking.rows]},
        per="of each response with its prompt",
        rows=shown,
        skipped=skipped.total + len(rows) - len(encoded),
        notes=[
            *skipped.notes("Preferences"),
            *sampled,
            *text_note(rows, model.tokenizer, "preferences"),
            *refused.notes("Preferences"),
            *notes,
        ],
    )


def _shown_ranking(ranking: EncodedRanking, start: list[int]) -> list[Part]:
    """What all responses begin with (their prompt, `start`, where it is there as a whole), then
    each of them."""
    if any(row[: len(start)] != start for row in ranking.rows):
        alike = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*ranking.rows, strict=False))
        start = [tokens[0] for tokens in alike]
    parts = []
    if start:
        title = f"what all of them begin with, {len(start)} tokens"
        parts.append(Part(title, start, [False] * len(start)))
    pair = len(ranking.rows) == 2 and ranking.ranks == [0, 1]
    for index, row in enumerate(ranking.rows):
        name = ("chosen", "rejected")[index] if pair else f"rank {ranking.ranks[index]}"
        ids = row[len(start) :]
        cut = ranking.truncated[index]
        parts.append(
            Part(
                f"{name}, {len(ids)} tokens; the score is read at the last of all {len(row)}"
                + (f" ({cut} more are truncated, first at the prompt's start)" if cut else ""),
                ids,
                [False] * (len(ids) - 1) + [True],
            )
        )
    return parts


def inspect_prompts(config: PPOConfig, model: Model, count: int) -> Inspection:
    """Prompts as the policy of `ppo-engine ppo` continues them, the first `count` of them in
    full."""
    data = config.data
    rows, skipped = load_prompts(
        data.path, tokenizer=model.tokenizer, on_bad_line="skip", **reading(data)
    )
    renderer = model.renderer(config)
    rows, refused = limit_prompts(
        rows,
        renderer,
        data.max_prompt_tokens,
        room=room_for_prompts(model.config, config.generation),
        on_bad_line="skip",
    )
    ids = [renderer.prompt(row.prompt, row.options) for row in rows]
    return Inspection(
        end_ids=renderer.end_ids,
        usable=len(rows),
        chats=_chats([row.prompt for row in rows]),
        tokens={"tokens": list(map(len, ids))},
        per="of each prompt",
        rows=[_shown_prompt(*pair, model) for pair in zip(rows[:count], ids, strict=False)],
        skipped=skipped.total + refused.total,
        notes=[
            *skipped.notes("Prompts", lambda column: True),  # a reward may read any
            *text_note(rows, model.tokenizer, "prompts"),
            *refused.notes("Prompts"),
        ],
    )


def _shown_prompt(row: PromptExample, ids: list[int], model: Model) -> Shown:
    facts = _form(row.prompt, model)
    facts += [f"column {name!r} for the reward: {value!r}" for name, value in row.columns.items()]
    part = Part(f"{len(ids)} tokens", ids, [False] * len(ids), then="the policy writes from here")
    return Shown(row.place, facts, [part])


def _form(prompt: Prompt, model: Model) -> list[str]:
    if not isinstance(prompt, str):
        return []
    if model.tokenizer.chat_template:
        return ["text, as it is: the model's chat template is not used"]
    return ["text, as it is"]


def _chats(prompts: Sequence[Prompt]) -> int:
    return sum(not isinstance(prompt, str) for prompt in prompts)


def _spelled_end(model: Model, ids: list[int], truncated: int) -> str:
    if truncated:
        return "the end is truncated"
    return f"the last is {model.tokenizer.decode(ids[-1:])}"
