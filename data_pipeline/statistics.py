"""Numbers about a split that the manifest does not hold: lengths of documents, and what packing costs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.dataset import TokenDataset
from data_pipeline.packing import DOCUMENT, LENGTH

_SAMPLES_AT_A_TIME = 4096


class SplitStatistics(NamedTuple):
    """What `stats` reports of one split.

    Attributes:
        bytes_per_token: UTF-8 bytes of text for every real token.
        padding_fraction: share of all positions that hold no real token.
        segments_per_document: 1 where no document is cut at the end of a sample.
        length_histogram: documents by token count; the key 2^n counts lengths in [2^n, 2^(n+1)).
    """

    split: str
    samples: int
    documents: int
    real_tokens: int
    bytes_per_token: float
    padding_fraction: float
    mean_document_tokens: float
    segments_per_document: float
    length_histogram: dict[int, int]

    def expected_padding(self, document_grid: int) -> float:
        """Share of padding that these documents would have on a grid of G positions, without the last sample.

        A document of n tokens takes G * ceil((r + n) / G) positions; over the phases r in [0, G), all equally
        likely, that is n + G - 1 in the mean.
        """
        return (document_grid - 1) / (self.mean_document_tokens + document_grid - 1)


def split_statistics(directory: str | Path, split: str) -> SplitStatistics:
    """Reads the segments of a whole split; holds 16 bytes for each in memory.

    Raises:
        DatasetError: as `TokenDataset`.
    """
    dataset = TokenDataset(directory, split)
    parts = []
    for first in range(0, len(dataset), _SAMPLES_AT_A_TIME):
        samples = range(first, min(first + _SAMPLES_AT_A_TIME, len(dataset)))
        parts.append(np.concatenate(dataset.read_segments(samples))[:, [DOCUMENT, LENGTH]])
    segments = np.concatenate(parts)
    # the segments of a document follow one another, so each change of the number begins a new one
    begins = np.flatnonzero(np.diff(segments[:, 0], prepend=-1))
    tokens = np.add.reduceat(segments[:, 1], begins)
    bins, counts = np.unique(np.floor(np.log2(tokens)).astype(int), return_counts=True)
    positions = len(dataset) * dataset.sample_length
    return SplitStatistics(
        split=split,
        samples=len(dataset),
        documents=dataset.num_documents,
        real_tokens=dataset.num_real_tokens,
        bytes_per_token=dataset.num_bytes / dataset.num_real_tokens,
        padding_fraction=1 - dataset.num_real_tokens / positions,
        mean_document_tokens=float(tokens.mean()),
        segments_per_document=len(segments) / len(tokens),
        length_histogram={1 << int(power): int(count) for power, count in zip(bins, counts, strict=True)},
    )
