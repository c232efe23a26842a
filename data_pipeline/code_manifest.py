"""codes_manifest.json: what a directory of codes holds, with a hash of everything. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from data_pipeline.errors import CorruptShardError, FormatVersionError, NotADatasetError
from data_pipeline.files import sha256_json
from data_pipeline.manifest import read_json
from rqvae.config import StrictModel

CODE_FORMAT = "rqvae-code-shards"
CODE_FORMAT_VERSION = 2
CODE_MANIFEST_NAME = "codes_manifest.json"
LATENT_DTYPE = np.dtype("<f2")
Precision = Literal["fp32", "bf16"]


class CodeShardEntry(StrictModel):
    """One tar of codes and its index."""

    name: str
    samples: int
    file_bytes: int
    sha256: str
    index_sha256: str


class CodeLayout(StrictModel):
    """What makes codes usable together: their codec, their tokens and their shape."""

    codec_hash: str
    """Hash of the codec that made them."""
    token_fingerprint: str
    """Fingerprint of the token shards they were made from."""
    compression_factor: int
    """K: tokens per latent position."""
    codebook_sizes: tuple[int, ...]
    """C of every level; there are D."""
    sample_length: int
    """T of the token samples; a sample has T / K latent positions."""
    latent_dim: int | None = None
    """Width of the latents that are kept beside the codes, in fp16; null where they are not."""
    precision: Precision = "fp32"
    """The codec's weights and arithmetic. Rounding decides the codes of vectors on the border of two."""

    @property
    def arrays(self) -> tuple[str, ...]:
        """What a tar holds of every sample."""
        return ("codes",) if self.latent_dim is None else ("codes", "latents")

    @property
    def dtype(self) -> np.dtype:
        """How codes lie on disk."""
        return np.dtype("<u2" if max(self.codebook_sizes) <= 1 << 16 else "<u4")

    @property
    def shape(self) -> tuple[int, int]:
        """(S, D) of one sample."""
        return self.sample_length // self.compression_factor, len(self.codebook_sizes)


class CodeManifest(StrictModel):
    """Everything about a directory of codes. Written last: where it is, all shards are there."""

    format: str = CODE_FORMAT
    format_version: int = CODE_FORMAT_VERSION
    fingerprint: str
    """sha256 over all the rest."""
    layout: CodeLayout
    splits: dict[str, tuple[CodeShardEntry, ...]]

    def compute_fingerprint(self) -> str:
        """The fingerprint that the content calls for."""
        values = self.model_dump(mode="json", exclude={"fingerprint"})
        if self.layout.precision == "fp32":  # younger than the format, which knew nothing else
            del values["layout"]["precision"]
        return sha256_json(values)


def load_code_manifest(code_directory: str | Path) -> CodeManifest:
    """The manifest of a finished directory of codes.

    Raises:
        NotADatasetError, FormatVersionError, CorruptShardError: as `manifest.load_manifest`.
    """
    path = Path(code_directory) / CODE_MANIFEST_NAME
    if not path.is_file():
        raise NotADatasetError(
            f"{code_directory}: holds no {CODE_MANIFEST_NAME}, so it is either not a directory of codes or "
            "not all of its shards are encoded; run launch/precompute_codes.py again"
        )
    values: Any = read_json(path)
    if not isinstance(values, dict) or values.get("format") != CODE_FORMAT:
        raise NotADatasetError(f"{path}: not the manifest of codes (format {CODE_FORMAT!r} expected)")
    if values.get("format_version") != CODE_FORMAT_VERSION:
        raise FormatVersionError(
            f"{path}: format version {values.get('format_version')!r}, but this program reads "
            f"{CODE_FORMAT_VERSION}; remove the directory and encode the tokens again"
        )
    try:
        manifest = CodeManifest.model_validate(values)
    except ValidationError as error:
        raise CorruptShardError(f"{path}: damaged: {error}") from error
    if manifest.fingerprint != manifest.compute_fingerprint():
        raise CorruptShardError(f"{path}: damaged or edited: its content does not match its fingerprint")
    return manifest
