"""Checkpoints that are complete or invisible.

A checkpoint is a directory `step-00001000` of DeepSpeed's files. It counts only once `COMPLETE.json`, written
last by an atomic rename, lists every file with its size; DeepSpeed's own `latest` file is not written.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from launch.config import TrainConfig

COMPLETE = "COMPLETE.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; says why and what is left."""


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
    guards: dict[str, Any] | None = None
    """State of `launch.guards.Guards`. None in checkpoints of older programs."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    directory: Path
    state: RunState
    world_size: int
    zero_stage: int
    is_ephemeral: bool = False
    """Saved because of the time, to be kept until the next one only."""


def find_complete(root: Path) -> list[Checkpoint]:
    """All complete checkpoints below `root`, oldest first; those that are damaged are left out."""
    found = []
    for mark in sorted(root.glob(f"step-*/{COMPLETE}")):
        if _damage(mark) is None:
            content = json.loads(mark.read_text())
            found.append(
                Checkpoint(
                    mark.parent,
                    RunState(**content["state"]),
                    content["world_size"],
                    content["zero_stage"],
                    content.get("is_ephemeral", False),
                )
            )
    return found


def find_damaged(root: Path) -> dict[Path, str]:
    """Checkpoints below `root` that were complete once, oldest first, and the first file that each lacks now."""
    damage = {mark.parent: _damage(mark) for mark in sorted(root.glob(f"step-*/{COMPLETE}"))}
    return {directory: file for directory, file in damage.items() if file is not None}


def _damage(mark: Path) -> str | None:
    """The first file of a checkpoint that is missing or cut, the mark itself included; None where there is none."""
    try:
        files = json.loads(mark.read_text())["files"]
    except (json.JSONDecodeError, KeyError):
        return mark.name
    for name, size in files.items():
        path = mark.parent / name
        if not path.is_file() or path.stat().st_size != size:
            return str(name)
    return None


def newest(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or None."""
    complete = find_complete(root)
    return complete[-1] if complete else None


