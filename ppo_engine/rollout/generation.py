"""Responses of one turn or several: the policy writes, an environment answers, until one ends."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ppo_engine.data.rows import has_lone_surrogate
from ppo_engine.errors import UserError
from ppo_engine.messages import shown
from ppo_engine.models.language_model import LanguageModel
from ppo_engine.models.token_rows import pad_left
from ppo_engine.pretrained import architecture
from ppo_engine.rollout.batch import Rollout
from ppo_engine.rollout.environment import Environment
from ppo_engine.rollout.sampling import Sampler
from ppo_engine.rollout.schedule import Request, Response
from ppo_engine.settings.schema import GenerationConfig
from ppo_engine.text.options import row_options
from ppo_engine.text.prompt import Message, Prompt
from ppo_engine.text.template import TemplateError


def generate(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    settings: GenerationConfig,
    columns: Mapping[str, Sequence[Any]] | None = None,
    *,
    group_size: int = 1,
    environment: Environment | None = None,
    greedy: bool = False,
) -> Rollout:
    """Sample `group_size` responses in a row to each prompt from softmax(logits / temperature).

    Top-k, top-p and a least number of tokens are off unless `settings` says otherwise: with them,
    the log-probs of the full distribution are not those of the sampler (`Rollout.logprobs`). With
    an `environment`, a response has several turns. `greedy` takes the likeliest tokens.
    """
    if not prompts:
        raise UserError("There are no prompts to sample responses to.")
    columns = columns or {}
    for name, column in columns.items():
        if len(column) != len(prompts):
            raise UserError(
                f"The column {name!r} has {len(column)} values for {len(prompts)} prompts: give "
                "one for each prompt, whatever the size of its group."
            )
    policy = sampler.policy
    room = room_for_prompts(policy.model, settings)
    ids = [_prompt_ids(policy, x, columns, place, room) for place, x in enumerate(prompts)]
    columns = {name: _each(column, group_size) for name, column in columns.items()}
    conversations = _converse(
        sampler,
        [
            _Conversation(prompt, prompt_ids, row)
            for row, (prompt, prompt_ids) in enumerate(
                _each([*zip(prompts, ids, strict=True)], group_size)
            )
        ],
        settings,
        columns,
        environment=environment,
        greedy=greedy,
    )
    return _as_rollout(
        conversations,
        policy.tokenizer,
        policy.device,
        columns,
        several=environment is not None,
    )


def room_for_prompts(model: Any, settings: GenerationConfig) -> int:
    """Tokens that the context of a model (or of its configuration) leaves for a prompt; a UserError
    where there are none."""
    positions = architecture.context_length(model)
    room = positions - settings.max_new_tokens
    if room < 1:
        raise UserError(
            f"generation.max_new_tokens is {settings.max_new_tokens}, but the model's context has "
            f"only {positions} tokens: lower it."
        )
    return room


@dataclass
class _Conversation:
    """A prompt and the response to it, as it grows."""

    prompt: Prompt
    prompt_ids: list[int]
    row: int  # of the batch
    tokens: list[int] = field(default_factory=list)  # of the response
    own: list[bool] = field(default_factory=list)  # whether the policy wrote it
    logprobs: list[float] = field(default_factory=list)  # of the sampler; 0 where not its own
    turns: list[Message] = field(default_factory=list)
    finished: bool = False

    def write(self, new: Response, text: str) -> None:
        """Add a turn of the policy."""
        self.tokens += new.tokens
        self.own += [True] * len(new.tokens)
        self.logprobs += new.logprobs
        self.turns.append({"role": "assistant", "content": text})
        self.finished = new.finished

    def hear(self, tokens: Sequence[int], message: Message) -> None:
        """Add a turn of the environment."""
        self.tokens += tokens
        self.own += [False] * len(tokens)
        self.logprobs += [0.0] * len(tokens)
        self.turns.append(message)


def _each(items: Sequence[Any], times: int) -> list[Any]:
    """Every item `times` times in a row."""
    return [item for item in items for _ in range(times)]


def _converse(
    sampler: Sampler,
    found: list[_Conversation],
    settings: GenerationConfig,
    columns: Mapping[str, Sequence[Any]],
    *,
    environment: Environment | None,
    greedy: bool,
) -> list[_Conversation]:
    """The conversations `found`, which have but their prompts, to their ends. One is over after
    `environment.max_turns` turns of the policy, or when the environment has no answer. It is
    truncated, and not finished, where a turn of the policy does not end within
    `settings.max_new_tokens`, and where an answer leaves no room in the model's context for another
    turn."""
    if environment is not None and "turns" in columns:
        raise UserError(
            "The prompts have a column 'turns', the name under which rewards get the turns of a "
            "conversation: rename it."
        )
    policy = sampler.policy
    active, max_turns = found, environment.max_turns if environment else 1
    with sampler.session(settings, greedy=greedy, keep=max_turns > 1) as write:
        for turn in range(1, max_turns + 1):
            if environment is not None and turn > 1:
                active = _answered(policy, active, environment, columns, settings.max_new_tokens)
            if not active:
                break
            # Every token of every response has a random number of its own.
            requests = [
                Request(
                    [*c.prompt_ids, *c.tokens],
                    number=c.row,
                    counter=c.row * max_turns * settings.max_new_tokens + sum(c.own),
                )
                for c in active
            ]
            for conversation, new in zip(active, write(requests), strict=True):
                row_ids = new.request.tokens
                said = policy.renderer.said(conversation.prompt, row_ids, new.tokens)
                conversation.write(new, said)
            active = [conversation for conversation in active if conversation.finished]
    return found


def _prompt_ids(
    policy: LanguageModel, prompt: Prompt, columns: Mapping[str, Sequence[Any]], row: int, room: int
) -> list[int]:
    if has_lone_surrogate(prompt):
        raise UserError(f"Prompt {row} is no Unicode text: it has a lone surrogate.")
    try:
        ids = policy.renderer.prompt(prompt, row_options(columns, row))
    except TemplateError as error:
        raise UserError(f"Prompt {row} cannot be used: {error}.") from error
    if not ids:
        raise UserError(f"Prompt {row} is empty: it has no tokens to continue.")
    if len(ids) > room:
        raise UserError(
            f"Prompt {row} has {len(ids)} tokens, and the model's context has room for {room} "
            "before a response: shorten it, or lower generation.max_new_tokens."
        )
    return ids


def _answered(
    policy: LanguageModel,
    active: list[_Conversation],
    environment: Environment,
    columns: Mapping[str, Sequence[Any]],
    max_new_tokens: int,
) -> list[_Conversation]:
    """The conversations that the environment continues, with its answers added."""
    if not active:
        return []
    picked = {name: [column[c.row] for c in active] for name, column in columns.items()}
    answers = environment([c.prompt for c in active], [c.turns for c in active], picked)
    positions = architecture.context_length(policy.model)
    going_on = []
    for conversation, answer in zip(active, answers, strict=True):
        if answer is None:
            continue
        options = row_options(columns, conversation.row)
        try:
            tokens = policy.renderer.reply(
                conversation.prompt, answer, conversation.tokens[-1], options
            )
        except TemplateError as error:  # such as "roles must alternate"
            raise UserError(
                f"{environment} answered {shown(answer)}, which cannot be used: {error}."
            ) from error
        length = len(conversation.prompt_ids) + len(conversation.tokens) + len(tokens)
        if length + max_new_tokens <= positions:
            # A copy: an environment may write its next answer into the same message.
            message = (
                {"role": "user", "content": answer}
                if isinstance(answer, str)
                else copy.deepcopy(answer)
            )
            conversation.hear(tokens, message)
            going_on.append(conversation)
        else:  # truncated, like a turn that did not end: metrics and `reward.missing_eos_…` see it
            conversation.finished = False
    return going_on


def _text(conversation: _Conversation) -> str:
    """A response as text: in a chat its turns as paragraphs, after a text prompt as it was read."""
    between = "" if isinstance(conversation.prompt, str) else "\n\n"
    return between.join(turn["content"] for turn in conversation.turns)


def _as_rollout(
    conversations: Sequence[_Conversation],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    columns: Mapping[str, Sequence[Any]],
    *,
    several: bool,
) -> Rollout:
    """Their batch; where there may be `several` turns, with these in the column `turns`."""
    width = max(len(c.tokens) for c in conversations)

    def padded(rows: Iterable[list[Any]], value: Any) -> torch.Tensor:
        dtype = torch.float32 if isinstance(value, float) else None
        wide = [[*row, *[value] * (width - len(row))] for row in rows]
        return torch.tensor(wide, dtype=dtype, device=device)

    prompt_ids, prompt_mask = pad_left(
        [c.prompt_ids for c in conversations], tokenizer.pad_token_id
    )
    heard = ([not own for own in c.own] for c in conversations)
    return Rollout(
        prompt_ids=torch.tensor(prompt_ids, device=device),
        prompt_mask=torch.tensor(prompt_mask, device=device),
        response_ids=padded((c.tokens for c in conversations), tokenizer.pad_token_id),
        mask=padded((c.own for c in conversations), False),
        finished=torch.tensor([c.finished for c in conversations], device=device),
        prompts=[c.prompt for c in conversations],
        responses=[_text(c) for c in conversations],
        columns={**columns, "turns": [c.turns for c in conversations]} if several else columns,
        environment_mask=padded(heard, False) if several else None,
        logprobs=padded((c.logprobs for c in conversations), 0.0),
    )
