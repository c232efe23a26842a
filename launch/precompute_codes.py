"""Encode token shards into code shards, for training the latent model.

    python launch/precompute_codes.py --config configs/tiny.yaml --checkpoint runs/tiny/model/rqvae \\
        --task-index 0 --num-tasks 1

Task i of n takes every n-th shard; finished shards are skipped, so a killed task is simply started again. The
task that finds all shards done completes the directory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from data_pipeline import TokenDataset, code_shard_is_done, finish_codes, write_code_shard
from data_pipeline.errors import MissingShardError
from launch.config import RunConfig, load_config
from launch.paths import codes_directory
from launch.progress import Progress
from rqvae import RQVAE

SPLITS = ("train", "validation")  # what training reads; evaluation encodes the test split itself


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--checkpoint", required=True, type=Path, help="model directory of the codec")
    parser.add_argument("--task-index", type=int, default=0)
    parser.add_argument("--num-tasks", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16, help="samples per forward pass")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    args = parser.parse_args(arguments)
    try:
        if not 0 <= args.task_index < args.num_tasks:
            raise ValueError(f"--task-index {args.task_index} is not below --num-tasks {args.num_tasks}")
        config = load_config(args.config, overrides=args.overrides)
        encode(config, args.checkpoint, args.task_index, args.num_tasks, args.batch_size)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def encode(config: RunConfig, checkpoint: Path, task_index: int, num_tasks: int, batch_size: int) -> None:
    """Write this task's code shards, and the manifest when none is missing any more."""
    vae = RQVAE.from_pretrained(checkpoint)
    codec_hash = vae.codec_hash()
    vae.to("cuda" if torch.cuda.is_available() else "cpu")
    output, tokens = codes_directory(config), config.data.directory
    for split in SPLITS:
        dataset = TokenDataset(tokens, split)
        shards = range(task_index, len(dataset.shards), num_tasks)
        total = sum(len(dataset.shard_range(shard)) for shard in shards)
        progress = Progress(total, f"encode {split}", unit="samples")
        for shard in shards:
            if code_shard_is_done(
                output, split, shard, token_fingerprint=dataset.fingerprint, codec_hash=codec_hash
            ):
                progress.update(len(dataset.shard_range(shard)))
                continue
            write_code_shard(
                output,
                split,
                shard,
                encode_shard(vae, dataset, shard, batch_size, progress),
                token_dataset=dataset,
                codec_hash=codec_hash,
                compression_factor=vae.config.compression_factor,
                codebook_sizes=vae.config.codebook_sizes,
            )
        progress.close()
    try:
        finish_codes(output, tokens, codec_hash=codec_hash, splits=SPLITS)
    except MissingShardError:
        print(
            f"Task {task_index} of {num_tasks} is done; the codes in {output} are complete when all tasks are."
        )
    else:
        print(f"Codes: {output}\nNext: deepspeed launch/train.py --config CONFIG --stage rq_transformer")


def encode_shard(
    vae: RQVAE, dataset: TokenDataset, shard: int, batch_size: int, progress: Progress
) -> np.ndarray:
    """Codes [n, S, D] of all samples of a token shard."""
    device = vae.encoder.absent_token.device
    samples = dataset.shard_range(shard)
    codes = []
    for start in range(samples.start, samples.stop, batch_size):
        batch = dataset.read(range(start, min(start + batch_size, samples.stop)))
        encoded = vae.encode(batch["input_ids"].to(device), document_ids=batch["document_ids"].to(device))
        codes.append(encoded.cpu().numpy())
        progress.update(len(encoded))
    return np.concatenate(codes)


if __name__ == "__main__":
    sys.exit(main())
