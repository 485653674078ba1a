"""From conversations to token ids: the one place where prompts and responses are rendered.

A prompt is text, used as it is, or a list of chat messages `{"role": …, "content": …}`, rendered
by the model's chat template up to the point where its answer begins.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ppo_engine.errors import UserError

Message = dict[str, str]
Prompt = str | list[Message]

_TURN = "The policy's turn, of which no template changes a word."


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, ready for the model to go on from."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    require_chat_template(tokenizer)
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    # The template has written every special token already.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str | Message, eos: str
) -> list[int]:
    """Token ids of an environment's answer to a turn of the policy's, up to where it goes on.

    To chat messages the template writes what stands between: the rest of the policy's turn behind
    `eos`, the token that ended it, the answer (text is a user's message), and the start of the
    next turn. To a text prompt the answer is text, as it is.
    """
    if isinstance(prompt, str):
        if not isinstance(answer, str):
            raise UserError("To a prompt that is text, an environment answers with text.")
        return list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    message = {"role": "user", "content": answer} if isinstance(answer, str) else answer
    turn = {"role": "assistant", "content": _TURN}
    text = tokenizer.apply_chat_template(
        [*prompt, turn, message], tokenize=False, add_generation_prompt=True
    )
    behind = str(text).rpartition(_TURN)[2]
    before, found, after = behind.partition(eos)
    rest = after if found and not before.strip() else behind
    return list(tokenizer(rest, add_special_tokens=False)["input_ids"])


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str, finished: bool) -> list[int]:
    """Token ids of a response; a finished one ends with EOS, as a sampled one does."""
    ids = list(tokenizer(response, add_special_tokens=False)["input_ids"])
    return [*ids, tokenizer.eos_token_id] if finished else ids


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    response: str,
    max_tokens: int,
    finished: bool = True,
) -> list[int]:
    """Prompt and response together, at most `max_tokens`: the prompt's start goes first.

    The response is what is judged, so it keeps its place; one that alone is longer loses its end.
    """
    answer = encode_response(tokenizer, response, finished)[:max_tokens]
    room = max_tokens - len(answer)
    question = encode_prompt(tokenizer, prompt)
    return [*question[len(question) - min(room, len(question)) :], *answer]


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise UserError(
            f"Chat messages were given, but the tokenizer of {tokenizer.name_or_path!r} has no "
            "chat template: give prompts as plain text, or use a chat model."
        )


def show_prompt(prompt: Prompt) -> str:
    """A prompt as a person reads it: its text, or its last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[list[list[int]], list[list[bool]]]:
    """Rows of one length, padded on the left, and the mask of real tokens."""
    width = max((len(row) for row in rows), default=0)
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
    return ids, mask
