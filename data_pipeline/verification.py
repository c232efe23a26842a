"""Reading everything again: every hash, every count, and every sample as the loader reads it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from data_pipeline.code_manifest import (
    CODE_MANIFEST_NAME,
    LATENT_DTYPE,
    CodeLayout,
    CodeShardEntry,
    load_code_manifest,
)
from data_pipeline.dataset import TOKEN_ARRAYS
from data_pipeline.errors import DatasetError
from data_pipeline.files import sha256_file
from data_pipeline.manifest import Manifest, ShardEntry, load_manifest
from data_pipeline.packing import DOCUMENT, LENGTH, NUM_BYTES, PHASE, SEGMENT_COLUMNS, START
from data_pipeline.progress import Progress
from data_pipeline.shard_reader import ShardReader
from data_pipeline.shards import index_path, tar_path
from data_pipeline.tokenizer import tokenizer_hash
from data_pipeline.workers import map_in_processes

_SHARDS_OF_A_WORKER = 8
"""Fewer are not worth another process, which takes a second to start."""
Shard = TypeVar("Shard")


class _TokenShard(NamedTuple):
    """A shard of tokens and the rules that it must keep; without the manifest, which may hold a hundred thousand."""

    folder: Path
    entry: ShardEntry
    token_dtype: str
    document_grid: int
    sample_length: int
    vocab_size: int


class _CodeShard(NamedTuple):
    """A shard of codes."""

    folder: Path
    entry: CodeShardEntry
    layout: CodeLayout


def verify(directory: str | Path, num_workers: int | None = None) -> list[str]:
    """All damage in a directory of token shards or of codes, one line each; empty if it is sound.

    Args:
        num_workers: processes that read; None takes one per core where there are many shards.

    Raises:
        NotADatasetError, FormatVersionError, CorruptShardError: there is no usable manifest to check against.
    """
    root = Path(directory)
    if (root / CODE_MANIFEST_NAME).is_file():
        return _verify_codes(root, num_workers)
    manifest = load_manifest(root)
    rules = (manifest.token_dtype, manifest.document_grid, manifest.sample_length, manifest.vocab_size)
    shards = [
        _TokenShard(root / split, entry, *rules)
        for split, found in manifest.splits.items()
        for entry in found.shards
    ]
    damage = [*_tokenizer_damage(root, manifest), *_in_all(_token_shard_damage, shards, num_workers)]
    for split, found in manifest.splits.items():
        listed = {path(root / split, e.name) for e in found.shards for path in (tar_path, index_path)}
        damage += _strangers(root / split, listed)
    return damage


def _verify_codes(root: Path, num_workers: int | None) -> list[str]:
    manifest = load_code_manifest(root)
    shards = [
        _CodeShard(root / split, entry, manifest.layout)
        for split, entries in manifest.splits.items()
        for entry in entries
    ]
    damage = _in_all(_code_shard_damage, shards, num_workers)
    for split, entries in manifest.splits.items():
        folder = root / split
        paths = (tar_path, index_path, lambda folder, name: folder / f"{name}.done.json")
        damage += _strangers(folder, {path(folder, entry.name) for entry in entries for path in paths})
    return damage


def _in_all(
    damage_of: Callable[[Shard], list[str]], shards: Sequence[Shard], num_workers: int | None
) -> list[str]:
    """What `damage_of` finds in the shards, in their order."""
    if num_workers is None:
        num_workers = max(1, min(len(os.sched_getaffinity(0)), len(shards) // _SHARDS_OF_A_WORKER))
    with Progress(len(shards), "verifying", unit="shards") as progress:
        if num_workers > 1:
            by_shard = map_in_processes(damage_of, shards, num_workers, progress)
        else:
            by_shard = []
            for shard in shards:
                by_shard.append(damage_of(shard))
                progress.update()
    return list(chain.from_iterable(by_shard))


def _token_shard_damage(shard: _TokenShard) -> list[str]:
    folder, entry = shard.folder, shard.entry
    found = list(_hash_damage(folder, entry.name, entry.sha256, entry.index_sha256))
    # The single samples are looked for only where the hash says that there is something to find.
    if found:
        return [*found, *_unreadable(folder, entry.name, TOKEN_ARRAYS, entry.samples, entry.file_bytes)]
    return list(_count_damage(shard))


def _code_shard_damage(shard: _CodeShard) -> list[str]:
    folder, entry, arrays = shard.folder, shard.entry, shard.layout.arrays
    found = list(_hash_damage(folder, entry.name, entry.sha256, entry.index_sha256))
    if found:
        return [*found, *_unreadable(folder, entry.name, arrays, entry.samples, entry.file_bytes)]
    return list(_code_damage(folder, entry, shard.layout))


def _strangers(folder: Path, listed: set[Path]) -> list[str]:
    found = sorted(set(folder.iterdir()) - listed) if folder.is_dir() else []
    return [f"{path}: not in the manifest" for path in found]


def _code_damage(folder: Path, shard: CodeShardEntry, layout: CodeLayout) -> Iterator[str]:
    """Counts of a shard whose bytes are sound, and the ranges of its codes and latents."""
    reader = ShardReader(folder, shard.name, layout.arrays, shard.samples, shard.file_bytes)
    for sample in range(shard.samples):
        codes = np.frombuffer(reader.read("codes", [sample])[0], dtype=layout.dtype)
        is_sound = len(codes) == layout.shape[0] * layout.shape[1]
        is_sound = is_sound and bool((codes.reshape(layout.shape) < np.array(layout.codebook_sizes)).all())
        if layout.latent_dim is not None:
            latents = np.frombuffer(reader.read("latents", [sample])[0], dtype=LATENT_DTYPE)
            is_sound = is_sound and len(latents) == layout.shape[0] * layout.latent_dim
            is_sound = is_sound and bool(np.isfinite(latents).all())
        if not is_sound:
            yield f"{tar_path(folder, shard.name)}: sample {sample} breaks the rules of the format"


def _tokenizer_damage(root: Path, manifest: Manifest) -> Iterator[str]:
    folder = root / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        yield f"{folder}: no tokenizer.json"
    elif tokenizer_hash(folder, manifest.eos_token_id, manifest.pad_token_id) != manifest.tokenizer_sha256:
        yield f"{folder}: not the tokenizer that the shards were made with (sha256)"


def _hash_damage(folder: Path, name: str, sha256: str, index_sha256: str) -> Iterator[str]:
    for path, expected in ((tar_path(folder, name), sha256), (index_path(folder, name), index_sha256)):
        if not path.is_file():
            yield f"{path}: missing"
        elif sha256_file(path) != expected:
            yield f"{path}: damaged, swapped or cut (sha256)"


def _unreadable(
    folder: Path, name: str, arrays: tuple[str, ...], samples: int, file_bytes: int
) -> Iterator[str]:
    """Which samples of a damaged shard are hit."""
    try:
        reader = ShardReader(folder, name, arrays, samples, file_bytes)
    except DatasetError as error:
        yield str(error)
        return
    hit = []
    for sample in range(samples):
        try:
            for array in arrays:
                reader.read(array, [sample])
        except DatasetError:
            hit.append(sample)
    if hit:
        shown = ", ".join(map(str, hit[:10])) + (", ..." if len(hit) > 10 else "")
        yield f"{tar_path(folder, name)}: {len(hit)} of {samples} samples cannot be read: {shown}"


def _count_damage(shard: _TokenShard) -> Iterator[str]:
    """Counts of a shard whose bytes are sound, and the rules that its segments keep."""
    folder, entry = shard.folder, shard.entry
    reader = ShardReader(folder, entry.name, TOKEN_ARRAYS, entry.samples, entry.file_bytes)
    real_tokens = num_bytes = 0
    dtype, grid = np.dtype(shard.token_dtype), shard.document_grid
    for sample in range(entry.samples):
        tokens = np.frombuffer(reader.read("tokens", [sample])[0], dtype=dtype)
        rows = reader.read("segments", [sample])[0]
        segments = np.frombuffer(rows, dtype="<i8").reshape(-1, len(SEGMENT_COLUMNS))
        starts, ends = segments[:, START], segments[:, START] + segments[:, LENGTH]
        on_grid = ((starts - segments[:, PHASE]) % grid == 0).all()
        apart = (starts[1:] // grid >= -(-ends[:-1] // grid)).all() and (
            np.diff(segments[:, DOCUMENT]) > 0
        ).all()
        inside = len(tokens) == shard.sample_length and (ends <= len(tokens)).all()
        if not (on_grid and apart and inside) or tokens.max(initial=0) >= shard.vocab_size:
            yield f"{tar_path(folder, entry.name)}: sample {sample} breaks the rules of the format"
        real_tokens += int(segments[:, LENGTH].sum())
        num_bytes += int(segments[:, NUM_BYTES].sum())
    if (real_tokens, num_bytes) != (entry.real_tokens, entry.bytes):
        yield (
            f"{tar_path(folder, entry.name)}: {real_tokens} tokens of {num_bytes} bytes where the manifest "
            f"says {entry.real_tokens} of {entry.bytes}"
        )
