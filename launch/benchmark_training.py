"""Training throughput: ZeRO-3 beside ZeRO-1 and DDP (DeepSpeed without ZeRO) on one job, as real launches.

The rows learn the same, which is checked; they differ in speed and memory. They are timed inside one run each, over
the windows after the first, so that starting up does not count.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from launch.environment import describe_environment
from launch.metrics_log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
ROWS = {"DDP (ZeRO-0)": 0, "ZeRO-1": 1, "ZeRO-3": 3}


def benchmark_training(
    config: str, stage: str, ranks: int, steps: int, overrides: list[str]
) -> dict[str, Any]:
    """Train `steps` steps per row on `ranks` processes of this machine, in fp32.

    Raises:
        ValueError: a row failed, or its losses are not those of the others.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="benchmark-training-") as directory:
        for name, zero_stage in ROWS.items():
            settings = [f"train.zero_stage={zero_stage}", f"train.steps={steps}", *overrides]
            lines = _train(Path(directory), config, stage, ranks, zero_stage, settings)
            timed = [line["tokens_per_s"] for line in lines[1:]]
            rows.append(
                {
                    "name": name,
                    "tokens_per_s": statistics.median(timed),
                    "spread_tokens_per_s": max(timed) - min(timed),
                    "peak_memory_gib": lines[-1]["peak_memory_gib"],
                    "losses": [line["loss"] for line in lines],
                }
            )
    worst = max(
        abs(loss - expected) / expected
        for row in rows
        for loss, expected in zip(row["losses"], rows[0]["losses"], strict=True)
    )
    if worst > 1e-3:
        raise ValueError(f"the rows do not learn the same: losses differ by {worst:.2g} of their value")
    return {
        "ranks": ranks,
        "steps": steps,
        "stage": stage,
        "rows": rows,
        "largest_relative_difference_of_losses": worst,
        "environment": describe_environment(),
    }


def _train(
    directory: Path, config: str, stage: str, ranks: int, zero_stage: int, settings: list[str]
) -> list[dict[str, Any]]:
    """Lines of the training log of one run."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*start, "launch/train.py", "--config", config, "--stage", stage, f"name=zero{zero_stage}"]
    fixed = [f"run_root={directory}", "tracking.wandb=disabled", "train.precision=fp32", "train.log_every=5"]
    fixed += ["train.eval_every=1000000", "train.checkpoint_every=1000000", "train.eval_samples=1"]
    result = subprocess.run(
        [*command, *fixed, *settings],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise ValueError(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    lines = read_metrics(directory / f"zero{zero_stage}" / stage / "metrics.jsonl")
    return [line for line in lines if line["split"] == "train"]


def print_training(result: dict[str, Any]) -> None:
    """The rows as a table."""
    print(f"{result['stage']}, {result['ranks']} ranks, fp32, {result['steps']} steps")
    print(f"{'':16}{'tokens/s':>12}{'spread':>10}{'peak GiB':>10}")
    for row in result["rows"]:
        print(
            f"{row['name']:16}{row['tokens_per_s']:12.0f}{row['spread_tokens_per_s']:10.0f}"
            f"{row['peak_memory_gib']:10.2f}"
        )
    print(f"losses differ by at most {result['largest_relative_difference_of_losses']:.1g} of their value")
