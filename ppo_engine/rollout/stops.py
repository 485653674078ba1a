"""Strings at which a turn ends."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Finds the first of some strings in what is being written. It is looked for in the text, so it
    may begin and end within tokens; the token that completes it is the last."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._strings = strings
        self._longest = max(map(len, strings))

    def __call__(self, tokens: list[int], looked_at: int) -> int | None:
        """How many of the `tokens` to keep, with the one that completes a stop string; None where
        none is written. There was none in the first `looked_at`."""
        # Each token is a character or more, or a part of one in at most four bytes.
        start = max(0, looked_at - 4 * self._longest)
        if not self._is_in(tokens[start:]):
            return None
        return next(
            n for n in range(looked_at + 1, len(tokens) + 1) if self._is_in(tokens[start:n])
        )

    def _is_in(self, tokens: list[int]) -> bool:
        text = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return any(string in text for string in self._strings)
