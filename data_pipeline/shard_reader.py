"""Random access to the samples of shards: every byte is checked against the index before it is returned."""

from __future__ import annotations

import os
import resource
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import CorruptShardError, MissingShardError
from data_pipeline.shards import index_dtype, index_path, npy_header, stale_index, tar_path

_SINGLE_ROWS = 64
"""Rows of an index that are read one by one before all are: with many shards, each is asked for a few only."""
_READ_TOGETHER = 1 << 15
"""Bytes up to which it is cheaper to read what lies between two rows than to read them one by one."""
_FETCH_AHEAD = 64
"""Samples that are fetched at a time; each may lie in another shard, all of which are open then."""
_READ_AROUND = 1 << 18
"""Bytes fetched around a sample that is not in memory yet, where all shards will stay there."""
_SHARE_OF_MEMORY = 4
"""Shards of less than this fraction of the machine's memory are taken to stay in it."""

_SHARE_OF_FILES = 32
"""A dataset keeps as many shards open as this fraction of the files that the process may: a shard has two, codes lie
beside tokens, and there may be several sources."""
_FEWEST_OPEN, _MOST_OPEN = 16, 256
"""Of such shards."""

Places = tuple[int, ...]
"""Offset, size and crc32 of a sample's rows of every array, the arrays in the order of their names."""


