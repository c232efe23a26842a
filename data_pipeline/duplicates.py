"""Exact duplicates of a whole source, found in bounded memory: hash, merge, leave out.

1. Hash, a unit at a time and so in parallel: `hashes-UNIT.npy` holds the 128-bit hash of every different text with
   its place in the unit, sorted by hash; `repeats-UNIT.npy` the places of texts that stand earlier in the unit.
2. Merge: the hashes fall into buckets of equal ranges, which are small enough to be sorted in memory. Of equal
   hashes the first in (unit, place) stays; `duplicates-BUCKET-of-N.npy` lists the others, sorted. `merged.json`
   comes last.
3. `WithoutDuplicates` reads a source and leaves out what is listed.

Every file is complete or invisible and a pure function of the source, so each step goes on where it was killed.
Texts are compared as they are: nothing is normalised. Among 10^10 texts two different ones share 128 bits with
probability 10^-19.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DatasetError, SourceError
from data_pipeline.files import atomic_writer, write_json
from data_pipeline.manifest import read_json
from data_pipeline.progress import Progress
from data_pipeline.sources import Document, Source

_HASH = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u4")])
_LISTED = np.dtype([("unit", "<u4"), ("place", "<u4")])
_BUCKET_ROWS = 1 << 25
_MERGE_BYTES_PER_ROW = 60
"""Peak of `_bucket`: the rows (20), their units (4), the order (8) and the sorted rows (20), or what sorting takes;
and room for the unevenness of the buckets."""


class Cost(NamedTuple):
    """What removing duplicates takes, in bytes; every listed duplicate adds 8 bytes of disk."""

    buckets: int
    merge_memory: int
    disk: int


def cost(documents: int, units: int, bucket_rows: int = _BUCKET_ROWS) -> Cost:
    """Memory and disk for a source of so many documents in so many units."""
    buckets = max(1, math.ceil(documents / bucket_rows))
    rows = math.ceil(documents / buckets)
    bounds = 8 * units * (buckets + 1)
    return Cost(buckets, _MERGE_BYTES_PER_ROW * rows + bounds, _HASH.itemsize * documents)


def is_hashed(folder: Path, unit: int) -> bool:
    """Whether the first pass has done this unit."""
    return _hashes(folder, unit).is_file()


def hash_unit(source: Source, folder: Path, unit: int, *, show_progress: bool = True) -> None:
    """The first pass over one unit; takes about 65 bytes of memory for each of its documents."""
    digests = bytearray()
    with Progress(None, "hashing", unit="documents", shown=show_progress) as progress:
        for document in source.read(unit):
            digests += hashlib.blake2b(document.text.encode(), digest_size=16).digest()
            progress.update()
    halves = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
    rows = np.empty(len(halves), dtype=_HASH)
    rows["high"], rows["low"], rows["place"] = halves[:, 0], halves[:, 1], np.arange(len(rows), dtype="<u4")
    rows = rows[_by_hash(rows)]
    repeats = _repeats(rows)
    # a text that fills a unit counts once in the merge, so no bucket outgrows its share by more than the units
    _save(folder / f"repeats-{unit:06d}.npy", np.sort(rows["place"][repeats]))
    _save(_hashes(folder, unit), rows[~repeats])


def is_merged(folder: Path) -> bool:
    """Whether the second pass is done."""
    return (folder / "merged.json").is_file()


def merge_hashes(folder: Path, units: Sequence[str], bucket_rows: int = _BUCKET_ROWS) -> None:
    """The second pass, over the hashes of all units; `cost` says what it takes.

    Args:
        units: names of the source's units.
        bucket_rows: hashes that are sorted at a time.

    Raises:
        DatasetError: units are not hashed yet; names them.
    """
    missing = [name for unit, name in enumerate(units) if not is_hashed(folder, unit)]
    if missing:
        raise DatasetError(
            f"{folder}: {len(missing)} of {len(units)} parts of the source are not hashed yet "
            f"({', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}): run their tasks of "
            "`python -m data_pipeline deduplicate` first"
        )
    sizes = [len(_mapped(_hashes(folder, unit))) for unit in range(len(units))]
    repeats = sum(len(_mapped(folder / f"repeats-{unit:06d}.npy")) for unit in range(len(units)))
    buckets = cost(sum(sizes), len(units), bucket_rows).buckets
    edges = np.array([(bucket << 64) // buckets for bucket in range(1, buckets)], dtype="<u8")
    bounds = np.empty((buckets + 1, len(units)), dtype=np.int64)
    bounds[0], bounds[-1] = 0, sizes
    for unit in range(len(units)):
        bounds[1:-1, unit] = np.searchsorted(_mapped(_hashes(folder, unit))["high"], edges)
    listed = 0
    with Progress(buckets, "merging hashes", unit="buckets") as progress:
        for bucket in range(buckets):
            path = _listing(folder, bucket, buckets)
            if not path.is_file():
                _save(path, _bucket(folder, bounds[bucket], bounds[bucket + 1]))
            listed += len(_mapped(path))
            progress.update()
    write_json(
        folder / "merged.json",
        {"documents": sum(sizes) + repeats, "removed": listed + repeats, "buckets": buckets},
    )


def _bucket(folder: Path, first: NDArray[np.int64], last: NDArray[np.int64]) -> NDArray[Any]:
    """All but the first of equal texts in one bucket, which is rows first[u] to last[u] of the hashes of unit u."""
    counts = last - first
    rows = np.empty(int(counts.sum()), dtype=_HASH)
    end = 0
    for unit in np.flatnonzero(counts).tolist():
        begin, end = end, end + int(counts[unit])
        rows[begin:end] = _mapped(_hashes(folder, unit))[first[unit] : last[unit]]
    units = np.repeat(np.arange(len(counts), dtype="<u4"), counts)
    order = _by_hash(rows)
    rows = rows[order]
    repeats = _repeats(rows)
    listed = np.empty(int(repeats.sum()), dtype=_LISTED)
    listed["unit"], listed["place"] = units[order[repeats]], rows["place"][repeats]
    return listed[np.lexsort((listed["place"], listed["unit"]))]


class WithoutDuplicates:
    """A source without the duplicates that the two passes have found.

    Args:
        source: the whole source.
        folder: of the passes.

    Raises:
        DatasetError: the passes are not done.
    """

    def __init__(self, source: Source, folder: Path) -> None:
        if not is_merged(folder):
            raise DatasetError(
                f"{folder}: the duplicates are not known yet: run `python -m data_pipeline deduplicate --config "
                "FILE` first, or its tasks (--task-index i --num-tasks n) and then its --merge"
            )
        self._source = source
        self._folder = folder
        self._merged = read_json(folder / "merged.json")

    def units(self) -> Sequence[str]:
        """As the whole source."""
        return self._source.units()

    def identity(self) -> str:
        """As the whole source."""
        return self._source.identity()

    def content(self) -> tuple[dict[str, Any], str]:
        """Description with the number of documents before, and of those removed; the hash of the whole source."""
        description, content_hash = self._source.content()
        counts = {name: self._merged[name] for name in ("documents", "removed")}
        return {**description, "exact_duplicates": counts}, content_hash

    def read(self, unit: int) -> Iterator[Document]:
        """The documents of one unit that are not listed as duplicates.

        Raises:
            SourceError: the unit is shorter than when it was hashed.
        """
        listed = iter(self._places(unit).tolist())
        left_out = next(listed, None)
        for place, document in enumerate(self._source.read(unit)):
            if place == left_out:
                left_out = next(listed, None)
            else:
                yield document
        if left_out is not None:
            raise SourceError(
                f"{self.units()[unit]}: has changed since its duplicates were looked for: build again"
            )

    def _places(self, unit: int) -> NDArray[np.uint32]:
        parts: list[NDArray[Any]] = [np.load(self._folder / f"repeats-{unit:06d}.npy")]
        for bucket in range(self._merged["buckets"]):
            listed = _mapped(_listing(self._folder, bucket, self._merged["buckets"]))
            mine = slice(bisect_left(listed["unit"], unit), bisect_right(listed["unit"], unit))
            parts.append(listed["place"][mine])
        return np.sort(np.concatenate(parts))


def _by_hash(rows: NDArray[Any]) -> NDArray[np.int64]:
    """The order by hash; stable, so that equal texts stay in the order of their places."""
    return np.lexsort((rows["low"], rows["high"]))


def _repeats(rows: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each of the sorted rows has the hash of the row before it."""
    repeats = np.zeros(len(rows), dtype=bool)
    repeats[1:] = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
    return repeats


def _hashes(folder: Path, unit: int) -> Path:
    return folder / f"hashes-{unit:06d}.npy"


def _listing(folder: Path, bucket: int, buckets: int) -> Path:
    return folder / f"duplicates-{bucket:06d}-of-{buckets:06d}.npy"


def _mapped(path: Path) -> NDArray[Any]:
    mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


def _save(path: Path, array: NDArray[Any]) -> None:
    with atomic_writer(path) as file:
        np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
