"""The shard format: an uncompressed tar of .npy members, and beside it an index of every sample's bytes.

A member holds the rows of several samples; the index says where each row lies in the tar and what its crc32
is, so single samples are read and checked (`shard_reader`). The tar is an ordinary one: stock `webdataset` reads it
without the index.
"""

from __future__ import annotations

import io
import itertools
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import CorruptShardError
from data_pipeline.files import HashingFile, atomic_writer, sha256_file
from data_pipeline.manifest import ShardEntry
from data_pipeline.packing import LENGTH, NUM_BYTES, ROW, PackedSample

# Where one sample's rows of one array lie: offset and size in the tar in bytes, crc32 of those bytes.
_PLACE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc", "<u4")])
_BLOCK = tarfile.BLOCKSIZE


def index_dtype(arrays: Sequence[str]) -> np.dtype:
    """Rows of an index: for each array (as `tokens`, `segments`) the place of the sample's bytes."""
    return np.dtype([(name, _PLACE) for name in arrays])


def tar_path(directory: Path, name: str) -> Path:
    """The tar of the shard `name`."""
    return directory / f"{name}.tar"


def index_path(directory: Path, name: str) -> Path:
    """The index of the shard `name`."""
    return directory / f"{name}.index.npy"


def samples_per_member(row_bytes: int, member_bytes: int) -> int:
    """Samples that a member must hold to reach `member_bytes`."""
    return max(1, -(-member_bytes // row_bytes))


class Group:
    """The arrays of the samples that share a tar member.

    Args:
        key: the webdataset key.
        arrays: by name; the rows of sample i are `boundaries[name][i] : boundaries[name][i + 1]`.
        boundaries: [n + 1] row numbers by name.
    """

    def __init__(
        self,
        key: str,
        arrays: Mapping[str, NDArray[Any]],
        boundaries: Mapping[str, NDArray[np.integer] | Sequence[int]],
    ) -> None:
        self.key = key
        self.arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        self.boundaries = boundaries


def write_tar(directory: Path, name: str, groups: Sequence[Group]) -> tuple[int, str, str]:
    """Writes a tar and its index, the index first, each complete or not at all.

    The bytes are a pure function of the groups.

    Returns:
        size of the tar in bytes, sha256 of the tar, sha256 of the index.
    """
    arrays = sorted(groups[0].arrays)
    index: list[tuple[tuple[int, int, int], ...]] = []
    with atomic_writer(tar_path(directory, name)) as raw:
        file = HashingFile(raw)
        with tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
            for group in groups:
                places = [_add_member(tar, group, array) for array in arrays]
                index += zip(*places, strict=True)
        with atomic_writer(index_path(directory, name)) as index_file:
            np.lib.format.write_array(
                index_file, np.array(index, dtype=index_dtype(arrays)), allow_pickle=False
            )
    return file.size, file.hexdigest(), sha256_file(index_path(directory, name))


def _add_member(tar: tarfile.TarFile, group: Group, name: str) -> list[tuple[int, int, int]]:
    """Adds one array of a group; the place of every sample's rows."""
    array, boundaries = group.arrays[name], group.boundaries[name]
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    content = buffer.getbuffer()
    member = tarfile.TarInfo(f"{group.key}.{name}.npy")
    member.size = len(content)
    member.mode = 0o644
    first_byte = tar.offset + _BLOCK
    header = len(content) - array.nbytes
    row_bytes = array.strides[0]
    places = []
    for begin, end in itertools.pairwise(boundaries):
        start, stop = header + int(begin) * row_bytes, header + int(end) * row_bytes
        places.append((first_byte + start, stop - start, zlib.crc32(content[start:stop])))
    tar.addfile(member, io.BytesIO(content))
    return places


def write_token_shard(
    directory: Path, name: str, key_prefix: str, samples: Sequence[PackedSample], samples_per_member: int
) -> ShardEntry:
    """Writes one shard of packed samples.

    Args:
        key_prefix: begins the webdataset keys, which must be unique in the split; without a dot.
    """
    groups = []
    for first in range(0, len(samples), samples_per_member):
        members = samples[first : first + samples_per_member]
        segments = np.concatenate([sample.segments for sample in members])
        counts = [len(sample.segments) for sample in members]
        segments[:, ROW] = np.repeat(np.arange(len(members)), counts)
        groups.append(
            Group(
                f"{key_prefix}{first // samples_per_member:06d}",
                {"tokens": np.stack([sample.tokens for sample in members]), "segments": segments},
                {"tokens": range(len(members) + 1), "segments": np.cumsum([0, *counts])},
            )
        )
    file_bytes, sha256, index_sha256 = write_tar(directory, name, groups)
    segments = np.concatenate([sample.segments for sample in samples])
    return ShardEntry(
        name=name,
        samples=len(samples),
        tokens=sum(len(sample.tokens) for sample in samples),
        real_tokens=int(segments[:, LENGTH].sum()),
        documents=sum(sample.documents for sample in samples),
        bytes=int(segments[:, NUM_BYTES].sum()),
        file_bytes=file_bytes,
        sha256=sha256,
        index_sha256=index_sha256,
    )


def npy_header(dtype: np.dtype, rows: int) -> bytes:
    """How a .npy file of this type and length begins. A header is compared, never parsed: it may be damaged."""
    buffer = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def parse_index(content: bytes, path: str, arrays: Sequence[str], samples: int) -> NDArray[Any]:
    """[samples] rows of `index_dtype` from the bytes of an index.

    Raises:
        CorruptShardError: it is not an index of so many samples.
    """
    expected = index_dtype(sorted(arrays))
    header = npy_header(expected, samples)
    if content[: len(header)] != header or len(content) != len(header) + samples * expected.itemsize:
        raise stale_index(path, samples)
    return np.frombuffer(content, dtype=expected, offset=len(header))


def stale_index(path: str, samples: int) -> CorruptShardError:
    """The error of an index that is not one of so many samples."""
    name = Path(path).name.removesuffix(".index.npy")
    return CorruptShardError(
        f"{path}: stale or damaged index of shard {name}: not {samples} rows as the manifest says"
    )
