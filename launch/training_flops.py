"""What training a stage costs, from its configuration. Free of torch."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.manifest import load_manifest
from launch import flops
from launch.config import RunConfig
from launch.latent_model import latent_model_config

ENCODED_SPLITS = ("train", "validation")


def tokens_to_encode(config: RunConfig) -> int:
    """Tokens of the splits that launch/precompute_codes.py encodes, padding included.

    Raises:
        NotADatasetError: the token shards are not built yet.
    """
    sources = [source.directory for source in config.data.mixture] or [config.data.directory]
    splits = [load_manifest(Path(directory)).splits for directory in sources]
    return sum(found[split].tokens for found in splits for split in ENCODED_SPLITS)


def stage_flops(stage: str, config: RunConfig, steps: int) -> float:
    """Training FLOPs of the first `steps` steps of a stage; `config.train` is that of the stage."""
    return _flops_per_token(stage, config, steps) * config.train.global_batch_size * config.data.sample_length


def encoding_flops(config: RunConfig, tokens: int) -> float:
    """FLOPs of encoding `tokens` tokens into codes."""
    return flops.codec(config.codec, config.data.sample_length).encode * tokens


def _flops_per_token(stage: str, config: RunConfig, steps: int) -> float:
    """Training FLOPs of all steps, per token of a step."""
    length, factor = config.data.sample_length, config.codec.compression_factor
    if stage == "base_lm":
        architecture = config.codec.backbone.architecture
        return 3 * steps * (flops.backbone(architecture, length / 2) + flops.head(architecture))
    total = 0.0
    if stage in ("rqvae", "joint"):
        codec = flops.codec(config.codec, length)
        frozen = min(steps, config.train.frozen_steps)
        total += frozen * codec.train_frozen + (steps - frozen) * codec.train_full
    if stage in ("rq_transformer", "joint"):
        name = "RQTransformer" if config.latent_model.model == "rq_transformer" else "FlatTransformer"
        forward = flops.latent_model(name, latent_model_config(config), length / factor)
        total += 3 * steps * forward / factor
    return total
