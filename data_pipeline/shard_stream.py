"""Samples of shards read from end to end through stock `webdataset`, with everything it does not check.

`webdataset` skips links and meta members, takes a damaged header for the end of the tar, and knows neither how
many samples there should be nor what their bytes were. So it is given a stream whose tar headers were checked, and
what it returns is held against the manifest and the index. Only byte arrays leave it: nothing is decoded by it, no
URL is opened by it, and no environment variable of it matters.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import fsspec  # type: ignore[import-untyped]
import numpy as np
import webdataset
from numpy.typing import NDArray
from webdataset.tariterators import group_by_keys, tar_file_expander

from data_pipeline.dataset import TOKEN_ARRAYS
from data_pipeline.errors import (
    CorruptShardError,
    DatasetError,
    MissingShardError,
    NotADatasetError,
    UnsafeShardError,
)
from data_pipeline.manifest import MANIFEST_NAME, Manifest, ShardEntry, checked_manifest
from data_pipeline.shards import parse_index

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20
"""Bytes asked of the store at a time."""
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
_TOKEN_MEMBER = re.compile(rf"[^/.]+\.({'|'.join(TOKEN_ARRAYS)})\.npy")
_PICKLED = (".pyd", ".pickle", ".pkl", ".pth", ".pt")


class Sample(NamedTuple):
    """One sample's bytes."""

    number: int
    """Its index in the split."""
    tokens: bytes
    segments: bytes


@dataclass(frozen=True)
class Piece:
    """Samples of one shard."""

    shard: int
    """Which shard of the split."""
    rows: range
    """Samples in the shard."""


class ShardStore:
    """A directory of token shards, on disk or behind any fsspec URL.

    Raises:
        UnsafeShardError: a `pipe:` URL, which would be a shell command.
        NotADatasetError, FormatVersionError, CorruptShardError: as `load_manifest`.
    """

    def __init__(self, url: str, split: str) -> None:
        if url.startswith("pipe:"):
            raise UnsafeShardError(
                f"{url}: a pipe: URL runs a shell command and is refused; name a directory"
            )
        self.url = url.rstrip("/")
        self.split = split
        try:
            values = json.loads(self._read(MANIFEST_NAME))
        except FileNotFoundError as error:
            raise NotADatasetError(
                f"{url}: holds no {MANIFEST_NAME}, so it is either not a directory of token shards or its "
                "build did not finish"
            ) from error
        except ValueError as error:
            raise CorruptShardError(f"{url}/{MANIFEST_NAME}: not readable as JSON: {error}") from error
        self.manifest: Manifest = checked_manifest(values, f"{url}/{MANIFEST_NAME}")
        entry = self.manifest.splits.get(split)
        self.shards: tuple[ShardEntry, ...] = entry.shards if entry else ()
        self.first = np.cumsum([0, *(shard.samples for shard in self.shards)])

    def _open(self, name: str) -> Any:
        return fsspec.open(f"{self.url}/{name}", "rb").open()

    def _read(self, name: str) -> bytes:
        with self._open(name) as file:
            return bytes(file.read())

    def shard_url(self, shard: int) -> str:
        """Where the tar lies."""
        return f"{self.url}/{self.split}/{self.shards[shard].name}.tar"

    def index(self, shard: int) -> NDArray[Any]:
        """The index of a shard, as `shards.index_dtype` says.

        Raises:
            MissingShardError: it is not there.
            CorruptShardError: it is not what was written.
        """
        entry = self.shards[shard]
        name = f"{self.split}/{entry.name}.index.npy"
        content = self._opened(name, self._read)
        if hashlib.sha256(content).hexdigest() != entry.index_sha256:
            raise CorruptShardError(
                f"{self.url}/{name}: damaged, stale or of another shard (sha256); restore it or build again"
            )
        return parse_index(content, f"{self.url}/{name}", TOKEN_ARRAYS, entry.samples)

    def open_tar(self, shard: int) -> BinaryIO:
        """The tar of a shard, of the size that the manifest says.

        Raises:
            MissingShardError: it is not there.
            CorruptShardError: it has another size.
        """
        entry = self.shards[shard]
        file: BinaryIO = self._opened(f"{self.split}/{entry.name}.tar", self._open)
        size = file.seek(0, os.SEEK_END)
        if size != entry.file_bytes:
            file.close()
            raise CorruptShardError(
                f"{self.shard_url(shard)}: {size} bytes where the manifest says {entry.file_bytes}: cut or replaced"
            )
        return file

    def _opened(self, name: str, how: Callable[[str], Any]) -> Any:
        try:
            return how(name)
        except FileNotFoundError as error:
            raise MissingShardError(
                f"{self.url}/{name}: listed in the manifest but not there; restore it or build again"
            ) from error


