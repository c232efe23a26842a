"""Checkpoints that are complete or invisible.

A checkpoint is a directory `step-00001000` of DeepSpeed's files. It counts only once `COMPLETE.json`, written
last by an atomic rename, lists every file with its size; DeepSpeed's own `latest` file is not written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from launch.config import RunConfig

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
    """Hash of the configuration, see `run_hash`."""


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
    (directory / _rank_file(dist.get_rank())).write_text(json.dumps(rank_state))
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


def load(engine: deepspeed.DeepSpeedEngine, checkpoint: Checkpoint) -> dict[str, Any]:
    """Bring the engine to the state of a checkpoint; returns what this rank saved as `rank_state`.

    Raises:
        ValueError: the number of ranks changed, or DeepSpeed found nothing to load.
    """
    if checkpoint.world_size != dist.get_world_size():
        raise ValueError(
            f"'{checkpoint.directory}' was written by {checkpoint.world_size} ranks and this run has "
            f"{dist.get_world_size()}; start it on {checkpoint.world_size} ranks"
        )
    path, _ = engine.load_checkpoint(str(checkpoint.directory.parent), tag=checkpoint.directory.name)
    if path is None:
        raise ValueError(f"DeepSpeed could not load '{checkpoint.directory}'")
    return json.loads((checkpoint.directory / _rank_file(dist.get_rank())).read_text())


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def run_hash(config: RunConfig, precision: str) -> str:
    """Identity of a run: everything that changes its numbers."""
    train = config.train.model_dump(
        mode="json",
        exclude={
            *("log_every", "checkpoint_every", "keep_last", "max_time_s", "precision"),
            *("num_workers", "worker_kind"),
        },
    )
    if config.train.streaming is None:
        del train["streaming"]  # so that runs from before there was streaming go on
    else:
        del train["streaming"]["url"]  # the data's place is not their content
    content = {
        "stage": config.stage,
        "seed": config.seed,
        "codec": config.codec.model_dump(mode="json"),
        "latent_model": config.latent_model.model_dump(mode="json"),
        "data": config.data.run_values(),
        "train": train,
        "precision": precision,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def refuse_other_run(
    run_directory: Path, checkpoint: Checkpoint | None, expected_hash: str, fingerprint: str
) -> None:
    """A checkpoint is continued only by the configuration and on the data that it was written with.

    Raises:
        ValueError: it was written by another configuration, or the data changed since.
    """
    if checkpoint is not None and checkpoint.state.loader["fingerprint"] != fingerprint:
        raise ValueError(
            f"'{run_directory}' was trained on data with fingerprint "
            f"{checkpoint.state.loader['fingerprint'][:16]}, the data now there has {fingerprint[:16]}. "
            "Restore the data, choose another name (name=...), or remove that directory to start afresh"
        )
    if checkpoint is not None and checkpoint.state.run_hash != expected_hash:
        raise ValueError(
            f"'{run_directory}' holds a run with another configuration (see its config.yaml). "
            "Choose another name (name=...), or remove that directory to start afresh"
        )


def consolidated_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The model's whole fp32 state, parameters and buffers, on the CPU, without any process group."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    module: dict[str, Tensor] = {}
    if checkpoint.zero_stage < 2:
        file = checkpoint.directory / "mp_rank_00_model_states.pt"
        # Our own file; DeepSpeed keeps more than tensors in it.
        module = torch.load(file, map_location="cpu", weights_only=False)["module"]
        if checkpoint.zero_stage == 0:
            return module
    state = get_fp32_state_dict_from_zero_checkpoint(
        str(checkpoint.directory.parent), tag=checkpoint.directory.name
    )
    # Stage 1 keeps fp32 copies of what it trains; frozen parameters are in the module's own state only.
    frozen = {name: tensor for name, tensor in module.items() if name not in state}
    return {name: t.float() if t.is_floating_point() else t for name, t in frozen.items()} | state


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
