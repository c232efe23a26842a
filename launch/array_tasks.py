"""Which tasks of an array still have something to do. Free of torch."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.build_job import BuildJob
from data_pipeline.config import DataConfig
from data_pipeline.errors import CorruptShardError
from data_pipeline.manifest import load_manifest, read_json
from launch.config import RunConfig
from launch.paths import TRAINING_SPLITS, model_directory, source_directories


def num_build_tasks(config: DataConfig, at_most: int) -> int:
    """Tasks to build with: one for each part of the source, but not too many."""
    return min(at_most, len(BuildJob(config).source.units()))


def missing_build_tasks(config: DataConfig, num_tasks: int) -> list[int]:
    """Tasks that have parts of the source to build; none if the directory is finished.

    Raises:
        DatasetError: the directory holds shards of another configuration or text.
    """
    job = BuildJob(config)
    if job.finished(replace=False) is not None:
        return []
    units = range(len(job.source.units()))
    return sorted({unit % num_tasks for unit in units if not job.record_path(unit).is_file()})


def num_code_tasks(config: RunConfig, at_most: int) -> int:
    """Tasks to encode with: one for each shard of the longest split, but not too many.

    Raises:
        NotADatasetError: token shards are not built yet.
    """
    lengths = [
        len(load_manifest(tokens).splits[split].shards)
        for tokens, _ in source_directories(config).values()
        for split in TRAINING_SPLITS
    ]
    return min(at_most, max(lengths))


def missing_code_tasks(config: RunConfig, num_tasks: int) -> list[int]:
    """Tasks that have shards to encode: without codes, with those of other tokens, or older than the codec.

    The tasks themselves go by the codec's hash, which takes torch; what is listed here in vain, they skip.
    """
    codec = model_directory(config) / "rqvae" / "config.json"
    made = codec.stat().st_mtime if codec.is_file() else float("inf")
    missing: set[int] = set()
    for tokens, codes in source_directories(config).values():
        manifest = load_manifest(tokens)
        for split in TRAINING_SPLITS:
            for shard in range(len(manifest.splits[split].shards)):
                mark = codes / split / f"codes-{shard:06d}.done.json"
                if not _is_done(mark, manifest.fingerprint, made):
                    missing.add(shard % num_tasks)
    return sorted(missing)


def _is_done(mark: Path, token_fingerprint: str, codec_made: float) -> bool:
    if not mark.is_file() or mark.stat().st_mtime < codec_made:
        return False
    try:
        return bool(read_json(mark)["layout"]["token_fingerprint"] == token_fingerprint)
    except (CorruptShardError, KeyError, TypeError):
        return False