def start_from(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint, chosen by the first rank for all; what a killed run left of one that it was
    writing is removed. For the holder of the run's lock only.

    Raises:
        ValueError: there are checkpoints, and all are damaged: training from the start would write over them.
    """
    chosen: list[Checkpoint | None] = [None]
    damaged: list[dict[Path, str]] = [{}]
    if not dist.is_initialized() or dist.get_rank() == 0:
        for directory in root.glob("step-*"):
            if not (directory / COMPLETE).exists():
                shutil.rmtree(directory)
        chosen[0] = newest(root)
        damaged[0] = find_damaged(root)
        for directory, file in damaged[0].items():
            if chosen[0] is not None and directory > chosen[0].directory:
                print(
                    f"warning: checkpoint '{directory}' is damaged ('{file}' is missing or cut); going on from "
                    f"'{chosen[0].directory}' before it",
                    flush=True,
                )
    if dist.is_initialized():
        dist.broadcast_object_list(chosen, src=0)
        dist.broadcast_object_list(damaged, src=0)
    if chosen[0] is None and damaged[0]:
        told = ", ".join(f"'{directory.name}' ('{file}')" for directory, file in damaged[0].items())
        raise ValueError(
            f"every checkpoint in '{root}' is damaged, files are missing or cut: {told}. Restore them, or remove "
            "the directory to start afresh"
        )
    return chosen[0]


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


class Checkpointer:
    """When to save, saving by all ranks together, and which checkpoints stay.

    Args:
        root: the directory of the run's checkpoints.
        train: `checkpoint_every`, `checkpoint_every_s`, `keep_last`, `keep_every` and `on_checkpoint_failure`.
    """

    def __init__(self, root: Path, train: TrainConfig) -> None:
        self.root, self._train = root, train
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """A checkpoint is due after `step`. All ranks ask at the same steps; the first one's clock decides."""
        return step % self._train.checkpoint_every == 0 or self._time_is_up()

    def _time_is_up(self) -> bool:
        if self._train.checkpoint_every_s is None:
            return False
        elapsed = torch.tensor(time.monotonic() - self._last)
        elapsed = elapsed.cuda() if torch.cuda.is_available() else elapsed
        dist.broadcast(elapsed, src=0)
        return float(elapsed) >= self._train.checkpoint_every_s

    def save(
        self,
        engine: deepspeed.DeepSpeedEngine,
        state: RunState,
        rank_state: dict[str, Any],
        is_needed: bool = False,
    ) -> None:
        """Write a checkpoint from all ranks, mark it complete, and remove those that need not stay.

        Args:
            rank_state: JSON content that belongs to this rank alone: sums by name, to be added up when another
                number of ranks goes on.
            is_needed: the run cannot do without this one (the end of a phase, a stop).

        Raises:
            CheckpointError: some rank could not write, and `on_checkpoint_failure` is stop or the checkpoint is
                needed. Otherwise that is said and training may go on. What was written of it is removed.
        """
        directory = self.root / f"step-{state.step:08d}"
        is_ephemeral = not is_needed and state.step % self._train.checkpoint_every != 0
        problem = self._write(engine, directory, state, rank_state)
        if problem is None:
            problem = _on_rank_0(lambda: self._complete(engine, directory, state, is_ephemeral))
        if problem is not None:
            _on_rank_0(lambda: shutil.rmtree(directory, ignore_errors=True))
            kept = newest(self.root)
            left = "there is none before it" if kept is None else f"'{kept.directory}' before it is intact"
            message = (
                f"checkpoint '{directory}' could not be written ({problem}); {left}. Make room on the disk"
            )
            if is_needed or self._train.on_checkpoint_failure == "stop":
                raise CheckpointError(f"{message} and start the same command again")
            if dist.get_rank() == 0:
                print(f"warning: {message}; training goes on", flush=True)
        elif (problem := _on_rank_0(self._remove_superseded)) is not None and dist.get_rank() == 0:
            print(f"warning: an old checkpoint could not be removed ({problem})", flush=True)
        self._last = time.monotonic()

    def _write(
        self, engine: deepspeed.DeepSpeedEngine, directory: Path, state: RunState, rank_state: dict[str, Any]
    ) -> str | None:
        """Every rank's files; returns the first problem of any rank."""
        problem = _on_rank_0(lambda: self._make_room(directory))
        if problem is not None:
            return problem
        writer = _Writer(engine.checkpoint_engine)
        engine.checkpoint_engine, engine._copy_recovery_script = writer, lambda _: None
        try:
            engine.save_checkpoint(
                str(self.root), tag=directory.name, client_state=asdict(state), save_latest=False
            )
        finally:
            engine.checkpoint_engine = writer.original
        if writer.problem is None:
            writer.attempt(
                lambda: (directory / rank_file(dist.get_rank())).write_text(json.dumps(rank_state))
            )
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, writer.problem)
        return next((f"rank {rank}: {text}" for rank, text in enumerate(problems) if text is not None), None)

    def _make_room(self, directory: Path) -> None:
        if directory.exists():
            (directory / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(directory)
        directory.mkdir(parents=True)

    def _complete(
        self, engine: deepspeed.DeepSpeedEngine, directory: Path, state: RunState, is_ephemeral: bool
    ) -> None:
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
            "is_ephemeral": is_ephemeral,
            "files": files,
        }
        temporary = directory / f"{COMPLETE}.tmp"
        temporary.write_text(json.dumps(content, indent=2))
        _fsync(temporary)
        temporary.replace(directory / COMPLETE)
        _fsync(directory)
        _fsync(self.root)

    def _remove_superseded(self) -> None:
        for old in superseded(find_complete(self.root), self._train.keep_last, self._train.keep_every):
            (old.directory / COMPLETE).unlink()  # invisible first, then gone
            shutil.rmtree(old.directory)


def superseded(complete: list[Checkpoint], keep_last: int, keep_every: int | None) -> list[Checkpoint]:
    """Which of all complete checkpoints (oldest first) need not stay."""
    lasting = [checkpoint for checkpoint in complete if not checkpoint.is_ephemeral]
    kept = {checkpoint.directory for checkpoint in [*lasting[-keep_last:], *complete[-1:]]}
    kept |= {c.directory for c in lasting if keep_every is not None and c.state.step % keep_every == 0}
    return [checkpoint for checkpoint in complete if checkpoint.directory not in kept]


class _Writer:
    """DeepSpeed's own writer, but a file that cannot be written is remembered instead of raised: a rank that left
    `save_checkpoint` early would leave the others waiting in it."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self.problem: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def save(self, state_dict: Any, path: str) -> None:
        self.attempt(lambda: self.original.save(state_dict, path))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.attempt(lambda: self.original.makedirs(path, exist_ok=exist_ok))

    def attempt(self, action: Callable[[], Any]) -> None:
        """Do it; after a first problem do nothing any more."""
        if self.problem is None:
            try:
                action()
            except (OSError, RuntimeError) as error:  # torch.save reports a full disk as the latter
                self.problem = _first_line(error)


def _on_rank_0(action: Callable[[], Any]) -> str | None:
    """Do it on the first rank while the others wait; returns its problem on every rank."""
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            problem[0] = _first_line(error)
    dist.broadcast_object_list(problem, src=0)
    return problem[0]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def rank_file(rank: int) -> str:
    """Name of the file that holds a rank's `rank_state`."""
    return f"rank-{rank:05d}.json"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
