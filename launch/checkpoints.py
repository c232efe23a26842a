"""Checkpoints that are complete or invisible.

A checkpoint is a directory `step-00001000` of DeepSpeed's files. It counts only once `COMPLETE.json`, written
last by an atomic rename, lists every file with its size; DeepSpeed's own `latest` file is not written.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist

COMPLETE = "COMPLETE.json"


@dataclass(frozen=True)
class RunState:
    """How far a run has come; saved with every checkpoint."""

    step: int
    """Optimizer steps done."""
    phase: str
    """Phase that the engine's state belongs to."""
    loader: dict[str, Any]
    """State of the data loader: epoch, step, seed, fingerprint."""
    run_hash: str
    """Hash of the configuration, see `launch.resume.run_hash`."""
    config: dict[str, Any] | None = None
    """The configuration, see `launch.resume.stored_config`. None in checkpoints of older programs."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    directory: Path
    state: RunState
    world_size: int
    zero_stage: int


def find_complete(root: Path) -> list[Checkpoint]:
    """All complete checkpoints below `root`, oldest first; directories without a valid mark are ignored."""
    found = []
    for mark in sorted(root.glob(f"step-*/{COMPLETE}")):
        content = json.loads(mark.read_text())
        files = content["files"]
        if all((mark.parent / name).is_file() for name in files) and all(
            (mark.parent / name).stat().st_size == size for name, size in files.items()
        ):
            found.append(
                Checkpoint(
                    mark.parent, RunState(**content["state"]), content["world_size"], content["zero_stage"]
                )
            )
    return found


def newest(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or None."""
    complete = find_complete(root)
    return complete[-1] if complete else None


def require_newest(root: Path) -> Checkpoint:
    """The newest complete checkpoint.

    Raises:
        ValueError: there is none; says what is there instead.
    """
    checkpoint = newest(root)
    if checkpoint is None:
        partial = sorted(path.name for path in root.glob("step-*"))
        what = f"only incomplete ones ({', '.join(partial)})" if partial else "none at all"
        raise ValueError(
            f"no complete checkpoint in '{root}': {what}. Start the training command again to continue the run"
        )
    return checkpoint


def save(
    engine: deepspeed.DeepSpeedEngine, root: Path, state: RunState, rank_state: dict[str, Any], keep_last: int
) -> Path:
    """Write a checkpoint from all ranks, mark it complete, and remove the oldest beyond `keep_last`.

    Args:
        rank_state: JSON content that belongs to this rank alone.
    """
    tag = f"step-{state.step:08d}"
    directory = root / tag
    if dist.get_rank() == 0:
        (directory / COMPLETE).unlink(missing_ok=True)
        root.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    engine.save_checkpoint(str(root), tag=tag, client_state=asdict(state), save_latest=False)
    (directory / rank_file(dist.get_rank())).write_text(json.dumps(rank_state))
    dist.barrier()
    if dist.get_rank() == 0:
        files = {
            str(path.relative_to(directory)): path.stat().st_size
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }
        for name in files:
            _fsync(directory / name)
        content = {
            "state": asdict(state),
            "world_size": dist.get_world_size(),
            "zero_stage": engine.zero_optimization_stage(),
            "files": files,
        }
        temporary = directory / f"{COMPLETE}.tmp"
        temporary.write_text(json.dumps(content, indent=2))
        _fsync(temporary)
        temporary.replace(directory / COMPLETE)
        _fsync(directory)
        for old in find_complete(root)[:-keep_last]:
            (old.directory / COMPLETE).unlink()  # invisible first, then gone
            shutil.rmtree(old.directory)
    dist.barrier()
    return directory


def rank_file(rank: int) -> str:
    """Name of the file that holds a rank's `rank_state`."""
    return f"rank-{rank:05d}.json"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
