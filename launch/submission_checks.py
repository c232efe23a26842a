"""What is checked before a training job is submitted. Free of torch: the plan runs in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from data_pipeline.code_manifest import CodeShardEntry, load_code_manifest
from data_pipeline.errors import NotADatasetError
from data_pipeline.manifest import ShardEntry, load_manifest
from launch.config import RunConfig, check_world_size
from launch.layout import check_layout
from launch.paths import TRAINING_SPLITS, run_directory, source_directories

GIB = 1 << 30
ROOT = Path(__file__).resolve().parents[1]


def check_data(config: RunConfig) -> None:
    """Token shards, and for the latent model codes, are complete: every tar that training reads has its size.

    Raises:
        ValueError: says what is missing and which command makes it.
    """
    for tokens, codes in source_directories(config).values():
        manifest = load_manifest(tokens)
        check_layout(manifest, tokens, config)
        streaming = config.train.streaming
        elsewhere = ("train",) if streaming is not None and streaming.url is not None else ()
        for split in (split for split in TRAINING_SPLITS if split not in elsewhere):
            if not manifest.splits[split].samples:
                raise ValueError(
                    f"the token shards in '{tokens}' have no samples of the split {split!r}: build with a larger "
                    "data.validation_fraction, or from more text"
                )
            _check_files(tokens / split, manifest.splits[split].shards, "submit --job build_data")
        if config.stage != "rq_transformer":
            continue
        again = "submit --job precompute_codes"
        try:
            made = load_code_manifest(codes)
        except NotADatasetError:
            raise ValueError(f"the codes in '{codes}' are not complete; {again} first") from None
        if made.layout.token_fingerprint != manifest.fingerprint:
            raise ValueError(
                f"the codes in '{codes}' are of other tokens than those in '{tokens}'; {again} first"
            )
        if config.train.stochastic_codes and made.layout.latent_dim is None:
            raise ValueError(
                f"the codes in '{codes}' are without the latents that stochastic codes are drawn from; {again} first"
            )
        for split, shards in made.splits.items():
            _check_files(codes / split, shards, again)


def _check_files(folder: Path, shards: Sequence[ShardEntry | CodeShardEntry], again: str) -> None:
    with os.scandir(folder) if folder.is_dir() else nullcontext(()) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries}  # by one listing: there may be 10^5
    wrong = [shard.name for shard in shards if sizes.get(f"{shard.name}.tar") != shard.file_bytes]
    if wrong:
        raise ValueError(
            f"'{folder}': {len(wrong)} of {len(shards)} shards are missing or cut ({', '.join(wrong[:5])}"
            f"{', ...' if len(wrong) > 5 else ''}); restore them, or remove the directory and {again} again"
        )


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
