"""The order of an epoch: a bijection of range(N) that is computed where it is needed and stored nowhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_TABLE_PER_POSITION = 4
"""Elements of the domain per position asked for, up to which all of them are enciphered at once."""


class Permutation:
    """A pseudo-random permutation of range(size), a pure function of (size, seed, epoch), in O(1) memory.

    A Feistel network over the smallest power of 4 that holds `size`, with cycle walking for the values that
    fall outside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", method 2): fewer than 4
    passes on average.

    Args:
        size: N, at most 2**62.
        seed: of the run.
        epoch: each has its own order.
        part: of the epoch's order that is permuted by itself; each has its own order.
    """

    def __init__(self, size: int, seed: int, epoch: int, part: str = "") -> None:
        if not 0 < size <= 1 << 62:
            raise ValueError(f"a permutation needs between 1 and 2**62 elements, not {size}")
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._keys = np.frombuffer(_digest(f"epoch-order:{seed}:{epoch}{part}", 8 * _ROUNDS), dtype="<u8")

    def __call__(self, positions: NDArray[np.integer]) -> NDArray[np.int64]:
        """The elements at these positions of the order, shape kept."""
        values = np.asarray(positions).astype(np.uint64)
        domain = 1 << 2 * self._half_bits
        step: Callable[[NDArray[np.uint64]], NDArray[np.uint64]] = self._encrypt
        if domain <= _TABLE_PER_POSITION * values.size:  # the whole domain once is less than the walk
            step = self._encrypt(np.arange(domain, dtype=np.uint64)).take
        flat = step(values.reshape(-1))
        outside = np.flatnonzero(flat >= self.size)
        while len(outside):
            flat[outside] = step(flat[outside])
            outside = outside[flat[outside] >= self.size]
        return flat.astype(np.int64).reshape(values.shape)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        shift = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = values >> shift, values & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << shift) | right


class BlockPermutation:
    """A permutation of range(size) that keeps neighbours close: for storage where a jump is dear.

    The elements are laid on a circle that begins at a place drawn for the epoch, and cut into blocks of
    `block_size` consecutive ones. The blocks are permuted over the whole epoch, and the elements inside every
    window of `window_blocks` blocks; what does not fill a block comes last. So the epoch goes through one window
    after the other, and a window reads `window_blocks` runs of `block_size` elements. A pure function of its
    arguments in O(1) memory, at any position.

    What it costs: two elements of one block are never more than a window apart. In a batch of G elements each
    meets about G / window_blocks others of its own block, where a full permutation gives G * block_size / size.

    Args:
        size: N, at most 2**62.
        seed: of the run.
        epoch: each has its own order.
        block_size: consecutive elements that stay in one window.
        window_blocks: blocks that are shuffled with each other.
    """

    def __init__(self, size: int, seed: int, epoch: int, block_size: int, window_blocks: int) -> None:
        if block_size < 1 or window_blocks < 1:
            raise ValueError(
                f"block_size ({block_size}) and window_blocks ({window_blocks}) must be at least 1"
            )
        self.size = size
        self._block_size = block_size
        self._window = block_size * window_blocks
        self._key = (seed, epoch)
        self._num_blocks = size // block_size  # whole ones
        self._blocks = Permutation(self._num_blocks, seed, epoch, ":blocks") if self._num_blocks else None
        self._start = int.from_bytes(_digest(f"epoch-start:{seed}:{epoch}", 8), "little") % size

    def __call__(self, positions: NDArray[np.integer]) -> NDArray[np.int64]:
        """The elements at these positions of the order, shape kept."""
        wanted = np.asarray(positions).astype(np.int64)
        order = wanted.reshape(-1)
        windows = order // self._window
        shuffled = np.empty_like(order)
        for window in np.unique(windows).tolist():
            inside = windows == window
            first = window * self._window
            permutation = Permutation(min(self._window, self.size - first), *self._key, f":window-{window}")
            shuffled[inside] = first + permutation(order[inside] - first)
        blocks, places = np.divmod(shuffled, self._block_size)
        if self._blocks is not None:
            whole = blocks < self._num_blocks
            blocks[whole] = self._blocks(blocks[whole])
        return ((blocks * self._block_size + places + self._start) % self.size).reshape(wanted.shape)


def _digest(text: str, size: int) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=size).digest()


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014), whose every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
