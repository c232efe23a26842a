"""Where documents come from. A source is cut into units (files, or parts of them) that are built one by one,
or in parallel."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data_pipeline import python_docs
from data_pipeline.config import DataConfig, HubSource, JsonlSource, ParquetSource, PythonDocsSource
from data_pipeline.errors import SourceError
from data_pipeline.files import sha256_file, sha256_json
from data_pipeline.source_files import expand, hash_file, opened

_ROWS_AT_A_TIME = 1024
_FILES_AT_A_TIME = 16


class Document(NamedTuple):
    """One document and the split that it belongs to."""

    id: str
    text: str
    split: str


class Source(Protocol):
    """Text in units whose documents always come in the same order."""

    def units(self) -> Sequence[str]:
        """Names of the units, in their order. Raises SourceError if there are none."""
        ...

    def read(self, unit: int) -> Iterator[Document]:
        """The documents of one unit."""
        ...

    def identity(self) -> str:
        """Hash of the source as it lies there, without reading more than it must."""
        ...

    def content(self) -> tuple[dict[str, Any], str]:
        """Description for the manifest, and hash of the content."""
        ...


def open_source(config: DataConfig) -> Source:
    """The source that the configuration asks for."""
    match config.source:
        case PythonDocsSource():
            return _PythonDocs(config.source)
        case ParquetSource():
            return _ParquetFiles(config.source, config.split_fractions)
        case JsonlSource():
            return _JsonlFiles(config.source, config.split_fractions)
        case HubSource():
            return _HubDataset(config.source, config.split_fractions)


def split_of(document_id: str, fractions: tuple[float, float]) -> str:
    """The split of a document by a hash of its id: the same in every dataset, whatever the order of the rows.

    Args:
        fractions: shares for validation and test.
    """
    validation, test = fractions
    digest = hashlib.blake2b(document_id.encode(), digest_size=8, key=b"split").digest()
    place = int.from_bytes(digest, "little") / 2**64
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"


class _PythonDocs:
    def __init__(self, config: PythonDocsSource) -> None:
        self._config = config
        self._read: tuple[list[python_docs.Docstring], dict[str, Any], str] | None = None

    def _result(self) -> tuple[list[python_docs.Docstring], dict[str, Any], str]:
        if self._read is None:
            self._read = python_docs.read_docstrings(self._config.min_characters, self._config.train_fraction)
        return self._read

    def units(self) -> Sequence[str]:
        return ("python-docs",)

    def read(self, unit: int) -> Iterator[Document]:
        return (Document(*document) for document in self._result()[0])

    def identity(self) -> str:
        return python_docs.identity()

    def content(self) -> tuple[dict[str, Any], str]:
        return self._result()[1:]


class _Rows:
    """Turns rows with FineWeb's columns into documents."""

    def __init__(
        self, config: ParquetSource | JsonlSource | HubSource, fractions: tuple[float, float]
    ) -> None:
        self._config = config
        self._fractions = fractions
        self._filters = dict[str, str]()  # column, and the setting that needs it
        if config.languages is not None:
            self._filters["language"] = "languages"
        if config.min_language_score > 0:
            self._filters["language_score"] = "min_language_score"
        self.columns = [config.text_field, config.id_field, *self._filters]

    def document(self, row: dict[str, Any], place: str) -> Document | None:
        """The document in a row, None if it is filtered out. The hash of the text stands in for no id."""
        config = self._config
        for column, setting in self._filters.items():
            if column not in row:
                raise SourceError(
                    f"{place}: no {column!r}, which source.{setting} filters by; it has {', '.join(map(str, row))}. "
                    f"Remove source.{setting}, or give the rows that column"
                )
        text = row.get(config.text_field)
        if not isinstance(text, str):
            raise SourceError(
                f"{place}: no text under {config.text_field!r}; it has {', '.join(map(str, row))}. Set "
                "source.text_field"
            )
        if not text.isascii():
            text = text.encode(
                "utf-8", "replace"
            ).decode()  # lone surrogates, which JSON can spell, are no text
        if not config.min_characters <= len(text) <= (config.max_characters or math.inf):
            return None
        if config.languages is not None and row.get("language") not in config.languages:
            return None
        if config.min_language_score > 0 and (row.get("language_score") or 0) < config.min_language_score:
            return None
        identifier = row.get(config.id_field)
        if identifier is None:
            identifier = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        identifier = str(identifier)
        return Document(identifier, text, split_of(identifier, self._fractions))


class _Files:
    """What parquet and jsonl files share."""

    def __init__(self, config: ParquetSource | JsonlSource, fractions: tuple[float, float]) -> None:
        self._rows = _Rows(config, fractions)
        self._patterns = config.paths

    @cached_property
    def _paths(self) -> list[str]:
        return expand(self._patterns)

    @cached_property
    def _hashes(self) -> list[str]:
        with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
            return list(pool.map(hash_file, self._paths))

    def units(self) -> Sequence[str]:
        return self._paths

    def identity(self) -> str:
        return sha256_json(self._hashes)

    def content(self) -> tuple[dict[str, Any], str]:
        files = [
            {"path": path, "hash": hashed} for path, hashed in zip(self._paths, self._hashes, strict=True)
        ]
        return {"files": files}, self.identity()


