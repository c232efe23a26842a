"""The same token samples in the format of each library, and its best way of reading them shuffled."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from data_pipeline import StepLoader, StreamLoader, TokenDataset
from data_pipeline.files import write_json
from data_pipeline.manifest import MANIFEST_NAME, Manifest, SourceEntry, SplitEntry
from data_pipeline.packing import SEGMENT_COLUMNS, PackedSample
from data_pipeline.shards import samples_per_member, write_token_shard

_SHARD_BYTES = 16 << 20
_MEMBER_BYTES = 8 << 10
_STREAMED_MEMBER_BYTES = 64 << 10
"""Of what is read from end to end: a member costs webdataset as much as many samples."""
_SHUFFLE = 1024
_WINDOW_BLOCKS = 128
_DOCUMENT = 700
"""Tokens of a document, about FineWeb's mean."""


class LoaderShape(NamedTuple):
    """What is read."""

    samples: int
    length: int
    batch: int


class Row(ABC):
    """A library: how its files are written, and an endless or one-epoch stream of batches of tokens."""

    name: str
    package: str
    """Distribution that it comes from."""
    install = "pip install -e .[benchmark-data]"
    """How to get what the project does not need by itself."""

    def __init__(self, directory: Path, shape: LoaderShape) -> None:
        self.directory = directory
        self.shape = shape

    @abstractmethod
    def write(self, tokens: NDArray[np.uint16]) -> None:
        """Write the samples [N, T] to `directory`.

        Raises:
            ImportError: the library is not installed.
        """

    @abstractmethod
    def batches(self, num_workers: int, seed: int, start_step: int = 0) -> Iterator[Tensor]:
        """LongTensors [B, T] of one epoch or more, shuffled."""


def _token_batch(rows: Sequence[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64))


