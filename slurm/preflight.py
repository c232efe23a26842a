"""Checks of the nodes before training: GPUs, disks, clock, shared file system, and a short all-reduce.

What a node finds wrong goes into a file of its own in a directory of this attempt; the batch script reads them and
knows by their absence which node does not answer. RQVAE_PREFLIGHT: `full` (default), `local` (no all-reduce), `off`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from slurm.scheduler import SlurmJob

TOKEN = "token"  # noqa: S105 (the name of a file)
ALLREDUCE = "allreduce.json"
TIMEOUT_S = 180.0
CLOCK_TOLERANCE_S = 2.0
_GPU_FIELDS = "index,memory.used,ecc.errors.uncorrected.volatile.total"


def run(job: SlurmJob, directory: Path) -> tuple[str, ...]:
    """Check all nodes; returns the bad ones, and prints what is wrong with them."""
    level = os.environ.get("RQVAE_PREFLIGHT", "full")
    if level == "off":
        return ()
    directory.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(8)
    (directory / TOKEN).write_text(token)
    begin = time.time()
    _start(job.srun(["-m", "slurm.preflight", str(directory), token, str(job.ranks_per_node)]))
    problems = problems_of_nodes(directory, job.nodes, begin, time.time())
    if not problems and level == "full" and len(job.nodes) * job.ranks_per_node > 1:
        master = f"{job.master_address()}:{job.free_port()}"
        command = ["-m", "slurm.allreduce", str(directory), master]
        _start(job.srun(command, tasks_per_node=job.ranks_per_node))
        problems = problems_of_network(directory, job.nodes)
    for node, found in problems.items():
        print(f"slurm.preflight: {node}: {'; '.join(found)}", flush=True)
    seconds = time.time() - begin
    print(f"slurm.preflight: {len(job.nodes)} nodes, {len(problems)} bad, {seconds:.1f} s", flush=True)
    return tuple(problems)


def _start(command: list[str]) -> None:
    """Run a step to its end or for TIMEOUT_S; what it found is in files."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    try:
        process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def problems_of_nodes(
    directory: Path, nodes: tuple[str, ...], begin: float, end: float
) -> dict[str, list[str]]:
    """What is wrong, by node, from the nodes' files; `begin` and `end` of the step by the first node's clock."""
    problems: dict[str, list[str]] = {}
    for node in nodes:
        path = directory / f"{node}.json"
        if not path.is_file():
            problems[node] = ["does not answer, or cannot write where the run directory is"]
            continue
        report = json.loads(path.read_text())
        found = list(report["problems"])
        early, late = begin - CLOCK_TOLERANCE_S, end + CLOCK_TOLERANCE_S
        if not early <= report["time"] <= late:
            off = report["time"] - (begin if report["time"] < early else end)
            found.append(f"its clock is off by {off:+.1f} s")
        if found:
            problems[node] = found
    return problems


def problems_of_network(directory: Path, nodes: tuple[str, ...]) -> dict[str, list[str]]:
    """Nodes that did not take part in the all-reduce, or between which it is slow. Prints the bandwidth."""
    path = directory / ALLREDUCE
    if not path.is_file():
        absent = [node for node in nodes if not (directory / f"{node}.joined").is_file()]
        # If all joined and it failed all the same, nobody can be named; the training's own error will say more.
        return {node: ["does not take part in an all-reduce"] for node in absent}
    result = json.loads(path.read_text())
    print(f"slurm.preflight: all-reduce {result['gb_per_s']:.2f} GB/s (bus bandwidth)", flush=True)
    floor = float(os.environ.get("RQVAE_MIN_BANDWIDTH_GBS", "0"))
    return slow_nodes({tuple(key.split()): value for key, value in result["pairs"].items()}, floor)


def slow_nodes(pairs: dict[tuple[str, ...], float], floor: float) -> dict[str, list[str]]:
    """Nodes all of whose pairs are below `floor` GB/s, while others reach it: the fault is theirs."""
    if not any(speed >= floor for speed in pairs.values()):
        return {}
    best: dict[str, float] = {}
    for pair, speed in pairs.items():
        for node in pair:
            best[node] = max(best.get(node, 0.0), speed)
    return {
        node: [f"at most {speed:.2f} GB/s to its neighbours, {floor:g} are asked for"]
        for node, speed in best.items()
        if speed < floor
    }


def problems_here(directory: Path, token: str, ranks: int) -> list[str]:
    """What is wrong with this node."""
    problems = []
    try:
        if (directory / TOKEN).read_text() != token:
            problems.append(f"sees an old version of '{directory}': not a shared file system, or a stale one")
    except OSError as error:
        problems.append(f"does not see '{directory}' ({error.strerror}): not a shared file system")
    least = float(os.environ.get("RQVAE_MIN_FREE_GIB", "1"))
    for place in {os.environ.get("TMPDIR", "/tmp"), "/dev/shm"}:  # noqa: S108
        free = shutil.disk_usage(place).free / 2**30
        if free < least:
            problems.append(f"{free:.1f} GiB free in {place}, {least:g} are needed")
    if os.environ.get("SLURM_GPUS_ON_NODE", "0") != "0":
        problems += problems_of_gpus(_nvidia_smi(), ranks)
    return problems


def problems_of_gpus(listing: str, expected: int) -> list[str]:
    """What is wrong by `nvidia-smi`'s lines of _GPU_FIELDS: one missing, memory errors, somebody else's process."""
    rows = [[field.strip() for field in line.split(",")] for line in listing.splitlines() if line.strip()]
    problems = [] if len(rows) >= expected else [f"{len(rows)} GPUs answer, {expected} are expected"]
    for index, used, errors in (row for row in rows if len(row) == 3):
        if errors.isdigit() and int(errors):
            problems.append(f"GPU {index}: {errors} uncorrected memory errors")
        if used.isdigit() and int(used) > 2048:
            problems.append(f"GPU {index}: {used} MiB in use by another process")
    return problems


def _nvidia_smi() -> str:
    command = ["nvidia-smi", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def main(arguments: list[str]) -> int:
    """On each node: write what is wrong with it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # a request to stop is no fault of the node
    directory, token, ranks = Path(arguments[0]), arguments[1], int(arguments[2])
    report = {"time": time.time(), "problems": problems_here(directory, token, ranks)}
    path = directory / f"{os.environ['SLURMD_NODENAME']}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report) + "\n")
    temporary.replace(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
