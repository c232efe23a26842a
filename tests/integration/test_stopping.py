"""Stops, killed launchers, a second launcher, a full disk: real processes, real signals, a real small disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import run_status
from tests.integration.conftest import NANO, REPOSITORY, command_environment, launcher, records, run
from tests.soak import command_of, complete_steps, descendants, is_rank

pytestmark = pytest.mark.slow
TORCHRUN = [
    str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2", "launch/train.py",
]  # fmt: skip


def settings(run_root: Path, name: str, data: list[str], *more: str) -> list[str]:
    options = ["--config", str(NANO), "--stage", "rqvae", f"name={name}", f"run_root={run_root}"]
    return [*options, "tracking.wandb=disabled", *data, *more]


class Started:
    """A command in the background, with its output in a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=REPOSITORY, env=command_environment(), stdout=file, stderr=file
            )

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 400
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def ranks(self) -> list[int]:
        return [pid for pid in descendants(self.process.pid) if is_rank(pid)]


def test_launchers_are_refused_killed_and_stopped(tmp_path: Path, nano_data: list[str]) -> None:
    directory = tmp_path / "run/rqvae"
    arguments = settings(tmp_path, "run", nano_data, "train.steps=100000", "train.frozen_steps=0")
    arguments += ["stages.rqvae.frozen_steps=0", "train.log_every=1", "train.eval_every=100000"]

    def steps() -> int:
        lines = records(directory / "metrics.jsonl")
        return lines[-1]["step"] if lines else 0

    # A second launcher is refused, and changes nothing.
    first = Started([*launcher(2), *arguments], tmp_path / "first.log")
    first.wait_until(lambda: steps() >= 6)
    second = run([*TORCHRUN, *arguments])
    assert second.returncode != 0
    assert f"is in use by process {first.ranks()[0]} on " in second.stderr
    assert run_status.read(directory)["state"] == "running"

    # kill -9 of the launcher's upper process takes the ranks with it, at once.
    ranks = first.ranks()
    assert len(ranks) == 2
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    deadline = time.monotonic() + 5
    while any(command_of(rank) for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(command_of(rank) for rank in ranks)

    # SIGUSR2 to one rank under the deepspeed launcher; the run goes on from the newest checkpoint meanwhile.
    complete = complete_steps(directory / "checkpoints")
    again = Started([*launcher(2), *arguments], tmp_path / "again.log")
    again.wait_until(lambda: f"Going on from step {complete[-1]}" in again.log.read_text())
    again.wait_until(lambda: steps() > complete[-1])
    os.kill(again.ranks()[1], signal.SIGUSR2)
    assert again.process.wait(timeout=200) != 0
    status = run_status.read(directory)
    assert (status["state"], status["reason"]) == ("stopped", "SIGUSR2")
    assert complete_steps(directory / "checkpoints")[-1] == status["step"]

    # SIGTERM to torchrun.
    third = Started([*TORCHRUN, *arguments], tmp_path / "third.log")
    third.wait_until(lambda: steps() > status["step"])
    third.process.send_signal(signal.SIGTERM)
    assert third.process.wait(timeout=200) != 0
    last = run_status.read(directory)
    assert (last["state"], last["reason"]) == ("stopped", "SIGTERM")
    assert complete_steps(directory / "checkpoints")[-1] == last["step"] > status["step"]


def test_full_disk_at_a_checkpoint(
    tmp_path: Path, nano_data: list[str], small_disk: Callable[[Path, int], None]
) -> None:
    options = [*nano_data, "stages.rqvae.frozen_steps=0", "train.eval_every=100"]
    whole = run([*TORCHRUN, *settings(tmp_path, "whole", options, "train.keep_last=10")])
    assert whole.returncode == 0, whole.stdout + whole.stderr
    kept = tmp_path / "whole/rqvae/checkpoints/step-00000005"
    size_kb = sum(path.stat().st_size for path in kept.iterdir()) // 1024
    directory = tmp_path / "cut/rqvae"
    (directory / "checkpoints").mkdir(parents=True)
    small_disk(directory / "checkpoints", size_kb + size_kb // 2)
    shutil.copytree(kept, directory / "checkpoints/step-00000005")
    shutil.copy(tmp_path / "whole/rqvae/metrics.jsonl", directory)

    # stop: at the first checkpoint that does not fit, with one message.
    stop = run([*TORCHRUN, *settings(tmp_path, "cut", options)])
    assert stop.returncode != 0
    assert stop.stderr.count("step-00000010' could not be written (rank ") == 1, stop.stderr
    assert "step-00000005' before it is intact" in stop.stderr
    assert 'Traceback (most recent call last):\n  File "' + str(REPOSITORY / "launch") not in stop.stderr
    assert complete_steps(directory / "checkpoints") == [5]
    assert [path.name for path in (directory / "checkpoints").iterdir()] == ["step-00000005"]
    failed = run_status.read(directory)
    assert failed["state"] == "failed"
    assert "CheckpointError" in failed["error"]

    # continue: trains on, but the last checkpoint is needed.
    go_on = run([*TORCHRUN, *settings(tmp_path, "cut", options, "train.on_checkpoint_failure=continue")])
    assert go_on.returncode != 0
    assert [go_on.stdout.count(f"step-000000{step}' could not be written") for step in (10, 15, 20)] == [
        1,
        1,
        0,
    ]
    assert go_on.stderr.count("step-00000020' could not be written") == 1
    assert records(directory / "metrics.jsonl") == records(tmp_path / "whole/rqvae/metrics.jsonl")
    assert complete_steps(directory / "checkpoints") == [5]

    # With room, the same command gets through.
    subprocess.run(
        ["mount", "-o", f"remount,size={size_kb * 4}k", str(directory / "checkpoints")], check=True
    )
    finished = run([*TORCHRUN, *settings(tmp_path, "cut", options)])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert records(directory / "metrics.jsonl") == records(tmp_path / "whole/rqvae/metrics.jsonl")
    assert complete_steps(directory / "checkpoints") == [15, 20]
    assert run_status.read(directory)["state"] == "finished"
