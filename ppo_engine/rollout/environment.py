"""What answers the policy in multi-turn conversations: a user's function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ppo_engine.data.rows import has_lone_surrogate
from ppo_engine.errors import UserError
from ppo_engine.messages import shown
from ppo_engine.settings.schema import EnvironmentConfig
from ppo_engine.text.prompt import Message, Prompt
from ppo_engine.user_functions.function import UserFunction
from ppo_engine.user_functions.importing import import_function
from ppo_engine.user_functions.signature import Lists

Answer = str | Message | None


class Environment(UserFunction):
    """A user's `(prompts, turns, **columns) -> list`, sync or async, which answers the policy.

    `turns` holds, for each conversation that continues, the messages that came after its
    prompt: the policy's (`{"role": "assistant", "content": …}`), the environment's, and so on, the
    last one the policy's. The result says for each what comes next: a chat message such as
    `{"role": "tool", "content": …}`, text (which is a user's message, where prompts are chat
    messages), or None where the conversation is over.
    """

    kind = "environment"
    lists = Lists("prompts", "turns", ("turns",))

    def __init__(
        self, function: Callable[..., Any], max_turns: int, name: str | None = None
    ) -> None:
        super().__init__(function, name)
        self.max_turns = max_turns

    def check_columns(self, columns: Collection[str]) -> None:
        """A UserError where the function cannot be called on data with these `columns`."""
        self.check(("prompts", "turns"), columns)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        turns: Sequence[Sequence[Message]],
        columns: Mapping[str, Sequence[Any]],
    ) -> list[Answer]:
        """The answers, one for each; a UserError where the function fails or misbehaves."""
        told = {"prompts": prompts, "turns": [list(messages) for messages in turns]}
        result = self.call(told, columns)
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
            if has_lone_surrogate(answer):
                raise UserError(
                    f"{self} answered conversation {index} (counted from 0) with {shown(answer)}, "
                    "which is no Unicode text (a lone surrogate): decode bytes with "
                    "errors='replace'."
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
