"""Chat templates with the shape of real families', each on a tiny tokenizer with its tokens.

Written anew and in outline: what differs between families is there (which token ends a turn, what
is refused, what becomes of former thoughts), their long system messages are not. `TEMPLATES` has
a function for each, which makes its tokenizer.

Import as `from templates import TEMPLATES, gemma` (pytest puts `tests/` on the path).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

LLAMA3 = r"""
{%- macro turn(role, text) -%}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' + text + '<|eot_id|>' -}}
{%- endmacro -%}
{%- if date_string is not defined -%}
{%- set date_string = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' -%}
{%- endif -%}
{%- set has_system = messages[0].role == 'system' -%}
{%- set system = namespace(text='Today Date: ' + date_string + '\n\n') -%}
{%- for tool in tools or [] -%}
{%- set system.text = system.text + (tool | tojson) + '\n\n' -%}
{%- endfor -%}
{%- if has_system -%}{%- set system.text = system.text + messages[0].content | trim -%}{%- endif -%}
{{- bos_token + turn('system', system.text) -}}
{%- for message in (messages[1:] if has_system else messages) -%}
{%- if message.tool_calls -%}
{%- if message.tool_calls | length != 1 -%}
{{- raise_exception('This model only supports single tool-calls at once!') -}}
{%- endif -%}
{%- set call = message.tool_calls[0].function -%}
{{- turn('assistant', {'name': call.name, 'parameters': call.arguments} | tojson) -}}
{%- elif message.role == 'tool' -%}
{{- turn('ipython', message.content | tojson) -}}
{%- else -%}
{{- turn(message.role, message.content | trim) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- endif -%}
"""

GEMMA = r"""
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{{- raise_exception('System role not supported') -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role != ('assistant' if loop.index0 % 2 else 'user') -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{%- set role = 'model' if message.role == 'assistant' else 'user' -%}
{{- '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""

PHI3 = r"""
{%- for message in messages -%}
{{- '<|' + message.role + '|>\n' + message.content + '<|end|>\n' -}}
{%- endfor -%}
{{- '<|assistant|>\n' if add_generation_prompt else eos_token -}}
"""

MISTRAL = r"""
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role != ('assistant' if loop.index0 % 2 else 'user') -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{%- if message.role == 'user' -%}
{{- '[INST] ' + message.content + ' [/INST]' -}}
{%- else -%}
{{- ' ' + message.content + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""

# Of the answers, only those after the last question of the user's keep their thoughts, and the
# very last one is given an empty thought where it has none.
QWEN3 = r"""
{%- set place = namespace(question=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set place.question = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- set has_system = messages[0].role == 'system' -%}
{%- if tools or has_system -%}
{{- '<|im_start|>system\n' + (messages[0].content if has_system else '') -}}
{%- for tool in tools or [] -%}
{{- ('\n\n# Tools\n<tools>\n' if loop.first else '') + (tool | tojson) + '\n' -}}
{{- '</tools>' if loop.last else '' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in (messages[1:] if has_system else messages) -%}
{%- set index = loop.index0 + (1 if has_system else 0) -%}
{%- set text = message.content if message.content is string else '' -%}
{%- if message.role == 'tool' -%}
{{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' else '' -}}
{{- '\n<tool_response>\n' + text + '\n</tool_response>' -}}
{{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' else '' -}}
{%- elif message.role == 'assistant' -%}
{%- set thought = '' -%}
{%- if message.reasoning_content is string -%}
{%- set thought = message.reasoning_content -%}
{%- elif '</think>' in text -%}
{%- set thought = text.split('</think>')[0].split('<think>')[-1] -%}
{%- set text = text.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\n' -}}
{%- if index > place.question and (loop.last or thought) -%}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' -}}
{%- endif -%}
{{- text -}}
{%- for call in message.tool_calls or [] -%}
{{- '\n' if text or not loop.first else '' -}}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' -}}
{%- set arguments = call.function.arguments -%}
{{- (arguments if arguments is string else arguments | tojson) + '}\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- else -%}
{{- '<|im_start|>' + message.role + '\n' + text + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}
{{- '<think>\n\n</think>\n\n' -}}
{%- endif -%}
{%- endif -%}
"""

R1 = r"""
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content -}}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- '<|User|>' + message.content -}}
{%- elif message.role == 'assistant' -%}
{{- '<|Assistant|>' + message.content.split('</think>')[-1] + eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\n' -}}{%- endif -%}
"""

# The very last answer keeps its thinking and ends as the model ends it; former ones do not.
GPTOSS = r"""
{%- set system = 'Current date: ' + strftime_now('%Y-%m-%d') + '\n\nReasoning: ' -%}
{%- set system = system + (reasoning_effort or 'medium') -%}
{{- '<|start|>system<|message|>' + system + '<|end|>' -}}
{%- set has_system = messages[0].role in ('system', 'developer') -%}
{%- if tools or has_system -%}
{{- '<|start|>developer<|message|>' -}}
{{- '# Instructions\n\n' + messages[0].content + '\n\n' if has_system else '' -}}
{%- for tool in tools or [] -%}
{{- '# Tools\n\n' if loop.first else '' -}}{{- (tool | tojson) + '\n' -}}
{%- endfor -%}
{{- '<|end|>' -}}
{%- endif -%}
{%- for message in (messages[1:] if has_system else messages) -%}
{%- if message.role == 'assistant' -%}
{%- set finished = loop.last and not add_generation_prompt -%}
{%- if message.thinking and (finished or message.tool_calls) -%}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' -}}
{%- endif -%}
{%- if message.tool_calls -%}
{%- set call = message.tool_calls[0].function -%}
{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' -}}
{{- (call.arguments | tojson) + '<|call|>' -}}
{%- else -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content -}}
{{- '<|return|>' if finished else '<|end|>' -}}
{%- endif -%}
{%- elif message.role == 'tool' -%}
{{- '<|start|>functions to=assistant<|channel|>commentary<|message|>' -}}
{{- (message.content | tojson) + '<|end|>' -}}
{%- else -%}
{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
"""


# As of Qwen3.5 and later: where an answer has no thought, an empty one stands in front of it.
OPENING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}THOUGHT"
    "<think>\n{{ thought | trim }}\n</think>\n\n{{ words }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
IN_CONTENT = (
    "{% set parts = m.content.split('</think>') %}{% set words = parts[-1].lstrip('\n') %}"
    "{% set thought = parts[0].split('<think>')[-1] if parts | length > 1 else '' %}"
)
BY_KEY = "{% set thought = m.reasoning_content or '' %}{% set words = m.content %}"


def chatml() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def llama3() -> PreTrainedTokenizerFast:
    """A date in the system turn; `<|eot_id|>` ends a turn and is EOS; a BOS before any text."""
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return begins_with_bos(_tokenizer(LLAMA3, special, eos="<|eot_id|>", bos=special[0]))


def gemma() -> PreTrainedTokenizerFast:
    """No system role, strict alternation; EOS is `<eos>`, but `<end_of_turn>` ends a turn."""
    special = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]
    return begins_with_bos(_tokenizer(GEMMA, special, eos="<eos>", bos="<bos>"))


def phi3() -> PreTrainedTokenizerFast:
    """`<|end|>` ends a turn; EOS, `<|endoftext|>`, stands once, behind a finished conversation."""
    special = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    return _tokenizer(PHI3, special, eos="<|endoftext|>")


def mistral() -> PreTrainedTokenizerFast:
    """Strict alternation, markers that are text, an answer that begins with a space."""
    return begins_with_bos(_tokenizer(MISTRAL, ["<s>", "</s>"], eos="</s>", bos="<s>"))


def qwen3() -> PreTrainedTokenizerFast:
    """ChatML with thoughts, of which former turns lose theirs, tools, and `enable_thinking`."""
    tags = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    tags += ["<tool_response>", "</tool_response>"]
    return _tokenizer(QWEN3, ["<|endoftext|>"], eos="<|im_end|>", ordinary=tags)


def opening(thought: str = IN_CONTENT) -> PreTrainedTokenizerFast:
    """A family that opens every answer's thought, and finds it by a key or in the content."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = OPENING.replace("THOUGHT", thought)
    return tokenizer


def r1() -> PreTrainedTokenizerFast:
    """The generation prompt opens a thought, and a rendered answer has none."""
    special = ["<|begin_of_sentence|>", "<|end_of_sentence|>"]
    ordinary = ["<|User|>", "<|Assistant|>", "<think>", "</think>"]
    tokenizer = _tokenizer(R1, special, eos=special[1], bos=special[0], ordinary=ordinary)
    return begins_with_bos(tokenizer)


def gptoss() -> PreTrainedTokenizerFast:
    """Channels: thinking and answer are messages of their own. An answer ends with `<|return|>`,
    a call with `<|call|>`, all else, former answers too, with `<|end|>`."""
    special = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"]
    return _tokenizer(GPTOSS, special, eos="<|return|>")


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama-2's: spaces are `▁`, one stands before any text (also what follows a special token),
    and characters outside of the vocabulary are bytes. A BOS before any text; no pad token. With
    the template of `mistral`."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += [chr(code) for code in range(0x21, 0x7F)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = MISTRAL
    return begins_with_bos(tokenizer)


def begins_with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer, which now writes a BOS before any text."""
    return _written_around(tokenizer, [tokenizer.bos_token], [])


def appends_eos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy that writes an EOS behind any text, as `add_eos_token` has it, and a BOS, if there is
    one, before it."""
    bos = [tokenizer.bos_token] if tokenizer.bos_token else []
    return _written_around(copy.deepcopy(tokenizer), bos, [tokenizer.eos_token])


def _written_around(
    tokenizer: PreTrainedTokenizerFast, before: list[str], after: list[str]
) -> PreTrainedTokenizerFast:
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join([*before, "$A", *after]),
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in (*before, *after)],
    )
    return tokenizer


def _tokenizer(
    template: str,
    special: list[str],
    eos: str,
    bos: str | None = None,
    ordinary: list[str] | None = None,
) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with further tokens, of which those that are `ordinary` stay where a text
    is decoded without special tokens."""
    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens(ordinary or [])
    tokenizer.eos_token, tokenizer.bos_token = eos, bos
    tokenizer.chat_template = template
    return tokenizer


TEMPLATES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "chatml": chatml,
    "llama3": llama3,
    "gemma": gemma,
    "phi3": phi3,
    "mistral": mistral,
    "qwen3": qwen3,
    "r1": r1,
    "gptoss": gptoss,
}
