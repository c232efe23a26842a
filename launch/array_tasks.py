"""Which tasks of an array still have something to do. Free of torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from data_pipeline import duplicates
from data_pipeline.build_job import BuildJob
from data_pipeline.code_manifest import CODE_MANIFEST_NAME, CodeLayout, Precision
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


def missing_duplicate_tasks(config: DataConfig, num_tasks: int) -> list[int] | None:
    """Tasks that have parts of the source to hash; None where duplicates are known already, or not to be removed."""
    if not config.deduplicate:
        return None
    job = BuildJob(config)
    folder = job.work / "duplicates"
    if duplicates.is_merged(folder):
        return None
    units = range(len(job.source.units()))
    return sorted({unit % num_tasks for unit in units if not duplicates.is_hashed(folder, unit)})


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


def missing_code_tasks(
    config: RunConfig, num_tasks: int, *, with_latents: bool, precision: Precision
) -> list[int]:
    """Tasks that have shards to encode: without codes, with those of other tokens, or older than the codec.

    The tasks themselves go by the codec's hash, which takes torch; what is listed here in vain, they skip. Where all
    shards are there but the manifest is not, the first task is listed: it writes it.

    Args:
        with_latents: shards without latents are to be encoded again.
        precision: and so are those of another.
    """
    codec = model_directory(config) / "rqvae" / "config.json"
    made = codec.stat().st_mtime if codec.is_file() else float("inf")
    missing: set[int] = set()
    complete = True
    for tokens, codes in source_directories(config).values():
        manifest = load_manifest(tokens)
        complete &= (codes / CODE_MANIFEST_NAME).is_file()
        for split in TRAINING_SPLITS:
            for shard in range(len(manifest.splits[split].shards)):
                mark = codes / split / f"codes-{shard:06d}.done.json"
                if not _is_done(mark, manifest.fingerprint, made, with_latents, precision):
                    missing.add(shard % num_tasks)
    if not missing and not complete:  # the last task was killed between its last shard and the manifest
        missing.add(0)
    return sorted(missing)


def _is_done(
    mark: Path, token_fingerprint: str, codec_made: float, with_latents: bool, precision: Precision
) -> bool:
    if not mark.is_file() or mark.stat().st_mtime < codec_made:
        return False
    try:
        layout = CodeLayout.model_validate(read_json(mark)["layout"])
    except (CorruptShardError, ValidationError, KeyError, TypeError):
        return False
    same = (layout.token_fingerprint, layout.precision) == (token_fingerprint, precision)
    return same and (layout.latent_dim is not None or not with_latents)
