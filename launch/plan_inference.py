"""Decoding speed by `launch/speed_model.py`, for a machine that need not be there: `launch/plan.py --inference`."""

from __future__ import annotations

from typing import Any

from launch import speed_model
from launch.config import RunConfig
from launch.latent_model import latent_model_config
from launch.speed import PEAK_TFLOPS
from launch.speed_model import Machine, Race

H100 = Machine(bandwidth=3.35e12, matmul=1e12 * PEAK_TFLOPS["H100"], launch_s=2e-6)
"""From the data sheet (SXM, dense bf16), so the best that can be; the launch overhead is assumed, for CUDA graphs."""
BATCHES = (1, 4, 16, 64)
FACTORS = (4, 8, 16)


def predict(config: RunConfig, machine: Machine, width: int) -> list[dict[str, Any]]:
    """Rows for all K and batches: ms per token of each sequence, autoregressive, deferred and streaming.

    Args:
        config: its own K is among the rows; prompt and new tokens are those of its benchmark section.
        width: bytes of a weight.

    Raises:
        ValueError: the model is of a kind that the speed model does not know.
    """
    if config.codec.model == "anchor" or config.latent_model.model == "flat_transformer":
        raise ValueError(
            "--inference knows codec.model rqvae and identity, and latent_model.model rq_transformer"
        )
    rows = []
    factors = sorted({*FACTORS, config.codec.compression_factor})
    if config.codec.model == "identity":
        factors = [config.codec.compression_factor]
    for factor in factors:
        codec = config.codec.model_copy(update={"compression_factor": factor})
        model = latent_model_config(config.model_copy(update={"codec": codec}))
        for batch in BATCHES:
            race = Race(batch, config.benchmark.prompt_tokens, config.benchmark.new_tokens, width)
            ar = speed_model.autoregressive(codec.backbone.architecture, race).seconds(machine)
            parts = speed_model.latent(codec, model, race)
            deferred = sum(work.seconds(machine) for work in parts.values())
            streaming = sum(
                work.seconds(machine)
                for work in speed_model.latent(codec, model, race, streaming=True).values()
            )
            per_token = 1e3 / race.new
            rows.append(
                {
                    "compression_factor": factor,
                    "batch_size": batch,
                    "ar_ms": per_token * ar,
                    # What feeds decoded text back has no deferred mode.
                    "deferred_ms": None if model.reads_tokens else per_token * deferred,
                    "streaming_ms": per_token * streaming,
                    "split_ms": {part: per_token * work.seconds(machine) for part, work in parts.items()},
                }
            )
    return rows


def print_prediction(config: RunConfig, machine: Machine, width: int, rows: list[dict[str, Any]]) -> None:
    """The rows for a person, with what they rest on."""
    benchmark = config.benchmark
    print(
        f"{config.name}, decoding in {'bf16' if width == 2 else 'fp32'}, {benchmark.prompt_tokens} tokens of prompt, "
        f"{benchmark.new_tokens} new; D={config.codec.codebook_levels}, "
        f"spatial {config.latent_model.spatial_layers} x {config.latent_model.spatial_dim}, "
        f"depth {config.latent_model.depth_layers} x {config.latent_model.depth_dim}"
    )
    print(
        f"assumed: {machine.bandwidth / 1e9:,.0f} GB/s, {machine.matmul / 1e12:,.3g} TFLOP/s, "
        f"{1e6 * machine.launch_s:g} us per launch. A prediction, not a measurement\n"
    )
    print("ms per token of each sequence; speed-up over autoregressive decoding in brackets")
    print(f"{'K':>3}{'batch':>7}{'AR':>10}{'deferred':>20}{'streaming':>20}")
    for row in rows:
        shown = [
            "–" if ms is None else f"{ms:.3g} ({row['ar_ms'] / ms:.2f}x)"
            for ms in (row["deferred_ms"], row["streaming_ms"])
        ]
        print(
            f"{row['compression_factor']:3}{row['batch_size']:7}{row['ar_ms']:10.3g}{shown[0]:>20}{shown[1]:>20}"
        )
