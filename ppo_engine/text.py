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


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, ready for the model to go on from."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    require_chat_template(tokenizer)
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    # The template has written every special token already.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


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
