"""A two-node Slurm on this machine, and the jobs that tests submit to it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.integration.conftest import REPOSITORY, command_environment, records

CLUSTER = str(REPOSITORY / "slurm" / "local_cluster.sh")
CPU_ONLY = ["--gpus-per-node=0", "--cpus-per-task=1"]
# qwen3_8b with nothing but its sizes changed, to those of nano.yaml.
SHRUNK = Path(__file__).with_name("shrunk_8b.txt").read_text().split()


class Cluster:
    """A started one, and a place for runs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        site = directory / "site.sh"
        site.write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')
        self.environment = {
            **command_environment(),
            "SLURM_CONF": str(directory / "cluster" / "slurm.conf"),
            "RQVAE_SITE": str(site),
            "RQVAE_PREFLIGHT": "local",  # the all-reduce imports torch once more: where a test is about it
        }

    def output(self, *command: str) -> str:
        result = subprocess.run(
            command, cwd=REPOSITORY, env=self.environment, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def sbatch(self, *words: str) -> str:
        return self.output("sbatch", "--parsable", f"--output={self.directory}/%j.out", *words)

    def train(
        self, name: str, data: list[str], *more: str, options: Sequence[str] = (), size: str = "8b"
    ) -> tuple[str, Path]:
        """train_SIZE.sh on both nodes, with more overrides and options of sbatch; the job and its run directory."""
        words = self.overrides(name, data, *more)
        job = self.sbatch("--nodes=2", *CPU_ONLY, *options, f"slurm/train_{size}.sh", *words)
        return job, self.directory / name / "rqvae"

    def overrides(self, name: str, data: list[str], *more: str) -> list[str]:
        """What makes a large configuration a small one on the test's data."""
        source = next(word.partition("=")[2] for word in data if word.startswith("data.source.paths="))
        return [
            *SHRUNK,
            *(word for word in data if not word.startswith("data.source.")),
            f"data.source={{kind: jsonl, paths: {source}}}",
            "data.tokenizer={kind: bpe, vocab_size: 320}",
            f"run_root={self.directory}",
            f"name={name}",
            *more,
        ]

    def log(self, job: str) -> str:
        path = self.directory / f"{job}.out"
        return path.read_text() if path.exists() else ""

    def field(self, job: str, name: str) -> str:
        words = self.output("scontrol", "show", "job", job, "--oneliner").split()
        return next(word.removeprefix(f"{name}=") for word in words if word.startswith(f"{name}="))

    def state(self, job: str) -> str:
        return self.field(job, "JobState")

    def wait(self, job: str, timeout_s: float = 900) -> str:
        """Until the job has ended for good; its state. Slurm lets a requeued job wait for two minutes: not here."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            state = self.state(job)
            if state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
                return state
            if state == "PENDING":
                # Started again within the second of its requeue, its credential is the one just revoked.
                time.sleep(2)
                subprocess.run(
                    ["scontrol", "update", f"JobId={job}", "StartTime=now"],
                    env=self.environment,
                    capture_output=True,
                )
            time.sleep(1)
        raise AssertionError(f"job {job} has not ended:\n{self.log(job)}")

    def wait_until_pending(self, job: str, timeout_s: float = 900) -> None:
        """Until the job is back in the queue."""
        deadline = time.monotonic() + timeout_s
        while self.state(job) != "PENDING":
            assert time.monotonic() < deadline, f"job {job} is not requeued:\n{self.log(job)}"
            time.sleep(0.5)


def wait_for_step(directory: Path, step: int, timeout_s: float = 900) -> None:
    deadline = time.monotonic() + timeout_s
    while not any(line["step"] >= step for line in records(directory / "metrics.jsonl")):
        assert time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.2)


def losses(directory: Path) -> dict[tuple[str, int], Any]:
    lines = records(directory / "metrics.jsonl")
    found = {(line["split"], line["step"]): line["loss"] for line in lines}
    assert len(found) == len(lines), "a step is there twice"
    return found


class NoSlurmError(Exception):
    """None can be started here; says why."""


@contextmanager
def running_cluster(directory: Path, port: int = 18600) -> Iterator[Cluster]:
    """A started one; stopped in the end.

    Args:
        directory: for its files and those of the jobs.
        port: the first of three.

    Raises:
        NoSlurmError: no root, no packages.
    """
    # munged, under a user of its own, has to reach its socket.
    for parent in (directory, *directory.parents[:2]):
        parent.chmod(parent.stat().st_mode | 0o055)
    environment = {**os.environ, "RQVAE_LOCAL_CLUSTER_PORT": str(port)}
    place = str(directory / "cluster")
    started = subprocess.run([CLUSTER, "start", place], env=environment, capture_output=True, text=True)
    try:
        if started.returncode != 0:
            raise NoSlurmError(f"no Slurm here: {started.stderr.strip().splitlines()[-1:]}")
        yield Cluster(directory)
    finally:
        subprocess.run([CLUSTER, "stop", place], env=environment, capture_output=True)
