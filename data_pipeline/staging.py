"""Copies of token and code shards on a node's own disk, for training to read instead of a busy shared file system.

A copy lies in `SCRATCH/FINGERPRINT`, so that all runs on the same data use it. A file is checked against the
manifest's sha256 while it is copied and appears under its name only then; the manifest comes last and marks the copy
as complete. What an interrupted start has copied, the next one keeps.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.code_manifest import CODE_MANIFEST_NAME, CodeShardEntry, load_code_manifest
from data_pipeline.errors import CorruptShardError, MissingShardError, NotADatasetError
from data_pipeline.files import atomic_writer
from data_pipeline.manifest import MANIFEST_NAME, ShardEntry, load_manifest
from data_pipeline.shards import index_path, tar_path

_CHUNK = 1 << 22
_THREADS = 4
_GIB = 1 << 30

Files = dict[Path, str | None]
"""Paths relative to the dataset, with their sha256; None where the manifest does not have it."""


class NoRoomError(OSError):
    """The node's disk does not hold what is to be copied there."""


def stage(directory: Path, scratch: Path, splits: Iterable[str]) -> Path:
    """Copy splits of a dataset to this node, unless they are there; returns the copy.

    Args:
        directory: token shards, or codes.
        scratch: directory on the node's disk; created if missing. Processes that copy the same data take turns.
        splits: others stay where they are.

    Raises:
        NoRoomError: the files do not fit; says what is needed and what is free.
        DatasetError: the dataset is incomplete or damaged; names the file.
    """
    manifest, fingerprint, files = _contents(directory, splits)
    target = scratch / fingerprint
    try:
        _fill(directory, target, files, manifest)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise NoRoomError(
                f"'{scratch}' on this node filled up while '{directory}' was copied there"
            ) from error
        raise
    return target


def _fill(directory: Path, target: Path, files: Files, manifest: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with _alone(target):
        for partial in target.rglob(".*.partial"):  # of a process that was killed
            partial.unlink()
        sizes = {file: _size(directory / file) for file in files}
        missing = [file for file, size in sizes.items() if _size_there(target / file) != size]
        _check_room(directory, target, sum(sizes[file] for file in missing))
        with ThreadPoolExecutor(_THREADS) as threads:
            jobs = [threads.submit(_copy, directory / file, target / file, files[file]) for file in missing]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        _copy(directory / manifest, target / manifest, None)


def staged(directory: Path, scratch: Path) -> Path:
    """The complete copy of a dataset on this node.

    Raises:
        NotADatasetError: there is none.
    """
    manifest, fingerprint, _ = _contents(directory, ())
    if not (scratch / fingerprint / manifest).is_file():
        raise NotADatasetError(f"'{directory}' has no complete copy in '{scratch}' on this node")
    return scratch / fingerprint


def _contents(directory: Path, splits: Iterable[str]) -> tuple[Path, str, Files]:
    """Manifest, fingerprint, and all other files."""
    files: Files = {}
    shards: dict[str, Sequence[ShardEntry | CodeShardEntry]]
    if (directory / MANIFEST_NAME).is_file() or not directory.is_dir():
        name, tokens = Path(MANIFEST_NAME), load_manifest(directory)
        fingerprint = tokens.fingerprint
        shards = {split: tokens.splits[split].shards for split in splits}
        if shards:
            tokenizer = sorted((directory / "tokenizer").iterdir())
            files |= {path.relative_to(directory): None for path in tokenizer}
    else:
        name, codes = Path(CODE_MANIFEST_NAME), load_code_manifest(directory)
        fingerprint = codes.fingerprint
        shards = {split: codes.splits.get(split, ()) for split in splits}
    for split, entries in shards.items():
        for entry in entries:
            files[tar_path(Path(split), entry.name)] = entry.sha256
            files[index_path(Path(split), entry.name)] = entry.index_sha256
    return name, fingerprint, files


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise MissingShardError(
            f"{path}: listed in the manifest but not there; restore it or build again"
        ) from None


def _size_there(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _check_room(directory: Path, target: Path, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if needed > free:
        raise NoRoomError(
            f"'{directory}' needs {needed / _GIB:.2f} GiB more in '{target.parent}' on this node, where "
            f"{free / _GIB:.2f} GiB are free: remove old copies there, or read the data where they are",
        )


def _copy(source: Path, target: Path, sha256: str | None) -> None:
    hasher = hashlib.sha256()
    with source.open("rb") as content, atomic_writer(target) as copy:
        while chunk := content.read(_CHUNK):
            hasher.update(chunk)
            copy.write(chunk)
        if sha256 is not None and hasher.hexdigest() != sha256:
            raise CorruptShardError(f"{source}: damaged, swapped or cut (sha256); restore it or build again")


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Whoever comes second waits, and finds the copy made. Released by the death of the process as well."""
    descriptor = os.open(target, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
