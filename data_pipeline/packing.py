"""Documents on the chunk grid: phases, cutting, and the fixed-length samples they are laid into.

A document is its text tokens and one end-of-text token. It is padded on the left by a phase r in [0, G),
drawn from (seed, document id), and on the right to a multiple of the grid G. What does not fit into the
sample goes on at the start of the next one, with phase 0: the cut falls on the grid, so no chunk of K tokens
(K divides G) ever holds two documents and none is lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Columns of a segment row, int64. `start` is the position of the first real token, so the chunk grid begins
# at start - phase; `length` counts the end-of-text token where the segment holds it, and no padding.
SEGMENT_COLUMNS = ("row", "start", "length", "phase", "num_bytes", "document")
ROW, START, LENGTH, PHASE, NUM_BYTES, DOCUMENT = range(len(SEGMENT_COLUMNS))


def document_phase(seed: int, document_id: str, document_grid: int) -> int:
    """Left padding r in [0, document_grid) of a document: the same wherever and whenever it is built."""
    digest = hashlib.blake2b(document_id.encode(), digest_size=8, key=b"phase-%d" % seed).digest()
    return int.from_bytes(digest, "little") % document_grid


class PackedSample(NamedTuple):
    """One finished sample.

    tokens: [T] of the packer's dtype, the pad token at padding.
    segments: [m, 6] int64, columns as in `SEGMENT_COLUMNS`, `row` 0; empty for a sample of padding only.
    documents: documents that begin in this sample.
    """

    tokens: NDArray[np.unsignedinteger]
    segments: NDArray[np.int64]
    documents: int


@dataclass
class Packer:
    """Lays documents one after another into samples of `sample_length` tokens.

    Args:
        sample_length: T, a multiple of `document_grid`.
        document_grid: G.
        pad_token_id: fills everything that is not a document's token.
        dtype: of the token rows.
        first_document: number of the first document.
    """

    sample_length: int
    document_grid: int
    pad_token_id: int
    dtype: np.dtype
    first_document: int = 0
    _tokens: NDArray[np.unsignedinteger] = field(init=False)
    _segments: list[tuple[int, int, int, int, int, int]] = field(init=False, default_factory=list)
    _cursor: int = field(init=False, default=0)
    _started: int = field(init=False, default=0)
    _document: int = field(init=False)

    def __post_init__(self) -> None:
        self._document = self.first_document
        self._tokens = self._blank()

    def _blank(self) -> NDArray[np.unsignedinteger]:
        return np.full(self.sample_length, self.pad_token_id, dtype=self.dtype)

    def add(
        self, tokens: NDArray[np.integer], phase: int, num_bytes: int, bytes_before: Callable[[int], int]
    ) -> list[PackedSample]:
        """The samples that this document completes.

        Args:
            tokens: the document with its end-of-text token.
            phase: padding before it, in [0, G).
            num_bytes: UTF-8 bytes of its text.
            bytes_before: bytes of the text that the first i tokens cover; asked only where the document is
                cut.
        """
        finished = []
        done, bytes_done = 0, 0
        self._started += 1
        while done < len(tokens):
            start = self._cursor + phase
            length = min(len(tokens) - done, self.sample_length - start)
            last = done + length == len(tokens)
            bytes_until = num_bytes if last else max(bytes_done, bytes_before(done + length))
            self._tokens[start : start + length] = tokens[done : done + length]
            self._segments.append((0, start, length, phase, bytes_until - bytes_done, self._document))
            done, bytes_done = done + length, bytes_until
            self._cursor = -(-(start + length) // self.document_grid) * self.document_grid
            phase = 0
            if self._cursor == self.sample_length:
                finished.append(self._finish())
        self._document += 1
        return finished

    def flush(self) -> list[PackedSample]:
        """The last sample, filled with padding; none if nothing is under way."""
        return [self._finish()] if self._segments else []

    def _finish(self) -> PackedSample:
        sample = PackedSample(self._tokens, np.array(self._segments, dtype=np.int64), self._started)
        self._tokens, self._segments, self._cursor, self._started = self._blank(), [], 0, 0
        return sample
