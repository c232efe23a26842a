"""The head's cross-entropy, a block of rows at a time, beside F.cross_entropy(F.linear(...)), with gradients.

Time is compared where the naive version fits; memory is measured at full size for ours only, since the naive
version's logits and their gradient alone take 2 x tokens x vocabulary x 4 bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from launch.environment import describe_environment
from launch.measurement import peak_in_subprocess, report_peak, time_rows
from rqvae.linear_head import LinearHead

CHUNKED, NAIVE = "chunked", "naive"


class LossShape(NamedTuple):
    """Size of one loss."""

    vocabulary: int
    hidden: int
    tokens: int


TIMED = LossShape(151_936, 256, 1_024)
FULL = LossShape(151_936, 1_024, 8_192)


def benchmark_loss(timed: LossShape = TIMED, full: LossShape = FULL, repeats: int = 3) -> dict[str, Any]:
    """Time at `timed` against the naive version, peak extra memory at `full`; bf16 too on a GPU, fp32 on a CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timings = {}
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
        rows = time_rows(
            {name: make_loss(name, timed, device, dtype) for name in (CHUNKED, NAIVE)}, repeats, device
        )
        timings[str(dtype).removeprefix("torch.")] = {
            "rows": rows,
            "time_over_naive": rows[0]["median_ms"] / rows[1]["median_ms"],
        }
    peak = peak_in_subprocess("launch.benchmark_loss", {"shape": full})
    gradients = 4 * full.hidden * (full.vocabulary + full.tokens)
    logits = 2 * 4 * full.tokens * full.vocabulary
    return {
        "timed": {**timed._asdict(), "dtypes": timings},
        "memory": {
            **full._asdict(),
            "extra_bytes": max(0, peak - gradients),
            "logits_with_gradients_bytes": logits,
            "share_of_logits": max(0, peak - gradients) / logits,
        },
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "environment": describe_environment(),
    }


def make_loss(
    name: str, shape: LossShape, device: torch.device, dtype: torch.dtype = torch.float32
) -> Callable[[], Any]:
    """Mean loss and gradients of both inputs."""
    torch.manual_seed(0)
    with torch.device(device):
        head = LinearHead(shape.hidden, shape.vocabulary).to(dtype)
        hidden = torch.randn(shape.tokens, shape.hidden, dtype=dtype, requires_grad=True)
        labels = torch.randint(shape.vocabulary, (shape.tokens,))
    weights = torch.full_like(labels, 1 / shape.tokens, dtype=torch.float32)

    def step() -> None:
        hidden.grad = head.weight.grad = None
        if name == NAIVE:
            F.cross_entropy(F.linear(hidden, head.weight), labels).backward()
        else:
            head(hidden, labels, weights).loss.backward()

    return step


def print_loss(result: dict[str, Any]) -> None:
    """The result for a person."""
    timed, memory = result["timed"], result["memory"]
    print(f"{timed['vocabulary']} x {timed['hidden']}, {timed['tokens']} tokens")
    for dtype, timing in timed["dtypes"].items():
        for row in timing["rows"]:
            print(
                f"  {row['name']:10}{dtype:10}{row['median_ms']:10.1f} ms  spread {row['spread_ms']:8.1f} ms"
            )
        print(f"  {dtype}: {timing['time_over_naive']:.2f}x the time of the naive version")
    print(f"{memory['vocabulary']} x {memory['hidden']}, {memory['tokens']} tokens")
    print(
        f"  beyond inputs and gradients {memory['extra_bytes'] / 2**20:.0f} MiB; full logits with gradients "
        f"{memory['logits_with_gradients_bytes'] / 2**20:.0f} MiB: {memory['share_of_logits']:.3f} of it"
    )
    print(f"{result['repeats']} turns, {result['threads']} threads")


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    report_peak(make_loss(CHUNKED, LossShape(*request["shape"]), torch.device("cpu")))