class _RefusedError(Exception):
    """Carries an error through `webdataset`, which rewrites the arguments of what it lets pass."""

    def __init__(self, error: DatasetError) -> None:
        super().__init__()
        self.error = error


class _CheckedTar:
    """Bytes [begin, end) of a tar, both at members' borders, whose headers are checked before anyone reads them."""

    def __init__(self, file: BinaryIO, url: str, index: NDArray[Any], begin: int, end: int) -> None:
        self._file, self._url, self._index = file, url, index
        self._asked = self._header = begin  # up to where the file was read, and where the next header stands
        self._end = end
        self._ready = io.BytesIO()
        file.seek(begin)

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; none at the end."""
        data = self._ready.read(size)
        while len(data) < size and self._asked < self._end:
            self._ready = io.BytesIO(self._next_chunk())
            data += self._ready.read(size - len(data))
        return data

    def _next_chunk(self) -> bytes:
        wanted = min(_CHUNK, self._end - self._asked)
        chunk = self._file.read(wanted)
        while 0 < len(chunk) < wanted and (more := self._file.read(wanted - len(chunk))):
            chunk += more
        if len(chunk) < wanted:
            raise self._refusal(CorruptShardError, "the shard ends too early", self._asked + len(chunk))
        while self._header < self._asked + wanted:
            offset = self._header - self._asked
            self._header += _BLOCK + _padded(self._check_header(chunk[offset : offset + _BLOCK]))
        self._asked += wanted
        return chunk

    def _check_header(self, block: bytes) -> int:
        """The size of the member that this header announces."""
        try:
            name, kind, size = _parse_header(block)
        except ValueError as error:
            raise self._refusal(CorruptShardError, f"damaged tar header ({error})", self._header) from None
        if kind in _REGULAR and _TOKEN_MEMBER.fullmatch(name):
            return size
        refused = "is neither tokens nor segments"
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            refused = "would leave the directory that the tar is extracted to"
        elif kind not in _REGULAR:
            refused = "is a link or another special file"
        elif name.endswith(_PICKLED):
            refused = "is a pickle, which can run any program"
        what = f"the member {name!r} {refused}: refused; restore the shard or build again"
        raise self._refusal(UnsafeShardError, what, self._header)

    def _refusal(self, kind: type[DatasetError], what: str, position: int) -> _RefusedError:
        sample = np.searchsorted(self._index["tokens"]["offset"], position)
        return _RefusedError(kind(f"{self._url}: at sample {min(sample, len(self._index) - 1)}: {what}"))


def _parse_header(block: bytes) -> tuple[str, bytes, int]:
    """Name, type and size of the member that a USTAR header announces; `tarfile` takes five times as long.

    Raises:
        ValueError: it is damaged, or no header of ours.
    """
    if len(block) != _BLOCK or block[257:265] != b"ustar\x0000":
        raise ValueError("no USTAR header")
    if sum(block) - sum(block[148:156]) + 8 * ord(" ") != int(block[148:154], 8):
        raise ValueError("bad checksum")
    prefix = block[345:500].rstrip(b"\0").decode()
    name = block[:100].rstrip(b"\0").decode()
    return f"{prefix}/{name}" if prefix else name, block[156:157], int(block[124:135], 8)


def read_pieces(store: ShardStore, pieces: Sequence[Piece]) -> webdataset.DataPipeline:
    """The samples of pieces, in order; iterate over the result, or compose it with further stages.

    Raises (while iterating):
        CorruptShardError: names the shard and the sample that is damaged or missing.
        UnsafeShardError: names the member of the tar that is refused.
        MissingShardError: a shard or its index is not there.
    """
    # Filled when webdataset opens a piece, read when its first samples come out of it.
    indexes: dict[int, NDArray[Any]] = {}
    return webdataset.DataPipeline(
        partial(_open_pieces, store, pieces, indexes),
        tar_file_expander,
        group_by_keys,
        partial(_check_pieces, store, pieces, indexes),
    )


def _open_pieces(
    store: ShardStore, pieces: Sequence[Piece], indexes: dict[int, NDArray[Any]]
) -> Iterator[dict[str, Any]]:
    """The sources that `webdataset` expands: from the member of a piece's first sample to that of its last."""
    for piece in pieces:
        index = indexes[piece.shard] = store.index(piece.shard)
        groups = _groups(store, piece)
        begin = _member_end(index, groups[0].start)
        end = _member_end(index, groups[-1].stop)
        with store.open_tar(piece.shard) as file:
            url = store.shard_url(piece.shard)
            yield {"url": url, "stream": _CheckedTar(file, url, index, begin, end)}


