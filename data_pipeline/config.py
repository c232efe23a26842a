"""Typed configuration of the `data:` section. Free of torch, so that submitting a job stays light."""

from __future__ import annotations

import posixpath
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline.weights import find_quotas
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
    max_characters: int | None = Field(default=None, ge=1)
    """Longer documents are left out; null keeps all."""
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
    row_groups_per_unit: int | None = Field(default=None, ge=1)
    """Cuts files into parts of so many row groups, each built by itself, so that few large files fill many tasks
    and processes. Null builds a file as a whole. Decides, as the files themselves, where samples are padded."""


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


class MixtureSource(StrictModel):
    """One of several token datasets that are trained on together."""

    directory: str
    """Its token shards. All of a mixture must have one tokenizer, sample length and document grid."""
    weight: float = Field(gt=0, allow_inf_nan=False)
    """Share of the samples of every step that come from it, relative to the other weights."""
    name: str = Field(default="", pattern=r"^[A-Za-z0-9._-]*$")
    """What metrics and the directory of its codes call it; empty takes the directory's last part."""

    @model_validator(mode="before")
    @classmethod
    def _named_after_its_directory(cls, values: object) -> object:
        if isinstance(values, dict) and isinstance(values.get("directory"), str) and not values.get("name"):
            return {**values, "name": posixpath.basename(posixpath.normpath(values["directory"]))}
        return values


READING_FIELDS = frozenset({"mixture", "shuffle_block", "shuffle_window", "on_corrupt", "max_replaced"})
"""Fields of `DataConfig` that say how shards are read in training; they do not touch what is built."""


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
    """What text, how it is tokenized, packed and split, where the shards go, and how training reads them."""

    directory: str
    """Where the token shards are written and read, relative to the working directory."""
    mixture: tuple[MixtureSource, ...] = ()
    """Token datasets to train on in place of `directory` alone, which must be one of them: its tokenizer goes with
    the model. Each is built by itself (data.directory=...)."""
    shuffle_block: int | None = Field(default=None, gt=0)
    """Consecutive samples that stay close to each other in every epoch, so that reads are near-sequential where a
    jump is dear (object stores). Null shuffles all samples freely."""
    shuffle_window: int = Field(default=1024, gt=0)
    """Blocks that are shuffled with each other, with `shuffle_block`. Several times the global batch, or the samples
    of a batch are often neighbours."""
    on_corrupt: Literal["raise", "replace"] = "raise"
    """A sample whose bytes are damaged stops training, or another takes its place, with a warning and a count in
    metrics.jsonl. May be changed when a run goes on."""
    max_replaced: int = Field(default=16, ge=0)
    """Samples replaced in a run, over all ranks, above which training stops after all."""
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
    deduplicate: bool = False
    """Leave out every document whose text, exactly, stands earlier in the source. It stays in the split of the
    first one, so that no text is in two splits."""
    seed: int = Field(default=0, ge=0)
    """Seed of the documents' phases on the chunk grid."""
    samples_per_shard: int = Field(default=8192, gt=0)
    """Samples in a tar; the last of a part of the source holds what is left."""
    member_bytes: int = Field(default=8192, ge=1)
    """A tar member holds as many samples as it takes to reach this size."""

    @model_validator(mode="after")
    def _mixture_is_sound(self) -> DataConfig:
        if not self.mixture:
            return self
        names = [source.name for source in self.mixture]
        if len(set(names)) < len(names):
            raise ValueError(f"mixture: the names {', '.join(names)} are not all different; set name in each")
        places = {posixpath.normpath(source.directory) for source in self.mixture}
        if posixpath.normpath(self.directory) not in places:
            raise ValueError(
                f"directory ({self.directory}) must be one of the mixture's: {', '.join(sorted(places))}"
            )
        try:
            find_quotas([source.weight for source in self.mixture])
        except ValueError as error:
            raise ValueError(f"mixture: {error}") from None
        return self

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
            if self.deduplicate:
                raise ValueError(
                    "deduplicate has no effect with the source python-docs, which leaves out exact duplicates "
                    "anyway: remove it"
                )
        elif sum(self.split_fractions) >= 1:
            raise ValueError("validation_fraction and test_fraction leave nothing to train on")
        return self

    @property
    def split_fractions(self) -> tuple[float, float]:
        """Shares of the documents for validation and for testing, where the split is by id."""
        validation = 0.01 if self.validation_fraction is None else self.validation_fraction
        return validation, 0.01 if self.test_fraction is None else self.test_fraction

    def build_values(self) -> dict[str, Any]:
        """What of it decides the content of the shards, as JSON.

        Settings younger than the format are left out at their defaults, so that directories built before them stay
        up to date.
        """
        values = self.model_dump(mode="json", exclude={"directory", *READING_FIELDS})
        if not self.deduplicate:
            del values["deduplicate"]
        if values["source"].get("row_groups_per_unit", 0) is None:
            del values["source"]["row_groups_per_unit"]
        return values

    def run_values(self) -> dict[str, Any]:
        """What of it decides the course of training, as JSON.

        Reading options at their defaults are left out, so that runs from before there were any go on; so is what to
        do with damage.
        """
        reading = {
            name
            for name in READING_FIELDS - {"on_corrupt", "max_replaced"}
            if getattr(self, name) != type(self).model_fields[name].default
        }
        return {**self.build_values(), **self.model_dump(mode="json", include={"directory", *reading})}
