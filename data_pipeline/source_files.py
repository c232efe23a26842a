"""The files of a source, on disk or behind any fsspec URL: finding, opening and hashing them, with clear errors."""

from __future__ import annotations

import glob
import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]

from data_pipeline.errors import SourceError
from data_pipeline.files import sha256_file, sha256_json

_READ_WHOLE = 16 << 20
"""Local files up to this size, in bytes, are hashed whole."""
_BLOCKS, _BLOCK_BYTES = 64, 64 << 10


@contextmanager
def opened(path: str, *, decompress: bool = False) -> Iterator[Any]:
    """A file for reading bytes; whatever goes wrong with it inside the block becomes a SourceError with its path.

    Args:
        decompress: by the ending of the name.
    """
    with _clear_errors(path):
        if decompress and path.endswith(".zst"):
            import pyarrow as pa

            # fsspec knows zstd only through another package, which takes a file that was cut for a whole one
            with fsspec.open(path, "rb") as raw, pa.CompressedInputStream(raw, "zstd") as file:
                yield io.BufferedReader(file)
        else:
            with fsspec.open(path, "rb", compression="infer" if decompress else None) as file:
                yield file


def expand(patterns: Sequence[str]) -> list[str]:
    """The files behind paths and patterns, each once, in the order of the patterns and by name inside one.

    Raises:
        SourceError: a pattern matches nothing, or its store cannot be asked.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        if _is_local(pattern):
            magic = glob.has_magic(pattern)
            paths = sorted(glob.glob(pattern, recursive=True)) if magic else [pattern]  # noqa: PTH207
            paths = [path for path in paths if Path(path).is_file()]
        elif glob.has_magic(pattern):
            with _clear_errors(pattern):
                filesystem, path = fsspec.core.url_to_fs(pattern)
                paths = sorted(filesystem.unstrip_protocol(name) for name in filesystem.glob(path))
        else:
            paths = [pattern]
        if not paths:
            raise SourceError(f"source.paths: no file matches {pattern!r}")
        found.update(dict.fromkeys(paths))
    return list(found)


def hash_file(path: str) -> str:
    """Identity of a file: of a local one by its size and bytes, of a remote one by the store's own description
    (size, etag, time).

    Every task of a build asks for all files, so of large ones only blocks at even distances are read (4 MiB). A
    byte changed between them is left to the checks of the file's own format.

    Raises:
        SourceError: there is no such file, or its store cannot be asked.
    """
    with _clear_errors(path):
        if _is_local(path):
            return _hash_local(Path(path))
        filesystem, inner = fsspec.core.url_to_fs(path)
        return sha256_json([filesystem.size(inner), str(filesystem.checksum(inner))])


def _hash_local(path: Path) -> str:
    size = path.stat().st_size
    if size <= _READ_WHOLE:
        return sha256_file(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for block in range(_BLOCKS):
            file.seek(
                (size - _BLOCK_BYTES) * block // (_BLOCKS - 1)
            )  # the first byte and the last among them
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


@contextmanager
def _clear_errors(path: str) -> Iterator[None]:
    try:
        yield
    except SourceError:
        raise
    except ImportError as error:  # fsspec's message names the package: "Install s3fs to access S3"
        raise SourceError(f"source.paths: {path!r} needs a package that is not installed: {error}") from error
    except FileNotFoundError as error:
        raise SourceError(f"source.paths: {path!r} does not exist") from error
    except Exception as error:  # stores and decompressors raise many kinds, of several libraries
        raise SourceError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); fetch it again if it is damaged"
        ) from error


def _is_local(path: str) -> bool:
    return "://" not in path and "::" not in path