def open_shards() -> int:
    """Shards that a dataset may keep open. The soft limit on the process's open files, often 1,024, becomes the hard
    one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):  # not allowed here: then with what there is
            pass
    if soft == resource.RLIM_INFINITY:
        return _MOST_OPEN
    return min(max(soft // _SHARE_OF_FILES, _FEWEST_OPEN), _MOST_OPEN)


class ShardReader:
    """Reads single samples of one shard, checking every byte it returns. Safe to use from several threads.

    Args:
        arrays: names of the arrays in the tar.
        samples: how many the manifest says there are.
        file_bytes: size of the tar by the manifest.
        read_around: `fetch` brings what lies around a sample as well: it will be wanted, and stay in memory.

    Raises:
        MissingShardError: the tar or its index is not there.
        CorruptShardError: either has another size than the manifest says.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        arrays: Sequence[str],
        samples: int,
        file_bytes: int,
        *,
        read_around: bool = False,
    ) -> None:
        self.path = tar_path(directory, name)
        index = index_path(directory, name)
        for path in (self.path, index):
            if not path.is_file():
                raise MissingShardError(
                    f"{path}: listed in the manifest but not there; restore it or build again"
                )
        self._arrays = sorted(arrays)
        self._row = struct.Struct("<" + "QII" * len(arrays))  # one row of the index
        self._index = os.open(index, os.O_RDONLY)
        header = npy_header(index_dtype(self._arrays), samples)
        size = os.fstat(self._index).st_size
        if size != len(header) + samples * self._row.size or os.pread(self._index, len(header), 0) != header:
            raise stale_index(str(index), samples)
        self._first_row, self._samples = len(header), samples
        self._asked = 0
        self._rows: bytes | None = None
        self._file = os.open(self.path, os.O_RDONLY)
        self._file_bytes = os.fstat(self._file).st_size
        if self._file_bytes != file_bytes:
            raise CorruptShardError(
                f"{self.path}: {self._file_bytes} bytes where the manifest says {file_bytes}: cut or replaced"
            )
        self._fetched: set[int] | None = set() if read_around else None  # blocks of the tar

    def __del__(self) -> None:  # closed when the last thread lets go of it, never under a running pread
        for name in ("_index", "_file"):
            if hasattr(self, name):
                os.close(getattr(self, name))

    def _places(self, sample: int) -> Places:
        if not 0 <= sample < self._samples:
            raise IndexError(f"sample {sample} of {self._samples} in {self.path}")
        if self._rows is not None:
            return self._row.unpack_from(self._rows, sample * self._row.size)
        self._asked += 1
        if self._asked <= _SINGLE_ROWS:
            return self._row.unpack(self._read_index(sample * self._row.size, self._row.size))
        self._rows = self._read_index(0, self._samples * self._row.size)
        return self._row.unpack_from(self._rows, sample * self._row.size)

    def _read_index(self, offset: int, size: int) -> bytes:
        found = os.pread(self._index, size, self._first_row + offset)
        if len(found) != size:
            raise CorruptShardError(
                f"{self.path}: its index was cut while it was in use; restore or rebuild the shard"
            )
        return found

    def fetch(self, sample: int) -> Places:
        """Has the system bring a sample into memory, without waiting for it; where it lies, for `read_fetched`."""
        places = self._places(sample)
        begin, end = places[0], places[-3] + places[-2]
        if not begin < end <= self._file_bytes:
            return places  # a damaged index, which shows when it is read
        if self._fetched is None:
            if end - begin <= _READ_TOGETHER:
                os.posix_fadvise(self._file, begin, end - begin, os.POSIX_FADV_WILLNEED)
        elif (block := begin // _READ_AROUND) not in self._fetched:
            self._fetched.add(block)
            os.posix_fadvise(self._file, block * _READ_AROUND, _READ_AROUND, os.POSIX_FADV_WILLNEED)
        return places

    def read_fetched(self, sample: int, places: Places) -> list[bytes]:
        """The bytes of one sample's rows of every array, the arrays in the order of their names.

        The arrays of a sample lie in neighbouring members, so that one `pread` mostly fetches them all.

        Raises:
            CorruptShardError: as `read`.
        """
        begin, end = places[0], places[-3] + places[-2]
        if not 0 < end - begin <= _READ_TOGETHER:
            return [self.read(array, [sample])[0] for array in self._arrays]
        data = os.pread(self._file, end - begin, begin)
        rows: list[bytes] = []
        place = iter(places)
        for offset, size, crc in zip(place, place, place, strict=True):
            start = offset - begin
            row = data[start : start + size] if start >= 0 else b""
            if len(row) != size or zlib.crc32(row) != crc:
                raise self._damaged(self._arrays[len(rows)], sample)
            rows.append(row)
        return rows

    def read(self, array: str, samples: Sequence[int] | NDArray[np.integer]) -> list[bytes]:
        """The bytes of these samples' rows of `array`, one string a sample.

        Raises:
            CorruptShardError: they are not the bytes that were written; names the first such sample.
        """
        rows = []
        field = 3 * self._arrays.index(array)
        for sample in np.asarray(samples).tolist():
            offset, size, crc = self._places(sample)[field : field + 3]
            data = os.pread(self._file, size, offset) if offset + size <= self._file_bytes else b""
            if len(data) != size or zlib.crc32(data) != crc:
                raise self._damaged(array, sample)
            rows.append(data)
        return rows

    def _damaged(self, array: str, sample: int) -> CorruptShardError:
        return CorruptShardError(
            f"{self.path}: sample {sample} is damaged: its {array} do not match the index (crc32); run "
            "'python -m data_pipeline verify' on the directory and restore or rebuild the shard"
        )


def stays_in_memory(file_bytes: int) -> bool:
    """Whether shards of so many bytes in all may be taken to stay in memory once they were read."""
    return file_bytes * _SHARE_OF_MEMORY < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def read_samples(
    open_shard: Callable[[int], ShardReader], shards: NDArray[np.int64], samples: NDArray[np.int64]
) -> list[list[bytes]]:
    """The bytes of samples' rows, for each array one string a sample, in the order asked for.

    The system is told of a batch of samples before the first of them is waited for, so that the disk reads side by
    side what is not in memory.
    """
    found = []
    wanted = list(zip(shards.tolist(), samples.tolist(), strict=True))
    for first in range(0, len(wanted), _FETCH_AHEAD):
        fetched = []
        for shard, sample in wanted[first : first + _FETCH_AHEAD]:
            reader = open_shard(shard)
            fetched.append((reader, sample, reader.fetch(sample)))
        found += [reader.read_fetched(sample, places) for reader, sample, places in fetched]
    return list(map(list, zip(*found, strict=True)))


def read_rows(
    open_shard: Callable[[int], ShardReader],
    array: str,
    shards: NDArray[np.int64],
    samples: NDArray[np.int64],
) -> list[bytes]:
    """The bytes of samples that may lie in several shards, in the order asked for."""
    rows: list[bytes] = [b""] * len(shards)
    for shard in np.unique(shards).tolist():
        positions = np.flatnonzero(shards == shard)
        for position, row in zip(
            positions.tolist(), open_shard(shard).read(array, samples[positions]), strict=True
        ):
            rows[position] = row
    return rows
