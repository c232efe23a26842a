"""Shards of latent codes: the format of the token shards, one output shard for every token shard.

A task that encodes shard i calls `write_code_shard`; a killed task asks `code_shard_is_done` for what is
left; once all are there, `finish_codes` writes the manifest. Codes carry the hash of the codec that made them
and the fingerprint of the token shards, and `CodeDataset` refuses any others.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from pydantic import ValidationError

from data_pipeline.code_manifest import (
    CODE_MANIFEST_NAME,
    LATENT_DTYPE,
    CodeLayout,
    CodeManifest,
    CodeShardEntry,
    Precision,
    load_code_manifest,
)
from data_pipeline.dataset import Batch, Indices, TokenDataset, require_shards
from data_pipeline.errors import (
    CodecMismatchError,
    CorruptShardError,
    DatasetError,
    EmptySplitError,
    FingerprintMismatchError,
    MissingShardError,
    NotADatasetError,
)
from data_pipeline.files import write_json
from data_pipeline.manifest import SPLITS, load_manifest, read_json
from data_pipeline.shard_reader import ShardReader, open_shards, read_rows
from data_pipeline.shards import Group, tar_path, write_tar
from rqvae.config import StrictModel


class _Record(StrictModel):
    """Marks one shard as done."""

    layout: CodeLayout
    entry: CodeShardEntry


def code_shard_name(shard_index: int) -> str:
    """Name of the code shard made from the token shard of that index."""
    return f"codes-{shard_index:06d}"


def _record_path(code_directory: str | Path, split: str, shard_index: int) -> Path:
    return Path(code_directory) / split / f"{code_shard_name(shard_index)}.done.json"


def _finished_layout(code_directory: str | Path) -> CodeLayout | None:
    """Layout of a finished set; None where there is none, or another task that adds latents has just undone it."""
    try:
        return load_code_manifest(code_directory).layout
    except (NotADatasetError, FileNotFoundError):
        if (Path(code_directory) / CODE_MANIFEST_NAME).is_file():  # of something else
            raise
        return None


def write_code_shard(
    code_directory: str | Path,
    split: str,
    shard_index: int,
    codes: ArrayLike,
    *,
    token_dataset: TokenDataset,
    codec_hash: str,
    compression_factor: int,
    codebook_sizes: Sequence[int],
    latents: ArrayLike | None = None,
    precision: Precision = "fp32",
) -> None:
    """Writes the codes of one token shard, and the mark that it is done last.

    Args:
        split: must be the split of `token_dataset`.
        codes: [n, S, D] integers, for the samples `token_dataset.shard_range(shard_index)` in that order.
        codec_hash: hash of the codec that made them.
        compression_factor: K, S = sample_length / K.
        codebook_sizes: C of each of the D levels.
        latents: [n, S, E] floats that the codes were chosen for, kept in fp16; for stochastic codes.
        precision: that the codec computed in.

    Raises:
        ValueError: the shape does not fit the token shard, or a code is out of its codebook's range.
        CodecMismatchError: the directory already holds a finished set of another codec's codes, or in another
            precision.
        FingerprintMismatchError: or of other token shards.
    """
    if split != token_dataset.split:
        raise ValueError(f"codes of split {split!r} cannot be made from the split {token_dataset.split!r}")
    vectors = None if latents is None else np.asarray(latents)
    layout = CodeLayout(
        codec_hash=codec_hash,
        token_fingerprint=token_dataset.fingerprint,
        compression_factor=compression_factor,
        codebook_sizes=tuple(codebook_sizes),
        sample_length=token_dataset.sample_length,
        latent_dim=None if vectors is None else vectors.shape[-1],
        precision=precision,
    )
    if (there := _finished_layout(code_directory)) is not None:
        _check_layout(there, layout, code_directory)
        if there != layout:  # latents are added: the set is not complete until all shards have them
            (Path(code_directory) / CODE_MANIFEST_NAME).unlink(missing_ok=True)  # other tasks add theirs
    samples = len(token_dataset.shard_range(shard_index))
    values = np.asarray(codes)
    if values.shape != (samples, *layout.shape) or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"codes of shard {shard_index} must be integers of shape {(samples, *layout.shape)}, not "
            f"{values.dtype} of shape {values.shape}"
        )
    if samples and (values.min() < 0 or (values >= np.array(codebook_sizes)).any()):
        raise ValueError(
            f"codes of shard {shard_index} are out of the range of their codebooks {codebook_sizes}"
        )
    rows = {"codes": values.astype(layout.dtype)}
    if vectors is not None:
        if vectors.shape[:-1] != values.shape[:-1]:
            raise ValueError(
                f"latents of shard {shard_index} have shape {vectors.shape}, the codes {values.shape}"
            )
        if not (np.abs(vectors) <= np.finfo(LATENT_DTYPE).max).all():
            raise ValueError(f"latents of shard {shard_index} do not fit fp16: not finite, or above 65504")
        rows["latents"] = vectors.astype(LATENT_DTYPE)
    name = code_shard_name(shard_index)
    size = token_dataset.manifest.samples_per_member
    groups = [
        Group(
            key,
            {array: content[first : first + size] for array, content in rows.items()},
            dict.fromkeys(rows, range(min(size, samples - first) + 1)),
        )
        for key, first in zip(
            _keys(tar_path(token_dataset.directory / split, token_dataset.shards[shard_index].name)),
            range(0, samples, size),
            strict=True,
        )
    ]
    record_path = _record_path(code_directory, split, shard_index)
    record_path.unlink(missing_ok=True)
    file_bytes, sha256, index_sha256 = write_tar(Path(code_directory) / split, name, groups)
    entry = CodeShardEntry(
        name=name, samples=samples, file_bytes=file_bytes, sha256=sha256, index_sha256=index_sha256
    )
    write_json(record_path, _Record(layout=layout, entry=entry).model_dump(mode="json"))


def _keys(token_tar: Path) -> list[str]:
    """The webdataset keys of a token shard in order; reads the headers only."""
    suffix = ".tokens.npy"
    with tarfile.open(token_tar, mode="r:") as tar:
        return [member.name.removesuffix(suffix) for member in tar if member.name.endswith(suffix)]


def _read_record(path: Path) -> _Record | None:
    if not path.is_file():
        return None
    try:
        return _Record.model_validate(read_json(path))
    except (ValidationError, CorruptShardError):
        return None  # not a mark of ours: the shard is made again


def code_shard_is_done(
    code_directory: str | Path,
    split: str,
    shard_index: int,
    *,
    token_fingerprint: str,
    codec_hash: str,
    with_latents: bool = False,
    precision: Precision = "fp32",
) -> bool:
    """Whether this codec's codes of this token shard are there already, if asked with their latents."""
    record = _read_record(_record_path(code_directory, split, shard_index))
    if record is None:
        return False
    layout, path = record.layout, tar_path(Path(code_directory) / split, record.entry.name)
    same = (layout.codec_hash, layout.token_fingerprint) == (codec_hash, token_fingerprint)
    same &= layout.precision == precision and (layout.latent_dim is not None or not with_latents)
    return same and path.is_file() and path.stat().st_size == record.entry.file_bytes


