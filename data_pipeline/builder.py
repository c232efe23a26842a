"""Building the token shards: restartable, in parallel where there are several files, complete or invisible.

The source is cut into units (one file each). A unit's shards are written under `.build/KEY/`, KEY a hash of
the configuration and the source, and its record last; a unit that has a record is never built again. Merging
moves all shards to their place and writes the manifest last. The shards do not depend on who builds the units
or in which order, so a build that was killed anywhere and run again ends in the same bytes.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import BPETokenizerConfig, DataConfig, PretrainedTokenizerConfig
from data_pipeline.errors import CorruptShardError, DatasetError, NotADatasetError, SourceError
from data_pipeline.files import sha256_file, sha256_json, sync_directory, write_json
from data_pipeline.manifest import (
    MANIFEST_NAME,
    SPLITS,
    Manifest,
    ShardEntry,
    SourceEntry,
    SplitEntry,
    load_manifest,
    read_json,
)
from data_pipeline.packing import PackedSample, Packer, document_phase
from data_pipeline.progress import Progress
from data_pipeline.shards import index_path, samples_per_member, tar_path, write_token_shard
from data_pipeline.sources import Document, Source, open_source
from data_pipeline.tokenizer import (
    DocumentTokenizer,
    EncodedDocument,
    copy_pretrained,
    pretrained_identity,
    save_bpe,
    train_bpe,
)

_WORK_FOLDER = ".build"
_BATCH_DOCUMENTS = 4096
_BATCH_CHARACTERS = 2 << 20
_UNIT_BITS = 32  # a document's number: that of its unit above these bits, its place in the unit's split below


def build(config: DataConfig, *, replace: bool = False, num_workers: int | None = None) -> Manifest:
    """Builds what is missing of the token shards and returns their manifest.

    A directory that is complete and was built from the same configuration and the same text is left as it is.

    Args:
        replace: build anew where the directory holds shards of another configuration or other text.
        num_workers: processes where the source has several files; None takes one per core.

    Raises:
        DatasetError: the directory holds something else, or other shards and `replace` is not set.
        SourceError: the text or the tokenizer cannot be read.
    """
    job = _Job(config)
    finished = job.finished(replace)
    if finished is not None:
        return finished
    job.prepare_tokenizer()
    job.build_units(range(len(job.source.units())), num_workers)
    return job.merge()


def build_task(config: DataConfig, task_index: int, num_tasks: int, *, num_workers: int = 1) -> None:
    """Task i of n of a build: its share of the files. `build` or `merge` afterwards finishes the directory.

    Raises:
        ValueError: the task index is out of range, or as `build`.
    """
    if not 0 <= task_index < num_tasks:
        raise ValueError(f"task index {task_index} is not in 0..{num_tasks - 1}")
    job = _Job(config)
    if job.finished(replace=False) is None:
        job.prepare_tokenizer()
        job.build_units(range(task_index, len(job.source.units()), num_tasks), num_workers)


def merge(config: DataConfig) -> Manifest:
    """Finishes a build whose tasks are all done.

    Raises:
        DatasetError: units are missing; names them.
    """
    job = _Job(config)
    finished = job.finished(replace=False)
    return job.merge() if finished is None else finished


def _config_values(config: DataConfig) -> dict[str, Any]:
    """What of the configuration decides the content."""
    return config.build_values()


class _Job:
    """One build: the configuration, the source as it lies there, and the folder of the work under way."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.directory = Path(config.directory)
        self.source: Source = open_source(config)
        if not self.source.units():
            raise SourceError("the source holds no files")
        self.identity = self.source.identity()
        if isinstance(config.tokenizer, PretrainedTokenizerConfig):
            self.identity = sha256_json([self.identity, pretrained_identity(config.tokenizer)])
        self.work = self.directory / _WORK_FOLDER / sha256_json([_config_values(config), self.identity])[:16]

    def finished(self, replace: bool) -> Manifest | None:
        """The manifest if the directory is complete and up to date; otherwise clears the way for building."""
        if not self.directory.is_dir() or not any(self.directory.iterdir()):
            return None
        if not (self.directory / MANIFEST_NAME).is_file():
            if not (self.directory / _WORK_FOLDER).is_dir():
                raise NotADatasetError(
                    f"{self.directory}: not empty and not a directory of token shards; set data.directory to "
                    "another"
                )
            return None
        try:
            manifest = load_manifest(self.directory)
            same_config = {**manifest.config, "directory": None} == {
                **_config_values(self.config),
                "directory": None,
            }
            if same_config and manifest.source.identity == self.identity:
                _check_files(self.directory, manifest)
                shutil.rmtree(
                    self.directory / _WORK_FOLDER, ignore_errors=True
                )  # of a merge killed at its end
                return manifest
            what = "other text or another tokenizer" if same_config else "another configuration"
            problem = f"holds token shards of {what}"
        except CorruptShardError as error:
            problem = str(error)
        if not replace:
            raise DatasetError(
                f"{self.directory}: {problem}. Set data.directory to another directory, or build with "
                "--replace"
            )
        (self.directory / MANIFEST_NAME).unlink()  # first, so that what is left is never taken for complete
        sync_directory(self.directory)
        return None

    def prepare_tokenizer(self) -> None:
        """Trains or copies the tokenizer, unless it is there."""
        directory = self.work / "tokenizer"
        if directory.is_dir():
            return
        tokenizer = self.config.tokenizer
        if isinstance(tokenizer, BPETokenizerConfig):
            texts = _head(self.source, tokenizer.training_mib << 20)
            save_bpe(train_bpe(texts, tokenizer), directory)
        else:
            copy_pretrained(tokenizer, directory)

    def record_path(self, unit: int) -> Path:
        """The record of a unit, which is there once its shards are."""
        return self.work / f"unit-{unit:06d}.json"

    def unit_folder(self, unit: int) -> Path:
        """Where a unit's shards lie before the merge."""
        return self.work / f"unit-{unit:06d}"

    def build_units(self, units: Iterable[int], num_workers: int | None) -> None:
        """Builds those of the units that have no record yet."""
        missing = [unit for unit in units if not self.record_path(unit).is_file()]
        if len(missing) <= 1 or num_workers == 1:
            for unit in missing:
                build_unit(self.config, self.source, self.work, unit)
            return
        workers = min(num_workers or os.cpu_count() or 1, len(missing))
        context = multiprocessing.get_context("spawn")
        with (
            ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread_each) as pool,
            Progress("files", "files", len(missing)) as progress,
        ):
            futures = [pool.submit(_build_unit_in_process, self.config, self.work, unit) for unit in missing]
            for future in as_completed(futures):
                future.result()
                progress.update()

    def merge(self) -> Manifest:
        """Moves all shards to their place and writes the manifest."""
        units = self.source.units()
        missing = [name for unit, name in enumerate(units) if not self.record_path(unit).is_file()]
        if missing:
            raise DatasetError(
                f"{self.directory}: {len(missing)} of {len(units)} files are not built yet "
                f"({', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}): run their tasks first"
            )
        records = [read_json(self.record_path(unit)) for unit in range(len(units))]
        tokenizer = DocumentTokenizer(self.work / "tokenizer")
        splits = {}
        for split in SPLITS:
            entries = [
                (self.unit_folder(unit) / split, ShardEntry.model_validate(entry))
                for unit, record in enumerate(records)
                for entry in record[split]
            ]
            splits[split] = SplitEntry.of(_move_shards(entries, self.directory / split))
        description, content_hash = self.source.content()
        manifest = Manifest.create(
            sample_length=self.config.sample_length,
            document_grid=self.config.document_grid,
            samples_per_member=_samples_per_member(self.config, tokenizer),
            token_dtype=_token_dtype(tokenizer).name,
            vocab_size=tokenizer.vocab_size,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tokenizer_sha256=tokenizer.sha256,
            seed=self.config.seed,
            source=SourceEntry(description=description, content_hash=content_hash, identity=self.identity),
            config=_config_values(self.config),
            splits=splits,
        )
        if not splits["train"].samples:
            raise SourceError(
                "the source gives no text to train on (check its filters and the split fractions)"
            )
        final = self.directory / "tokenizer"
        shutil.rmtree(final, ignore_errors=True)
        shutil.copytree(self.work / "tokenizer", final)
        for partial in self.directory.glob(".*.partial"):
            partial.unlink()  # of a merge that was killed
        write_json(self.directory / MANIFEST_NAME, manifest.model_dump(mode="json"))
        shutil.rmtree(self.directory / _WORK_FOLDER, ignore_errors=True)
        return manifest


