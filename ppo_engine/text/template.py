"""The chat template of a tokenizer: messages to text, and what can be known of that text.

What a message or a row holds beside role and content reaches the template. What the template would
leave out in silence (a role it does not know, tools, a thought) is a `TemplateError`.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.meta
import jinja2.nodes

from ppo_engine.errors import UserError
from ppo_engine.messages import first_line
from ppo_engine.text.bounds import CHARACTERS, UnboundedError, bounded, check_length
from ppo_engine.text.prompt import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Given = tuple[Sequence[Message], "Options"]
Options = Mapping[str, Any]  # what a row hands to the template: `tools`, and arguments of its own

_ANSWER = "An answer whose words every template leaves as they are."
_STOCK = [{"role": "user", "content": "A question."}]
# Arguments that the rendering sets itself, or takes from elsewhere.
RESERVED = {
    "messages", "conversation", "tools", "add_generation_prompt", "continue_final_message",
    "tokenize",
}  # fmt: skip
# Keys under which data sets and templates have what a model thought before it answered.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# `<think>` or `[THINK]` or `<|START_THINKING|>`, which `_closing` closes.
_TAG = (
    r"(?:<(?P<xml>[\w:-]*(?:think|thought|reason)[\w:-]*)>"
    r"|\[(?P<square>THINK)\]|<\|START_THINKING\|>)"
)
_OPENING, _BEGINNING = re.compile(_TAG + r"\s*\Z"), re.compile(r"\s*" + _TAG)
_OWN = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)  # a thought that begins an answer
_ALWAYS_SEEN = {"role", "content", "train", "tool_calls", *THOUGHTS}  # or an error
_FOR_PROGRAMS = {("tool", "name"), ("tool", "tool_call_id")}
_DATE_CODES = "aAbBcdeFGHIjmMpSTuUVwWxXyY"  # of `strftime`
_GENERATION = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")  # a tag of transformers' own
_CLOSING = re.compile(r"</think>|\[/THINK\]|<\|END_THINKING\|>")
_WORDS = re.compile(r"\w+")


class TemplateError(Exception):
    """Messages that the chat template refuses, or of which it would lose a part; `reason` is the
    same for all with this problem, `detail` is that of these."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason + detail)
        self.reason = reason
        self.detail = detail


