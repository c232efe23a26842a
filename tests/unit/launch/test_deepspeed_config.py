from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from launch.config import STAGES, TrainConfig, load_config
from launch.deepspeed_config import deepspeed_config
from launch.engine_config import AIO_KEYS, PASSED_ON, mistakes_of_engine

CONFIGS = Path(__file__).parents[3] / "configs"
RUNNABLE = sorted(path for path in CONFIGS.glob("*.yaml"))
# Stages that leave nothing to train, or nothing to learn, in such a codec.
REFUSED = {"anchor": ("joint",), "identity": ("rqvae", "joint")}


def parsed(train: TrainConfig, precision: Literal["bf16", "fp32"], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What DeepSpeed itself makes of the dictionary on one rank."""
    from deepspeed.runtime.config import DeepSpeedConfig

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return DeepSpeedConfig(deepspeed_config(train, precision, world_size=1))


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.stem)
def test_deepspeed_accepts_the_dict_of_every_shipped_config(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_config(path).codec.model
    for stage in STAGES:
        if stage in REFUSED.get(model, ()):
            continue
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
        {"zero_hpz_partition_size": 8, "zero_quantized_weights": True, "zero_quantized_gradients": True},
        {"optimizer": "muon", "gradient_clipping": 0.0},
        {"communication": {"overlap_comm": False, "reduce_bucket_size": 7, "prefetch_bucket_size": 5}},
        {"communication": {"max_live_parameters": 3, "max_reuse_distance": 2}},
        {"zero_stage": 2, "communication": {"allgather_bucket_size": 9}},
        {"deepspeed": {"zero_optimization": {"sub_group_size": 11}, "comms_logger": {"enabled": True}}},
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
        assert device is None or device.pin_memory
    for name in ("zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients"):
        assert getattr(zero, name) == getattr(train, name)
    assert zero.reduce_scatter == (train.optimizer == "adamw")
    for name, value in train.communication.model_dump(exclude_none=True).items():
        assert getattr(zero, name) == value
    if train.deepspeed:
        assert zero.sub_group_size == 11
        assert result.comms_config.comms_logger.enabled
    if precision == "bf16":
        assert result.keep_in_fp32_modules == ["*"]
        assert result.grad_accum_dtype == "fp32"


class Recorder(dict[str, Any]):
    """A dictionary that knows what it was asked for."""

    def __init__(self, values: dict[str, Any]):
        super().__init__(values)
        self.asked: set[Any] = set()

    def __copy__(self) -> Recorder:
        return self

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        self.asked.add(key)
        return super().__contains__(key)


def test_every_name_at_the_top_level_is_one_that_deepspeed_reads() -> None:
    """DeepSpeed accepts misspelt top-level keys silently, so they are compared with what it asks for."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.swap_tensor import constants as aio

    given = Recorder(deepspeed_config(TrainConfig(), "bf16", 1))
    DeepSpeedConfig(given)
    assert set(given) <= given.asked
    assert set(PASSED_ON) - {"aio"} <= given.asked  # which is looked for by its constant
    assert aio.AIO == "aio"
    assert set(AIO_KEYS) <= {value for value in vars(aio).values() if isinstance(value, str)}


@pytest.mark.parametrize(
    ("passed", "complaint"),
    [
        ({"zero_optimisation": {}}, "did you mean train.deepspeed.zero_optimization?"),
        ({"train_batch_size": 4}, "set by train.global_batch_size"),
        ({"zero_optimization": {"stage": 1}}, "set by train.zero_stage"),
        ({"zero_optimization": {"overlap_comm": True}}, "set by train.communication.overlap_comm"),
        ({"aio": {"block_sise": 1}}, "train.deepspeed.aio.block_sise: unknown"),
        (
            {"compile": {"deepcompile": True}},
            "train.deepspeed.compile.deepcompile: has no effect without torch",
        ),
    ],
    ids=str,
)
def test_what_is_passed_on_is_checked(passed: dict[str, Any], complaint: str) -> None:
    (found,) = mistakes_of_engine(TrainConfig(deepspeed=passed), lambda name: f"train.{name}")
    assert complaint in found


def test_zero_3_is_compiled_by_deepspeed_only() -> None:
    def mistakes(**settings: Any) -> list[str]:
        train = TrainConfig(torch_compile=True, **settings)
        return list(mistakes_of_engine(train, lambda name: f"train.{name}"))

    (found,) = mistakes()
    assert "train.torch_compile: not with zero_stage 3" in found
    assert mistakes(zero_stage=1) == []
    assert mistakes(deepspeed={"compile": {"deepcompile": True}}) == []


def test_deepspeed_checks_what_stands_below() -> None:
    from launch.engine import check_deepspeed_config

    train = TrainConfig(deepspeed={"zero_optimization": {"sub_group_sise": 1}})
    assert not list(mistakes_of_engine(train, str))
    with pytest.raises(ValueError, match="sub_group_sise"):
        check_deepspeed_config(deepspeed_config(train, "fp32", 1))


def test_a_stage_adds_to_a_section_and_an_override_wins(tmp_path: Path) -> None:
    path = tmp_path / "child.yaml"
    path.write_text(
        f"extends: {CONFIGS / 'tiny_rqvae.yaml'}\n"
        "train: {communication: {reduce_bucket_size: 5, overlap_comm: true}}\n"
        "stages: {rqvae: {communication: {reduce_bucket_size: 7}}}\n"
    )
    communication = load_config(path, stage="rqvae").train.communication
    assert (communication.reduce_bucket_size, communication.overlap_comm) == (7, True)
    given = ["train.communication.reduce_bucket_size=9"]
    assert load_config(path, stage="rqvae", overrides=given).train.communication.reduce_bucket_size == 9


def test_world_size_must_divide_the_batch() -> None:
    with pytest.raises(ValueError, match="3 ranks"):
        deepspeed_config(TrainConfig(global_batch_size=8, micro_batch_size=1), "fp32", 3)
    assert deepspeed_config(TrainConfig(global_batch_size=8), "fp32", 4)["gradient_accumulation_steps"] == 2
