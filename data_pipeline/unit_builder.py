"""One unit of a source to shards: tokenized, packed, and written split by split, its record last."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.files import write_json
from data_pipeline.manifest import SPLITS, ShardEntry
from data_pipeline.packing import PackedSample, Packer, document_phase
from data_pipeline.progress import Progress
from data_pipeline.shards import samples_per_member, write_token_shard
from data_pipeline.sources import Document, Source
from data_pipeline.tokenizer import DocumentTokenizer, EncodedDocument

_BATCH_DOCUMENTS = 4096
_BATCH_CHARACTERS = 2 << 20
_UNIT_BITS = 32  # a document's number: that of its unit above these bits, its place in the unit's split below


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in batches for the tokenizer, bounded in number and in characters."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded(
    documents: Iterable[Document], tokenizer: DocumentTokenizer
) -> Iterator[tuple[list[Document], list[EncodedDocument]]]:
    """Batches with their tokens; the next one is encoded, on all cores, while this one is being packed."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for batch in _batches(documents):
            future = pool.submit(tokenizer.encode, [document.text for document in batch])
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = (batch, future)
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def token_dtype(tokenizer: DocumentTokenizer) -> np.dtype:
    """The narrowest type that holds every token id."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def rows_per_member(config: DataConfig, tokenizer: DocumentTokenizer) -> int:
    """Samples in a tar member."""
    return samples_per_member(config.sample_length * token_dtype(tokenizer).itemsize, config.member_bytes)


class _SplitWriter:
    """Packs the documents of one split of one unit and writes a shard whenever one is full."""

    def __init__(self, config: DataConfig, tokenizer: DocumentTokenizer, unit: int, folder: Path) -> None:
        self._config = config
        self._unit = unit
        self._folder = folder
        self._per_member = rows_per_member(config, tokenizer)
        self._packer = Packer(
            sample_length=config.sample_length,
            document_grid=config.document_grid,
            pad_token_id=tokenizer.pad_token_id,
            dtype=token_dtype(tokenizer),
            first_document=unit << _UNIT_BITS,
        )
        self._samples: list[PackedSample] = []
        self.entries: list[ShardEntry] = []

    def add(self, document: Document, encoded: EncodedDocument) -> None:
        phase = document_phase(self._config.seed, document.id, self._config.document_grid)
        self._samples += self._packer.add(encoded.tokens, phase, encoded.num_bytes, encoded.bytes_before)
        while len(self._samples) >= self._config.samples_per_shard:
            self._write(self._config.samples_per_shard)

    def close(self) -> None:
        self._samples += self._packer.flush()
        if self._samples:
            self._write(len(self._samples))

    def _write(self, count: int) -> None:
        number = len(self.entries)
        samples, self._samples = self._samples[:count], self._samples[count:]
        self.entries.append(
            write_token_shard(
                self._folder,
                f"shard-{number:06d}",
                f"{self._unit:06d}-{number:06d}-",
                samples,
                self._per_member,
            )
        )


def build_unit(
    config: DataConfig, source: Source, work: Path, unit: int, *, show_progress: bool = True
) -> None:
    """Writes the shards of one unit of the source, and its record last."""
    tokenizer = DocumentTokenizer(work / "tokenizer")
    folder = work / f"unit-{unit:06d}"
    shutil.rmtree(folder, ignore_errors=True)  # of a build that was killed
    writers = {split: _SplitWriter(config, tokenizer, unit, folder / split) for split in SPLITS}
    with Progress(None, "tokenizing and packing", unit="documents", shown=show_progress) as progress:
        for documents, encoded in _encoded(source.read(unit), tokenizer):
            for document, tokens in zip(documents, encoded, strict=True):
                writers[document.split].add(document, tokens)
            progress.update(len(documents))
    for writer in writers.values():
        writer.close()
    record = {
        split: [entry.model_dump(mode="json") for entry in writer.entries]
        for split, writer in writers.items()
    }
    write_json(work / f"unit-{unit:06d}.json", record)
