"""Training throughput of the RQ-transformer beside the flat transformer, at equal parameters.

Over T tokens and D codes per latent position, with the training FLOPs expected of each: attention costs
O(S^2 + S D^2) against O((S D)^2), S = T / K (Lee 2022, section 3.2). The flat model has the same width and as many
layers as bring it nearest to the RQ-transformer's parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from launch import flops
from launch.environment import describe_environment
from launch.measurement import time_rows
from rqvae import RQTransformer
from rqvae.config import RQTransformerConfig
from rqvae.flat_transformer import FlatTransformer

RQ, FLAT = "RQTransformer", "FlatTransformer"


class Grid(NamedTuple):
    """What is measured."""

    tokens: tuple[int, ...] = (256, 512, 1024)
    levels: tuple[int, ...] = (2, 4, 8)
    width: int = 128
    layers: int = 4
    codebook_size: int = 512


def benchmark_latent(grid: Grid | None = None, repeats: int = 3) -> dict[str, Any]:
    """Codes per second of a forward and backward pass of both models at every point of the grid."""
    grid = grid or Grid()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    points = []
    for levels in grid.levels:
        for tokens in grid.tokens:
            config = RQTransformerConfig(
                spatial_dim=grid.width,
                spatial_layers=grid.layers,
                depth_dim=grid.width,
                depth_layers=max(1, grid.layers // 2),
                head_dim=min(64, grid.width),
                compression_factor=4,
                codebook_levels=levels,
                codebook_size=grid.codebook_size,
            )
            points.append(_point(config, tokens, repeats, device))
    return {
        "points": points,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "environment": describe_environment(),
    }


def _point(config: RQTransformerConfig, tokens: int, repeats: int, device: torch.device) -> dict[str, Any]:
    positions = tokens // config.compression_factor
    models: dict[str, nn.Module] = {RQ: RQTransformer(config), FLAT: flat_of_equal_size(config)}
    rows = time_rows(
        {name: _training_pass(model.to(device).train(), config, positions) for name, model in models.items()},
        repeats,
        device,
    )
    latent = flops.rq_transformer(config, positions)
    per_position = {
        RQ: latent.spatial + latent.depth,
        FLAT: flops.flat_transformer(models[FLAT].config, positions),  # type: ignore[arg-type]
    }
    codes = positions * config.codebook_levels
    for row in rows:
        name = row["name"]
        row["parameters"] = sum(parameter.numel() for parameter in models[name].parameters())
        row["codes_per_s"] = 1e3 * codes / row["median_ms"]
        row["training_flops_per_code"] = 3 * per_position[name] / config.codebook_levels
    return {
        "tokens": tokens,
        "levels": config.codebook_levels,
        "rows": rows,
        "speedup": rows[0]["codes_per_s"] / rows[1]["codes_per_s"],
        "flops_ratio": per_position[FLAT] / per_position[RQ],
    }


def flat_of_equal_size(config: RQTransformerConfig) -> FlatTransformer:
    """The flat transformer of the same width whose parameters come nearest to the RQ-transformer's."""
    # Parameters do not depend on the length.
    match = flops.match_flat_transformer(config, num_latents=1, by="parameters")
    return FlatTransformer(config.model_copy(update={"spatial_layers": match.layers}))


def _training_pass(model: nn.Module, config: RQTransformerConfig, positions: int) -> Callable[[], Any]:
    device = next(model.parameters()).device
    sizes = torch.tensor(config.codebook_sizes, device=device)
    codes = (torch.rand(1, positions, len(sizes), device=device) * sizes).long()

    def step() -> None:
        model.zero_grad()
        model(codes).loss.backward()

    return step


def print_latent(result: dict[str, Any]) -> None:
    """The result for a person."""
    print(
        f"{'T':>6}{'D':>4}  {'model':18}{'parameters':>12}{'codes/s':>10}{'MFLOP/code':>12}{'speed-up':>10}"
    )
    for point in result["points"]:
        for row in point["rows"]:
            ratio = f"{point['speedup']:9.2f}x" if row["name"] == RQ else ""
            print(
                f"{point['tokens']:6}{point['levels']:4}  {row['name']:18}{row['parameters']:12,}"
                f"{row['codes_per_s']:10.0f}{row['training_flops_per_code'] / 1e6:12.2f}{ratio}"
            )
    print(f"{result['repeats']} turns, {result['threads']} threads")
