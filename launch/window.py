"""Sums over steps, ranks and micro-batches, and what belongs to cutting a batch into micro-batches."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")


def joined(tensor: Tensor) -> Tensor:
    """Sum over ranks."""
    dist.all_reduce(tensor)
    return tensor


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that any rank has taken so far: allocated on its GPU, or resident in its process on a CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / (1 << 30)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    largest = torch.tensor(peak, device=device, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


class Window:
    """Sums and times since the last log line, joined over ranks when it closes."""

    def __init__(self, device: torch.device):
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._times: dict[str, float] = {}
        self._start = time.perf_counter()

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Add one micro-batch's sums. Names need not be the same in every one, but on all ranks."""
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def timed(self, name: str, call: Callable[[], Result]) -> Result:
        """Call, and count the seconds under `name`."""
        start = time.perf_counter()
        result = call()
        self._times[name] = self._times.get(name, 0.0) + time.perf_counter() - start
        return result

    def close(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Joint sums, this rank's times and the largest peak memory of any rank; the next window begins."""
        flat = joined(torch.cat([value.flatten() for value in self._sums.values()]))
        pieces = flat.split([value.numel() for value in self._sums.values()])
        named = zip(self._sums.items(), pieces, strict=True)
        sums = {name: piece.view_as(old).cpu() for (name, old), piece in named}
        times = {
            **self._times,
            "window_s": time.perf_counter() - self._start,
            "peak_memory_gib": peak_memory_gib(self._device),
        }
        self._sums = {}
        self.skip_time()
        return sums, times

    def skip_time(self) -> None:
        """Keep what was just done (validation, a checkpoint) out of the times."""
        self._times = {}
        self._start = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """This rank's unfinished sums as JSON, so that a resumed run logs what an uninterrupted one would."""
        return {name: value.tolist() for name, value in self._sums.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._sums = {
            name: torch.tensor(value, dtype=torch.float64, device=self._device)
            for name, value in state.items()
        }


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch on the device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def split(batch: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """Micro-batches of `size` samples."""
    pieces = {name: tensor.split(size) for name, tensor in batch.items()}
    return [dict(zip(pieces, values, strict=True)) for values in zip(*pieces.values(), strict=True)]


def num_real_tokens(batch: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """Tokens that are not padding: [] fp32, at least 1."""
    return (batch["document_ids"] > 0).sum().to(device, torch.float32).clamp(min=1)