def finish_codes(
    code_directory: str | Path,
    token_directory: str | Path,
    *,
    codec_hash: str,
    splits: Sequence[str] | None = None,
    with_latents: bool = False,
    precision: Precision = "fp32",
) -> CodeManifest:
    """Writes the manifest of the codes once every shard is there.

    Args:
        splits: the splits that were encoded; None takes all that have samples.
        with_latents: every shard must have its latents.
        precision: every shard must have been made in it.

    Raises:
        MissingShardError: names the shards that are not done, or were made by another codec.
    """
    tokens = load_manifest(token_directory)
    wanted = [name for name in (splits or SPLITS) if splits is not None or tokens.splits[name].samples]
    layouts: set[CodeLayout] = set()
    entries: dict[str, tuple[CodeShardEntry, ...]] = {}
    missing = []
    for split in wanted:
        found = []
        for index in range(len(tokens.splits[split].shards)):
            record = _read_record(_record_path(code_directory, split, index))
            if record is None or not code_shard_is_done(
                code_directory,
                split,
                index,
                token_fingerprint=tokens.fingerprint,
                codec_hash=codec_hash,
                with_latents=with_latents,
                precision=precision,
            ):
                missing.append(f"{split}/{code_shard_name(index)}")
                continue
            found.append(record.entry)
            layouts.add(record.layout)
        entries[split] = tuple(found)
    if missing:
        raise MissingShardError(
            f"{code_directory}: {len(missing)} shards are not encoded yet by the codec {codec_hash} "
            f"({', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}): run their tasks first"
        )
    if len(layouts) != 1:
        raise DatasetError(
            f"{code_directory}: the shards disagree about K, D, C or the presence of latents: encode with "
            "--latents, or remove the directory and encode again"
        )
    manifest = CodeManifest(fingerprint="", layout=layouts.pop(), splits=entries)
    manifest = manifest.model_copy(update={"fingerprint": manifest.compute_fingerprint()})
    write_json(Path(code_directory) / CODE_MANIFEST_NAME, manifest.model_dump(mode="json"))
    return manifest


def _check_layout(there: CodeLayout, wanted: CodeLayout, code_directory: str | Path) -> None:
    if there.codec_hash != wanted.codec_hash:
        raise _other_codec(code_directory, there.codec_hash, wanted.codec_hash)
    if there.token_fingerprint != wanted.token_fingerprint:
        raise _other_tokens(code_directory, there.token_fingerprint, wanted.token_fingerprint)
    if there.precision != wanted.precision:
        raise CodecMismatchError(
            f"{code_directory}: these codes were made in {there.precision}, not in {wanted.precision}: go on with "
            f"--precision {there.precision}, or encode into another directory (name=...)"
        )


