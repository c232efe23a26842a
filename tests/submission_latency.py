"""From `sbatch` to the first step on a local two-node Slurm, beside the same ranks started by hand.

    python -m tests.submission_latency --repeats 3

On an otherwise idle machine, as root. By hand: a `torchrun` for each node, all checks of nodes and the queue left
out. Alternating, after one of each that is not counted, which fills the caches.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from slurm import history, node
from tests.integration.conftest import NANO, REPOSITORY, command_environment, free_port, run, write_corpus
from tests.integration.local_slurm import Cluster, running_cluster, wait_for_step

ONE_STEP = ["train.steps=1", "train.frozen_steps=0", "train.switch_warmup_steps=0", "train.warmup_steps=0"]
ONE_STEP += ["train.quantizer_warmup_steps=0", "tracking.wandb=disabled"]


def by_slurm(cluster: Cluster, name: str, data: list[str]) -> tuple[float, float]:
    """Seconds to the first step, and of these to the beginning of the batch script's own work."""
    begin, now = time.monotonic(), datetime.now()
    job, directory = cluster.train(name, data, *ONE_STEP, options=["--export=ALL,RQVAE_PREFLIGHT=full"])
    wait_for_step(directory, 1)
    seconds = time.monotonic() - begin
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    start = datetime.fromisoformat(history.read(directory)[0]["time"])
    return seconds, (start - now).total_seconds()


def by_hand(cluster: Cluster, name: str, data: list[str]) -> float:
    """Seconds to the first step."""
    directory = cluster.directory / name / "rqvae"
    script = ["launch/train.py", "--config", "configs/qwen3_8b.yaml", "--stage", "rqvae"]
    script += cluster.overrides(name, data, *ONE_STEP)
    master = f"127.0.0.1:{free_port()}"
    begin = time.monotonic()
    processes = [
        subprocess.Popen(
            node.torchrun(master, index, 2, 1, str(directory / "logs"), script),
            cwd=REPOSITORY,
            env=command_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for index in range(2)
    ]
    wait_for_step(directory, 1)
    seconds = time.monotonic() - begin
    assert all(process.wait() == 0 for process in processes)
    return seconds


def main() -> int:
    """Command line; the exit status says whether the difference is below 10 s."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "slurm"
        directory.mkdir()
        write_corpus(directory / "documents.jsonl", 400)
        data = [
            f"data.directory={directory / 'shards'}",
            f"data.source.paths={directory / 'documents.jsonl'}",
        ]
        built = run([sys.executable, "-m", "data_pipeline", "build", "--config", str(NANO), *data])
        assert built.returncode == 0, built.stderr
        slurm, queue, hand = [], [], []
        with running_cluster(directory) as cluster:
            for repeat in range(repeats + 1):
                total, queued = by_slurm(cluster, f"slurm-{repeat}", data)
                alone = by_hand(cluster, f"hand-{repeat}", data)
                print(
                    f"sbatch {total:.1f} s (batch script after {queued:.1f} s), by hand {alone:.1f} s",
                    flush=True,
                )
                slurm, queue, hand = [*slurm, total], [*queue, queued], [*hand, alone]
    extra = statistics.median(a - b for a, b in zip(slurm[1:], hand[1:], strict=True))
    medians = [statistics.median(values[1:]) for values in (slurm, queue, hand)]
    print("median: sbatch {:.1f} s, batch script after {:.1f} s, by hand {:.1f} s".format(*medians))
    print(f"beyond a start by hand: {extra:.1f} s, below 10 s is asked for")
    return int(extra >= 10)


if __name__ == "__main__":
    sys.exit(main())