class _ParquetFiles(_Files):
    def __init__(self, config: ParquetSource, fractions: tuple[float, float]) -> None:
        super().__init__(config, fractions)
        self._config = config

    @cached_property
    def _row_groups(self) -> list[int]:
        """Of every file; reads no more of it than its footer."""
        with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
            return list(pool.map(_num_row_groups, self._paths))

    @cached_property
    def _parts(self) -> list[tuple[str, range | None]]:
        """File and row groups of every unit; None stands for all of them."""
        size = self._config.row_groups_per_unit
        if size is None:
            return [(path, None) for path in self._paths]
        return [
            (path, range(first, min(first + size, count)))
            for path, count in zip(self._paths, self._row_groups, strict=True)
            for first in range(0, max(count, 1), size)
        ]

    def units(self) -> Sequence[str]:
        return [
            path if groups is None else f"{path}, row groups {groups.start} to {groups.stop - 1}"
            for path, groups in self._parts
        ]

    def content(self) -> tuple[dict[str, Any], str]:
        """With `row_groups_per_unit`, for each file also its row groups and the number of its first unit."""
        description, content_hash = super().content()
        if self._config.row_groups_per_unit is not None:
            first = {path: unit for unit, (path, _) in reversed(list(enumerate(self._parts)))}
            for file, count in zip(description["files"], self._row_groups, strict=True):
                file |= {"row_groups": count, "first_unit": first[file["path"]]}
        return description, content_hash

    def read(self, unit: int) -> Iterator[Document]:
        import pyarrow.parquet as pq

        path, groups = self._parts[unit]
        # pages are checked where the file has checksums
        with opened(path) as raw, pq.ParquetFile(raw, page_checksum_verification=True) as file:
            names = set(file.schema_arrow.names)
            needed = [name for name in self._rows.columns if name != self._config.id_field]
            if missing := [name for name in needed if name not in names]:
                raise SourceError(
                    f"{path}: no column {', '.join(missing)}; it has {', '.join(sorted(names))}. "
                    "Set source.text_field, or drop the filter"
                )
            columns = [name for name in self._rows.columns if name in names]
            for group in range(file.num_row_groups) if groups is None else groups:
                for batch in file.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=columns):
                    for row in batch.to_pylist():
                        document = self._rows.document(row, f"{path}, row group {group}")
                        if document is not None:
                            yield document


def _num_row_groups(path: str) -> int:
    import pyarrow.parquet as pq

    with opened(path) as raw, pq.ParquetFile(raw) as file:
        return int(file.num_row_groups)


class _JsonlFiles(_Files):
    def read(self, unit: int) -> Iterator[Document]:
        path = self.units()[unit]
        rows = 0
        with opened(path, decompress=True) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise SourceError(f"{path}, line {number}: not readable as JSON: {error}") from error
                if not isinstance(row, dict):
                    raise SourceError(f"{path}, line {number}: a JSON object is needed on every line")
                rows += 1
                document = self._rows.document(row, f"{path}, line {number}")
                if document is not None:
                    yield document
        if not rows:
            raise SourceError(f"{path}: is empty; take it out of source.paths, or fetch it again")


class _HubDataset:
    def __init__(self, config: HubSource, fractions: tuple[float, float]) -> None:
        self._config = config
        self._rows = _Rows(config, fractions)
        self._dataset: Any = None

    def _open(self) -> Any:
        if self._dataset is None:
            from datasets import load_dataset

            config = self._config
            # The commit that is recorded, also where a branch moves on meanwhile.
            revision = config.revision if Path(config.path).is_dir() else self._commit()
            try:
                dataset = load_dataset(
                    config.path, config.name, split=config.split, revision=revision, streaming=True
                )
            except Exception as error:  # the hub's client raises many kinds, of several libraries
                raise SourceError(
                    f"the dataset {config.path!r} ({config.name}, split {config.split}) cannot be opened: "
                    f"{error}. "
                    "Without a network, use source.kind=parquet with downloaded files, or "
                    "source.kind=python-docs"
                ) from error
            columns = dataset.column_names
            if columns is not None:
                dataset = dataset.select_columns([name for name in self._rows.columns if name in columns])
            self._dataset = dataset
        return self._dataset

    def units(self) -> Sequence[str]:
        return [f"{self._config.path}/{index}" for index in range(self._open().num_shards)]

    def read(self, unit: int) -> Iterator[Document]:
        dataset = self._open()
        rows = iter(dataset.shard(num_shards=dataset.num_shards, index=unit))
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # of the network, the hub's client or the files, of several libraries
                raise SourceError(
                    f"the dataset {self._config.path!r}, part {unit}, cannot be read on: {error}. Run the same "
                    "command again; what is done is kept"
                ) from error
            document = self._rows.document(row, f"{self._config.path}, part {unit}")
            if document is not None:
                yield document

    def _commit(self) -> str:
        if Path(self._config.path).is_dir():
            files = sorted(path for path in Path(self._config.path).rglob("*") if path.is_file())
            return sha256_json([sha256_file(path) for path in files])
        from huggingface_hub import HfApi

        try:
            info = HfApi().dataset_info(self._config.path, revision=self._config.revision)
        except Exception as error:
            raise SourceError(
                f"the hub cannot be asked for the commit of {self._config.path!r}: {error}. Without a "
                "network, use source.kind=parquet with downloaded files, or source.kind=python-docs"
            ) from error
        return str(info.sha)

    def identity(self) -> str:
        return sha256_json([self._config.path, self._config.name, self._config.split, self._commit()])

    def content(self) -> tuple[dict[str, Any], str]:
        return {
            "path": self._config.path,
            "name": self._config.name,
            "commit": self._commit(),
        }, self.identity()
