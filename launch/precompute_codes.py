"""Encode token shards into code shards, for training the latent model.

    python launch/precompute_codes.py --config configs/tiny.yaml --checkpoint runs/tiny/model/rqvae \\
        --task-index 0 --num-tasks 1

With `codec.model: identity` there is no checkpoint to give: the codec is made here. `--latents` keeps what the codes
were chosen for too, from which `stochastic_codes` draws in training.

Task i of n takes every n-th shard; finished shards are skipped, so a killed task is simply started again. The
task that finds all shards done completes the directory. Of a mixture (`data.mixture`) the sources are encoded one
after the other, each into a directory of its own.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_pipeline import TokenDataset, code_shard_is_done, finish_codes, write_code_shard
from data_pipeline.code_manifest import Precision
from data_pipeline.errors import MissingShardError
from data_pipeline.files import save_once
from data_pipeline.progress import Progress
from launch.compatibility import check_vocabulary
from launch.config import RunConfig, load_config
from launch.layout import check_layout
from launch.paths import TRAINING_SPLITS, codes_directory, model_directory, source_directories
from launch.precision import add_precision, placed
from rqvae import RQVAE, IdentityCodec, ResidualQuantizer, load_codec
from rqvae.codec import Codec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--checkpoint", type=Path, help="model directory of the codec")
    parser.add_argument("--latents", action="store_true", help="keep the latents beside the codes, in fp16")
    add_precision(parser)
    parser.add_argument("--task-index", type=int, default=0)
    parser.add_argument("--num-tasks", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16, help="samples per forward pass")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    args = parser.parse_args(arguments)
    try:
        if not 0 <= args.task_index < args.num_tasks:
            raise ValueError(f"--task-index {args.task_index} is not below --num-tasks {args.num_tasks}")
        config = load_config(args.config, overrides=args.overrides)
        codec = codec_of(config, args.checkpoint)
        job = EncodingJob(args.latents, args.precision, args.task_index, args.num_tasks, args.batch_size)
        encode(config, codec, job)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def codec_of(config: RunConfig, checkpoint: Path | None) -> Codec:
    """The codec to encode with.

    Raises:
        ValueError: none is given, or it is not of the configuration's kind.
    """
    if config.codec.model == "identity":
        if checkpoint is not None:
            raise ValueError("--checkpoint: the identity codec has none; leave it out")
        codec, directory = IdentityCodec(config.codec), model_directory(config) / "rqvae"
        if not (directory / "config.json").is_file():
            save_once(codec.save_pretrained, directory)
        if load_codec(directory).codec_hash() != codec.codec_hash():
            raise ValueError(
                f"'{directory}' holds another codec; give this project a name of its own (name=...)"
            )
        return codec
    if checkpoint is None:
        raise ValueError("--checkpoint: the model directory of the codec is needed")
    return load_codec(checkpoint)


@dataclass(frozen=True)
class EncodingJob:
    """How to encode, and which part of the shards."""

    with_latents: bool
    precision: Precision
    task_index: int
    num_tasks: int
    batch_size: int
    """Samples per forward pass."""


def encode(config: RunConfig, codec: Codec, job: EncodingJob) -> None:
    """Write this task's code shards, and the manifest when none is missing any more.

    Raises:
        ValueError: latents are asked for of a codec that has none.
    """
    codec_hash = codec.codec_hash()
    if job.with_latents:
        if not isinstance(codec, RQVAE):
            raise ValueError(
                f"--latents: the {config.codec.model} codec has no latents, and nothing to draw from"
            )
        keep_quantizer(codec, codec_hash, codes_directory(config) / "quantizer")
    placed(codec, DEVICE, job.precision)
    for tokens, _ in source_directories(config).values():
        for split in TRAINING_SPLITS:  # all, before any is encoded: an empty one would fail after the others
            dataset = TokenDataset(tokens, split)
            check_layout(dataset, tokens, config)
            check_vocabulary(dataset, codec.config.backbone.architecture)
    for tokens, output in source_directories(config).values():
        encode_source(tokens, output, codec, codec_hash, job)


def encode_source(tokens: Path, output: Path, codec: Codec, codec_hash: str, job: EncodingJob) -> None:
    """`encode` for one directory of token shards."""
    for split in TRAINING_SPLITS:
        dataset = TokenDataset(tokens, split)
        shards = range(job.task_index, len(dataset.shards), job.num_tasks)
        total = sum(len(dataset.shard_range(shard)) for shard in shards)
        progress = Progress(total, f"encode {split}", unit="samples")
        for shard in shards:
            if code_shard_is_done(
                output,
                split,
                shard,
                token_fingerprint=dataset.fingerprint,
                codec_hash=codec_hash,
                with_latents=job.with_latents,
                precision=job.precision,
            ):
                progress.update(len(dataset.shard_range(shard)))
                continue
            codes, latents = encode_shard(codec, dataset, shard, job, progress)
            write_code_shard(
                output,
                split,
                shard,
                codes,
                token_dataset=dataset,
                codec_hash=codec_hash,
                compression_factor=codec.config.compression_factor,
                codebook_sizes=codec.config.codebook_sizes,
                latents=latents,
                precision=job.precision,
            )
        progress.close()
    try:
        finish_codes(
            output,
            tokens,
            codec_hash=codec_hash,
            splits=TRAINING_SPLITS,
            with_latents=job.with_latents,
            precision=job.precision,
        )
    except MissingShardError:
        print(
            f"Task {job.task_index} of {job.num_tasks} is done; the codes in {output} are complete when all tasks "
            "are."
        )
    else:
        print(f"Codes: {output}\nNext: deepspeed launch/train.py --config CONFIG --stage rq_transformer")


def keep_quantizer(codec: RQVAE, codec_hash: str, directory: Path) -> None:
    """What stochastic codes are drawn with, beside the codes. Whichever task comes first writes it.

    Raises:
        ValueError: there is another codec's.
    """
    if not (directory / "config.json").is_file():
        save_once(lambda place: codec.quantizer.save_pretrained(place, codec_hash), directory)
    if ResidualQuantizer.from_pretrained(directory).codec_hash != codec_hash:
        raise ValueError(
            f"'{directory.parent}' holds the codes of another codec; encode into another project (name=...)"
        )


def encode_shard(
    codec: Codec, dataset: TokenDataset, shard: int, job: EncodingJob, progress: Progress
) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes [n, S, D] of all samples of a token shard, and their latents [n, S, E] if asked for."""
    samples = dataset.shard_range(shard)
    codes, latents = [], []
    for start in range(samples.start, samples.stop, job.batch_size):
        batch = dataset.read(range(start, min(start + job.batch_size, samples.stop)))
        ids, documents = batch["input_ids"].to(DEVICE), batch["document_ids"].to(DEVICE)
        if job.with_latents:
            assert isinstance(codec, RQVAE)
            with torch.inference_mode():
                vectors = codec.quantizer.bound(codec.encoder(ids, documents))
                encoded = codec.quantizer(vectors, documents.new_ones(vectors.shape[:2]) > 0).codes
            latents.append(vectors.float().cpu().numpy())
        else:
            encoded = codec.encode(ids, document_ids=documents)
        codes.append(encoded.cpu().numpy())
        progress.update(len(encoded))
    return np.concatenate(codes), np.concatenate(latents) if job.with_latents else None


if __name__ == "__main__":
    sys.exit(main())
