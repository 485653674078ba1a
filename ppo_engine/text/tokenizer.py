"""Tokenizers: with an EOS token, and a pad token that differs from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ppo_engine.errors import UserError
from ppo_engine.messages import reason, untrusted

# Special tokens that models ship for padding or leave unused, tried when pad is missing or is EOS.
_PAD_CANDIDATES = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|fim_pad|>")
_SPLIT = 8  # tokens that may spell one character
_PROBE_TEXT = "Is 2 + 2 = 4?\nYes, it is."


def load_tokenizer(path: str, *, trust: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, padding on the left and with a pad token other than EOS; with
    `trust`, by code that comes with it.

    A pad token equal to EOS hides the end of a response from every model that finds the last
    token by its id, so another special token is used for padding. Where a model has none, one is
    added: `resize_embeddings` makes room for it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    except Exception as error:  # what is in the files may fail anywhere within the library
        raise UserError(
            f"Could not load a tokenizer from {path!r}: {reason(error)}{untrusted(error)}"
        ) from error
    separate_pad_from_eos(tokenizer)
    tokenizer.padding_side = "left"
    return tokenizer


def separate_pad_from_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a pad token other than EOS and BOS; one without EOS is a UserError."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no EOS token, so a response could "
            "never end; set one in its tokenizer_config.json."
        )
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in taken:
        return
    vocabulary = tokenizer.get_vocab()
    known = [token for token in _PAD_CANDIDATES if token in vocabulary]
    unknown = [tokenizer.unk_token] if tokenizer.unk_token_id not in taken | {None} else []
    tokenizer.add_special_tokens({"pad_token": (known + unknown + ["<|pad|>"])[0]})


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens, special ones included."""
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def spelled(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> str:
    """What `ids` add to the text of the tokens `before`: by themselves they would lose the space
    that a token of the SentencePiece kind begins with."""
    known, longer = decoded(tokenizer, before), decoded(tokenizer, [*before, *ids])
    # `before` may end within a character.
    return longer.removeprefix(known) if longer.startswith(known) else decoded(tokenizer, ids)


def spellings(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], marked: Sequence[bool], window: range
) -> Iterator[tuple[range, str]]:
    """`(tokens, text)` of the tokens in the `window`: one each, or those, all of them `marked` or
    none, that spell a character together."""
    start = window.start
    for stop in range(window.start + 1, window.stop + 1):
        # The first is spelled as behind itself.
        before = ids[max(0, start - 1) : start] or ids[:1]
        text = spelled(tokenizer, before, ids[start:stop])
        last = stop == window.stop or stop - start == _SPLIT
        if text.endswith("\ufffd") and not last and marked[stop] == marked[start]:
            continue
        yield range(start, stop), text
        start = stop


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token; of those that spell a character together, the last has all of it."""
    found: list[str] = []
    for tokens, text in spellings(tokenizer, ids, [False] * len(ids), range(len(ids))):
        found += [*[""] * (len(tokens) - 1), text]
    return found


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether token ids made by one, special tokens included, mean the same to the other."""
    return a is b or (
        a.get_vocab() == b.get_vocab()
        and a.eos_token_id == b.eos_token_id
        and a.chat_template == b.chat_template
        and a(_PROBE_TEXT)["input_ids"] == b(_PROBE_TEXT)["input_ids"]
    )
