"""The DeepSpeed configuration, generated from the typed run configuration. Free of torch.

It is never written by hand, because DeepSpeed accepts misspelt top-level keys silently.
"""

from __future__ import annotations

from typing import Any, Literal

from launch.config import TrainConfig


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
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.zero_stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": train.param_persistence_threshold,
            # save_16bit_model would otherwise write nothing but placeholders.
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    for kind in ("optimizer", "param"):
        device = getattr(train, f"offload_{kind}")
        if device != "none":
            zero[f"offload_{kind}"] = {"device": device}
            if device == "nvme":
                zero[f"offload_{kind}"]["nvme_path"] = train.nvme_path
    config: dict[str, Any] = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.gradient_clipping,
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
        # The optimizer is torch's AdamW with our parameter groups, also with offloading.
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
    return config
