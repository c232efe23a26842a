"""Writing files so that they are complete or invisible, and hashing them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under `path` only once it is complete and on disk.

    It is written beside its place as `.NAME.PID.partial`, fsynced and renamed; an error leaves nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_directory(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync_directory(directory: Path) -> None:
    """Makes renames inside the directory survive a power loss."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_once(save: Callable[[Path], object], directory: Path) -> None:
    """A directory that appears complete or not at all; where several tasks write the same one, the first stays.

    Args:
        save: fills the directory that it is given, which is not there yet.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        written = partial / directory.name  # mkdtemp's own folder is closed to everyone else
        save(written)
        for path in written.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        try:
            written.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise
        sync_directory(directory.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def canonical_json(value: Any) -> str:
    """The one text of a JSON value, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, complete or not at all."""
    with atomic_writer(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def sha256_json(value: Any) -> str:
    """sha256 of the canonical text of a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class HashingFile:
    """A write-only file that hashes and counts what goes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        """Writes all of `data`."""
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)
        return len(data)

    def hexdigest(self) -> str:
        """sha256 of everything written so far."""
        return self._hash.hexdigest()
