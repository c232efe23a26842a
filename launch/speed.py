"""How fast training goes: tokens per second and model FLOPs utilisation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from launch import flops
from launch.config import RunConfig
from launch.latent_model import latent_model_config
from launch.task import Phase

# Dense bf16 TFLOP/s of one GPU, from the makers' data sheets; the first name that is part of the device's counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10": 125.0,
    "MI300X": 1307.0,
}


def peak_tflops(config: RunConfig, precision: str, device: torch.device) -> float | None:
    """Peak of one rank's device: `tracking.peak_tflops`, or the table's for bf16; None if neither knows."""
    if config.tracking.peak_tflops is not None or device.type != "cuda" or precision != "bf16":
        return config.tracking.peak_tflops
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def train_flops_per_token(config: RunConfig, phase: Phase) -> float:
    """Model FLOPs of training on one token, recomputed activations not counted (PaLM, appendix B)."""
    length = config.data.sample_length
    if config.stage == "base_lm":
        architecture = config.codec.backbone.architecture
        return 3 * (flops.backbone(architecture, length / 2) + flops.head(architecture))
    total = 0.0
    if config.stage in ("rqvae", "joint"):
        costs = flops.codec(config.codec, length)
        total += costs.train_frozen if phase.freezes_backbone else costs.train_full
    if config.stage in ("rq_transformer", "joint"):
        shape = latent_model_config(config)
        name = "FlatTransformer" if config.latent_model.model == "flat_transformer" else "RQTransformer"
        factor = shape.compression_factor
        total += 3 * flops.latent_model(name, shape, length / factor) / factor
    return total


class Speedometer:
    """Speed of a stage on all ranks together.

    Attributes:
        note: why there is no utilisation, or None.
    """

    def __init__(self, config: RunConfig, precision: str, device: torch.device, world_size: int):
        self._config, self._world_size = config, world_size
        self._peak = peak_tflops(config, precision, device)
        self.note = None
        if self._peak is None:
            self.note = (
                f"model_flops_utilisation is not logged: the peak of this device in {precision} is not known here; "
                "tracking.peak_tflops sets it"
            )

    def metrics(
        self, phase: Phase, sums: Mapping[str, Tensor], times: Mapping[str, float]
    ) -> dict[str, float]:
        """Of one window, from its joint sums and this rank's times."""
        tokens_per_s = float(sums["tokens"]) / times["window_s"]
        metrics = {
            "tokens_per_s": tokens_per_s,
            "data_wait_share": times.get("data_wait_s", 0.0) / times["window_s"],
        }
        if self._peak is not None:
            reached = train_flops_per_token(self._config, phase) * tokens_per_s
            metrics["model_flops_utilisation"] = reached / (self._peak * 1e12 * self._world_size)
        return metrics
