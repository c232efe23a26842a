"""Batches by step: the global order is a pure function of (seed, epoch), ranks and threads only slice it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.dataset import Batch
from data_pipeline.permutation import Permutation

_PREFETCH_PER_WORKER = 2
_ORDER_BLOCK = 4096
"""Positions of the epoch order computed at a time: one call for each step would cost more than the reads."""


class Dataset(Protocol):
    """What the loader reads from: `TokenDataset` or `CodeDataset`."""

    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int] | NDArray[np.integer], /) -> Batch:
        """The samples at these indices."""
        ...


class StepLoader:
    """Endless (step, batch) pairs of one rank.

    Step t takes the samples at positions [t*G, (t+1)*G) of the order, G the global batch size; this rank gets
    its contiguous block of G / world_size. Each epoch is a new permutation of all samples; what is left of an
    epoch behind its last whole step is dropped for all ranks alike. So neither the world size nor the number
    of workers changes which samples a step sees, and any step can be the first.

    Args:
        global_batch_size: G, samples per step over all ranks.
        start_step: first step to yield.
        num_workers: threads that read ahead; 0 reads when asked. The order is the same.

    Raises:
        ValueError: G is larger than the dataset or not divisible by the world size, or the rank is out of
            range.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_step: int = 0,
        num_workers: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size}")
        if global_batch_size <= 0 or global_batch_size % world_size:
            raise ValueError(
                f"global_batch_size ({global_batch_size}) must be a multiple of the world size ({world_size})"
            )
        if len(dataset) < global_batch_size:
            raise ValueError(
                f"global_batch_size ({global_batch_size}) is larger than the dataset ({len(dataset)} "
                "samples): use a smaller batch or more text"
            )
        if start_step < 0 or num_workers < 0:
            raise ValueError(f"start_step ({start_step}) and num_workers ({num_workers}) cannot be negative")
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.steps_per_epoch = len(dataset) // global_batch_size
        self._per_rank = global_batch_size // world_size
        self._rank = rank
        self._next = start_step  # the step that __next__ yields
        self._submitted = start_step  # the step that goes to the workers next
        self._order: tuple[int, int, NDArray[np.int64]] | None = None  # epoch, block, its samples
        self._permutation: tuple[int, Permutation] | None = None
        self._pin = torch.cuda.is_available()
        self._depth = num_workers * _PREFETCH_PER_WORKER
        self._pending: deque[Future[Batch]] = deque()
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="data") if num_workers else None

    def indices(self, step: int) -> NDArray[np.int64]:
        """[G / world_size] sample indices of this rank at a step."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = step_in_epoch * self.global_batch_size + self._rank * self._per_rank
        parts = []
        position, stop = first, first + self._per_rank
        while position < stop:
            block, offset = divmod(position, _ORDER_BLOCK)
            part = self._block(epoch, block)[offset : offset + stop - position]
            parts.append(part)
            position += len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _block(self, epoch: int, block: int) -> NDArray[np.int64]:
        if self._order is None or self._order[:2] != (epoch, block):
            if self._permutation is None or self._permutation[0] != epoch:
                self._permutation = (epoch, Permutation(len(self.dataset), self.seed, epoch))
            stop = min((block + 1) * _ORDER_BLOCK, len(self.dataset))
            samples = self._permutation[1](np.arange(block * _ORDER_BLOCK, stop))
            self._order = (epoch, block, samples)
        return self._order[2]

    def _read(self, indices: NDArray[np.int64]) -> Batch:
        batch = self.dataset.read(indices)
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self._pin else batch

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self

    def __next__(self) -> tuple[int, Batch]:
        if self._pool is None:
            batch = self._read(self.indices(self._next))
        else:
            while len(self._pending) <= self._depth:
                self._pending.append(self._pool.submit(self._read, self.indices(self._submitted)))
                self._submitted += 1
            batch = self._pending[0].result()  # stays there when it raises, so that no step is ever skipped
            self._pending.popleft()
        step = self._next
        self._next += 1
        return step, batch

    def state(self) -> dict[str, Any]:
        """Where the loader stands; `step` is the next one to be yielded, the `start_step` to go on from."""
        return {
            "epoch": self._next // self.steps_per_epoch,
            "step": self._next,
            "seed": self.seed,
            "fingerprint": self.dataset.fingerprint,
        }

    def close(self) -> None:
        """Stops the reading threads; the loader yields nothing after it."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pending.clear()

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