def _check_files(directory: Path, manifest: Manifest) -> None:
    """Refuses a directory with files missing or of another size; `verify` is what reads them."""
    for split, entry in manifest.splits.items():
        for shard in entry.shards:
            path = tar_path(directory / split, shard.name)
            there = path.is_file() and index_path(directory / split, shard.name).is_file()
            if not there or path.stat().st_size != shard.file_bytes:
                raise CorruptShardError(f"{path} is missing, cut, or without its index")


def _move_shards(entries: list[tuple[Path, ShardEntry]], folder: Path) -> list[ShardEntry]:
    """Numbers the shards through and renames them into `folder`; goes on where a killed merge stopped."""
    moved = []
    folder.mkdir(parents=True, exist_ok=True)
    for number, (origin, entry) in enumerate(entries):
        name = f"shard-{number:06d}"
        for place, sha256 in ((tar_path, entry.sha256), (index_path, entry.index_sha256)):
            if place(origin, entry.name).is_file():
                place(origin, entry.name).replace(place(folder, name))
            elif not place(folder, name).is_file() or sha256_file(place(folder, name)) != sha256:
                raise CorruptShardError(
                    f"{place(origin, entry.name)}: gone although its record is there; delete "
                    f"{origin.parent.parent} and build again"
                )
        moved.append(entry.model_copy(update={"name": name}))
    listed = {place(folder, entry.name).name for entry in moved for place in (tar_path, index_path)}
    for path in folder.iterdir():
        if path.name not in listed:
            path.unlink()  # of an earlier build that was replaced
    sync_directory(folder)
    return moved


