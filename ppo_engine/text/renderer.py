"""From conversations to token ids and back: the one place where prompts and responses are rendered.

A prompt is text, used as it is, or a list of chat messages, rendered by the model's chat template
up to the point where its answer begins. The same functions serve training, generation and rewards:
what a model is scored on, or learns, is what it reads and writes.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from ppo_engine.errors import UserError
from ppo_engine.text.prompt import Message, Prompt
from ppo_engine.text.template import (
    ChatTemplate,
    Options,
    TemplateError,
    answer_after,
    is_thinking,
    leaves_out,
    opened_thought,
    thought_of,
)
from ppo_engine.text.tokenizer import decoded, spelled

_OPENING_TOKENS = 32  # of a prompt's end: enough for what opens a thought, byte by byte too


class Renderer:
    """What a tokenizer and its chat template make of prompts and responses."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        end_ids: Collection[int] = (),
        arguments: Options | None = None,
        date: datetime.date | None = None,
    ) -> None:
        """`end_ids` are those that the model's checkpoint declares besides the tokenizer's EOS;
        `arguments` and `date` go to the chat template, see `ChatTemplate`."""
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, arguments, date)
        self._declared = frozenset(end_ids)

    def of(self, tokenizer: PreTrainedTokenizerBase) -> Renderer:
        """The same for a reward model's tokenizer: with the arguments that its template knows."""
        other = Renderer(tokenizer)
        other.template = ChatTemplate(
            tokenizer, self.template.arguments, self.template.date, lenient=True
        )
        return other

    @cached_property
    def end_ids(self) -> list[int]:
        """Every token that ends an answer: the tokenizer's EOS, those that the checkpoint declares,
        and the one with which the chat template ends a turn."""
        special = self.tokenizer.added_tokens_decoder
        of_template = [token for token in self._behind if token in special][:1]
        return sorted({self.tokenizer.eos_token_id, *self._declared, *of_template})

    @cached_property
    def _behind(self) -> list[int]:
        """The token ids that the template writes behind an answer."""
        return self._continued(self.template.ending) if self.template else []

    @cached_property
    def _ending(self) -> list[int]:
        """The same, with EOS where none of them ends the answer."""
        ends = any(token in self.end_ids for token in self._behind)
        return self._behind if ends else [*self._behind, self.tokenizer.eos_token_id]

    def prompt(self, prompt: Prompt, options: Options | None = None) -> list[int]:
        """Token ids of a prompt, ready for the model to continue."""
        if isinstance(prompt, str):
            return self._text_prompt(prompt)
        return self._tokens(self.template.render(prompt, ask=True, options=options))

    def said(self, prompt: Prompt, before: Sequence[int], answer: Sequence[int]) -> str:
        """The words of a sampled `answer` behind the tokens `before`: without its end and padding,
        with special tokens that mean something, such as `<think>`, also where the prompt's chat
        template has opened it already."""
        end = len(answer) - (len(answer) > 0 and answer[-1] in self.end_ids)
        tokens = [t for t in answer[:end] if t != self.tokenizer.pad_token_id]
        if isinstance(prompt, str):
            return self._spelled(before, tokens)
        words, tail = self._decode(tokens), self._decode(before[-_OPENING_TOKENS:])
        if opened := opened_thought(tail):
            return opened[0] + words
        opening = self.template.opening
        # Not what it has closed as well, such as the empty thought of a model told not to think.
        goes_on = opening and tail.endswith(opening) and "</" not in opening
        return opening + words if goes_on else words

    def reply(
        self, prompt: Prompt, reply: str | Message, end: int, options: Options | None = None
    ) -> list[int]:
        """Token ids of an environment's reply to a turn of the policy, up to where the next begins.

        For chat messages the template writes what comes between: the rest of the policy's turn
        after `end`, the token that ended it, the reply (text is a user's message), and the start
        of the next turn. For a text prompt the reply is text, used as it is.
        """
        if isinstance(prompt, str):
            if not isinstance(reply, str):
                raise UserError(
                    "An environment must answer a text prompt with text, not with a message."
                )
            return self._continued(reply)
        message = {"role": "user", "content": reply} if isinstance(reply, str) else reply
        behind = self.template.between(prompt, message, options)
        ending = self._decode([end])
        before, found, after = behind.partition(ending) if ending else ("", "", "")
        return self._continued(after if found and not before.strip() else behind)

    def scored(
        self,
        prompt: Prompt,
        answer: str | Sequence[Message],
        *,
        finished: bool = True,
        max_tokens: int,
        options: Options | None = None,
        written: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> list[int]:
        """The tokens at whose last one a reward model is read: the whole rendered conversation, as
        public reward models read it; for a text prompt, both texts and EOS. One that is not
        `finished` lacks what the template (or EOS) writes behind the answer.

        `answer` is text, or the messages of several turns. `written` are the tokens of prompt and
        answer as a policy with the same tokenizer read and wrote them: they are taken where they
        spell that same text. Truncated to `max_tokens` at the prompt's start; an answer that alone
        is longer, at its end. Raises `TemplateError`.
        """
        if written is not None:
            read, said = written
            # What is finished has an end, perhaps one that only the policy's checkpoint declares,
            # or a stop, which is part of the text.
            ended = finished or (len(said) > 0 and said[-1] in self.end_ids)
            is_part = not ended or self._is_text(answer, read, said)
            written = read, said if is_part else said[:-1]
        parts: tuple[Sequence[int], Sequence[int], Sequence[int]]
        if isinstance(prompt, str):
            assert isinstance(answer, str)
            pair = written or self._apart(prompt, answer, self._text_prompt(prompt))
            parts = *pair, [self.tokenizer.eos_token_id]
        else:
            parts = self._scored_chat(prompt, answer, options, written, finished=finished)
        question, words, ending = parts
        response = [*words, *(ending if finished else ())][:max_tokens]
        room = max_tokens - len(response)
        return [*question[len(question) - min(room, len(question)) :], *response]

    def _scored_chat(
        self,
        prompt: Sequence[Message],
        answer: str | Sequence[Message],
        options: Options | None,
        written: tuple[Sequence[int], Sequence[int]] | None,
        *,
        finished: bool,
    ) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """Question, words and ending of a chat; all in one where the template writes the answer
        otherwise than it asks for it. An answer that is not `finished` and of which no template
        makes a text, such as one cut off in its thought, is what was written."""
        turns = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        turns = [
            {**turn, "content": self.template.words(turn["content"])}
            if turn["role"] == "assistant"
            else turn
            for turn in turns
        ]
        if not finished and is_thinking(turns[-1]["content"]):
            return self._cut_off(prompt, turns, options, written)
        before = self.template.render(prompt, ask=True, options=options)
        try:
            whole = self.template.render(
                [*prompt, *turns], ask=False, options=options, sampled=True
            )
        except TemplateError:
            if finished:
                raise
            return self._cut_off(prompt, turns, options, written)
        # A call of a tool may end otherwise.
        ending = self._ending if whole.endswith(self.template.ending) else []
        whole = whole.removesuffix(self.template.ending)
        if not whole.startswith(before):
            return self._tokens(whole), (), ending
        shown = whole.removeprefix(before)
        if written is not None and self._spelled(*written) == shown:
            return *written, ending
        return *self._apart(before, shown), ending

    def _cut_off(
        self,
        prompt: Sequence[Message],
        turns: Sequence[Message],
        options: Options | None,
        written: tuple[Sequence[int], Sequence[int]] | None,
    ) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """Question and words, where the last of `turns` stands behind what asks for it."""
        *former, last = turns
        asked = [*prompt, *former]
        before = self.template.render(asked, ask=True, options=options, sampled=True)
        opened = opened_thought(before)
        words = last["content"].removeprefix(opened[0] if opened else self.template.opening)
        if former:
            return self._tokens(before + words), (), ()
        same = written is not None and self._spelled(*written) == words
        return *(written if written and same else self._apart(before, words)), ()

    def learned(
        self, prompt: Prompt, answer: str | Sequence[Message], options: Options | None = None
    ) -> list[tuple[list[int], list[bool]]]:
        """Token ids of an example, and which of them the model learns: the answer to a text, or
        the assistant's messages of a chat's further turns (but for those with `train` false),
        each with the token that ends it.

        Each answer stands behind the tokens that the model will read when it is asked for it. One
        sequence, or, where the chat template rewrites earlier answers (dropping their thoughts,
        say), one for each answer. Raises `TemplateError`.
        """
        if isinstance(prompt, str):
            assert isinstance(answer, str)
            question, words = self._apart(prompt, answer, self._text_prompt(prompt))
            words = [*words, self.tokenizer.eos_token_id]
            return [(question + words, [False] * len(question) + [True] * len(words))]
        messages = [*prompt, *answer]
        sequences: list[tuple[list[int], list[bool]]] = []
        for index in range(len(prompt), len(messages)):
            if messages[index]["role"] != "assistant":
                continue
            question, words = self._turn(messages[: index + 1], options)
            learns = bool(messages[index].get("train", True))
            ids, trained = sequences[-1] if sequences else ([], [])
            if sequences and question[: len(ids)] == ids:
                trained += [False] * (len(question) - len(ids)) + [learns] * len(words)
                ids[:] = question + words
            else:
                sequences.append(
                    (question + words, [False] * len(question) + [learns] * len(words))
                )
        return [(ids, trained) for ids, trained in sequences if any(trained)]

    def _turn(
        self, messages: Sequence[Message], options: Options | None
    ) -> tuple[list[int], list[int]]:
        """Token ids of what the model reads before the last of `messages`, and of what it is to
        write: up to the token that ends it, and not what the template writes after that."""
        before = self.template.render(messages[:-1], ask=True, options=options)
        after = self.template.render(messages, ask=False, options=options)
        opened = opened_thought(before)
        if after.startswith(before):
            answer = after.removeprefix(before)
            if opened and opened[1] not in answer:
                raise TemplateError(f"the answer has a thought that no {opened[1]!r} closes")
        elif opened and not messages[-1].get("tool_calls"):
            answer = answer_after(messages[-1], opened) + self.template.ending
        else:
            raise TemplateError(
                "the model's chat template writes this answer otherwise than it asks for it, so "
                "that it cannot be learned"
            )
        if messages[-1].get("train", True) and leaves_out(answer, thought_of(messages[-1])):
            raise TemplateError("the model's chat template leaves out the thought of this answer")
        question, words = self._apart(before, answer)
        # The answer may hold an end itself; the template's ending has the last ones.
        ends = [place for place, token in enumerate(words) if token in self.end_ids]
        of_template = sum(token in self.end_ids for token in self._behind)
        if not ends or not of_template:
            return question, [*words, self.tokenizer.eos_token_id]
        return question, words[: ends[-of_template] + 1]

    def _text_prompt(self, text: str) -> list[int]:
        """With what the tokenizer puts before a text (BOS), and not with what it appends (EOS)."""
        ids, plain = list(self.tokenizer(text)["input_ids"]), self._tokens(text)
        if plain[:1] == [self.tokenizer.bos_token_id]:
            return plain  # the text brings its own BOS
        starts = range(len(ids) - len(plain) + 1)
        start = next((n for n in starts if ids[n : n + len(plain)] == plain), len(ids))
        return ids[: start + len(plain)]

    def _apart(
        self, before: str, text: str, ids_before: list[int] | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids of `before`, tokenized by itself as the prompt that it is, and of the `text`
        that stands behind it."""
        apart, joined = self._tokens(before), self._tokens(before + text)
        same = joined[: len(apart)] == apart  # else a token would span the two
        words = joined[len(apart) :] if same else self._continued(text)
        return (apart if ids_before is None else ids_before), words

    def _continued(self, text: str) -> list[int]:
        """Token ids of a text that stands behind another one.

        A tokenizer of the SentencePiece kind puts a space before every text that it is given; a
        text that continues another has none.
        """
        anchor, joined = self._tokens("\n"), self._tokens("\n" + text)
        same = joined[: len(anchor)] == anchor
        return joined[len(anchor) :] if same else self._tokens(text)

    def _tokens(self, text: str) -> list[int]:
        """Without BOS or the like: a template has written every special token already."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _is_text(
        self, answer: str | Sequence[Message], read: Sequence[int], said: Sequence[int]
    ) -> bool:
        """Whether the last token of what a policy `said` is part of its `answer`, a text, which
        lacks padding and the ends of earlier turns."""
        if self._spelled(read, said) == answer != self._spelled(read, said[:-1]):
            return True
        if not said or said[-1] in self.end_ids or not isinstance(answer, str):
            return False
        last = self._spelled([*read, *said[:-1]], said[-1:])
        return bool(last) and answer.endswith(last)

    def _spelled(self, before: Sequence[int], ids: Sequence[int]) -> str:
        return spelled(self.tokenizer, before[-1:], ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return decoded(self.tokenizer, ids)
