"""Batches by step: the global order is a pure function of (seed, epoch), ranks and workers only slice it."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.dataset import Batch
from data_pipeline.errors import CorruptShardError, FingerprintMismatchError
from data_pipeline.mixture import MixtureDataset
from data_pipeline.order import EpochOrder, MixtureOrder, Shuffle, check_slice
from data_pipeline.read_ahead import Request, read_in_processes, read_in_threads, read_inline
from data_pipeline.replacement import Dataset, OnCorrupt, Replaced, SampleReader, StepResult

_SAMPLES_AT_A_TIME = 64
"""Samples that are read together, of several steps where these are small: a read costs as much as eight of them."""
_ORDER_BLOCK = 4096
"""Positions of the order computed at a time: one call for each step would cost more than the reads."""

WorkerKind = Literal["thread", "process"]


class StepLoader:
    """Endless (step, batch) pairs of one rank.

    Step t takes the samples at positions [t*G, (t+1)*G) of the order, G the global batch size; this rank gets
    its contiguous block of G / world_size. Each epoch is a new permutation of all samples; what is left of an
    epoch behind its last whole step is dropped for all ranks alike. So neither the world size nor the number
    of workers changes which samples a step sees, and any step can be the first. In a `MixtureDataset` each part
    goes through epochs of its own, without a rest.

    Args:
        global_batch_size: G, samples per step over all ranks.
        start_step: first step to yield.
        num_workers: threads or processes that read ahead; 0 reads when asked. The order is the same.
        worker_kind: which of the two.
        shuffle_block: samples that stay neighbours in every epoch, see `BlockPermutation`; None shuffles freely.
        shuffle_window: blocks that are shuffled with each other.
        on_corrupt: raise an error where a sample is damaged, or replace it by another, see `SampleReader`.
        max_replaced: replacements since the start of the run, over all ranks, above which an error is raised.
        sum_over_ranks: adds up a number of every rank; called at each step with `on_corrupt: replace`, so that all
            ranks count the same. Needed where there are several.

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
        worker_kind: WorkerKind = "thread",
        shuffle_block: int | None = None,
        shuffle_window: int = 1024,
        on_corrupt: OnCorrupt = "raise",
        max_replaced: int = 16,
        sum_over_ranks: Callable[[int], int] | None = None,
    ) -> None:
        check_slice(rank, world_size, start_step, num_workers)
        if global_batch_size <= 0 or global_batch_size % world_size:
            raise ValueError(
                f"global_batch_size ({global_batch_size}) must be a multiple of the world size ({world_size})"
            )
        if len(dataset) < global_batch_size:
            raise ValueError(
                f"global_batch_size ({global_batch_size}) is larger than the dataset ({len(dataset)} "
                "samples): use a smaller batch or more text"
            )
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.steps_per_epoch = len(dataset) // global_batch_size
        self.replaced_samples = 0
        self._per_rank = global_batch_size // world_size
        self._rank = rank
        self._next = start_step  # the step that __next__ yields
        self._shuffle = Shuffle(seed, shuffle_block, shuffle_window)
        self._order: EpochOrder | MixtureOrder
        if isinstance(dataset, MixtureDataset):
            self._order = dataset.order(self._shuffle)
        else:
            epoch_length = self.steps_per_epoch * global_batch_size
            self._order = EpochOrder(len(dataset), epoch_length, self._shuffle)
        self._block: tuple[int, NDArray[np.int64]] | None = None  # number of an order block, its samples
        self._read = SampleReader(dataset, on_corrupt, seed)
        self._workers = (num_workers, worker_kind)
        self._counts_damage = on_corrupt == "replace"
        self._max_replaced = max_replaced
        self._sum_over_ranks = sum_over_ranks
        self._warned: set[int] = set()
        self._pin = torch.cuda.is_available()
        self._steps_at_a_time = max(1, _SAMPLES_AT_A_TIME // self._per_rank)
        self._results: Generator[tuple[StepResult, ...]] | None = None
        self._ready: deque[StepResult] = deque()
        self._failure: Exception | None = None

    def indices(self, step: int) -> NDArray[np.int64]:
        """[G / world_size] sample indices of this rank at a step."""
        first = step * self.global_batch_size + self._rank * self._per_rank
        parts = []
        position, stop = first, first + self._per_rank
        while position < stop:
            block, offset = divmod(position, _ORDER_BLOCK)
            if self._block is None or self._block[0] != block:
                positions = np.arange(block * _ORDER_BLOCK, (block + 1) * _ORDER_BLOCK)
                self._block = (block, self._order(positions))
            parts.append(self._block[1][offset : offset + stop - position])
            position += len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _requests(self) -> Iterator[Request]:
        step = self._next
        while True:
            steps = range(step, step + self._steps_at_a_time)
            yield step, np.stack([self.indices(each) for each in steps])
            step = steps.stop

    def _start(self) -> Generator[tuple[StepResult, ...]]:
        num_workers, kind = self._workers
        if num_workers and kind == "process":
            return read_in_processes(self._read.read_steps, self._requests(), num_workers)
        if num_workers:
            return read_in_threads(self._read_pinned, self._requests(), num_workers)
        return read_inline(self._read_pinned, self._requests())

    def _read_pinned(self, step: int, indices: NDArray[np.int64]) -> tuple[StepResult, ...]:
        results = self._read.read_steps(step, indices)
        return tuple(r if isinstance(r, Exception) else (self._pinned(r[0]), r[1]) for r in results)

    def _pinned(self, batch: Batch) -> Batch:
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self._pin else batch

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self

    def __next__(self) -> tuple[int, Batch]:
        if self._failure is not None:
            raise self._failure  # again and again, so that no step is ever skipped
        if self._results is None:
            self._results = self._start()
        try:
            if not self._ready:
                self._ready.extend(next(self._results))
            result = self._ready.popleft()
            if isinstance(result, Exception):
                raise result
            batch, replaced = result
            if self._counts_damage:
                self._count(replaced)
        except Exception as error:
            self._failure = error
            raise
        step = self._next
        self._next += 1
        return step, self._pinned(batch) if self._workers[1] == "process" else batch

    def _count(self, replaced: list[Replaced]) -> None:
        """Says what was replaced on this rank, once a sample, and counts what was on all."""
        for sample, stand_in, damage in replaced:
            if sample not in self._warned:
                self._warned.add(sample)
                warnings.warn(f"{damage}. Sample {stand_in} takes its place", stacklevel=3)
        here = len(replaced)
        self.replaced_samples += here if self._sum_over_ranks is None else self._sum_over_ranks(here)
        if self.replaced_samples > self._max_replaced:
            last = f" The last here: {replaced[-1].damage}" if replaced else ""
            raise CorruptShardError(
                f"{self.replaced_samples} damaged samples had to be replaced in this run, more than "
                f"data.max_replaced={self._max_replaced}: run 'python -m data_pipeline verify' on the data and "
                f"restore or rebuild the shards, or allow more.{last}"
            )

    def metrics(self) -> dict[str, float]:
        """Totals since the start of the run: samples of each part of a mixture, and replaced ones, over all ranks."""
        counts = self._counts()
        metrics = {f"data/source_{name}_samples": float(count) for name, count in counts.items()}
        if self._counts_damage:
            metrics["data/replaced_samples"] = float(self.replaced_samples)
        return metrics

    def _counts(self) -> dict[str, int]:
        position = self._next * self.global_batch_size
        return self.dataset.counts(position) if isinstance(self.dataset, MixtureDataset) else {}

    def state(self) -> dict[str, Any]:
        """Where the loader stands, as JSON; `step` is the next one to be yielded, the `start_step` to go on from."""
        return {
            "epoch": self._order.epoch(self._next * self.global_batch_size),
            "step": self._next,
            "seed": self.seed,
            "fingerprint": self.dataset.fingerprint,
            "global_batch_size": self.global_batch_size,
            "shuffle_block": self._shuffle.blocks,
            "source_samples": self._counts(),
            "replaced_samples": self.replaced_samples,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`; before the first batch. The world size and the workers may be others.

        Raises:
            FingerprintMismatchError: other data, or another order of them; names what differs.
        """
        ours = self.state()
        # what a state of an earlier version does not name was not there to be set
        names = ("seed", "fingerprint", "global_batch_size", "shuffle_block")
        before = {"global_batch_size": self.global_batch_size, "shuffle_block": None} | dict(state)
        differing = [
            f"{name} was {before[name]}, is {ours[name]}" for name in names if before[name] != ours[name]
        ]
        if differing:
            raise FingerprintMismatchError(
                f"the saved position is one of another order of samples ({'; '.join(differing)}): restore these, or "
                "start a new run"
            )
        self._next = state["step"]
        self.replaced_samples = state.get("replaced_samples", 0)

    def close(self) -> None:
        """Stops the reading threads or processes; the loader yields nothing after it."""
        if self._results is not None:
            self._results.close()
        self._failure = StopIteration()

    def __enter__(self) -> StepLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
