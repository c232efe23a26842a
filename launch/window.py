"""Sums over steps, ranks and micro-batches, and what belongs to cutting a batch into micro-batches."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")


def joined(tensor: Tensor) -> Tensor:
    """Sum over ranks."""
    dist.all_reduce(tensor)
    return tensor


def peak_memory(device: torch.device) -> dict[str, float]:
    """Most memory in GiB that any rank has taken so far.

    Returns:
        peak_memory_gib: allocated on the GPU, or resident in the process on a CPU. On a GPU also
        peak_reserved_gib: taken from it, free blocks included, and peak_process_gib: resident in the process.
    """
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    peaks = {"peak_memory_gib": process}
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        peaks = {
            "peak_memory_gib": allocated / (1 << 30),
            "peak_reserved_gib": reserved / (1 << 30),
            "peak_process_gib": process,
        }
    largest = torch.tensor(list(peaks.values()), device=device, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return dict(zip(peaks, largest.tolist(), strict=True))


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
            **peak_memory(self._device),
        }
        self._sums, self._times = {}, {}
        self._start = time.perf_counter()
        return sums, times

    @contextmanager
    def outside(self, name: str | None = None) -> Iterator[None]:
        """Keep what is done here (validation, a checkpoint) out of the window's time, and count it under `name`."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._start += seconds
        if name is not None:
            self._times[name] = self._times.get(name, 0.0) + seconds

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
