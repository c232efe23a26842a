"""Before training, where RQVAE_STAGE_DIR is set: every node copies the data to its own disk.

What went wrong on a node goes into a file of its own in a directory of this attempt, as in `slurm.preflight`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from data_pipeline.staging import stage
from launch.config import STAGES, RunConfig, load_config
from launch.paths import TRAINING_SPLITS, scratch_directory, source_directories
from slurm.scheduler import SlurmJob


def run(
    job: SlurmJob,
    directory: Path,
    words: list[str],
    environment: dict[str, str],
    stopping: Callable[[], bool],
) -> tuple[str, ...]:
    """Copy on all nodes; returns those that cannot, and prints why.

    Args:
        directory: for the nodes' reports; shared.
        words: `--config C --stage S` and overrides.
        stopping: asked now and then; true ends the copying, which the next start takes up.

    Raises:
        ValueError: the data cannot be copied anywhere: incomplete or damaged.
    """
    directory.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    process = subprocess.Popen(job.srun(["-m", "slurm.staging", str(directory), *words]), env=environment)
    while process.poll() is None:
        if stopping():
            process.terminate()
            process.wait()
            return ()
        time.sleep(0.2)
    bad_nodes: list[str] = []
    for node in job.nodes:
        path = directory / f"{node}.json"
        report = json.loads(path.read_text()) if path.is_file() else {"error": "does not answer"}
        if report.get("of_the_data"):
            raise ValueError(report["error"])
        if report["error"]:
            bad_nodes.append(node)
            print(f"slurm.staging: {node}: {report['error']}", flush=True)
    seconds = time.monotonic() - begin
    print(f"slurm.staging: {len(job.nodes)} nodes, {len(bad_nodes)} bad, {seconds:.1f} s", flush=True)
    return tuple(bad_nodes)


def copy_here(config: RunConfig, scratch: Path) -> None:
    """Copy what the stage reads to this node.

    Raises:
        OSError, ValueError: see `data_pipeline.staging.stage`.
    """
    for tokens, codes in source_directories(config).values():
        for place in (tokens, codes) if config.stage == "rq_transformer" else (tokens,):
            stage(place, scratch, TRAINING_SPLITS)


def main(arguments: list[str] | None = None) -> int:
    """On each node: copy, and write how it went."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # the batch script hears it as well, and ends this
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reports", type=Path, help="directory for NODE.json")
    parser.add_argument("--config", required=True)
    parser.add_argument("--stage", required=True, choices=STAGES)
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    args = parser.parse_intermixed_args(arguments)
    config = load_config(args.config, stage=args.stage, overrides=args.overrides)
    scratch = scratch_directory(config)
    report: dict[str, object] = {"error": ""}
    try:
        if scratch is None:
            raise ValueError("RQVAE_STAGE_DIR is not set: where to?")
        copy_here(config, scratch)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        report = {"error": str(error), "of_the_data": isinstance(error, ValueError)}
    path = args.reports / f"{os.environ.get('SLURMD_NODENAME', 'here')}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report) + "\n")
    temporary.replace(path)
    return int(bool(report["error"]))


if __name__ == "__main__":
    sys.exit(main())
