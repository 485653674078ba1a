"""From conversations to token ids: the one place where prompts and responses are rendered.

A prompt is text, used as it is, or a list of chat messages `{"role": …, "content": …}`, rendered
by the model's chat template up to the point where its answer begins.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from ppo_engine.errors import UserError

Message = dict[str, str]
Prompt = str | list[Message]

_TURN = "The policy's turn, of which no template changes a word."


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, ready for the model to continue."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    require_chat_template(tokenizer)
    return _tokens(tokenizer, _render(tokenizer, prompt, ask=True))


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str | Message, eos: str
) -> list[int]:
    """Token ids of an environment's answer to a turn of the policy, up to where the next begins.

    For chat messages the template writes what comes between: the rest of the policy's turn after
    `eos`, the token that ended it, the answer (text is a user's message), and the start of the
    next turn. For a text prompt the answer is text, used as it is.
    """
    if isinstance(prompt, str):
        if not isinstance(answer, str):
            raise UserError(
                "An environment must answer a text prompt with text, not with a message."
            )
        return _tokens(tokenizer, answer)
    message = {"role": "user", "content": answer} if isinstance(answer, str) else answer
    turn = {"role": "assistant", "content": _TURN}
    behind = _render(tokenizer, [*prompt, turn, message], ask=True).rpartition(_TURN)[2]
    before, found, after = behind.partition(eos)
    return _tokens(tokenizer, after if found and not before.strip() else behind)


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str, finished: bool) -> list[int]:
    """Token ids of a response; a finished one ends with EOS, as a sampled one does."""
    ids = _tokens(tokenizer, response)
    return [*ids, tokenizer.eos_token_id] if finished else ids


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    response: str,
    max_tokens: int,
    finished: bool = True,
) -> list[int]:
    """Prompt and response together, truncated to `max_tokens` at the prompt's start.

    The response is what is scored, so it is kept; one that alone is longer is truncated at its end.
    """
    answer = encode_response(tokenizer, response, finished)[:max_tokens]
    room = max_tokens - len(answer)
    question = encode_prompt(tokenizer, prompt)
    return [*question[len(question) - min(room, len(question)) :], *answer]


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[Message],
    turns: list[Message],
    end_ids: Collection[int],
) -> list[tuple[list[int], list[bool]]]:
    """Token ids of a conversation, and which of them the model learns: those of the assistant's
    messages among `turns`, each up to and including the one of `end_ids` that ends it.

    Prompts and answers are tokenized separately, as they are when the model answers. One sequence,
    or, where the chat template rewrites earlier answers (dropping their reasoning, say), one for
    each answer. An answer that the template leaves open at the end of a sequence gets an EOS.
    """
    messages = [*prompt, *turns]
    asked, answers = [], []
    for index in range(len(prompt), len(messages)):
        if messages[index]["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:index], ask=True)
        after = _render(tokenizer, messages[: index + 1], ask=False)
        shown = after.removeprefix(before) if after.startswith(before) else None
        # Not shown: the prompt ends with what a finished answer lacks, such as `<think>`.
        answers.append(messages[index]["content"] if shown is None else shown)
        asked.append(before)
    done = [before + answer for before, answer in zip(asked, answers, strict=True)]
    sequences = [[piece] for piece in zip(asked, answers, strict=True)]
    if all(b.startswith(a) for a, b in zip(done[:-1], asked[1:], strict=True)):
        new = [b.removeprefix(a) for a, b in zip(["", *done[:-1]], asked, strict=True)]
        sequences = [list(zip(new, answers, strict=True))]
    return [_encode_pieces(tokenizer, pieces, end_ids) for pieces in sequences]


def _encode_pieces(
    tokenizer: PreTrainedTokenizerBase, pieces: list[tuple[str, str]], end_ids: Collection[int]
) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    trained: list[bool] = []
    stop = 0
    for asked, answer in pieces:
        question, response = _tokens(tokenizer, asked), _tokens(tokenizer, answer)
        ends = [place for place, token in enumerate(response, start=1) if token in end_ids]
        learned = ends[-1] if ends else len(response)  # not what the template writes after it
        stop = len(ids) + len(question) + learned
        ids += question + response
        trained += [False] * len(question)
        trained += [place < learned for place in range(len(response))]
    ids, trained = ids[:stop], trained[:stop]
    if ids[-1] not in end_ids:
        ids.append(tokenizer.eos_token_id)
        trained.append(True)
    return ids, trained


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], ask: bool) -> str:
    """The chat template's text, where `ask` up to the point where the model's answer begins."""
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Without BOS or the like: a template has written every special token already."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


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
