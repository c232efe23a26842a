"""The text of tokens that come a few at a time."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
"""What a tokenizer decodes the bytes of a character to that are not all there."""


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens, as it is: a tokenizer that tidies up spaces looks at what comes later."""
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


class TextStream:
    """Text of one row as far as it is certain: no half of a character, and nothing that may begin a stop string.

    All pieces together are exactly the text of all tokens, up to the stop string that is complete first, however the
    tokens are cut into calls of `push`.

    Args:
        stop: strings at which the text ends; they are no part of it.
        exempt_tokens: a stop string that is complete within so many tokens ends nothing.

    Attributes:
        stopped: a stop string has been found; there is nothing more to push.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), exempt_tokens: int = 0):
        self.stopped = False
        self._tokenizer, self._stop, self._exempt = tokenizer, stop, exempt_tokens
        self._ids: list[int] = []
        self._text = ""
        self._shown = 0
        self._searched = 0
        # Tokens are decoded anew from `_window` on, of whose text the first `_in_window` characters are known.
        # Both are at whole characters, and some text goes before, as a first token may lose its space.
        self._window, self._clean, self._in_window = 0, 0, 0

    @property
    def num_tokens(self) -> int:
        """How many tokens have been taken: with a stop string, those up to the one that completes it."""
        return len(self._ids)

    @property
    def text(self) -> str:
        """All of it so far."""
        return self._text

    def push(self, ids: Sequence[int]) -> str:
        """Take further tokens and give the text that has become certain, possibly none."""
        first = max(0, min(len(ids), self._exempt - len(self._ids)))
        if first:
            self._take(ids[:first], searches=False)
        if first < len(ids):
            self._take(ids[first:], searches=True)
        return self._show(len(self._text) - (0 if self.stopped else self._possible_beginning()))

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        if not self.stopped:
            decoded = self._decoded(self._ids)
            self._text += decoded[self._in_window :]
            self._in_window = len(decoded)
            if len(self._ids) > self._exempt:
                self._search()
        return self._show(len(self._text))

    def _decoded(self, ids: Sequence[int]) -> str:
        return decode_text(self._tokenizer, ids[self._window :])

    def _show(self, end: int) -> str:
        piece = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _take(self, ids: Sequence[int], searches: bool) -> None:
        before = len(self._text)
        known = len(self._ids)
        self._ids.extend(ids)
        decoded = self._decoded(self._ids)
        complete = decoded.rstrip(_INCOMPLETE)
        self._text += complete[self._in_window :]
        if not searches:
            self._searched = len(self._text)
        elif (end := self._search()) is not None:
            # Which token was it?
            for count in range(known + 1, len(self._ids) + 1):
                length = before + len(self._decoded(self._ids[:count]).rstrip(_INCOMPLETE)) - self._in_window
                if length >= end:
                    self._ids = self._ids[:count]
                    break
            return
        self._in_window = len(complete)
        if complete == decoded:
            self._window, self._clean = self._clean, len(self._ids)
            self._in_window = len(self._decoded(self._ids))

    def _search(self) -> int | None:
        """Cut the text at the stop string that ends first behind what was searched before; where did it end?"""
        found: list[tuple[int, int]] = []
        for stop in self._stop:
            start = self._text.find(stop, max(0, self._searched - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start))
        self._searched = len(self._text)
        if not found:
            return None
        end, start = min(found)
        self._text, self.stopped = self._text[:start], True
        return end

    def _possible_beginning(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = min(len(self._text) - self._shown, max(map(len, self._stop), default=1) - 1)
        for length in range(longest, 0, -1):
            ending = self._text[-length:]
            if any(stop.startswith(ending) and stop != ending for stop in self._stop):
                return length
        return 0
