"""The DeepSpeed configuration, generated from the typed run configuration. Free of torch.

It is never written by hand, because DeepSpeed accepts misspelt top-level keys silently.
"""

from __future__ import annotations

from typing import Any, Literal

from data_pipeline.yaml_config import merge
from launch.config import TrainConfig

_STAGE_3_NAMES = ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")


def deepspeed_config(
    train: TrainConfig, precision: Literal["bf16", "fp32"], world_size: int
) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize(config=...)`, to be used with a client optimizer.

    Args:
        train: settings of the stage.
        precision: arithmetic, with `auto` already resolved.
        world_size: number of ranks; must divide the batch (`launch.config.check_world_size`).

    Raises:
        ValueError: the batch does not divide, or bf16 would be trained without fp32 master weights.
    """
    accumulation, rest = divmod(train.global_batch_size, train.micro_batch_size * world_size)
    if rest:
        raise ValueError(
            f"global_batch_size {train.global_batch_size} is not a multiple of micro_batch_size "
            f"{train.micro_batch_size} x {world_size} ranks"
        )
    if precision == "bf16" and train.zero_stage == 0:
        raise ValueError(
            "zero_stage 0 keeps no fp32 master weights with bf16; use zero_stage 1 or more, or precision fp32"
        )
    config: dict[str, Any] = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.gradient_clipping,
        "zero_optimization": _zero_optimization(train),
        "bf16": {"enabled": precision == "bf16"},
        # The optimizer is ours, with our parameter groups, also with offloading.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Logging is ours.
        "wall_clock_breakdown": False,
        "steps_per_print": 1_000_000_000,
    }
    if precision == "bf16":
        config["data_types"] = {
            # Every float buffer: codebooks (EMA counts, sums) and rotary frequencies lose too much in bf16.
            "keep_in_fp32_modules": ["*"],
            "grad_accum_dtype": "fp32",
        }
    return merge(config, train.deepspeed)


def _zero_optimization(train: TrainConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.zero_stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": train.param_persistence_threshold,
            # save_16bit_model would otherwise write nothing but placeholders.
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    if train.zero_hpz_partition_size > 1:
        zero["zero_hpz_partition_size"] = train.zero_hpz_partition_size
    zero |= {
        name: True for name in ("zero_quantized_weights", "zero_quantized_gradients") if getattr(train, name)
    }
    if train.optimizer == "muon":
        zero["reduce_scatter"] = False  # orthogonalisation needs whole gradients
    for name, value in train.communication.model_dump(exclude_none=True).items():
        zero[f"stage3_{name}" if name in _STAGE_3_NAMES else name] = value
    for kind in ("optimizer", "param"):
        device = getattr(train, f"offload_{kind}")
        if device != "none":
            offload = {"device": device, "pin_memory": train.offload_pin_memory}
            if device == "nvme":
                offload["nvme_path"] = train.nvme_path
            zero[f"offload_{kind}"] = offload
    return zero
