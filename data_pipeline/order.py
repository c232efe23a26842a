"""The endless order of samples that a training run goes through: position p -> sample, for any p at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.interleave import Interleave
from data_pipeline.permutation import BlockPermutation, Permutation


@dataclass(frozen=True)
class Shuffle:
    """How each epoch is shuffled: over all samples, or in blocks of consecutive ones (`BlockPermutation`)."""

    seed: int = 0
    block_size: int | None = None
    """Samples in a block; None permutes all samples freely."""
    window_blocks: int = 1024
    """Blocks that are shuffled with each other."""

    def permutation(self, size: int, epoch: int) -> Permutation | BlockPermutation:
        """The order of an epoch of `size` samples."""
        if self.block_size is None:
            return Permutation(size, self.seed, epoch)
        return BlockPermutation(size, self.seed, epoch, self.block_size, self.window_blocks)

    @property
    def blocks(self) -> list[int] | None:
        """What of it a saved position depends on beside the seed, as JSON."""
        return None if self.block_size is None else [self.block_size, self.window_blocks]


class EpochOrder:
    """Epoch after epoch of one dataset, each in its own permutation.

    Args:
        size: samples of the dataset.
        epoch_length: samples of each epoch that are used, the first of its permutation.
        shuffle: gives the permutations.
    """

    def __init__(self, size: int, epoch_length: int, shuffle: Shuffle) -> None:
        self._size, self._epoch_length, self._shuffle = size, epoch_length, shuffle
        self._last: tuple[int, Permutation | BlockPermutation] | None = None

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] samples at [n] positions."""
        epochs, places = np.divmod(positions, self._epoch_length)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            samples[inside] = self._permutation(epoch)(places[inside])
        return samples

    def _permutation(self, epoch: int) -> Permutation | BlockPermutation:
        if self._last is None or self._last[0] != epoch:
            self._last = (epoch, self._shuffle.permutation(self._size, epoch))
        return self._last[1]

    def epoch(self, position: int) -> int:
        """The epoch that a position is in."""
        return position // self._epoch_length


class MixtureOrder:
    """Several datasets side by side, each going through epochs of its own.

    Args:
        sizes: samples of each source; their indices lie one behind the other.
        interleave: which source a position comes from.
        shuffle: gives every source's permutations. All samples of an epoch of a source are used.
    """

    def __init__(self, sizes: list[int], interleave: Interleave, shuffle: Shuffle) -> None:
        self._interleave = interleave
        self._first = np.cumsum([0, *sizes])
        self._orders = [EpochOrder(size, size, shuffle) for size in sizes]

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] samples at [n] positions."""
        sources, ranks = self._interleave(positions)
        samples = np.empty_like(ranks)
        for source, order in enumerate(self._orders):
            inside = sources == source
            samples[inside] = self._first[source] + order(ranks[inside])
        return samples

    def epoch(self, position: int) -> int:
        """The epoch that the source furthest ahead is in."""
        counts = self._interleave.counts(position)
        return max(order.epoch(count) for order, count in zip(self._orders, counts, strict=True))


def check_slice(rank: int, world_size: int, start_step: int, num_workers: int) -> None:
    """Refuses what no loader can make sense of.

    Raises:
        ValueError: the rank is out of range, or a number is negative.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a world of {world_size}")
    if start_step < 0 or num_workers < 0:
        raise ValueError(f"start_step ({start_step}) and num_workers ({num_workers}) cannot be negative")
