"""Batches by step from shards that are read from end to end, for object stores where random access is dear."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset
from webdataset import filters

from data_pipeline.dataset import Batch, TokenDataset, assemble
from data_pipeline.errors import DatasetError, EmptySplitError, FingerprintMismatchError
from data_pipeline.order import check_slice
from data_pipeline.permutation import Permutation
from data_pipeline.read_ahead import start_workers, worker_options
from data_pipeline.shard_stream import Piece, Sample, ShardStore, read_pieces

_PREFETCH_PER_WORKER = 2
_TOKENS_READ = 1 << 16
"""Tokens that are assembled, and sent between processes, at a time: several steps where these are small."""


class StreamOrder:
    """Which samples every stream yields, and when: a pure function of the manifest and these numbers.

    In each epoch the shards are laid out in an order drawn from (seed, epoch) and cut into `streams` equal
    stretches. A stream reads its stretch from end to end and shuffles it a buffer at a time. Step t takes the next
    G / streams samples of every stream; what is left of the epoch behind its last whole step is dropped.

    Args:
        global_batch_size: G, samples per step over all ranks.
        shuffle_buffer: samples of a stream that are shuffled at a time.

    Raises:
        EmptySplitError: the split has no samples.
        ValueError: G is larger than the split, or not a multiple of `streams`.
    """

    def __init__(
        self, store: ShardStore, global_batch_size: int, seed: int, streams: int, shuffle_buffer: int
    ) -> None:
        samples = int(store.first[-1])
        if not samples:
            raise EmptySplitError(f"{store.url}: the split {store.split!r} has no samples")
        if streams <= 0 or global_batch_size <= 0 or global_batch_size % streams:
            raise ValueError(
                f"global_batch_size ({global_batch_size}) must be a multiple of streams ({streams})"
            )
        if samples < global_batch_size:
            raise ValueError(
                f"global_batch_size ({global_batch_size}) is larger than the split ({samples} samples): use a "
                "smaller batch or more text"
            )
        if shuffle_buffer <= 0:
            raise ValueError(f"shuffle_buffer ({shuffle_buffer}) must be positive")
        self.store = store
        self.seed = seed
        self.streams = streams
        self.steps_per_epoch = samples // global_batch_size
        self.per_step = global_batch_size // streams
        self.steps_at_a_time = max(1, _TOKENS_READ // (global_batch_size * store.manifest.sample_length))
        self._buffer = shuffle_buffer
        self._length = self.steps_per_epoch * self.per_step  # samples of one stream in an epoch

    def samples(self, stream: int, epoch: int, start_step: int) -> Iterator[Sample]:
        """What a stream yields in an epoch from a step of the epoch on."""
        skipped, offset = divmod(start_step * self.per_step, self._buffer)
        pieces = self._pieces(
            epoch, stream * self._length + skipped * self._buffer, (stream + 1) * self._length
        )
        shuffled = read_pieces(self.store, pieces).compose(
            filters.batched(self._buffer, collation_fn=None),
            partial(self._shuffle, stream, epoch, skipped),
            filters.unlisted(),
        )
        return islice(iter(shuffled), offset, None)

    def _shuffle(
        self, stream: int, epoch: int, skipped: int, buffers: Iterator[list[Sample]]
    ) -> Iterator[list[Sample]]:
        buffers_per_stream = -(-self._length // self._buffer)
        first = (epoch * self.streams + stream) * buffers_per_stream + skipped
        for number, buffer in enumerate(buffers, first):
            order = Permutation(len(buffer), self.seed, number)
            yield [buffer[position] for position in order(np.arange(len(buffer)))]

    def _pieces(self, epoch: int, begin: int, end: int) -> list[Piece]:
        """The stretch [begin, end) of the epoch."""
        shards = Permutation(len(self.store.shards), self.seed, epoch)(np.arange(len(self.store.shards)))
        sizes = np.diff(self.store.first)[shards]
        ends = np.cumsum(sizes)
        pieces = []
        for place in range(int(np.searchsorted(ends, begin, side="right")), len(shards)):
            start = int(ends[place] - sizes[place])
            if start >= end:
                break
            rows = range(max(begin - start, 0), min(end - start, int(sizes[place])))
            pieces.append(Piece(int(shards[place]), rows))
        return pieces


class StreamedDataset(TokenDataset):
    """A split whose shards lie elsewhere than its manifest: the few samples that are read at random come from there.

    Every read fetches the tar members around the samples, checked as a stream is.

    Args:
        directory: holds the manifest; the split's shards need not be there.
        url: directory or fsspec URL that holds them.

    Raises:
        DatasetError: as `TokenDataset` and `ShardStore`.
        FingerprintMismatchError: another dataset lies there.
    """

    def __init__(self, directory: str | Path, split: str, url: str) -> None:
        super().__init__(directory, split)
        self._store = ShardStore(url, split)
        there = self._store.manifest.fingerprint
        if there != self.fingerprint:
            raise FingerprintMismatchError(
                f"{url} holds another dataset (fingerprint {there[:16]}) than {directory} "
                f"({self.fingerprint[:16]}): copy the manifest, or upload the shards again"
            )

    def _check_shards(self) -> None:
        """A missing shard shows when it is read: listing a store of many shards is dear."""

    def read(self, indices: Sequence[int] | NDArray[np.integer]) -> Batch:
        """As `TokenDataset.read`."""
        order = np.argsort(np.asarray(indices), kind="stable")
        places = zip(*(place[order].tolist() for place in self.locate(indices)), strict=True)
        pieces = [Piece(shard, range(row, row + 1)) for shard, row in places]
        samples: list[Sample] = [
            sample for _, sample in sorted(zip(order.tolist(), read_pieces(self._store, pieces), strict=True))
        ]
        return assemble(
            [sample.tokens for sample in samples],
            [sample.segments for sample in samples],
            indices,
            self._dtype,
        )


class _StreamReader(IterableDataset[Batch | DatasetError]):
    """The share of some streams in every step, a few steps at a time, endless.

    An error is yielded, so that it arrives from another process as it is.
    """

    def __init__(self, order: StreamOrder, parts: list[range], start_step: int) -> None:
        self._order = order
        self._parts = parts  # the streams of each worker
        self._start_step = start_step

    def __iter__(self) -> Iterator[Batch | DatasetError]:
        worker = torch.utils.data.get_worker_info()
        try:
            yield from self._batches(self._parts[worker.id if worker is not None else 0])
        except DatasetError as error:
            yield error

    def _batches(self, streams: range) -> Iterator[Batch]:
        order = self._order
        dtype = np.dtype(order.store.manifest.token_dtype)
        epoch, step = divmod(self._start_step, order.steps_per_epoch)
        while True:
            readers = [order.samples(stream, epoch, step) for stream in streams]
            while step < order.steps_per_epoch:
                steps = min(order.steps_at_a_time, order.steps_per_epoch - step)
                samples = [
                    sample
                    for _ in range(steps)
                    for reader in readers
                    for sample in islice(reader, order.per_step)
                ]
                indices, tokens, segments = zip(*samples, strict=True)
                batch = assemble(tokens, segments, indices, dtype)
                yield {name: tensor.unflatten(0, (steps, -1)) for name, tensor in batch.items()}
                step += steps
            epoch, step = epoch + 1, 0


class StreamLoader:
    """Endless (step, batch) pairs of one rank, as `StepLoader` gives them, read in sequence through `webdataset`.

    **Guarantee.** The samples of a step are a pure function of the dataset, seed, G, `streams`, `shuffle_buffer` and
    the step: at any number of workers, and at any world size that divides `streams`. So a run goes on exactly at
    any step, also on another such number of ranks. Every epoch has each sample at most once, and the same number
    for every rank.

    **What is weaker than in `StepLoader`.** The order is random in the order of the shards and inside the buffers of
    `streams` streams, not over the whole split. A world size that does not divide `streams` is refused. Starting in
    the middle of an epoch reads again what the streams' buffers held: up to `shuffle_buffer` samples of every
    stream before the first batch, as at the start of an epoch.

    Memory: `shuffle_buffer` samples for each of the rank's streams, besides a few batches.

    Args:
        directory: of the dataset, on disk or behind any fsspec URL.
        global_batch_size: G, samples per step over all ranks; a multiple of `streams`.
        start_step: first step to yield.
        num_workers: processes that read ahead, at most one for each stream; 0 reads when asked.
        streams: read side by side over all ranks; a multiple of the world size.
        shuffle_buffer: samples of a stream that are shuffled at a time.

    Raises:
        DatasetError: as `ShardStore`; while reading, CorruptShardError, MissingShardError and UnsafeShardError,
            which name the shard and the sample or the member.
        ValueError: the numbers do not divide as they must.
    """

    def __init__(
        self,
        directory: str,
        split: str = "train",
        *,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_step: int = 0,
        num_workers: int = 1,
        streams: int = 8,
        shuffle_buffer: int = 1024,
    ) -> None:
        check_slice(rank, world_size, start_step, num_workers)
        if streams % world_size:
            raise ValueError(f"streams ({streams}) must be a multiple of the world size ({world_size})")
        store = ShardStore(directory, split)
        self._order = StreamOrder(store, global_batch_size, seed, streams, shuffle_buffer)
        self.fingerprint = store.manifest.fingerprint
        self.steps_per_epoch = self._order.steps_per_epoch
        self._next = start_step
        per_rank = streams // world_size
        self._workers = min(num_workers, per_rank)
        cuts = np.linspace(rank * per_rank, (rank + 1) * per_rank, max(self._workers, 1) + 1).astype(int)
        parts = [
            range(start, stop) for start, stop in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)
        ]
        self._batches: Iterator[Batch | DatasetError] = start_workers(
            DataLoader(
                _StreamReader(self._order, parts, start_step),
                batch_size=None,
                num_workers=self._workers,
                prefetch_factor=_PREFETCH_PER_WORKER if self._workers else None,
                pin_memory=torch.cuda.is_available(),
                **worker_options(),
            )
        )
        self._ready: deque[Batch] = deque()
        self._failure: Exception | None = None

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self

    def __next__(self) -> tuple[int, Batch]:
        if not self._ready:
            self._ready.extend(self._next_steps())
        batch = self._ready.popleft()
        step = self._next
        self._next += 1
        return step, batch

    def _next_steps(self) -> list[Batch]:
        parts: list[Batch] = []
        while len(parts) < max(self._workers, 1):  # the workers take turns, in order
            if self._failure is not None:  # again and again: no step is ever skipped, no part of one kept
                raise self._failure
            try:
                part = next(self._batches)
            except Exception as error:  # of a worker process, with its traceback
                self._failure = error
                raise
            if isinstance(part, DatasetError):
                self._failure = part
                raise part
            parts.append(part)
        # The workers' parts lie side by side in the batch of a step.
        joined = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
        return [dict(zip(joined, tensors, strict=True)) for tensors in zip(*joined.values(), strict=True)]

    def state(self) -> dict[str, Any]:
        """Where the loader stands; `step` is the next one to be yielded, the `start_step` to go on from."""
        return {
            "epoch": self._next // self.steps_per_epoch,
            "step": self._next,
            "seed": self._order.seed,
            "fingerprint": self.fingerprint,
        }

    def metrics(self) -> dict[str, float]:
        """As `StepLoader.metrics`: neither mixtures nor replaced samples are streamed."""
        return {}

    def close(self) -> None:
        """Stops the reading processes; the loader yields nothing after it."""
        self._batches = iter(())
        self._ready.clear()

    def __enter__(self) -> StreamLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
