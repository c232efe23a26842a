"""What is checked before a training job is submitted. Free of torch: the plan runs in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from data_pipeline.manifest import load_manifest
from launch.config import RunConfig, check_world_size
from launch.paths import run_directory, source_directories

GIB = 1 << 30
ROOT = Path(__file__).resolve().parents[1]


def check_data(config: RunConfig) -> None:
    """Token shards, and for the latent model codes, are complete.

    Raises:
        ValueError: says what is missing and which command makes it.
    """
    for tokens, codes in source_directories(config).values():
        load_manifest(tokens)
        if config.stage == "rq_transformer" and not (codes / "codes_manifest.json").is_file():
            raise ValueError(f"the codes in '{codes}' are not complete; submit --job precompute_codes first")


def check_plan(
    config: RunConfig, path: str, overrides: list[str], ranks: int, gpu_memory_gib: float | None
) -> list[str]:
    """The stage fits into the GPUs' memory and its checkpoints onto the disk; returns what the plan says.

    Args:
        gpu_memory_gib: None on a CPU, where memory is not checked.

    Raises:
        ValueError: it does not, or the batch cannot be split over the ranks.
    """
    check_world_size(config, ranks)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "plan.json"
        command = [sys.executable, str(ROOT / "launch" / "plan.py"), "--config", path, "--gpus", str(ranks)]
        memory = ["--gpu-memory-gib", str(gpu_memory_gib or 1e9)]
        result = subprocess.run(
            [*command, *memory, "--json", str(file), *overrides], capture_output=True, text=True, check=False
        )
        if result.returncode not in (0, 1):
            raise ValueError(f"launch/plan.py: {result.stderr.strip().removeprefix('error: ')}")
        phases = [part for part in json.loads(file.read_text()) if part["stage"] == config.stage]
    lines = []
    for part in phases:
        peak = part["peak_bytes"] / GIB
        name = f"{config.stage}, {part['phase']['name']}"
        if gpu_memory_gib is not None and peak > gpu_memory_gib:
            raise ValueError(
                f"{name}: {peak:.1f} GiB per GPU are needed, {gpu_memory_gib:g} are there; use more GPUs, a smaller "
                "train.micro_batch_size or train.offload_optimizer=cpu (launch/plan.py shows the parts)"
            )
        lines.append(
            f"{name}: {peak:.1f} GiB per rank, {part['days']:.2f} days by launch/plan.py's assumptions"
        )
    check_disk(config, max((part["checkpoint_bytes"] for part in phases), default=0.0))
    return lines


def check_disk(config: RunConfig, checkpoint_bytes: float) -> None:
    """There is room for the checkpoints that are kept, and the one being written.

    Raises:
        ValueError: there is not.
    """
    assert config.stage is not None
    place = run_directory(config, config.stage)
    while not place.exists():
        place = place.parent
    needed, free = (config.train.keep_last + 1) * checkpoint_bytes / GIB, shutil.disk_usage(place).free / GIB
    if needed > free:
        raise ValueError(
            f"{config.train.keep_last + 1} checkpoints of {checkpoint_bytes / GIB:.1f} GiB do not fit into the "
            f"{free:.1f} GiB free in '{place}'; use another run_root, or a smaller train.keep_last"
        )
