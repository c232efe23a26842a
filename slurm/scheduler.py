"""The job that this process runs in, and what to ask of Slurm about it."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass

_FIRST_PORT, _NUM_PORTS = 10_000, 20_000  # below the range from which connections are given theirs


@dataclass(frozen=True)
class SlurmJob:
    """A job's allocation, from the environment of its batch script."""

    job_id: str
    restart: int
    """How often Slurm has started it again."""
    nodes: tuple[str, ...]
    """Names, in the order of SLURM_NODEID."""
    ranks_per_node: int

    @classmethod
    def from_environment(cls) -> SlurmJob:
        """Of this process.

        Raises:
            ValueError: it does not run in a Slurm job.
        """
        if "SLURM_JOB_ID" not in os.environ:
            raise ValueError("this runs inside a Slurm job only; submit one of slurm/*.sh with sbatch")
        names = _output(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]).split()
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return cls(os.environ["SLURM_JOB_ID"], restart, tuple(names), ranks_per_node())

    @property
    def attempt(self) -> str:
        """Names this start of the job: job id and restart."""
        return f"{self.job_id}.{self.restart}"

    def master_address(self) -> str:
        """Address of the first node: MASTER_ADDR where the site sets it, else what Slurm itself calls it by."""
        if "MASTER_ADDR" in os.environ:
            return os.environ["MASTER_ADDR"]
        fields = _output(["scontrol", "show", "node", self.nodes[0], "--oneliner"]).split()
        return next(word.removeprefix("NodeAddr=") for word in fields if word.startswith("NodeAddr="))

    def free_port(self) -> int:
        """A port that nobody uses on this node, the first one; jobs that share it start looking far apart."""
        offset = int(self.job_id) * 97 + self.restart
        for number in range(_NUM_PORTS):
            port = _FIRST_PORT + (offset + number) % _NUM_PORTS
            with socket.socket() as probe:
                try:
                    probe.bind(("", port))
                except OSError:
                    continue
                return port
        raise ValueError(f"no free port from {_FIRST_PORT} to {_FIRST_PORT + _NUM_PORTS} on this node")

    def srun(self, command: list[str], tasks_per_node: int = 1) -> list[str]:
        """The command line that starts a command on every node. RQVAE_SRUN_OPTIONS adds options of the site."""
        num_tasks = len(self.nodes) * tasks_per_node
        options = [
            f"--nodes={len(self.nodes)}",
            f"--ntasks={num_tasks}",
            f"--ntasks-per-node={tasks_per_node}",
        ]
        if tasks_per_node > 1:
            options += ["--overcommit", "--cpu-bind=none"]
        site = shlex.split(os.environ.get("RQVAE_SRUN_OPTIONS", ""))
        return ["srun", *options, "--mpi=none", *site, sys.executable, *command]

    def state(self) -> str:
        """What Slurm calls the job's state now, e.g. RUNNING, CANCELLED, PENDING; empty if it does not answer."""
        try:
            fields = _output(["scontrol", "show", "job", self.job_id, "--oneliner"]).split()
        except (OSError, subprocess.SubprocessError):
            return ""
        return next((word.removeprefix("JobState=") for word in fields if word.startswith("JobState=")), "")

    def requeue(self, without: tuple[str, ...] = ()) -> None:
        """Put the job back into the queue, if asked not to run on some nodes again. This process ends by it.

        Only a job that is not running takes nodes to exclude. Slurm waits two minutes before it starts one that was
        requeued, so there is time; it is not held meanwhile, as nobody would release it if this process died.
        """
        # Slurm sends it as soon as the job is back in the queue, also to the commands below.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            _output(["scontrol", "requeue", self.job_id])
        except subprocess.SubprocessError as error:
            print(f"slurm: cannot requeue, submit it again: {_why(error)}", file=sys.stderr, flush=True)
            return
        if not without:
            return
        try:
            excluded = ",".join(sorted({*without, *_excluded(self.job_id)}))  # earlier ones stay excluded
            _output(["scontrol", "update", f"JobId={self.job_id}", f"ExcNodeList={excluded}"])
        except subprocess.SubprocessError as error:
            print(f"slurm: cannot exclude {', '.join(without)}: {_why(error)}", file=sys.stderr, flush=True)


def ranks_per_node() -> int:
    """Processes that a node trains with: RQVAE_RANKS_PER_NODE, else its GPUs in this job, else one on the CPU."""
    for name in ("RQVAE_RANKS_PER_NODE", "SLURM_GPUS_ON_NODE"):
        if os.environ.get(name, "0") != "0":
            return int(os.environ[name])
    return 1


def shutdown_s() -> int:
    """Seconds that ranks have for a step and a checkpoint once they are asked to end: RQVAE_SHUTDOWN_S, else 300."""
    return int(os.environ.get("RQVAE_SHUTDOWN_S", "300"))


def _excluded(job_id: str) -> set[str]:
    fields = _output(["scontrol", "show", "job", job_id, "--oneliner"]).split()
    names = next(
        (word.removeprefix("ExcNodeList=") for word in fields if word.startswith("ExcNodeList=")), ""
    )
    if names in ("", "(null)"):
        return set()
    return set(_output(["scontrol", "show", "hostnames", names]).split())


def _why(error: subprocess.SubprocessError) -> str:
    return str(getattr(error, "stderr", None) or error).strip()


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
