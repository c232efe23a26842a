from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from launch.config import STAGES, TrainConfig, load_config
from launch.deepspeed_config import deepspeed_config

CONFIGS = Path(__file__).parents[3] / "configs"
RUNNABLE = sorted(path for path in CONFIGS.glob("*.yaml"))


def parsed(train: TrainConfig, precision: Literal["bf16", "fp32"], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What DeepSpeed itself makes of the dictionary on one rank."""
    from deepspeed.runtime.config import DeepSpeedConfig

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return DeepSpeedConfig(deepspeed_config(train, precision, world_size=1))


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_deepspeed_accepts_the_dict_of_every_shipped_config(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in STAGES:
        train = load_config(path, stage=stage).train
        for precision in ("bf16", "fp32"):
            result = parsed(train, precision, monkeypatch)
            assert result.train_batch_size == train.global_batch_size
            assert result.gradient_clipping == train.gradient_clipping


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 0},
        {"zero_stage": 1},
        {"zero_stage": 1, "offload_optimizer": "cpu"},
        {"zero_stage": 2, "offload_optimizer": "cpu"},
        {"zero_stage": 3, "param_persistence_threshold": 0},
        {"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
        {"zero_stage": 3, "offload_optimizer": "nvme", "offload_param": "nvme", "nvme_path": "/local"},
    ],
    ids=str,
)
def test_every_option_reaches_deepspeed(
    settings: dict[str, Any], precision: Literal["bf16", "fp32"], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = TrainConfig(global_batch_size=8, micro_batch_size=2, **settings)
    if precision == "bf16" and train.zero_stage == 0:
        with pytest.raises(ValueError, match="master weights"):
            deepspeed_config(train, precision, 1)
        return
    result = parsed(train, precision, monkeypatch)
    zero = result.zero_config
    assert zero.stage == train.zero_stage
    assert result.bfloat16_config.enabled == (precision == "bf16")
    assert result.gradient_accumulation_steps == 4
    assert result.zero_allow_untested_optimizer
    assert not result.zero_force_ds_cpu_optimizer
    assert not result.wall_clock_breakdown
    if train.zero_stage == 3:
        assert zero.param_persistence_threshold == train.param_persistence_threshold
        assert zero.gather_16bit_weights_on_model_save
    for kind in ("optimizer", "param"):
        device, wanted = getattr(zero, f"offload_{kind}"), getattr(train, f"offload_{kind}")
        assert ("none" if device is None else device.device) == wanted
    if precision == "bf16":
        assert result.keep_in_fp32_modules == ["*"]
        assert result.grad_accum_dtype == "fp32"


def test_every_top_level_key_is_one_that_deepspeed_reads() -> None:
    """DeepSpeed accepts misspelt top-level keys silently, so they are compared with its own names."""
    import deepspeed.runtime.constants as constants
    import deepspeed.runtime.zero.config as zero

    known = {value for value in vars(constants).values() if isinstance(value, str)}
    known |= {zero.ZERO_OPTIMIZATION, "bf16"}
    assert set(deepspeed_config(TrainConfig(), "bf16", 1)) <= known


def test_world_size_must_divide_the_batch() -> None:
    with pytest.raises(ValueError, match="3 ranks"):
        deepspeed_config(TrainConfig(global_batch_size=8, micro_batch_size=1), "fp32", 3)
    assert deepspeed_config(TrainConfig(global_batch_size=8), "fp32", 4)["gradient_accumulation_steps"] == 2
