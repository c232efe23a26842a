"""The batch script's one entry for training: check the nodes, train on all of them, requeue if that is right.

    python -m slurm.train --config configs/qwen3_8b.yaml --stage rqvae [a.b=value ...]

SIGUSR2 to this process (`sbatch --signal=B:USR2@SECONDS` before the time limit) asks the ranks to stop with a
checkpoint, and the job goes on later. SIGTERM means that Slurm ends the job: the ranks have got it as well and save
what they can, and nothing is requeued from here.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from launch import run_status
from launch.config import STAGES, RunConfig, check_world_size, load_config
from launch.paths import run_directory, scratch_directory
from slurm import history, preflight, staging
from slurm.outcome import EXIT_SETTINGS, Facts, Limits, Outcome, judge, to_exclude
from slurm.scheduler import SlurmJob, shutdown_s

ROOT = Path(__file__).resolve().parents[1]
REPEAT_S = 5.0
"""Between two requests to stop: ranks that are still importing do not hear the first."""


class Requests:
    """What this process was asked for by signals."""

    def __init__(self) -> None:
        self.stop = False
        self.end = False
        signal.signal(signal.SIGUSR2, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)

    def stopping(self) -> bool:
        """Whether this start is to end."""
        return self.stop or self.end

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGUSR2:
            self.stop = True
        else:
            self.end = True


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status of the job."""
    requests = Requests()
    args = parse_arguments(arguments)
    try:
        config = load_config(args.config, stage=args.stage, overrides=args.overrides)
        job = SlurmJob.from_environment()
        check_world_size(config, len(job.nodes) * job.ranks_per_node)
        scratch_directory(config)
        limits = limits_of_site()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_SETTINGS
    directory = run_directory(config, args.stage)
    step = history.newest_step(directory)
    history.add(directory, "start", job=job.job_id, restart=job.restart, step=step, nodes=list(job.nodes))
    earlier = history.starts_without_progress(history.read(directory), job.job_id, step)
    # Beyond these only by Slurm's own requeues, which nobody here decides on.
    if earlier > limits.max_starts_without_progress or job.restart > limits.max_requeues:
        outcome = Outcome(False, f"given up: start {job.restart + 1}, {earlier} in a row from step {step}", 1)
        facts = Facts(1, {})
    else:
        facts = attempt(args, config, job, directory, requests)
        outcome = judge(facts, limits)
    return close(job, directory, outcome, facts)


def attempt(
    args: argparse.Namespace, config: RunConfig, job: SlurmJob, directory: Path, requests: Requests
) -> Facts:
    """One start, from the checks of the nodes to the end of training."""
    bad_nodes = preflight.run(job, directory / "preflight" / job.attempt)
    before = run_status.read(directory)
    exit_status = 1
    if not (bad_nodes or requests.stopping()) and scratch_directory(config) is not None:
        words = ["--config", args.config, "--stage", args.stage, *args.overrides]
        reports = directory / "staging" / job.attempt
        try:
            bad_nodes = staging.run(job, reports, words, step_environment(), requests.stopping)
        except ValueError as error:
            return Facts(1, {"state": "failed", "error": str(error), "retryable": False})
    if not (bad_nodes or requests.stopping()):
        exit_status = train(args, job, directory, requests)
    step, status = history.newest_step(directory), run_status.read(directory)
    return Facts(
        exit_status,
        status if status != before else {},  # what it says of an earlier start is not this one's
        requests.stop,
        requests.end,
        bad_nodes,
        job.restart,
        history.starts_without_progress(history.read(directory), job.job_id, step),
    )


def train(args: argparse.Namespace, job: SlurmJob, directory: Path, requests: Requests) -> int:
    """Train on all nodes; returns the exit status of srun."""
    logs = directory / "logs" / job.attempt
    logs.mkdir(parents=True, exist_ok=True)
    script = [str(ROOT / "launch" / "train.py"), "--config", args.config, "--stage", args.stage]
    node = ["-m", "slurm.node", "--master", f"{job.master_address()}:{job.free_port()}", "--logs", str(logs)]
    command = job.srun([*node, "--", *script, *args.overrides])
    print(f"slurm.train: {job.attempt} on {', '.join(job.nodes)}, logs in {logs}", flush=True)
    command.insert(1, "--kill-on-bad-exit=1")
    before = run_status.read(directory)
    process = subprocess.Popen(command, env=step_environment())
    last_asked, ended = -REPEAT_S, None
    while True:
        try:
            return process.wait(0.5)
        except subprocess.TimeoutExpired:
            status = run_status.read(directory)
            # Ranks that have stopped must not hear it again: at its end Python lets go of its handlers.
            is_over = status != before and status.get("state") != "running"
            if requests.stop and not is_over and time.monotonic() - last_asked >= REPEAT_S:
                process.send_signal(signal.SIGUSR2)  # srun passes it on to every process of the step
                last_asked = time.monotonic()
            # srun waits for ever for a node that lost its step and came back before Slurm took it for dead.
            ended = (ended or time.monotonic()) if is_over else None
            if ended is not None and time.monotonic() - ended > 2 * shutdown_s():
                print("slurm.train: srun does not end though the run has; left behind", flush=True)
                process.kill()


def step_environment() -> dict[str, str]:
    """For srun: the program to import, and the cores of a task, which srun no longer takes from the job by itself."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    cores = os.environ.get("SLURM_CPUS_PER_TASK")
    return {**os.environ, "PYTHONPATH": path, **({"SRUN_CPUS_PER_TASK": cores} if cores else {})}


def close(job: SlurmJob, directory: Path, outcome: Outcome, facts: Facts) -> int:
    """Say what happened, in the log, in STATUS and in the history, and requeue. Returns the exit status."""
    slurm_says = job.state() if facts.ended_by_slurm else ""
    reason = f"{outcome.reason} ({slurm_says})" if slurm_says else outcome.reason
    step = history.newest_step(directory)
    what = {"job": job.job_id, "restart": job.restart, "outcome": reason, "requeued": outcome.requeue}
    if facts.status or run_status.read(directory).get("state") != "running":  # by another job, perhaps
        run_status.amend(directory, slurm=what)
    history.add(directory, "end", **what, step=step)
    print(
        f"slurm.train: {reason}; step {step}; {'requeued' if outcome.requeue else 'not requeued'}", flush=True
    )
    if outcome.requeue:
        job.requeue(to_exclude(facts.bad_nodes, job.nodes))
    return outcome.exit_status


def limits_of_site() -> Limits:
    """RQVAE_MAX_REQUEUES and RQVAE_MAX_STARTS_WITHOUT_PROGRESS, where they are set."""
    default = Limits()
    return Limits(
        int(os.environ.get("RQVAE_MAX_REQUEUES", default.max_requeues)),
        int(os.environ.get("RQVAE_MAX_STARTS_WITHOUT_PROGRESS", default.max_starts_without_progress)),
    )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line. Of an option given twice the later counts, so that a script's own can be changed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file, e.g. configs/qwen3_8b.yaml")
    parser.add_argument("--stage", required=True, choices=STAGES)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings over the file's")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