class ChatTemplate:
    """The chat template of `tokenizer`, with the `arguments` that every rendering gets.

    `date` is what `strftime_now` of a template shows: a run keeps its date, so that neither
    midnight nor a resumption changes its prompts. By default today.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        arguments: Options | None = None,
        date: datetime.date | None = None,
        *,
        lenient: bool = False,
    ) -> None:
        """`lenient`: arguments that the template does not know are left out. Otherwise they are
        mistakes: a `UserError` here, a `TemplateError` in a row's options."""
        self.tokenizer = tokenizer
        self._shows: dict[tuple[str, str], bool] = {}  # a role's keys
        self._seen: set[tuple[Any, ...]] = set()  # the kinds of messages and tools that it renders
        self._repeats: dict[str, bool] = {}  # by source: `_repeats_thoughts`
        self.date = date or datetime.date.today()
        self.lenient = lenient
        self.arguments = dict(arguments or {})
        if self.arguments and not lenient:
            if not self:
                raise UserError(
                    "data.chat_template_kwargs needs a chat template, which the tokenizer of "
                    f"{tokenizer.name_or_path!r} lacks: leave it unset, or use a chat model."
                )
            if wrong := sorted(self.arguments.keys() & RESERVED):
                raise UserError(f"data.chat_template_kwargs must not set {wrong[0]!r}.")
            try:
                self._known(self.arguments, str(tokenizer.get_chat_template()))
            except TemplateError as error:
                raise UserError(f"data.chat_template_kwargs: {error}.") from None
            except UnboundedError as error:
                raise self._refusal(error) from None

    def __bool__(self) -> bool:
        """Whether the tokenizer has one."""
        return bool(self.tokenizer.chat_template)

    def require(self) -> None:
        """Raise a UserError unless the tokenizer has a chat template."""
        if not self:
            raise UserError(
                f"Chat messages were given, but the tokenizer of {self.tokenizer.name_or_path!r} "
                "has no chat template: give prompts as plain text, or use a chat model."
            )

    def render(
        self,
        messages: Sequence[Message],
        *,
        ask: bool,
        options: Options | None = None,
        sampled: bool = False,
    ) -> str:
        """The messages as text, where `ask` up to the point where the model's answer begins.

        Raises `TemplateError`; where the last messages were `sampled`, not for words of theirs
        that the template leaves out.
        """
        self.require()
        options = options or {}
        text = self._unchecked(messages, ask, options)
        self._check_tools(text, messages, options)
        if not sampled:
            self._check_words(text, messages, options)
        return text

    def _unchecked(self, messages: Sequence[Message], ask: bool, options: Options) -> str:
        # Templates are programs: a message that they did not expect fails in any way.
        try:
            with bounded():
                return self._render(messages, ask, options)
        except TemplateError:
            raise
        except UnboundedError as error:
            raise self._refusal(error) from None
        except Exception as error:
            detail = first_line(error) or type(error).__name__
            raise TemplateError("refused by the model's chat template", f" ({detail})") from error

    def _check_tools(self, text: str, messages: Sequence[Message], options: Options) -> None:
        """Raise a TemplateError for tools, or calls of them, that the `text` leaves out."""
        calls = [call for message in messages for call in message.get("tool_calls") or ()]
        without = [{k: v for k, v in message.items() if k != "tool_calls"} for message in messages]
        no_tools = {name: value for name, value in options.items() if name != "tools"}
        for what, found, changed in (
            ("tool calls", calls, (without, options)),
            ("tools", options.get("tools") or (), (messages, no_tools)),
        ):
            names = [str(item.get("function", item).get("name", "")) for item in found]
            lost = next((name for name in names if name not in text), None)
            # A name may stand in the text for another reason, such as in the question.
            kind = what, messages[0]["role"] if messages else ""
            if lost is None and names and not self._sees(kind, (messages, options), changed):
                lost = names[0]
            if lost is not None:
                raise TemplateError(
                    f"the model's chat template renders no {what}, so they would be lost",
                    f" ({lost})",
                )

    def _check_words(self, text: str, messages: Sequence[Message], options: Options) -> None:
        """The same for messages."""
        for index, message in enumerate(messages):
            # Templates may drop thoughts of former turns, and quote what a tool has answered.
            said = _CLOSING.split(str(message["content"]))[-1]
            longest = max(_WORDS.findall(said), key=len, default="")
            other = {**message, "content": f"{message['content']} And more."}
            changed = [*messages[:index], other, *messages[index + 1 :]], options
            role, calls = message["role"], bool(message.get("tool_calls"))
            kind = role, calls, index == 0, index == len(messages) - 1
            # A word may stand there for another reason, such as in the name of a role.
            if longest not in text or (
                longest and not self._sees(kind, (messages, options), changed)
            ):
                raise TemplateError(
                    f"the model's chat template leaves out messages of the role {role!r}",
                    f" (message {index})",
                )

    def _sees(self, kind: tuple[Any, ...], given: _Given, changed: _Given) -> bool:
        """Whether what is changed, of this kind, is rendered. One kind is asked for until it has
        been seen once: what is left out may depend on more than the kind."""
        if kind not in self._seen and self._tells_apart(given, changed):
            self._seen.add(kind)
        return kind in self._seen

    def _tells_apart(self, given: _Given, changed: _Given) -> bool:
        try:
            text, other = (self._unchecked(x, False, options) for x, options in (given, changed))
        except TemplateError:  # what it refuses, it looks at
            return True
        return text != other

    def _render(self, messages: Sequence[Message], ask: bool, options: Options) -> str:
        source = str(self.tokenizer.get_chat_template(tools=options.get("tools")))
        _looked_at(source)  # or an UnboundedError
        arguments = self._known({**self.arguments, **options}, source)
        apart = [_apart(message) for message in messages]
        if apart != list(messages) and self._repeats_thoughts(source):
            messages = apart
        prepared = [_prepared(message, source) for message in messages]
        dated = self._clock + source if "strftime_now" in source else source
        try:
            text = self._apply(prepared, ask, dated, arguments)
        except TypeError:  # some families' write the arguments of a call as they come: as text
            text = self._apply(_with_text_arguments(prepared), ask, dated, arguments)
        if len(text) > CHARACTERS:
            raise UnboundedError(f"writes {len(text):,} characters")
        return text

    def _repeats_thoughts(self, source: str) -> bool:
        """Whether a thought that begins an answer's content is written behind another, empty one:
        the template knows thoughts by a key alone."""
        if source not in self._repeats:
            self._repeats[source] = False
            inside = {"role": "assistant", "content": f"<think>\nHm.\n</think>\n\n{_ANSWER}"}
            try:
                counts = [
                    self._apply([*_STOCK, _prepared(x, source)], False, source, {}).count(
                        "</think>"
                    )
                    for x in (inside, _apart(inside))
                ]
            except UnboundedError:
                raise
            except Exception:  # templates are programs; what this one refuses is told elsewhere
                return False
            self._repeats[source] = counts[0] > counts[1] > 0
        return self._repeats[source]

    def _refusal(self, error: UnboundedError) -> UserError:
        return UserError(
            f"The chat template of {self.tokenizer.name_or_path!r} {error}: no conversation needs "
            "that. Correct its chat_template.jinja or tokenizer_config.json, or take another model."
        )

    def unseen(self, messages: Sequence[Message], options: Options | None = None) -> set[str]:
        """The keys of messages of which the template shows nothing: without them the text is the
        same. Not those by which programs tell the answers of tools apart."""
        found = set()
        for index, message in enumerate(messages):
            for key in message.keys() - _ALWAYS_SEEN:
                role = message["role"]
                if (role, key) in _FOR_PROGRAMS:
                    continue
                bare = {name: value for name, value in message.items() if name != key}
                if (role, key) not in self._shows:
                    changed = [*messages[:index], bare, *messages[index + 1 :]]
                    self._shows[role, key] = self._tells_apart(
                        (messages, options or {}), (changed, options or {})
                    )
                if not self._shows[role, key]:
                    found.add(key)
        return found

    def _apply(self, messages: list[Message], ask: bool, source: str, arguments: Options) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=ask,
                chat_template=source,
                **arguments,
            )
        )

    @cached_property
    def ending(self) -> str:
        """What the template writes behind the words of a conversation's last answer, such as
        `<|im_end|>` and a newline."""
        return self._around_answer[1]

    @cached_property
    def _lead(self) -> str:
        """What it writes between the point where an answer is asked for and the answer's words,
        such as a space, or the name of a channel."""
        before = self.render(_STOCK, ask=True)
        after = self._around_answer[0]
        return after.removeprefix(before) if after.startswith(before) else ""

    @cached_property
    def _around_answer(self) -> tuple[str, str]:
        """What it writes before and behind the words of an answer; nothing where it refuses a
        question with its answer, for which it will refuse anything."""
        answer = {"role": "assistant", "content": _ANSWER}
        try:
            before, _, behind = self.render([*_STOCK, answer], ask=False).rpartition(_ANSWER)
        except TemplateError:
            return "", ""
        return before, behind

    @cached_property
    def opening(self) -> str:
        """What it writes where an answer is asked for and not before the words of one that is
        there: what it has opened for the model to go on with."""
        given = self._around_answer[0]
        asked = self.render(_STOCK, ask=True) if given else ""
        return asked.removeprefix(given) if asked.startswith(given) else ""

    def words(self, sampled: str) -> str:
        """The words of a sampled answer, which has what the template writes before them, too."""
        # Where it writes an empty thought, a sampled answer may have its own in that place.
        if self._lead.strip() and not _CLOSING.search(self._lead):
            return sampled.rpartition(self._lead)[2]
        return sampled.removeprefix(self._lead)

    def between(
        self, messages: Sequence[Message], reply: Message, options: Options | None = None
    ) -> str:
        """What stands between the words of an answer to `messages` and those of the next answer,
        where `reply` comes in between."""
        answer = {"role": "assistant", "content": _ANSWER}
        text = self.render([*messages, answer, reply], ask=True, options=options)
        return text.rpartition(_ANSWER)[2]

    def _known(self, arguments: Options, source: str) -> dict[str, Any]:
        """Those of the arguments that the template `source` looks at; raises for others."""
        taken = sorted((arguments.keys() & RESERVED) - {"tools"})
        if taken:
            raise TemplateError(f"the model's chat template is given {taken[0]!r} already")
        known = {
            name: value
            for name, value in arguments.items()
            if name == "tools" or name in _looked_at(source)
        }
        unknown = [name for name in arguments if name not in known]
        if unknown and not self.lenient:
            raise TemplateError(f"the model's chat template has no variable {unknown[0]!r}")
        return known

    @cached_property
    def _clock(self) -> str:
        """`strftime_now` that shows the date. A macro: transformers lets no function of ours in."""
        moment = datetime.datetime.combine(self.date, datetime.time())
        codes = [f"%{flag}{letter}" for flag in ("-", "") for letter in _DATE_CODES]
        filters = "".join(f"|replace({code!r}, {moment.strftime(code)!r})" for code in codes)
        macro = f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}"
        return macro + "{{ '' }}"  # keeps a newline behind it, which the end of a block would take


