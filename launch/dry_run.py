"""What a training command would do, without doing it. Free of torch."""

from __future__ import annotations

import json

from launch.config import RunConfig, check_world_size
from launch.deepspeed_config import deepspeed_config
from launch.latent_model import describe_match


def batch_arithmetic(config: RunConfig, world_size: int) -> str:
    """How the global batch of `config.train` comes about, and what it amounts to."""
    train, accumulation = config.train, check_world_size(config, world_size)
    tokens = train.global_batch_size * config.data.sample_length
    return (
        f"{train.micro_batch_size} samples x {accumulation} passes x {world_size} ranks = "
        f"{train.global_batch_size} samples = {tokens:,} tokens per step; {train.steps:,} steps = "
        f"{tokens * train.steps:,} tokens"
    )


def dry_run(config: RunConfig, world_size: int) -> int:
    """Print what would run: resolved configuration, DeepSpeed dictionary, batch arithmetic."""
    batch = batch_arithmetic(config, world_size)
    train = config.train
    precision = "bf16 or fp32, by hardware" if train.precision == "auto" else train.precision
    engine = deepspeed_config(train, "fp32" if train.precision == "fp32" else "bf16", world_size)
    print(config.to_yaml())
    print("# DeepSpeed\n" + json.dumps(engine, indent=2))
    print(f"\n# Batch\n{batch}; precision {precision}")
    if config.stage == "rq_transformer" and (match := describe_match(config)) is not None:
        print(f"\n# Latent model\n{match}")
    return 0
