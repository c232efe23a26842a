"""How often every code was used in a split of codes; for the commands `stats` and `inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.code_manifest import CodeManifest
from data_pipeline.shard_reader import ShardReader
from rqvae.codebook import compute_perplexity


class LevelStatistics(NamedTuple):
    """One codebook level over a split.

    Attributes:
        size: C.
        used: codes that occur.
        perplexity: exp of the entropy of how often they occur, at most C.
    """

    size: int
    used: int
    perplexity: float


def read_codes(directory: str | Path, manifest: CodeManifest, split: str) -> Iterator[NDArray[np.int64]]:
    """The codes of a split sample by sample, each [S, D], those of padding among them.

    Raises:
        DatasetError: a shard is damaged; names it and the sample.
    """
    layout = manifest.layout
    for shard in manifest.splits[split]:
        reader = ShardReader(
            Path(directory) / split, shard.name, layout.arrays, shard.samples, shard.file_bytes
        )
        for sample in range(shard.samples):
            row = reader.read("codes", [sample])[0]
            yield np.frombuffer(row, dtype=layout.dtype).reshape(layout.shape).astype(np.int64)


def level_statistics(directory: str | Path, manifest: CodeManifest, split: str) -> list[LevelStatistics]:
    """Of every level; reads the whole split. Latents of padding alone are counted too.

    Raises:
        DatasetError: a shard is damaged.
    """
    sizes = manifest.layout.codebook_sizes
    counts = [np.zeros(size, dtype=np.int64) for size in sizes]
    for codes in read_codes(directory, manifest, split):
        for level, size in enumerate(sizes):
            counts[level] += np.bincount(codes[:, level], minlength=size)
    return [
        LevelStatistics(
            size, int((counted > 0).sum()), float(compute_perplexity(torch.from_numpy(counted).double()))
        )
        for size, counted in zip(sizes, counts, strict=True)
    ]
