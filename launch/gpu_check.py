"""Run every claim of this project that needs a GPU, and print a table.

    python launch/gpu_check.py [--json FILE]        (or: make gpu-check)

Each row runs in a process of its own, so that one failure does not hide the others. Without a GPU every row says so,
and the exit status is 0; with one it is 1 if a row failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
NO_GPU = "no GPU"


@dataclass(frozen=True)
class Row:
    """One claim."""

    name: str
    command: Callable[[Path], list[str]] | None
    """What to run, given a scratch directory; None where no check has been written yet."""
    needs_gpus: int = 1


def train(*overrides: str, gpus: int = 1) -> Callable[[Path], list[str]]:
    """A few steps of the codec on the smallest configuration."""

    def command(scratch: Path) -> list[str]:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
        name = f"name=check{time.monotonic_ns()}"
        where = [f"run_root={scratch / 'runs'}", f"data.directory={scratch / 'shards'}"]
        config = [
            "--config",
            "configs/tiny.yaml",
            "--stage",
            "rqvae",
            name,
            "tracking.wandb=disabled",
            *where,
        ]
        short = ["train.steps=12", "stages.rqvae.quantizer_warmup_steps=3", "stages.rqvae.frozen_steps=6"]
        short += ["stages.rqvae.switch_warmup_steps=2", "train.warmup_steps=2", "train.log_every=1"]
        return [*start, "launch/train.py", *config, *short, *overrides]

    return command


def gpu_tests(file: str) -> Callable[[Path], list[str]]:
    """Command of the tests in a file that need a GPU."""
    return lambda _: [sys.executable, "-m", "pytest", "-q", "-m", "gpu", file]


ROWS = (
    Row("bf16, one GPU, ZeRO-3", train("train.precision=bf16")),
    Row("fp32, one GPU, ZeRO-3", train("train.precision=fp32")),
    Row("NCCL, 2 GPUs, ZeRO-3, bf16", train("train.precision=bf16", gpus=2), 2),
    Row("NCCL, 2 GPUs, ZeRO-1, bf16", train("train.precision=bf16", "train.zero_stage=1", gpus=2), 2),
    Row("torch.compile, ZeRO-1", train("train.torch_compile=true", "train.zero_stage=1")),
    Row("activation checkpointing", train("train.activation_checkpointing=true")),
    Row("Muon", train("train.optimizer=muon", "train.gradient_clipping=0")),
    Row("frozen by learning rate 0", train("train.phase_method=zero_lr")),
    Row("optimizer on the CPU, pinned memory", train("train.offload_optimizer=cpu")),
    Row("weights on the CPU, pinned memory", train("train.offload_param=cpu", "train.offload_optimizer=cpu")),
    Row(
        "optimizer and weights on NVMe",
        lambda scratch: train(
            "train.offload_param=nvme", "train.offload_optimizer=nvme", f"train.nvme_path={scratch}"
        )(scratch),
    ),
    Row("ZeRO++ hpZ", train("train.zero_hpz_partition_size=2", gpus=2), 2),
    Row("ZeRO++ quantized weights", train("train.zero_quantized_weights=true", gpus=2), 2),
    Row("ZeRO++ quantized gradients", train("train.zero_quantized_gradients=true", gpus=2), 2),
    Row("CUDA graphs in decoding", gpu_tests("tests/unit/rqvae/test_generation_modes.py")),
    Row("Unsloth on a GPU", gpu_tests("tests/unit/launch/test_race.py")),
)


def check(row: Row, scratch: Path, gpus: int) -> str:
    """Outcome of a row: `passed in N s`, `failed: ...`, or why it was not run."""
    if gpus == 0:
        return NO_GPU
    if row.command is None:
        return "no check yet"
    if gpus < row.needs_gpus:
        return f"needs {row.needs_gpus} GPUs, {gpus} here"
    start = time.monotonic()
    result = subprocess.run(row.command(scratch), cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in (result.stdout + result.stderr).splitlines() if "rror" in line]
        return f"failed: {lines[-1] if lines else f'exit status {result.returncode}'}"
    return f"passed in {time.monotonic() - start:.0f} s"


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file to write the outcomes to")
    args = parser.parse_args(arguments)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    outcomes = {}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as directory:
        scratch = Path(directory)
        if gpus:
            build = [sys.executable, "-m", "data_pipeline", "build", "--config", "configs/tiny.yaml"]
            subprocess.run([*build, f"data.directory={scratch / 'shards'}"], cwd=ROOT, check=True)
        for row in ROWS:
            outcomes[row.name] = check(row, scratch, gpus)
            print(f"{row.name:40}{outcomes[row.name]}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(outcomes, indent=2) + "\n")
    return int(any(outcome.startswith("failed") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
