"""Responses of one turn or several: the policy writes, an environment answers, until one ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ppo_engine import models
from ppo_engine.config import EnvironmentConfig, GenerationConfig
from ppo_engine.errors import UserError
from ppo_engine.rollout import Rollout
from ppo_engine.sampler import Continuation, sample
from ppo_engine.text import Message, Prompt, encode_answer, encode_prompt, pad_left
from ppo_engine.user_functions import UserFunction, import_function, shown

if TYPE_CHECKING:
    from ppo_engine.policy import Policy

Answer = str | Message | None


class Environment(UserFunction):
    """A user's `(prompts, turns, **columns) -> list`, sync or async, which answers the policy.

    `turns` holds, for each conversation that still goes on, the messages that came after its
    prompt: the policy's (`{"role": "assistant", "content": …}`), the environment's, and so on, the
    last one the policy's. The result says for each what comes next: a chat message such as
    `{"role": "tool", "content": …}`, text (which is a user's message, where prompts are chat
    messages), or None where the conversation is over.
    """

    kind = "environment"

    def __init__(
        self, function: Callable[..., Any], max_turns: int, name: str | None = None
    ) -> None:
        super().__init__(function, name)
        self.max_turns = max_turns

    def __call__(
        self,
        prompts: Sequence[Prompt],
        turns: Sequence[Sequence[Message]],
        columns: Mapping[str, Sequence[Any]],
    ) -> list[Answer]:
        """The answers, one for each; a UserError where the function fails or misbehaves."""
        result = self.call(prompts, [list(messages) for messages in turns], columns)
        if not isinstance(result, list | tuple) or len(result) != len(prompts):
            raise UserError(
                f"{self} returned {shown(result)}; it must return a list of {len(prompts)}, an "
                "answer or None for each conversation."
            )
        for index, answer in enumerate(result):
            if not (answer is None or isinstance(answer, str) or _is_message(answer)):
                raise UserError(
                    f"{self} returned {shown(answer)} for conversation {index} (counted from 0); "
                    "an answer is text, a message with 'role' and 'content' as text, or None."
                )
        return list(result)


def _is_message(answer: Any) -> bool:
    return isinstance(answer, Mapping) and all(
        isinstance(answer.get(key), str) for key in ("role", "content")
    )


def load_environment(
    config: EnvironmentConfig, given: Callable[..., Any] | Environment | None = None
) -> Environment | None:
    """The environment that is `given`, or that `config` names, if any does."""
    if isinstance(given, Environment):
        return given
    if given is not None:
        return Environment(given, config.max_turns)
    if config.function is None:
        return None
    return Environment(import_function(config.function), config.max_turns, config.function)


@dataclass
class Conversation:
    """A prompt and the response to it, as it grows."""

    prompt: Prompt
    prompt_ids: list[int]
    row: int  # of the batch
    tokens: list[int] = field(default_factory=list)  # of the response
    own: list[bool] = field(default_factory=list)  # whether the policy wrote it
    logprobs: list[float] = field(default_factory=list)  # of the sampler; 0 where not its own
    turns: list[Message] = field(default_factory=list)
    finished: bool = False

    def write(self, new: Continuation, text: str) -> None:
        """A turn of the policy's."""
        self.tokens += new.tokens
        self.own += [True] * len(new.tokens)
        self.logprobs += new.logprobs
        self.turns.append({"role": "assistant", "content": text})
        self.finished = new.finished

    def hear(self, tokens: Sequence[int], message: Message) -> None:
        """A turn of the environment's."""
        self.tokens += tokens
        self.own += [False] * len(tokens)
        self.logprobs += [0.0] * len(tokens) if self.logprobs else []
        self.turns.append(message)


def converse(
    policy: Policy,
    prompts: Sequence[Prompt],
    settings: GenerationConfig,
    columns: Mapping[str, Sequence[Any]],
    *,
    environment: Environment | None = None,
    greedy: bool = False,
    record_logprobs: bool = False,
) -> list[Conversation]:
    """One conversation from each prompt. It is over after `environment.max_turns` turns of the
    policy, or when the environment has no answer. It is cut off, and not finished, where a turn
    of the policy does not end within `settings.max_new_tokens`, and where an answer leaves the
    model no positions for another turn."""
    if environment is not None and "turns" in columns:
        raise UserError(
            "The prompts have a column 'turns', the name under which a reward gets the turns of a "
            "conversation: rename it."
        )
    found = [
        Conversation(prompt, encode_prompt(policy.tokenizer, prompt), row)
        for row, prompt in enumerate(prompts)
    ]
    for conversation in found:
        if not conversation.prompt_ids:
            raise UserError(
                f"Prompt {conversation.row} is empty; a response needs something to answer."
            )
    active, max_turns = found, environment.max_turns if environment else 1
    for turn in range(1, max_turns + 1):
        if environment is not None and turn > 1:
            active = _answered(policy, active, environment, columns, settings.max_new_tokens)
        if not active:
            break
        rows = [[*c.prompt_ids, *c.tokens] for c in active]
        continued = sample(policy, rows, settings, greedy=greedy, record_logprobs=record_logprobs)
        for conversation, new in zip(active, continued, strict=True):
            text = policy.tokenizer.decode(new.tokens, skip_special_tokens=True)
            conversation.write(new, str(text))
        active = [conversation for conversation in active if conversation.finished]
    return found


def _answered(
    policy: Policy,
    active: list[Conversation],
    environment: Environment,
    columns: Mapping[str, Sequence[Any]],
    max_new_tokens: int,
) -> list[Conversation]:
    """The conversations that the environment goes on with, its answers in them."""
    if not active:
        return []
    picked = {name: [column[c.row] for c in active] for name, column in columns.items()}
    answers = environment([c.prompt for c in active], [c.turns for c in active], picked)
    positions = models.positions(policy.model)
    going_on = []
    for conversation, answer in zip(active, answers, strict=True):
        if answer is None:
            continue
        eos = str(policy.tokenizer.decode(conversation.tokens[-1:]))
        try:
            tokens = encode_answer(policy.tokenizer, conversation.prompt, answer, eos)
        except TemplateError as error:  # such as "roles must alternate"
            raise UserError(
                f"{environment} answered {shown(answer)}, which the model's chat template refuses: "
                f"{error}"
            ) from error
        length = len(conversation.prompt_ids) + len(conversation.tokens) + len(tokens)
        if length + max_new_tokens <= positions:
            message = {"role": "user", "content": answer} if isinstance(answer, str) else answer
            conversation.hear(tokens, message)
            going_on.append(conversation)
        else:  # cut off, like a turn that did not end: metrics and `reward.missing_eos_…` see it
            conversation.finished = False
    return going_on


def _text(conversation: Conversation) -> str:
    """A response as text: after a text prompt as it was read, of a chat its turns as paragraphs."""
    between = "" if isinstance(conversation.prompt, str) else "\n\n"
    return between.join(turn["content"] for turn in conversation.turns)


def as_rollout(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    columns: Mapping[str, Sequence[Any]],
    *,
    several: bool,
) -> Rollout:
    """The batch of them; where there may be `several` turns, with these in the column `turns`."""
    recorded = any(c.logprobs for c in conversations)
    width = max(len(c.tokens) for c in conversations)

    def padded(rows: Iterable[list[Any]], value: Any) -> torch.Tensor:
        return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=device)

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
        logprobs=padded((c.logprobs for c in conversations), 0.0) if recorded else None,
    )