class OurRow(Row):
    """Random access, read by threads."""

    name = "StepLoader"
    package = "rqvae-text"
    member_bytes = _MEMBER_BYTES
    in_blocks = False

    def write(self, tokens: NDArray[np.uint16]) -> None:  # noqa: D102
        length, grid = self.shape.length, 4
        starts = np.arange(0, length, min(_DOCUMENT // grid * grid, length))
        lengths = np.diff([*starts, length])
        segments = np.zeros((len(starts), len(SEGMENT_COLUMNS)), dtype=np.int64)
        segments[:, 1], segments[:, 2], segments[:, 4] = starts, lengths, 4 * lengths
        per_shard = self._chunk
        size = samples_per_member(tokens[0].nbytes, self.member_bytes)
        shards = [
            write_token_shard(
                self.directory / "train",
                f"shard-{first // per_shard:06d}",
                f"{first // per_shard:06d}-",
                [
                    PackedSample(row, segments.copy(), len(starts))
                    for row in tokens[first : first + per_shard]
                ],
                size,
            )
            for first in range(0, len(tokens), per_shard)
        ]
        manifest = Manifest.create(
            sample_length=length,
            document_grid=grid,
            samples_per_member=size,
            token_dtype="<u2",  # noqa: S106
            vocab_size=1 << 16,
            eos_token_id=0,
            pad_token_id=1,
            tokenizer_sha256="",
            seed=0,
            source=SourceEntry(description={}, content_hash="", identity=""),
            config={},
            splits={"train": SplitEntry.of(shards)},
        )
        write_json(self.directory / MANIFEST_NAME, manifest.model_dump(mode="json"))

    @property
    def _chunk(self) -> int:
        """Samples in 16 MiB, the size of everybody's files."""
        return max(1, _SHARD_BYTES // (2 * self.shape.length))

    def batches(self, num_workers: int, seed: int, start_step: int = 0) -> Iterator[Tensor]:  # noqa: D102
        with StepLoader(
            TokenDataset(self.directory, "train"),
            global_batch_size=self.shape.batch,
            seed=seed,
            start_step=start_step,
            num_workers=num_workers,
            shuffle_block=self._chunk // _WINDOW_BLOCKS or 1 if self.in_blocks else None,
            shuffle_window=_WINDOW_BLOCKS,
        ) as loader:
            for _, batch in loader:
                yield batch["input_ids"]


class OurBlockRow(OurRow):
    """Random access in blocks of neighbours, shuffled over as many samples as one of litdata's chunks holds."""

    name = "StepLoader, blocks"
    in_blocks = True


class OurStreamRow(OurRow):
    """In sequence, through webdataset."""

    name = "StreamLoader"
    member_bytes = _STREAMED_MEMBER_BYTES

    def batches(self, num_workers: int, seed: int, start_step: int = 0) -> Iterator[Tensor]:  # noqa: D102
        with StreamLoader(
            str(self.directory),
            global_batch_size=self.shape.batch,
            seed=seed,
            start_step=start_step,
            num_workers=num_workers,
            streams=self.shape.batch,
            shuffle_buffer=_SHUFFLE // self.shape.batch,
        ) as loader:
            for _, batch in loader:
                yield batch["input_ids"]


class WebDatasetRow(Row):
    """Stock webdataset: .npy members of many samples each, shuffled shards and a shuffle buffer."""

    name = package = "webdataset"

    def write(self, tokens: NDArray[np.uint16]) -> None:  # noqa: D102
        import webdataset

        self.directory.mkdir(parents=True)
        size = samples_per_member(tokens[0].nbytes, _STREAMED_MEMBER_BYTES)
        pattern = str(self.directory / "shard-%06d.tar")
        with webdataset.ShardWriter(pattern, maxsize=_SHARD_BYTES, verbose=0) as writer:
            for first in range(0, len(tokens), size):
                buffer = io.BytesIO()
                np.save(buffer, tokens[first : first + size], allow_pickle=False)
                writer.write({"__key__": f"{first:09d}", "tokens.npy": buffer.getvalue()})

    def batches(self, num_workers: int, seed: int, start_step: int = 0) -> Iterator[Tensor]:  # noqa: D102
        import webdataset

        def rows(groups: Iterator[dict[str, Any]]) -> Iterator[NDArray[np.uint16]]:
            for group in groups:
                yield from np.load(io.BytesIO(group["tokens.npy"]), allow_pickle=False)

        urls = sorted(str(path) for path in self.directory.glob("*.tar"))
        dataset = (
            webdataset.WebDataset(urls, shardshuffle=len(urls), seed=seed, empty_check=False)
            .compose(rows)
            .shuffle(_SHUFFLE, seed=seed)
            .batched(self.shape.batch, collation_fn=_token_batch, partial=False)
        )
        loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)
        return islice(iter(loader), start_step, None)


class LitDataRow(Row):
    """litdata's TokensLoader over uncompressed chunks, mapped into memory."""

    name = package = "litdata"

    def write(self, tokens: NDArray[np.uint16]) -> None:  # noqa: D102
        from litdata.streaming import Cache, TokensLoader

        cache = Cache(
            str(self.directory),
            chunk_bytes=_SHARD_BYTES,
            item_loader=TokensLoader(block_size=self.shape.length),
        )
        for number, row in enumerate(tokens):
            cache[number] = row
        cache.done()
        cache.merge()

    def batches(self, num_workers: int, seed: int, start_step: int = 0) -> Iterator[Tensor]:  # noqa: D102
        from litdata import StreamingDataLoader, StreamingDataset
        from litdata.streaming import TokensLoader

        dataset = StreamingDataset(
            str(self.directory),
            item_loader=TokensLoader(block_size=self.shape.length),
            shuffle=True,
            seed=seed,
        )
        loader = StreamingDataLoader(
            dataset, batch_size=self.shape.batch, num_workers=num_workers, collate_fn=_token_batch
        )
        return islice(iter(loader), start_step, None)


class MosaicRow(Row):
    """mosaicml-streaming's MDS with arrays of a fixed shape, uncompressed, its own shuffle."""

    name = package = "mosaicml-streaming"
    install = (
        "it wants an older numpy and transformers: in a copy of this environment, pip install --no-deps "
        "mosaicml-streaming, and what its import then asks for"
    )

    def write(self, tokens: NDArray[np.uint16]) -> None:  # noqa: D102
        from streaming import MDSWriter

        columns = {"tokens": f"ndarray:uint16:{self.shape.length}"}
        with MDSWriter(out=str(self.directory), columns=columns, size_limit=_SHARD_BYTES) as writer:
            for row in tokens:
                writer.write({"tokens": row})

    def batches(self, num_workers: int, seed: int, start_step: int = 0) -> Iterator[Tensor]:  # noqa: D102
        from streaming import StreamingDataset

        dataset = StreamingDataset(
            local=str(self.directory), shuffle=True, shuffle_seed=seed, batch_size=self.shape.batch
        )
        loader = DataLoader(
            dataset,
            batch_size=self.shape.batch,
            num_workers=num_workers,
            collate_fn=lambda rows: _token_batch([row["tokens"] for row in rows]),
        )
        return islice(iter(loader), start_step, None)


OURS: tuple[type[Row], ...] = (OurRow, OurBlockRow, OurStreamRow)
PEERS: tuple[type[Row], ...] = (WebDatasetRow, LitDataRow, MosaicRow)
