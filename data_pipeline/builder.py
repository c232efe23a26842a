"""Building the token shards: restartable, in parallel, complete or invisible.

The source is cut into units: files, or parts of them. Where exact duplicates are removed, they are looked for first.
Any number of tasks and processes builds the units; a build that was killed anywhere and run again ends in the same
bytes.
"""

from __future__ import annotations

from data_pipeline.build_job import BuildJob
from data_pipeline.config import DataConfig
from data_pipeline.manifest import Manifest


def build(config: DataConfig, *, replace: bool = False, num_workers: int | None = None) -> Manifest:
    """Builds what is missing of the token shards and returns their manifest.

    A directory that is complete and was built from the same configuration and the same text is left as it is.

    Args:
        replace: build anew where the directory holds shards of another configuration or other text.
        num_workers: processes where the source has several files; None takes one per core.

    Raises:
        DatasetError: the directory holds something else, or other shards and `replace` is not set.
        SourceError: the text or the tokenizer cannot be read.
    """
    job = BuildJob(config)
    finished = job.finished(replace)
    if finished is not None:
        return finished
    if config.deduplicate:
        job.find_duplicates(num_workers)
    job.prepare_tokenizer()
    job.build_units(range(len(job.source.units())), num_workers)
    return job.merge()


def deduplicate(config: DataConfig, *, num_workers: int | None = None) -> None:
    """Only finds the duplicates, all of them; `build` or its tasks go on from there.

    Does nothing where the directory is complete.

    Raises:
        ValueError: as `build`, or `data.deduplicate` is off.
    """
    job = _deduplication(config)
    if job is not None:
        job.find_duplicates(num_workers)


def deduplicate_task(config: DataConfig, task_index: int, num_tasks: int, *, num_workers: int = 1) -> None:
    """Task i of n of finding the duplicates: hashes its share of the source. `merge_duplicates` comes after all.

    Raises:
        ValueError: the task index is out of range, or as `deduplicate`.
    """
    job = _deduplication(config)
    if job is not None:
        job.hash_units(_share(job, task_index, num_tasks), num_workers)


def merge_duplicates(config: DataConfig) -> None:
    """Finds the duplicates once all tasks have hashed their share.

    Raises:
        DatasetError: units are not hashed; names them.
    """
    job = _deduplication(config)
    if job is not None:
        job.merge_hashes()


def build_task(config: DataConfig, task_index: int, num_tasks: int, *, num_workers: int = 1) -> None:
    """Task i of n of a build: its share of the files. `build` or `merge` afterwards finishes the directory.

    Raises:
        ValueError: the task index is out of range, or as `build`.
    """
    job = BuildJob(config)
    share = _share(job, task_index, num_tasks)
    if job.finished(replace=False) is None:
        job.prepare_tokenizer()
        job.build_units(share, num_workers)


def merge(config: DataConfig) -> Manifest:
    """Finishes a build whose tasks are all done.

    Raises:
        DatasetError: units are missing; names them.
    """
    job = BuildJob(config)
    finished = job.finished(replace=False)
    return job.merge() if finished is None else finished


def _deduplication(config: DataConfig) -> BuildJob | None:
    """The job, None if the directory is complete."""
    if not config.deduplicate:
        raise ValueError("data.deduplicate is off in this configuration: set it to true to remove duplicates")
    job = BuildJob(config)
    return job if job.finished(replace=False) is None else None


def _share(job: BuildJob, task_index: int, num_tasks: int) -> range:
    if not 0 <= task_index < num_tasks:
        raise ValueError(f"task index {task_index} is not in 0..{num_tasks - 1}")
    return range(task_index, len(job.source.units()), num_tasks)
