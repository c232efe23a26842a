"""Where a run keeps what. Free of torch."""

from __future__ import annotations

import os
from pathlib import Path

from launch.config import RunConfig, Stage

TRAINING_SPLITS = ("train", "validation")
"""What training reads, and so what is encoded; evaluation encodes the test split itself."""


def project_directory(config: RunConfig) -> Path:
    """`run_root/name`: everything that belongs together, all stages of one chain."""
    return Path(config.run_root) / config.name


def run_directory(config: RunConfig, stage: Stage) -> Path:
    """The run directory of one stage."""
    return project_directory(config) / stage


def codes_directory(config: RunConfig) -> Path:
    """Code shards of the finished codec; those of a mixture in a subdirectory for each source."""
    return project_directory(config) / "codes"


def source_directories(config: RunConfig) -> dict[str, tuple[Path, Path]]:
    """Token shards and their code shards by source; without a mixture there is one source, named ''."""
    codes = codes_directory(config)
    if not config.data.mixture:
        return {"": (Path(config.data.directory), codes)}
    return {source.name: (Path(source.directory), codes / source.name) for source in config.data.mixture}


def scratch_directory(config: RunConfig) -> Path | None:
    """Directory on the node's own disk that training reads copies of its data from: RQVAE_STAGE_DIR, where it is set.

    Raises:
        ValueError: it is, and the data are streamed.
    """
    place = os.environ.get("RQVAE_STAGE_DIR")
    if not place:
        return None
    if config.stage is not None and config.train.streaming is not None:
        raise ValueError(
            "data are either streamed or copied to the nodes: unset RQVAE_STAGE_DIR, or train.streaming"
        )
    return Path(place)


def model_directory(config: RunConfig) -> Path:
    """Exported models, one subdirectory per part: base_lm, rqvae, rq_transformer, tokenizer."""
    return project_directory(config) / "model"
