"""What a start came to, and whether it is repeated."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import run_status
from slurm import history
from slurm.outcome import EXIT_SETTINGS, EXIT_STOPPED, Facts, Limits, judge, to_exclude

RUNNING = {"state": "running"}


@pytest.mark.parametrize(
    ("facts", "requeue", "exit_status"),
    [
        (Facts(0, {"state": "finished"}), False, 0),
        (Facts(0, {"state": "finished"}, asked_to_stop=True), False, 0),
        (Facts(1, {"state": "stopped", "reason": "SIGUSR2"}, asked_to_stop=True), True, EXIT_STOPPED),
        (Facts(1, {"state": "stopped", "reason": "SIGUSR2"}), True, EXIT_STOPPED),
        (Facts(1, {"state": "stopped", "reason": "max_time_s"}), True, EXIT_STOPPED),
        (Facts(1, {"state": "stopped", "reason": "STOP file"}), False, EXIT_STOPPED),
        (Facts(1, {"state": "stopped", "reason": "SIGTERM"}, ended_by_slurm=True), False, EXIT_STOPPED),
        (Facts(1, RUNNING, ended_by_slurm=True), False, EXIT_STOPPED),
        (Facts(1, {"state": "failed", "error": "ValueError: x", "retryable": False}), False, EXIT_SETTINGS),
        (Facts(1, {"state": "failed", "error": "RuntimeError: x", "retryable": True}), True, 1),
        (Facts(1, RUNNING), True, 1),
        (Facts(1, {}), True, 1),
        (Facts(1, {}, asked_to_stop=True), True, EXIT_STOPPED),
        (Facts(1, {}, bad_nodes=("n2",)), True, 1),
        # A launcher that exits with 0 has not finished the run.
        (Facts(0, RUNNING), True, 1),
        (Facts(1, RUNNING, starts_without_progress=3), False, 1),
        (Facts(1, RUNNING, restart=100), False, 1),
    ],
)
def test_decision(facts: Facts, requeue: bool, exit_status: int) -> None:
    outcome = judge(facts, Limits())
    assert (outcome.requeue, outcome.exit_status) == (requeue, exit_status), outcome


def test_bad_nodes_are_left_out_unless_all_are() -> None:
    assert to_exclude(("n2",), ("n1", "n2")) == ("n2",)
    assert to_exclude(("n1",), ("n1",)) == ("n1",)
    assert to_exclude(("n1", "n2"), ("n1", "n2")) == ()
    assert to_exclude((), ("n1", "n2")) == ()


def test_status_says_what_a_new_start_can_cure(tmp_path: Path) -> None:
    run_status.failed(tmp_path, 0, RuntimeError("Connection closed by peer"))
    assert run_status.read(tmp_path)["retryable"] is True
    run_status.running(tmp_path)
    run_status.failed(tmp_path, 0, ValueError("x"))
    assert run_status.read(tmp_path)["retryable"] is False
    run_status.amend(tmp_path, slurm={"requeued": False})
    assert run_status.read(tmp_path)["error"] == "ValueError: x"
    assert run_status.read(tmp_path)["slurm"] == {"requeued": False}


def test_starts_from_one_checkpoint_are_counted_by_job(tmp_path: Path) -> None:
    for job, step in (("7", 0), ("8", 5), ("8", 5), ("9", 5), ("8", 5)):
        history.add(tmp_path, "start", job=job, step=step)
        history.add(tmp_path, "end", job=job, step=step)
    lines = history.read(tmp_path)
    assert history.starts_without_progress(lines, "8", 5) == 3
    assert history.starts_without_progress(lines, "8", 6) == 0
    with (tmp_path / history.FILE).open("a") as file:
        file.write('{"event": "start", "jo')
    assert history.read(tmp_path) == lines


def test_only_complete_checkpoints_are_progress(tmp_path: Path) -> None:
    assert history.newest_step(tmp_path) == 0
    for step in (5, 10):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000005" / "COMPLETE.json").touch()
    assert history.newest_step(tmp_path) == 5