def _check_pieces(
    store: ShardStore,
    pieces: Sequence[Piece],
    indexes: dict[int, NDArray[Any]],
    groups: Iterator[dict[str, Any]],
) -> Iterator[Sample]:
    """Splits what `webdataset` grouped into samples: exactly those of the pieces, each with the bytes it had."""
    for piece in pieces:
        url = store.shard_url(piece.shard)
        first = int(store.first[piece.shard])
        for rows in _groups(store, piece):
            group = _next_group(groups, url, rows)
            index = indexes[piece.shard]
            tokens, segments = (
                _split(group, array, index[array][rows.start : rows.stop], url, rows)
                for array in ("tokens", "segments")
            )
            for row in range(max(rows.start, piece.rows.start), min(rows.stop, piece.rows.stop)):
                position = row - rows.start
                yield Sample(first + row, tokens[position], segments[position])
        del indexes[piece.shard]


def _next_group(groups: Iterator[dict[str, Any]], url: str, rows: range) -> Mapping[str, Any]:
    try:
        group = next(groups, None)
    except _RefusedError as refused:
        raise refused.error from None
    except (tarfile.TarError, ValueError) as error:
        if isinstance(error, DatasetError):
            raise
        raise CorruptShardError(f"{url}: from sample {rows.start} on: {error.args[0]}") from error
    if group is None or group["__url__"] != url:
        raise CorruptShardError(
            f"{url}: sample {rows.start} and what follows it are missing; restore the shard or build again"
        )
    return group


def _split(group: Mapping[str, Any], array: str, places: NDArray[Any], url: str, rows: range) -> list[bytes]:
    """The bytes of each sample's rows, checked."""
    content = group.get(f"{array}.npy", b"")
    known = places.tolist()
    start = len(content) - sum(size for _, size, _ in known)
    parts = []
    for row, (_, size, crc) in zip(rows, known, strict=True):
        part = content[start : start + size] if start >= 0 else b""
        if len(part) != size or zlib.crc32(part) != crc:
            raise CorruptShardError(
                f"{url}: sample {row} is damaged or missing: its {array} do not match the index (crc32); run "
                "'python -m data_pipeline verify' on the directory and restore or rebuild the shard"
            )
        parts.append(part)
        start += size
    return parts


def _groups(store: ShardStore, piece: Piece) -> list[range]:
    """The samples of every pair of members that hold some of the piece's."""
    size, samples = store.manifest.samples_per_member, store.shards[piece.shard].samples
    first = piece.rows.start // size * size
    return [range(start, min(start + size, samples)) for start in range(first, piece.rows.stop, size)]


def _member_end(index: NDArray[Any], samples: int) -> int:
    """Where the members of the first `samples` samples end; `tokens` is the last of each group."""
    if samples == 0:
        return 0
    last = index["tokens"][samples - 1]
    return _padded(int(last["offset"]) + int(last["size"]))


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
