"""One build of token shards: the source as it lies there, the folder of the work under way, and its steps.

A unit's shards are written under `.build/KEY/`, KEY a hash of the configuration and the source, and its record
last; a unit that has a record is never built again. Merging moves all shards to their place and writes the manifest
last. The shards do not depend on who builds the units or in which order.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, lru_cache, partial
from pathlib import Path

from data_pipeline import duplicates
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
from data_pipeline.progress import Progress
from data_pipeline.shards import index_path, tar_path
from data_pipeline.sources import Source, open_source
from data_pipeline.tokenizer import (
    DocumentTokenizer,
    copy_pretrained,
    pretrained_identity,
    save_bpe,
    train_bpe,
)
from data_pipeline.unit_builder import build_unit, rows_per_member, token_dtype
from data_pipeline.workers import map_in_processes

_WORK_FOLDER = ".build"


class BuildJob:
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
        self.work = self.directory / _WORK_FOLDER / sha256_json([config.build_values(), self.identity])[:16]

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
                **self.config.build_values(),
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

    @cached_property
    def documents(self) -> Source:
        """The source, without its duplicates where they are to be removed."""
        return _documents(self.config, self.source, self.work)

    def find_duplicates(self, num_workers: int | None) -> None:
        """Both passes of `duplicates`, as far as they are not done."""
        self.hash_units(range(len(self.source.units())), num_workers)
        self.merge_hashes()

    def hash_units(self, units: Iterable[int], num_workers: int | None) -> None:
        """Hashes the texts of those of the units that are not hashed yet."""
        folder = _duplicates_folder(self.work)
        missing = [unit for unit in units if not duplicates.is_hashed(folder, unit)]
        if len(missing) <= 1 or num_workers == 1:
            for unit in missing:
                duplicates.hash_unit(self.source, folder, unit)
        else:
            self._in_processes(partial(_hash_unit_in_process, self.config, folder), missing, num_workers)

    def merge_hashes(self) -> None:
        """Lists the duplicates, unless they are listed."""
        folder = _duplicates_folder(self.work)
        if not duplicates.is_merged(folder):
            duplicates.merge_hashes(folder, self.source.units())

    def prepare_tokenizer(self) -> None:
        """Trains or copies the tokenizer, unless it is there."""
        directory = self.work / "tokenizer"
        if directory.is_dir():
            return
        tokenizer = self.config.tokenizer
        if isinstance(tokenizer, BPETokenizerConfig):
            texts = _head(self.documents, tokenizer.training_mib << 20)
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
        documents = self.documents  # before any process: an error here is one message
        if len(missing) <= 1 or num_workers == 1:
            for unit in missing:
                build_unit(self.config, documents, self.work, unit)
        else:
            self._in_processes(partial(_build_unit_in_process, self.config, self.work), missing, num_workers)

    def _in_processes(
        self, function: Callable[[int], None], units: list[int], num_workers: int | None
    ) -> None:
        with Progress(len(units), "parts of the source", unit="parts") as progress:
            map_in_processes(function, units, num_workers or len(os.sched_getaffinity(0)), progress)

    def merge(self) -> Manifest:
        """Moves all shards to their place and writes the manifest."""
        units = self.source.units()
        missing = [name for unit, name in enumerate(units) if not self.record_path(unit).is_file()]
        if missing:
            raise DatasetError(
                f"{self.directory}: {len(missing)} of {len(units)} parts of the source are not built yet "
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
        description, content_hash = self.documents.content()
        # Shards are in the order of the parts: how many each gave tells which part a shard is from.
        parts = [
            {"name": name, "shards": {split: len(record[split]) for split in SPLITS}}
            for name, record in zip(units, records, strict=True)
        ]
        description = {**description, "parts": parts}
        manifest = Manifest.create(
            sample_length=self.config.sample_length,
            document_grid=self.config.document_grid,
            samples_per_member=rows_per_member(self.config, tokenizer),
            token_dtype=token_dtype(tokenizer).name,
            vocab_size=tokenizer.vocab_size,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tokenizer_sha256=tokenizer.sha256,
            seed=self.config.seed,
            source=SourceEntry(description=description, content_hash=content_hash, identity=self.identity),
            config=self.config.build_values(),
            splits=splits,
        )
        if not splits["train"].samples:
            raise SourceError(
                "the source gives no text to train on (check its filters and the split fractions)"
            )
        final = self.directory / "tokenizer"
        shutil.rmtree(final, ignore_errors=True)
        shutil.copytree(self.work / "tokenizer", final)
        for unfinished in self.directory.glob(".*.partial"):
            unfinished.unlink()  # of a merge that was killed
        write_json(self.directory / MANIFEST_NAME, manifest.model_dump(mode="json"))
        shutil.rmtree(self.directory / _WORK_FOLDER, ignore_errors=True)
        return manifest


def _duplicates_folder(work: Path) -> Path:
    return work / "duplicates"


def _documents(config: DataConfig, source: Source, work: Path) -> Source:
    if not config.deduplicate:
        return source
    return duplicates.WithoutDuplicates(source, _duplicates_folder(work))


_opened = lru_cache(maxsize=1)(open_source)
"""The source in a worker process, opened once for all units that it is given."""


def _hash_unit_in_process(config: DataConfig, folder: Path, unit: int) -> None:
    duplicates.hash_unit(_opened(config), folder, unit, show_progress=False)


def _build_unit_in_process(config: DataConfig, work: Path, unit: int) -> None:
    build_unit(config, _documents(config, _opened(config), work), work, unit, show_progress=False)


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
