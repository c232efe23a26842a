"""Training that is killed goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from tests.integration.conftest import NANO, REPOSITORY, command_environment, launcher, records, run


def train_command(run_root: Path, name: str, overrides: list[str]) -> list[str]:
    """The codec's two phases on two ranks."""
    settings = ["--config", str(NANO), "--stage", "rqvae", f"name={name}", f"run_root={run_root}"]
    return [*launcher(2), *settings, *overrides]


def kill_all(process: subprocess.Popen[str]) -> None:
    """kill -9 for the launcher and its ranks."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_training_resumes_bitwise(tmp_path: Path, nano_data: list[str]) -> None:
    whole = run(train_command(tmp_path, "whole", nano_data))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    expected = records(tmp_path / "whole/rqvae/metrics.jsonl")
    assert {line["phase"] for line in expected} == {"frozen", "full"}
    assert expected[-1]["step"] == 20

    # Killed after step 12 was logged and before step 15 was saved: it must go back to step 10.
    metrics = tmp_path / "cut/rqvae/metrics.jsonl"
    log = (tmp_path / "cut.log").open("w")
    command = train_command(tmp_path, "cut", nano_data)
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=command_environment(),
        stdout=log,
        stderr=log,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while not any(line["step"] >= 12 for line in records(metrics)):
        assert process.poll() is None, (tmp_path / "cut.log").read_text()
        assert time.monotonic() < deadline, "training did not get to step 12"
        time.sleep(0.02)
    kill_all(process)
    port = command[command.index("--master_port") + 1]
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
    assert not (tmp_path / "cut/rqvae/checkpoints/step-00000020/COMPLETE.json").exists()

    resumed = run(train_command(tmp_path, "cut", nano_data))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert records(metrics) == expected

    # The same directory is refused to another configuration.
    other = run(train_command(tmp_path, "cut", [*nano_data, "train.learning_rate=1.0e-3"]))
    assert other.returncode != 0
    assert "another configuration" in other.stdout + other.stderr
