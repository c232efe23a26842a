"""One continuation as it grows, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rqvae.generation_options import GenerationOptions
from rqvae.text_stream import TextStream, decode_text


class GeneratedRow:
    """Tokens of one prompt's continuation, and on request its text.

    Args:
        options: what the text ends at.
        end_of_text: token at which it ends; None for no such token.
        compression_factor: K, tokens per latent.
        with_text: keep `new_text`.

    Attributes:
        ids: the tokens so far, without end-of-text.
        ended: nothing more is wanted.
        num_latents: how many latents hold `ids` and their end.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: GenerationOptions,
        end_of_text: int | None,
        compression_factor: int,
        with_text: bool,
    ):
        self.ids: list[int] = []
        self.ended = False
        self._tokenizer, self._options, self._end = tokenizer, options, end_of_text
        self._factor = compression_factor
        self._places = 0
        self._new_text = ""
        self._stream: TextStream | None = None
        if with_text or options.stop:
            self._stream = TextStream(tokenizer, options.stop, options.min_new_tokens)

    @property
    def num_latents(self) -> int:
        """See the class."""
        return -(-self._places // self._factor)

    def extend(self, drawn: Sequence[int]) -> bool:
        """Take the tokens of further latents, negative at places without one; has the text ended?"""
        ids, places = self._wanted(drawn)
        if self._stream is not None:
            self._new_text += self._stream.push(ids)
            if self._stream.stopped:
                kept = self._stream.num_tokens - len(self.ids)
                ids, self._places, self.ended = ids[:kept], places[kept - 1], True
        self.ids += ids
        if self.ended:
            self.end()
        return self.ended

    def end(self) -> None:
        """No more tokens come."""
        self.ended = True
        if self._stream is not None:
            self._new_text += self._stream.finish()

    def new_text(self) -> str:
        """Text that has become certain since the last call."""
        text, self._new_text = self._new_text, ""
        return text

    def text(self) -> str:
        """All of the text; to be asked for at the end."""
        return decode_text(self._tokenizer, self.ids) if self._stream is None else self._stream.text

    def _wanted(self, drawn: Sequence[int]) -> tuple[list[int], list[int]]:
        """The tokens up to the end, if it is there, and how many places there are up to each."""
        ids: list[int] = []
        places: list[int] = []
        for token in drawn:
            self._places += 1
            count = len(self.ids) + len(ids)
            if token == self._end and count >= self._options.min_new_tokens:
                self.ended = True
                break
            if token >= 0 and token != self._end:
                ids.append(token)
                places.append(self._places)
                if count + 1 == self._options.max_new_tokens:
                    self.ended = True
                    break
        return ids, places
