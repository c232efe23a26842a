"""Token shards must be laid out as the configuration says: on a chunk grid, in samples of a length. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from launch.config import RunConfig


class Layout(Protocol):
    """A dataset, or a manifest."""

    @property
    def sample_length(self) -> int: ...  # noqa: D102

    @property
    def document_grid(self) -> int: ...  # noqa: D102


def check_layout(shards: Layout, directory: Path, config: RunConfig) -> None:
    """The shards in `directory` fit the configuration that is about to read them.

    Raises:
        ValueError: samples of another length, on which compute and memory are reckoned, or another chunk grid.
    """
    if shards.sample_length != config.data.sample_length:
        raise ValueError(
            f"data.sample_length is {config.data.sample_length}, the token shards in '{directory}' have samples of "
            f"{shards.sample_length} tokens: set it back, or build shards of their own with it in another "
            "data.directory (python -m data_pipeline build)"
        )
    check_grid(shards, directory, config.codec.compression_factor)


def check_grid(shards: Layout, directory: Path, compression_factor: int) -> None:
    """No chunk holds two documents.

    Raises:
        ValueError: some may.
    """
    if shards.document_grid % compression_factor:
        raise ValueError(
            f"the token shards in '{directory}' were built with data.document_grid={shards.document_grid}, so that "
            f"a chunk of codec.compression_factor={compression_factor} tokens may hold two documents: build shards "
            "on a grid that is a multiple of it in another data.directory (python -m data_pipeline build)"
        )
