"""Training step of the residual quantizer beside vector-quantize-pytorch's ResidualVQ and bare torch.

A step assigns codes, forms the commitment loss, runs backward to the input and moves the EMA codebooks. The peer
runs the same recipe: EMA codebooks, Euclidean distance, straight-through gradient, no k-means, a search for dead
codes in every step. The bare row is addmm, argmin, bincount and index_add per level and nothing else: no loss, no
gradient, no averages.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from launch.environment import describe_environment
from launch.measurement import peak_in_subprocess, report_peak, time_rows
from rqvae import ResidualQuantizer
from rqvae.config import QuantizerConfig

OURS, PEER, BARE = "ResidualQuantizer", "ResidualVQ", "bare torch"


class Shape(NamedTuple):
    """What is quantized."""

    dim: int
    codebook_size: int
    levels: int
    vectors: int


SHAPES = (Shape(16, 1024, 8, 8192), Shape(128, 512, 8, 8192), Shape(512, 2048, 4, 4096))


def benchmark_quantizer(shapes: tuple[Shape, ...] = SHAPES, repeats: int = 7) -> dict[str, Any]:
    """Time and peak extra memory of one training step at every shape.

    Raises:
        ValueError: vector-quantize-pytorch is not installed.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    for shape in shapes:
        rows = time_rows(
            {name: make_step(name, shape, device) for name in (OURS, PEER, BARE)}, repeats, device
        )
        ours, peer, bare = (row["median_ms"] for row in rows)
        for row in rows[:2]:
            row["peak_extra_bytes"] = peak_in_subprocess(
                "launch.benchmark_quantizer", {"name": row["name"], "shape": shape}
            )
        results.append(
            {
                **shape._asdict(),
                "rows": rows,
                "speedup_over_peer": peer / ours,
                "time_over_bare": ours / bare,
                "all_distances_bytes": 4 * shape.vectors * shape.codebook_size * shape.levels,
            }
        )
    return {
        "shapes": results,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "environment": describe_environment(),
    }


def make_step(name: str, shape: Shape, device: torch.device) -> Callable[[], Any]:
    """One row's training step, on the same vectors; the peer starts from codebooks of its own."""
    torch.manual_seed(0)
    vectors = torch.randn(1, shape.vectors, shape.dim, device=device, requires_grad=True)
    config = QuantizerConfig(dead_code_interval=1)  # every step, as the peer does
    if name == PEER:
        return _peer_step(shape, vectors, config)
    quantizer = ResidualQuantizer((shape.codebook_size,) * shape.levels, shape.dim, config).to(device).train()
    return _bare_step(quantizer, vectors) if name == BARE else _our_step(quantizer, vectors)


def _our_step(quantizer: ResidualQuantizer, vectors: torch.Tensor) -> Callable[[], Any]:
    mask = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
    steps = itertools.count()
    weight = quantizer.config.commitment_weight

    def step() -> None:
        vectors.grad = None
        out = quantizer(vectors, mask)
        (out.quantized.sum() + weight * out.commitment_loss / vectors.shape[1]).backward()
        quantizer.update_codebook_ema(next(steps), seed=0)

    return step


def _peer_step(shape: Shape, vectors: torch.Tensor, config: QuantizerConfig) -> Callable[[], Any]:
    try:
        from vector_quantize_pytorch import ResidualVQ
    except ImportError as error:
        raise ValueError(
            "the comparison needs vector-quantize-pytorch: pip install -e '.[benchmark]'"
        ) from error
    peer = ResidualVQ(
        dim=shape.dim,
        num_quantizers=shape.levels,
        codebook_size=shape.codebook_size,
        decay=config.ema_decay,
        commitment_weight=config.commitment_weight,
        kmeans_init=False,
        use_cosine_sim=False,
        rotation_trick=False,
        # A count per step there, a share of uniform usage here.
        threshold_ema_dead_code=config.threshold_ema_dead_code * shape.vectors / shape.codebook_size,
    )
    peer.to(vectors.device).train()

    def step() -> None:
        vectors.grad = None
        quantized, _, losses = peer(vectors)
        (quantized.sum() + losses.sum()).backward()

    return step


def _bare_step(quantizer: ResidualQuantizer, vectors: torch.Tensor) -> Callable[[], Any]:
    codebooks = [level.codebook for level in quantizer.levels]

    @torch.no_grad()
    def step() -> None:
        residual = vectors[0]
        for codebook in codebooks:
            codes = torch.addmm(codebook.square().sum(1) / 2, residual, codebook.T, alpha=-1).argmin(1)
            torch.bincount(codes, minlength=len(codebook))
            torch.zeros_like(codebook).index_add_(0, codes, residual)
            residual = residual - codebook[codes]

    return step


def print_quantizer(result: dict[str, Any]) -> None:
    """The result for a person."""
    for shape in result["shapes"]:
        print(
            f"dim {shape['dim']}, {shape['codebook_size']} codes, {shape['levels']} levels, "
            f"{shape['vectors']} vectors (all distances at once: {shape['all_distances_bytes'] / 2**20:.0f} MiB)"
        )
        for row in shape["rows"]:
            peak = row.get("peak_extra_bytes")
            memory = "" if peak is None else f"  extra memory {peak / 2**20:7.0f} MiB"
            print(f"  {row['name']:20}{row['median_ms']:9.1f} ms  spread {row['spread_ms']:7.1f} ms{memory}")
        print(
            f"  {shape['speedup_over_peer']:.2f}x as fast as {PEER}, "
            f"{shape['time_over_bare']:.2f}x the time of {BARE}"
        )
    print(f"{result['repeats']} turns, {result['threads']} threads")


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    report_peak(make_step(request["name"], Shape(*request["shape"]), torch.device("cpu")))