def opened_thought(text: str) -> tuple[str, str] | None:
    """`("<think>\\n", "</think>")` where `text` ends with a thought that is still open."""
    found = _OPENING.search(text)
    return (found[0], _closing(found)) if found else None


def is_thinking(answer: str) -> bool:
    """Whether an answer begins with a thought and has been cut off in it."""
    found = _BEGINNING.match(answer)
    return found is not None and _closing(found) not in answer


def _closing(opening: re.Match[str]) -> str:
    if opening["xml"]:
        return f"</{opening['xml']}>"
    return "[/THINK]" if opening["square"] else "<|END_THINKING|>"


def answer_after(message: Message, opened: tuple[str, str]) -> str:
    """The words of an answer to a prompt that has opened a thought: the thought, what closes it,
    and the rest. An answer without a thought closes it at once. Raises `TemplateError`."""
    opening, closing = opened
    content = str(message["content"])
    thought = next((str(message[key]) for key in THOUGHTS if message.get(key)), None)
    if thought is None and closing not in content and content.lstrip().startswith(opening.strip()):
        raise TemplateError(f"the answer has a thought that no {closing!r} closes")
    if thought is None and closing in content:
        return content.lstrip().removeprefix(opening.strip()).lstrip("\n")
    return f"{(thought or '').strip()}\n{closing}\n\n{content.lstrip()}"


