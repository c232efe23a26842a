"""The speed model: its sums by hand, and the launches that it counts against those that there are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache

from launch import plan, speed_model
from launch.config import load_config
from launch.latent_model import latent_model_config
from launch.plan_inference import H100, predict
from launch.speed_model import Machine, Race, Work
from rqvae.backbone import huggingface_config
from rqvae.config import ArchitectureConfig, CodecBackboneConfig, RQTransformerConfig, RQVAEConfig
from rqvae.layers import TransformerBlock

CONFIGS = Path(__file__).parents[3] / "configs"
BACKBONE = ArchitectureConfig(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=2,
)
# queries and output 4 x 4 each, keys and values 4 x 2 each, three matrices of 4 x 8; two layers
WEIGHTS = 2 * (2 * 16 + 2 * 8 + 3 * 32)
CODEC = RQVAEConfig(
    backbone=CodecBackboneConfig(architecture=BACKBONE),
    compression_factor=4,
    codebook_levels=2,
    codebook_size=16,
    codebook_dim=4,
    latent_dim=4,
    latent_head_dim=4,
    num_latent_layers=0,
)
MODEL = RQTransformerConfig(
    compression_factor=4,
    codebook_levels=2,
    codebook_size=16,
    spatial_dim=4,
    spatial_layers=1,
    depth_dim=4,
    depth_layers=1,
    head_dim=4,
    mlp_ratio=16,
)
BYTES = Machine(bandwidth=1.0, matmul=float("inf"), launch_s=0.0)
FLOPS = Machine(bandwidth=float("inf"), matmul=1.0, launch_s=0.0)
LAUNCHES = Machine(bandwidth=float("inf"), matmul=float("inf"), launch_s=1.0)


def test_work_takes_the_sum_of_its_three_parts() -> None:
    assert Work(bytes=6, flops=8, launches=10).seconds(Machine(2, 4, 0.5)) == 3 + 2 + 5
    assert Work(1, 2, 3) + Work(4, 5, 6) * 2 == Work(9, 12, 15)


def test_a_pass_by_hand() -> None:
    race = Race(batch=3, prompt=8, new=8, width=2)
    work = speed_model.backbone_pass(BACKBONE, race, positions=5, context=7)
    cached = 3 * 7 * 2 * 2 * 2  # rows, positions, keys and values, layers, width
    assert work.bytes == 2 * (WEIGHTS + cached)
    assert work.flops == 3 * 5 * (2 * WEIGHTS + 2 * 4 * 7 * 4)
    assert work.launches == 2 * (speed_model.BACKBONE_LAUNCHES + speed_model.CONVERSION_LAUNCHES)
    head = speed_model.head_pass(BACKBONE, race, positions=5)
    assert head.bytes == 2 * (10 * 4 + 2 * 10 * 15)
    assert head.flops == 15 * 2 * 4 * 10


def test_autoregressive_decoding_reads_the_weights_once_per_token() -> None:
    race = Race(batch=1, prompt=2, new=6, width=2)
    cached = 2 * (2 / 2 + 5 * (2 + 6 / 2)) * 2 * 2 * 2
    logits = 6 * 2 * (10 * 4 + 2 * 10)
    assert speed_model.autoregressive(BACKBONE, race).seconds(BYTES) == 6 * 2 * WEIGHTS + cached + logits


def test_deferred_decoding_reads_the_decoder_once_and_streaming_once_per_latent() -> None:
    race = Race(batch=1, prompt=8, new=32, width=2)
    deferred, streaming = (speed_model.latent(CODEC, MODEL, race, mode)["decode"] for mode in (False, True))
    upsampling, head = 4 * 4 * 4, 10 * 4
    assert deferred.bytes == 2 * (WEIGHTS + 20 * 2 * 2 * 2 + upsampling + head + 2 * 10 * 32)
    # 8 latents: 7 more passes, and what they read of the cache.
    caches = 6 + 7 * (8 + 16) - 20
    assert streaming.bytes - deferred.bytes == 2 * (7 * (WEIGHTS + upsampling + head) + caches * 8)
    assert streaming.launches == 8 * deferred.launches


def test_the_parts_of_latent_decoding_by_hand() -> None:
    race = Race(batch=1, prompt=8, new=32, width=2)
    parts = speed_model.latent(CODEC, MODEL, race)
    assert list(parts) == ["encode", "spatial", "depth", "decode"]
    layer = 4 * 16 + 3 * 4 * 64
    # 8 latents of 2 levels: a layer, a head of 16 codes and its logits, on average one position seen.
    assert parts["depth"].bytes == 16 * 2 * (layer + 2 * 4 + 16 * (4 + 2))
    # The prompt at once, then 7 steps.
    assert parts["spatial"].bytes == 2 * (8 * layer + (1 + 7 * (2 + 4)) * 2 * 4)
    assert parts["depth"].launches == 16 * (speed_model.BLOCK_LAUNCHES + speed_model.LEVEL_LAUNCHES)
    compiled = speed_model.latent(CODEC, MODEL, race, compiled=True)["depth"]
    assert compiled == replace(parts["depth"], launches=16 * (1 + speed_model.LEVEL_LAUNCHES))
    identity = RQVAEConfig(model="identity", backbone=CODEC.backbone)
    tokens = MODEL.model_copy(update={"codebook_levels": 4, "codebook_size": 11})
    bare = speed_model.latent(identity, tokens, race)
    assert bare["encode"] == bare["decode"] == Work()
    assert bare["depth"].launches == 2 * parts["depth"].launches


def test_more_rows_cost_flops_and_no_weights() -> None:
    one, many = (
        speed_model.autoregressive(BACKBONE, Race(batch, prompt=2, new=6, width=2)) for batch in (1, 16)
    )
    assert many.flops == 16 * one.flops
    assert many.launches == one.launches
    assert many.bytes < 16 * one.bytes


class _Kernels(TorchDispatchMode):
    """Counts operations but for views, as inference mode shows them: composite ones whole. `to` is none where it has
    nothing to convert."""

    VIEWS = ("view", "transpose", "t", "expand", "slice", "select", "unsqueeze", "squeeze", "permute", "unbind",
             "split", "chunk", "alias", "detach", "reshape")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, result = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        self.count += name not in self.VIEWS and (name != "to" or result is not args[0])
        return result


def launches(step: Callable[[], object]) -> int:
    with _Kernels() as kernels:
        step()
    return kernels.count


@torch.inference_mode()
def test_launches_by_layer() -> None:
    def of_block(layers: int, theta: float | None) -> int:
        block = TransformerBlock(16, layers, 16, 2, rope_theta=theta).eval()
        x, position = torch.zeros(1, 1, 16), torch.zeros(1, 1, dtype=torch.long)
        cache = block.new_cache(1, 8, x)
        block(x, position, None, cache)
        return launches(lambda: block(x, position, None, cache))

    def of_backbone(layers: int, dtype: torch.dtype) -> int:
        config = huggingface_config(BACKBONE.model_copy(update={"num_hidden_layers": layers}))
        lm: Any = AutoModelForCausalLM.from_config(config).to(dtype).eval()
        cache, ids = DynamicCache(config=lm.config), torch.zeros(1, 1, dtype=torch.long)
        lm(ids, past_key_values=cache)
        return launches(lambda: lm(ids, past_key_values=cache))

    block = of_block(3, None) - of_block(2, None)
    assert block == speed_model.BLOCK_LAUNCHES
    assert of_block(3, 1e4) - of_block(2, 1e4) - block == speed_model.ROTARY_LAUNCHES
    full, half = (of_backbone(3, dtype) - of_backbone(2, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert full == speed_model.BACKBONE_LAUNCHES
    assert half - full == speed_model.CONVERSION_LAUNCHES


def test_this_machine_can_be_measured() -> None:
    machine = speed_model.measure_machine(torch.float32, torch.device("cpu"))
    assert machine.bandwidth > 1e7
    assert machine.matmul > 1e7
    assert 0 < machine.launch_s < 0.1


def test_a_mean_machine_takes_the_mean_of_the_times() -> None:
    first, second = speed_model.Machine(1e9, 4e9, 1e-6), speed_model.Machine(3e9, 4e9, 3e-6)
    work = speed_model.Work(bytes=6e9, flops=2e9, launches=5e5)
    taken = work.seconds(speed_model.mean_machine([first, second]))
    assert taken == pytest.approx((work.seconds(first) + work.seconds(second)) / 2)


def test_the_plan_predicts_for_a_machine_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = CONFIGS / "benchmarks" / "qwen3_8b.yaml"
    arguments = ["--config", str(file), "--inference", "--json", str(tmp_path / "plan.json")]
    assert plan.main(arguments) == 0
    assert "assumed: 3,350 GB/s, 989 TFLOP/s" in capsys.readouterr().out
    rows = json.loads((tmp_path / "plan.json").read_text())["rows"]
    assert {row["compression_factor"] for row in rows} == {4, 8, 16}
    one = next(row for row in rows if (row["compression_factor"], row["batch_size"]) == (4, 1))
    # 7.57 billion weights that every token reads, in bf16 at 3.35 TB/s, and 36 layers of launches.
    assert one["ar_ms"] == pytest.approx(1e3 * 2 * 7.57e9 / 3.35e12 + 0.002 * 36 * 56, rel=0.02)
    assert one["deferred_ms"] == pytest.approx(sum(one["split_ms"].values()))
    assert one["deferred_ms"] < one["streaming_ms"] < one["ar_ms"]
    slow = [*arguments[:-2], "--bandwidth-gb-s", "10"]
    assert plan.main(slow) == 0
    assert "assumed: 10 GB/s" in capsys.readouterr().out
    assert plan.main([*arguments, "--matmul-tflops", "0"]) == 2
    assert "--matmul-tflops: 0 is no rate" in capsys.readouterr().err
    assert plan.main(["--config", str(file)]) == 2
    assert "--gpus N for training, or --inference" in capsys.readouterr().err


def test_what_the_speed_model_does_not_know_is_refused() -> None:
    config = load_config(CONFIGS / "tiny_rqvae.yaml", overrides=["latent_model.model=flat_transformer"])
    with pytest.raises(ValueError, match="rq_transformer"):
        predict(config, H100, 2)
    assert latent_model_config(config).codebook_levels == 8
