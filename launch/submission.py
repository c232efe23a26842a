"""Jobs for Slurm: command lines of sbatch, dependencies, arrays of what is missing, a record of what was submitted.

Free of torch.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

RECORD = "jobs.jsonl"


@dataclass(frozen=True)
class Job:
    """One call of sbatch."""

    name: str
    script: str
    """File name below slurm/."""
    arguments: list[str]
    options: list[str] = field(default_factory=list)
    """Of sbatch, after those of the script."""


def command(job: Job, code: Path, logs: Path, after: Sequence[str] = ()) -> list[str]:
    """The command line. A job whose dependency fails is cancelled instead of waiting for ever.

    Args:
        code: directory of the program, its own or a snapshot's.
        logs: directory of the job's output.
        after: ids of jobs that have to end well before.
    """
    dependency = [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    pattern = "%x-%A_%a.out" if any(option.startswith("--array") for option in job.options) else "%x-%j.out"
    output = f"--output={logs / pattern}"
    script = str(code / "slurm" / job.script)
    return [
        "sbatch",
        "--parsable",
        f"--job-name={job.name}",
        output,
        *dependency,
        *job.options,
        script,
        *job.arguments,
    ]


def submit(job: Job, code: Path, project: Path, after: Sequence[str] = ()) -> str:
    """Submit, note it in the project's jobs.jsonl, and return the job's id.

    Raises:
        ValueError: sbatch refuses; says why.
    """
    logs = project / "slurm"
    logs.mkdir(parents=True, exist_ok=True)
    words = command(job, code, logs, after)
    # From inside a job: what that one was given must not become the new one's.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    environment = {**inherited, "RQVAE_CODE": str(code)}
    try:
        result = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(
            f"sbatch cannot be started ({error}); submit from a machine of the cluster"
        ) from error
    if result.returncode:
        raise ValueError(f"sbatch refuses {job.name}: {(result.stderr or result.stdout).strip()}")
    job_id = result.stdout.strip().partition(";")[0]
    line = {
        "time": datetime.now().isoformat(" ", "seconds"),
        "id": job_id,
        "name": job.name,
        "after": list(after),
        "command": words,
    }
    with (project / RECORD).open("a") as file:
        file.write(json.dumps(line) + "\n")
    return job_id


def submit_in_order(jobs: Sequence[Job], code: Path, project: Path, dry_run: bool) -> None:
    """Submit each to run after the one before, or print the command lines.

    Raises:
        ValueError: as `submit`.
    """
    after: list[str] = []
    for job in jobs:
        if dry_run:
            print(shlex.join(command(job, code, project / "slurm", after)))
            after = [f"<{job.name}>"]
        else:
            after = [submit(job, code, project, after)]
            print(f"{job.name}: job {after[0]}, output in {project / 'slurm'}", flush=True)


def array(tasks: Sequence[int], at_once: int) -> str:
    """Option for an array of just these tasks, in ascending order, some of them at a time."""
    ranges: list[list[int]] = []
    for task in tasks:
        if ranges and ranges[-1][1] == task - 1:
            ranges[-1][1] = task
        else:
            ranges.append([task, task])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
    return f"--array={text}%{at_once}"
