"""manifest.json: what a directory of token shards holds, with a hash of everything. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from data_pipeline.errors import CorruptShardError, FormatVersionError, NotADatasetError
from data_pipeline.files import sha256_json
from rqvae.config import StrictModel

FORMAT = "rqvae-token-shards"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "validation", "test")


class ShardEntry(StrictModel):
    """One tar and its index."""

    name: str
    """File name without `.tar` and `.index.npy`."""
    samples: int
    tokens: int
    """Positions, padding included."""
    real_tokens: int
    """Tokens of documents, their end-of-text tokens included."""
    documents: int
    """Documents that begin in this shard."""
    bytes: int
    """UTF-8 bytes of the original text covered by the real tokens."""
    file_bytes: int
    """Size of the tar."""
    sha256: str
    index_sha256: str


class SplitEntry(StrictModel):
    """One split: its totals, and its shards in the order of the sample index."""

    samples: int
    tokens: int
    real_tokens: int
    documents: int
    bytes: int
    shards: tuple[ShardEntry, ...]

    @classmethod
    def of(cls, shards: list[ShardEntry]) -> SplitEntry:
        """The split made of these shards."""
        totals = {
            name: sum(getattr(shard, name) for shard in shards)
            for name in ("samples", "tokens", "real_tokens", "documents", "bytes")
        }
        return cls(shards=tuple(shards), **totals)


class SourceEntry(StrictModel):
    """Where the text came from."""

    description: dict[str, Any]
    """What was read: files or distributions with their versions, what was left out, and `parts` of the source in the
    order of the shards, each with how many shards of every split it gave."""
    content_hash: str
    """Hash of the documents, or of the files they were read from."""
    identity: str
    """Cheap hash of the source as it lies there, and of a pretrained tokenizer; a finished build is skipped
    while it stays the same."""


class Manifest(StrictModel):
    """Everything about a directory of token shards. Written last, so its presence means a complete build."""

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    fingerprint: str
    """sha256 over all the rest, except for the place of the directory."""
    sample_length: int
    document_grid: int
    samples_per_member: int
    token_dtype: str
    vocab_size: int
    """Token ids are below it."""
    eos_token_id: int
    pad_token_id: int
    tokenizer_sha256: str
    seed: int
    source: SourceEntry
    config: dict[str, Any]
    """The `data:` section that built it."""
    splits: dict[str, SplitEntry]

    @classmethod
    def create(cls, **values: Any) -> Manifest:
        """A manifest with its fingerprint computed."""
        manifest = cls(fingerprint="", **values)
        return manifest.model_copy(update={"fingerprint": manifest.compute_fingerprint()})

    def compute_fingerprint(self) -> str:
        """The fingerprint that the content calls for."""
        return _fingerprint(self.model_dump(mode="json"))


def _fingerprint(values: Mapping[str, Any]) -> str:
    content = {name: value for name, value in values.items() if name != "fingerprint"}
    content["config"] = {name: value for name, value in values["config"].items() if name != "directory"}
    return sha256_json(content)


def load_manifest(directory: str | Path) -> Manifest:
    """The manifest of a complete build.

    Raises:
        NotADatasetError: nothing there, unfinished, or something else's.
        FormatVersionError: another version of the format.
        CorruptShardError: the manifest does not match its own fingerprint.
    """
    path = Path(directory) / MANIFEST_NAME
    if not Path(directory).is_dir():
        raise NotADatasetError(
            f"{directory}: no such directory; build the token shards first: "
            "python -m data_pipeline build --config FILE"
        )
    if not path.is_file():
        raise NotADatasetError(
            f"{directory}: holds no {MANIFEST_NAME}, so it is either not a directory of token shards or its "
            "build did not finish; run the same build command again"
        )
    there = path.stat()
    return _load(path, (there.st_ino, there.st_size, there.st_mtime_ns))


@lru_cache(maxsize=8)
def _load(path: Path, _: tuple[int, int, int]) -> Manifest:
    """The manifest in a file as it stands; once, as all splits open it and 10^5 shards take a second or more."""
    return checked_manifest(_parse(path.read_bytes(), str(path)), str(path))


def _parse(content: bytes, path: str) -> Any:
    try:
        return from_json(content)  # half the time of json.loads
    except ValueError as error:
        raise CorruptShardError(f"{path}: not readable as JSON: {error}") from error


def checked_manifest(values: Any, path: str) -> Manifest:
    """The manifest in the JSON value that was read from `path`.

    Raises:
        NotADatasetError, FormatVersionError, CorruptShardError: as `load_manifest`.
    """
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise NotADatasetError(f"{path}: not the manifest of token shards (format {FORMAT!r} expected)")
    if values.get("format_version") != FORMAT_VERSION:
        raise FormatVersionError(
            f"{path}: format version {values.get('format_version')!r}, but this program reads "
            f"{FORMAT_VERSION}; build the token shards again"
        )
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        raise CorruptShardError(f"{path}: damaged: {error}") from error
    # over what was read: to build it again from the model takes as long as all the rest where there are 10^5 shards
    if manifest.fingerprint != _fingerprint(values):
        raise CorruptShardError(f"{path}: damaged or edited: its content does not match its fingerprint")
    return manifest


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        CorruptShardError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptShardError(f"{path}: not readable as JSON: {error}") from error