def _other_codec(code_directory: str | Path, there: str, wanted: str) -> CodecMismatchError:
    return CodecMismatchError(
        f"{code_directory}: these codes were made by the codec {there}, but the codec in use is {wanted}: "
        "encode with it into another directory (launch/precompute_codes.py)"
    )


def _other_tokens(code_directory: str | Path, there: str, wanted: str) -> FingerprintMismatchError:
    return FingerprintMismatchError(
        f"{code_directory}: these codes were made from the token shards {there}, but the token shards in use "
        f"are {wanted}: encode those (launch/precompute_codes.py)"
    )


class CodeDataset:
    """The samples of a `TokenDataset` with their latent codes, joined by the sample index.

    Attributes:
        fingerprint: of the codes and with them of the tokens.
        codec_hash: of the codec that made the codes.
        compression_factor: K.
        codebook_sizes: C of every level.
        token_dataset: the tokens; `sample_length`, `vocab_size` and the rest are its.

    Args:
        codec_hash: refuse codes of any other codec; None takes whatever is there.
        with_latents: `read` adds the latents.

    Raises:
        NotADatasetError: no finished codes there, or no latents where they are asked for.
        CodecMismatchError: made by another codec; names both hashes.
        FingerprintMismatchError: made from other token shards; names both fingerprints.
        MissingShardError: a shard is not there.
        EmptySplitError: the split was not encoded.
    """

    def __init__(
        self,
        token_dataset: TokenDataset,
        code_directory: str | Path,
        codec_hash: str | None = None,
        with_latents: bool = False,
    ) -> None:
        manifest = load_code_manifest(code_directory)
        layout = manifest.layout
        if codec_hash is not None and layout.codec_hash != codec_hash:
            raise _other_codec(code_directory, layout.codec_hash, codec_hash)
        if layout.token_fingerprint != token_dataset.fingerprint:
            raise _other_tokens(code_directory, layout.token_fingerprint, token_dataset.fingerprint)
        if token_dataset.split not in manifest.splits:
            raise EmptySplitError(
                f"{code_directory}: the split {token_dataset.split!r} was not encoded; there are: "
                f"{', '.join(manifest.splits)}"
            )
        if with_latents and layout.latent_dim is None:
            raise NotADatasetError(
                f"{code_directory}: holds codes without their latents, which stochastic codes are drawn from; "
                "encode with launch/precompute_codes.py --latents"
            )
        self.token_dataset = token_dataset
        self.manifest = manifest
        self.with_latents = with_latents
        self.fingerprint = manifest.fingerprint
        self.codec_hash = layout.codec_hash
        self.compression_factor = layout.compression_factor
        self.codebook_sizes = layout.codebook_sizes
        self.sample_length = token_dataset.sample_length
        self.document_grid = token_dataset.document_grid
        self.vocab_size = token_dataset.vocab_size
        self.pad_token_id = token_dataset.pad_token_id
        self.eos_token_id = token_dataset.eos_token_id
        self.num_bytes = token_dataset.num_bytes
        self.num_real_tokens = token_dataset.num_real_tokens
        self.num_documents = token_dataset.num_documents
        self._shards = manifest.splits[token_dataset.split]
        self._folder = Path(code_directory) / token_dataset.split
        require_shards(self._folder, [shard.name for shard in self._shards], "encode")
        self._reader = lru_cache(maxsize=open_shards())(self._open)

    def __len__(self) -> int:
        return len(self.token_dataset)

    def _open(self, shard_index: int) -> ShardReader:
        shard = self._shards[shard_index]
        return ShardReader(
            self._folder, shard.name, self.manifest.layout.arrays, shard.samples, shard.file_bytes
        )

    def read(self, indices: Indices) -> Batch:
        """The batch of `TokenDataset.read` with `codes` [B, S, D], LongTensor, added, and `latents` if asked for.

        Latents are [B, S, E] in fp32.

        Raises:
            CorruptShardError: names the shard and the sample whose bytes are damaged.
        """
        layout = self.manifest.layout
        places = self.token_dataset.locate(indices)
        rows = read_rows(self._reader, "codes", *places)
        codes = np.frombuffer(b"".join(rows), dtype=layout.dtype).reshape(len(rows), *layout.shape)
        batch = {**self.token_dataset.read(indices), "codes": torch.from_numpy(codes.astype(np.int64))}
        if self.with_latents:
            rows = read_rows(self._reader, "latents", *places)
            latents = np.frombuffer(b"".join(rows), dtype=LATENT_DTYPE).astype(np.float32)
            batch["latents"] = torch.from_numpy(latents.reshape(len(rows), layout.shape[0], -1))
        return batch
