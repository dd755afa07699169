"""From tokens to the pieces of text that a client may see: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# How many of a prompt's last tokens the first new ones are read with: tokenizers drop the space before a text's first word.
_BEFORE = 4


class Detokenizer:
    """Text of a growing list of tokens, piece by piece; a piece ends where a character does.

    Args:
        tokenizer: a Hugging Face tokenizer.
        before: the prompt that the tokens continue, where their text should join it without a seam.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(before[-_BEFORE:])
        # Text of the tokens from `begin` to `seen` was given already, and is what the next ones are read with.
        self._begin, self._seen = 0, len(self._tokens)

    def add(self, token: int) -> str:
        """The text that ``token`` makes final, often none."""
        self._tokens.append(token)
        return self._new(final=False)

    def end(self) -> str:
        """What is left, broken characters included."""
        return self._new(final=True)

    def _new(self, *, final: bool) -> str:
        known, text = self._decode(self._tokens[self._begin : self._seen]), self._decode(self._tokens[self._begin :])
        # A text that ends in a replacement character may be in the middle of a real one.
        if len(text) <= len(known) or (text.endswith("\N{REPLACEMENT CHARACTER}") and not final):
            return ""
        self._begin, self._seen = self._seen, len(self._tokens)
        return text[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class Stops:
    """Ends a text before the first of its stop strings, and holds back what could become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """The part of the text so far that is safe to show now."""
        if not self._stops:
            return text
        if self.found:
            return ""
        self._held += text
        ends = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            shown, self._held = self._held[: min(ends)], ""
            return shown
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                break
        else:
            length = 0
        shown = self._held[: len(self._held) - length]
        self._held = self._held[len(self._held) - length :]
        return shown

    def end(self) -> str:
        """What was held back for nothing."""
        shown, self._held = self._held, ""
        return shown