def thought_of(message: Message) -> str:
    """What was thought before a message's answer, also where its content has it; "" if nothing."""
    thought = next((str(message[key]) for key in THOUGHTS if message.get(key)), None)
    before, *rest = _CLOSING.split(str(message["content"]), maxsplit=1)
    inside = re.split(r"<think>|\[THINK\]|<\|START_THINKING\|>", before)[-1] if rest else ""
    return inside if thought is None else thought


def leaves_out(answer: str, thought: str) -> bool:
    """Whether the words of a `thought` do not stand in a rendered `answer`."""
    return " ".join(_WORDS.findall(thought)) not in " ".join(_WORDS.findall(answer))


def _apart(message: Message) -> Message:
    """The message with a thought that its content begins with under a key of its own."""
    found = _OWN.match(str(message["content"])) if message["role"] == "assistant" else None
    if found is None or any(message.get(key) for key in THOUGHTS):
        return message
    return {**message, "content": message["content"][found.end() :], THOUGHTS[0]: found[1].strip()}


def _prepared(message: Message, source: str) -> Message:
    """The message under the keys that the template `source` looks at."""
    found = {key: value for key, value in message.items() if key not in (*THOUGHTS, "train")}
    thought = next((message[key] for key in THOUGHTS if message.get(key)), None)
    if thought is None:
        return found
    key = next((key for key in THOUGHTS if key in _looked_at(source)), None)
    if key is not None:
        return {**found, key: thought}
    if "</think>" not in source:
        raise TemplateError(
            "the model's chat template renders no thoughts (a message's "
            f"{' or '.join(map(repr, THOUGHTS))}), so they would be lost: put them into 'content'"
        )
    return {**found, "content": f"<think>\n{thought}\n</think>\n\n{message['content']}"}


def _with_text_arguments(messages: list[Message]) -> list[Message]:
    """The same, with the arguments of tool calls as JSON text."""

    def written(call: dict[str, Any]) -> dict[str, Any]:
        function = dict(call["function"])
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": function}

    return [
        {**message, "tool_calls": [written(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


@functools.lru_cache
def _looked_at(source: str) -> frozenset[str]:
    """The names of variables, keys and attributes that a template looks at; an UnboundedError for
    one that is not to be run."""
    check_length(source)
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    tree = environment.parse(_GENERATION.sub("", source))
    if tree.find(jinja2.nodes.Pow):  # nothing interrupts the computing of a huge one
        raise UnboundedError("computes powers (**), which can take forever")
    attributes = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    keys = {node.value for node in tree.find_all(jinja2.nodes.Const) if type(node.value) is str}
    return frozenset(attributes | keys | jinja2.meta.find_undeclared_variables(tree))