def _head(source: Source, num_bytes: int) -> Iterator[str]:
    """The texts of the training split until `num_bytes` characters are reached."""
    total = 0
    for unit in range(len(source.units())):
        for document in source.read(unit):
            if document.split == "train":
                yield document.text
                total += len(document.text)
                if total >= num_bytes:
                    return


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


def _token_dtype(tokenizer: DocumentTokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _samples_per_member(config: DataConfig, tokenizer: DocumentTokenizer) -> int:
    return samples_per_member(config.sample_length * _token_dtype(tokenizer).itemsize, config.member_bytes)


class _SplitWriter:
    """Packs the documents of one split of one unit and writes a shard whenever one is full."""

    def __init__(self, config: DataConfig, tokenizer: DocumentTokenizer, unit: int, folder: Path) -> None:
        self._config = config
        self._unit = unit
        self._folder = folder
        self._per_member = _samples_per_member(config, tokenizer)
        self._packer = Packer(
            sample_length=config.sample_length,
            document_grid=config.document_grid,
            pad_token_id=tokenizer.pad_token_id,
            dtype=_token_dtype(tokenizer),
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
    with Progress("tokenizing and packing", "documents", shown=show_progress) as progress:
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


def _one_thread_each() -> None:
    """The units are built side by side, so that each process needs one core only."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _build_unit_in_process(config: DataConfig, work: Path, unit: int) -> None:
    build_unit(config, open_source(config), work, unit, show_progress=False)
