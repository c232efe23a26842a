"""Random access to token samples by their index in the split."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.errors import EmptySplitError, MissingShardError
from data_pipeline.manifest import load_manifest
from data_pipeline.packing import LENGTH, NUM_BYTES, SEGMENT_COLUMNS, START
from data_pipeline.shard_reader import ShardReader, open_shards, read_rows, read_samples, stays_in_memory
from data_pipeline.shards import tar_path

Batch = dict[str, Tensor]
Indices = Sequence[int] | NDArray[np.integer]
TOKEN_ARRAYS = ("segments", "tokens")


class TokenDataset:
    """One split of a directory of token shards.

    Attributes:
        fingerprint: hash of the whole directory's content.
        sample_length: T.
        document_grid: G.
        vocab_size: token ids are below it.
        pad_token_id: stands at padding.
        eos_token_id: ends every document.
        num_bytes: UTF-8 bytes of all documents of the split.
        num_real_tokens: tokens of all documents, their end-of-text tokens included.
        num_documents: documents of the split.

    Raises:
        NotADatasetError, FormatVersionError, CorruptShardError: see `load_manifest`.
        EmptySplitError: the split has no samples.
        MissingShardError: a shard is not there.
    """

    def __init__(self, directory: str | Path, split: str) -> None:
        manifest = load_manifest(directory)
        entry = manifest.splits.get(split)
        if entry is None or not entry.samples:
            filled = [name for name, other in manifest.splits.items() if other.samples]
            raise EmptySplitError(
                f"{directory}: the split {split!r} has no samples; there are: {', '.join(filled)}"
            )
        self.directory = Path(directory)
        self.split = split
        self.manifest = manifest
        self.shards = entry.shards
        self.fingerprint = manifest.fingerprint
        self.sample_length = manifest.sample_length
        self.document_grid = manifest.document_grid
        self.vocab_size = manifest.vocab_size
        self.pad_token_id = manifest.pad_token_id
        self.eos_token_id = manifest.eos_token_id
        self.num_bytes = entry.bytes
        self.num_real_tokens = entry.real_tokens
        self.num_documents = entry.documents
        self._dtype = np.dtype(manifest.token_dtype)
        self._folder = self.directory / split
        self._first = np.cumsum([0, *(shard.samples for shard in self.shards)])
        self._stays_in_memory = stays_in_memory(sum(shard.file_bytes for shard in self.shards))
        self._check_shards()
        self._reader = lru_cache(maxsize=open_shards())(self._open)

    def _check_shards(self) -> None:
        require_shards(self._folder, [shard.name for shard in self.shards], "build")

    def __len__(self) -> int:
        return int(self._first[-1])

    def shard_range(self, shard_index: int) -> range:
        """Sample indices of one shard."""
        return range(int(self._first[shard_index]), int(self._first[shard_index + 1]))

    def locate(self, indices: Indices) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """([B] shards, [B] samples inside the shards) of sample indices.

        Raises:
            IndexError: there is no such sample.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"samples {wanted.min()}..{wanted.max()} of {len(self)} in {self._folder}")
        shards = np.searchsorted(self._first, wanted, side="right") - 1
        return shards, wanted - self._first[shards]

    def _open(self, shard_index: int) -> ShardReader:
        shard = self.shards[shard_index]
        return ShardReader(
            self._folder,
            shard.name,
            TOKEN_ARRAYS,
            shard.samples,
            shard.file_bytes,
            read_around=self._stays_in_memory,
        )

    def read_segments(self, indices: Indices) -> list[NDArray[np.int64]]:
        """[m, 6] segments of each of these samples, columns as in `packing.SEGMENT_COLUMNS`."""
        rows = read_rows(self._reader, "segments", *self.locate(indices))
        return [np.frombuffer(row, dtype="<i8").reshape(-1, len(SEGMENT_COLUMNS)) for row in rows]

    def read(self, indices: Indices) -> Batch:
        """The samples at these indices, in this order.

        Returns:
            input_ids [B, T], document_ids [B, T] (0 at padding, else the number of the segment in the sample,
            from 1), sample_index [B], num_bytes [B]; all LongTensors.

        Raises:
            CorruptShardError: names the shard and the sample whose bytes are damaged.
            IndexError: there is no such sample.
        """
        segments, tokens = read_samples(self._reader, *self.locate(indices))
        return assemble(tokens, segments, indices, self._dtype)


def assemble(
    token_rows: Sequence[bytes],
    segment_rows: Sequence[bytes],
    indices: Sequence[int] | NDArray[np.integer],
    token_dtype: np.dtype,
) -> Batch:
    """The batch of `TokenDataset.read` from the bytes of its samples."""
    size = len(token_rows)
    tokens = np.frombuffer(b"".join(token_rows), dtype=token_dtype)
    length = len(tokens) // max(size, 1)
    segments = np.frombuffer(b"".join(segment_rows), dtype="<i8").reshape(-1, len(SEGMENT_COLUMNS))
    counts = np.fromiter(map(len, segment_rows), dtype=np.int64, count=size) // segments.strides[0]
    last = counts.cumsum()
    first = last - counts  # first segment of each sample
    # Runs of equal document ids, as they lie in the whole batch: what is before a segment, the segment, ...
    edges = np.zeros(2 * len(segments) + 2, dtype=np.int64)
    begins = segments[:, START] + (np.arange(size) * length).repeat(counts)
    edges[1:-1:2], edges[2:-1:2], edges[-1] = begins, begins + segments[:, LENGTH], size * length
    ids = np.zeros(len(edges) - 1, dtype=np.int64)
    ids[1::2] = np.arange(1, len(segments) + 1) - first.repeat(counts)
    bytes_before = np.zeros(len(segments) + 1, dtype=np.int64)
    segments[:, NUM_BYTES].cumsum(out=bytes_before[1:])
    return {
        "input_ids": torch.from_numpy(tokens.astype(np.int64)).view(size, length),
        "document_ids": torch.from_numpy(ids.repeat(edges[1:] - edges[:-1])).view(size, length),
        "sample_index": torch.from_numpy(np.array(indices, dtype=np.int64)),
        "num_bytes": torch.from_numpy(bytes_before[last] - bytes_before[first]),
    }


def require_shards(folder: Path, names: Sequence[str], made_by: str) -> None:
    """Checks that the tars of all these shards are there; by one listing, since there may be 10^5.

    Args:
        made_by: what writes them, for the message.

    Raises:
        MissingShardError: names the first that is not.
    """
    there = set(os.listdir(folder)) if folder.is_dir() else set()  # noqa: PTH208 - paths would take longer
    for name in names:
        if f"{name}.tar" not in there:
            raise MissingShardError(
                f"{tar_path(folder, name)}: listed in the manifest but not there; restore it or {made_by} again"
            )
