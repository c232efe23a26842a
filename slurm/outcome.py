"""What a start of a training job came to, and whether it is put back into the queue. No side effects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EXIT_STOPPED = 75  # of a rank: stopped on request with a complete checkpoint
EXIT_SETTINGS = 2  # a mistake that the same command makes again


@dataclass(frozen=True)
class Limits:
    """When to stop trying."""

    max_requeues: int = 100
    """Restarts of one job, by Slurm or by itself."""
    max_starts_without_progress: int = 3
    """Starts of one job in a row from the same checkpoint."""


@dataclass(frozen=True)
class Facts:
    """All that is known once a start has ended."""

    exit_status: int
    """Of srun."""
    status: Mapping[str, Any]
    """Content of the run's STATUS."""
    asked_to_stop: bool = False
    """Slurm announced the end of the job's time, or somebody signalled the batch script with SIGUSR2."""
    ended_by_slurm: bool = False
    """The batch script got SIGTERM: scancel, preemption, `scontrol requeue` or a dead node."""
    bad_nodes: tuple[str, ...] = ()
    """Found before the start."""
    restart: int = 0
    starts_without_progress: int = 0
    """Starts in a row from the checkpoint that is the newest now, this one included; 0 if it has made a newer one."""


@dataclass(frozen=True)
class Outcome:
    """The decision."""

    requeue: bool
    reason: str
    """For people, in STATUS and in the job's log."""
    exit_status: int


def judge(facts: Facts, limits: Limits) -> Outcome:
    """What to do. A plain scancel means stop, so nothing that SIGTERM ended is requeued here: of preemption and
    dead nodes Slurm does it by itself."""
    state, why = facts.status.get("state"), str(facts.status.get("reason") or facts.status.get("error") or "")
    if state == "finished" and facts.exit_status == 0:
        return Outcome(False, "finished", 0)
    if facts.ended_by_slurm:
        return Outcome(False, "ended by Slurm", EXIT_STOPPED)
    if facts.bad_nodes:
        return _unless_hopeless(f"bad node: {', '.join(facts.bad_nodes)}", facts, limits, 1)
    if state == "stopped":
        if why in ("STOP file", "SIGTERM"):  # somebody wants it to end
            return Outcome(False, f"stopped: {why}", EXIT_STOPPED)
        return _unless_hopeless(f"stopped: {why}", facts, limits, EXIT_STOPPED)
    if facts.asked_to_stop and not facts.status:
        return _unless_hopeless("asked to stop before training began", facts, limits, EXIT_STOPPED)
    if state == "failed" and not facts.status.get("retryable", True):
        return Outcome(False, f"failed for good: {why}", EXIT_SETTINGS)
    what = f"failed: {why}" if state == "failed" else f"killed without a word (status {facts.exit_status})"
    if facts.asked_to_stop:
        what += ", after it was asked to stop"
    return _unless_hopeless(what, facts, limits, 1)


def to_exclude(bad_nodes: tuple[str, ...], nodes: tuple[str, ...]) -> tuple[str, ...]:
    """Which of the job's nodes it should not get again: the bad ones, unless all of several are. That is the fault of
    what they share (network, file system, a setting of the site), and other nodes would do no better."""
    return () if len(nodes) > 1 and set(bad_nodes) >= set(nodes) else bad_nodes


def _unless_hopeless(reason: str, facts: Facts, limits: Limits, exit_status: int) -> Outcome:
    if facts.restart >= limits.max_requeues:
        return Outcome(False, f"{reason}; not again, after {facts.restart} restarts", exit_status)
    if facts.starts_without_progress >= limits.max_starts_without_progress:
        starts = facts.starts_without_progress
        return Outcome(False, f"{reason}; not again, no checkpoint in {starts} starts", exit_status)
    return Outcome(True, reason, exit_status)
