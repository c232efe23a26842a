"""Typed configuration of the `data:` section. Free of torch, so that submitting a job stays light."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rqvae.config import StrictModel


class PythonDocsSource(StrictModel):
    """Docstrings of a fixed list of installed dependencies: real English without a download.

    The list and the split by package are in `data_pipeline/python_docs.py`.
    """

    kind: Literal["python-docs"] = "python-docs"
    min_characters: int = Field(default=100, ge=1)
    """Shorter docstrings are left out (characters after cleaning)."""
    train_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the training documents that is kept, chosen by a hash of their id; held-out text stays whole."""


class _RowSource(StrictModel):
    text_field: str = "text"
    """Column or key that holds the text."""
    id_field: str = "id"
    """Column or key that holds the document id, which decides the split and the phase."""
    min_characters: int = Field(default=1, ge=1)
    """Shorter documents are left out."""
    languages: tuple[str, ...] | None = None
    """Keep documents whose `language` is one of these; null keeps all."""
    min_language_score: float = Field(default=0.0, ge=0, le=1)
    """Keep documents whose `language_score` is at least this; 0 keeps all."""


class _FileSource(_RowSource):
    paths: tuple[str, ...] = Field(min_length=1)
    """Files or glob patterns, on disk or behind any fsspec URL (s3://, gs://, https://)."""

    @field_validator("paths", mode="before")
    @classmethod
    def _one_path_is_a_list_of_one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class ParquetSource(_FileSource):
    """Parquet files in FineWeb's schema, read by row group."""

    kind: Literal["parquet"] = "parquet"


class JsonlSource(_FileSource):
    """One JSON object a line; `.gz` and the other compressions that fsspec knows are read as they are."""

    kind: Literal["jsonl"] = "jsonl"


class HubSource(_RowSource):
    """A dataset of the Hugging Face hub, streamed through `datasets`."""

    kind: Literal["hub"] = "hub"
    path: str = "HuggingFaceFW/fineweb"
    """Repository of the dataset, or a local directory in the layout of one."""
    name: str | None = "sample-10BT"
    """Configuration of the dataset; null for one that has none."""
    revision: str | None = None
    """Commit, tag or branch. Name a commit where the corpus must never change."""
    split: str = "train"
    """Split on the hub; ours are drawn from it by a hash of the id."""


Source = Annotated[
    PythonDocsSource | ParquetSource | JsonlSource | HubSource,
    Field(discriminator="kind"),
]


class BPETokenizerConfig(StrictModel):
    """Byte-level BPE trained on the training split; `<|endoftext|>` is id 0 and `<|pad|>` id 1."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: int = Field(default=4096, ge=258)
    """Entries including the 256 bytes and the 2 special tokens."""
    training_mib: int = Field(default=64, gt=0)
    """Text to train on, from the head of the training split, in MiB."""


class PretrainedTokenizerConfig(StrictModel):
    """Any fast Hugging Face tokenizer, copied beside the data."""

    kind: Literal["pretrained"] = "pretrained"
    path: str
    """Directory, or repository on the hub."""
    eos_token: str | None = None
    """Token that ends every document; null takes the tokenizer's own end-of-sequence token."""


Tokenizer = Annotated[BPETokenizerConfig | PretrainedTokenizerConfig, Field(discriminator="kind")]


class StreamingConfig(StrictModel):
    """Reading shards from end to end instead of sample by sample: for object stores, where random access is dear."""

    url: str | None = None
    """Directory or fsspec URL (s3://, gs://, https://) that the shards are streamed from; null is `data.directory`.
    It must hold the same dataset. What is read at random (validation, the codebooks' first values) comes from
    `data.directory` in any case."""
    streams: int = Field(default=8, gt=0)
    """Equal stretches of an epoch that are read side by side. Every step takes as many samples from each, so
    train.global_batch_size is a multiple of it, and it is a multiple of the number of ranks. Part of the order."""
    shuffle_buffer: int = Field(default=1024, gt=0)
    """Samples of a stream that are shuffled at a time, and kept in memory. Part of the order."""


class DataConfig(StrictModel):
    """What text, how it is tokenized, packed and split, and where the shards go."""

    directory: str
    """Where the token shards are written and read, relative to the working directory."""
    source: Source = PythonDocsSource()
    tokenizer: Tokenizer = BPETokenizerConfig()
    sample_length: int = Field(default=256, gt=0)
    """T: tokens per sample, padding included."""
    document_grid: int = Field(default=4, gt=0)
    """G: documents begin and end on multiples of it. A multiple of every compression factor to be trained."""
    validation_fraction: float | None = Field(default=None, ge=0, lt=1)
    """Share of the documents held out for validation by a hash of their id. Null is 0.01, and the only value
    for python-docs, which is split by package."""
    test_fraction: float | None = Field(default=None, ge=0, lt=1)
    """Share of the documents held out for testing; null as above."""
    seed: int = Field(default=0, ge=0)
    """Seed of the documents' phases on the chunk grid."""
    samples_per_shard: int = Field(default=8192, gt=0)
    """Samples in a tar; the last of a part of the source holds what is left."""
    member_bytes: int = Field(default=8192, ge=1)
    """A tar member holds as many samples as it takes to reach this size."""

    @model_validator(mode="after")
    def _fits_together(self) -> DataConfig:
        if self.sample_length % self.document_grid:
            raise ValueError(
                f"sample_length ({self.sample_length}) must be a multiple of document_grid "
                f"({self.document_grid})"
            )
        if self.source.kind == "python-docs":
            if self.validation_fraction is not None or self.test_fraction is not None:
                raise ValueError(
                    "validation_fraction and test_fraction have no effect with the source python-docs, which "
                    "is split by package: remove them"
                )
        elif sum(self.split_fractions) >= 1:
            raise ValueError("validation_fraction and test_fraction leave nothing to train on")
        return self

    @property
    def split_fractions(self) -> tuple[float, float]:
        """Shares of the documents for validation and for testing, where the split is by id."""
        validation = 0.01 if self.validation_fraction is None else self.validation_fraction
        return validation, 0.01 if self.test_fraction is None else self.test_fraction
