"""The order of an epoch: a bijection of range(N) that is computed where it is needed and stored nowhere."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8


class Permutation:
    """A pseudo-random permutation of range(size), a pure function of (size, seed, epoch), in O(1) memory.

    A Feistel network over the smallest power of 4 that holds `size`, with cycle walking for the values that
    fall outside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", method 2): fewer than 4
    passes on average.

    Args:
        size: N, at most 2**62.
        seed: of the run.
        epoch: each has its own order.
    """

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        if not 0 < size <= 1 << 62:
            raise ValueError(f"a permutation needs between 1 and 2**62 elements, not {size}")
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        digest = hashlib.blake2b(f"epoch-order:{seed}:{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8")

    def __call__(self, positions: NDArray[np.integer]) -> NDArray[np.int64]:
        """The elements at these positions of the order, shape kept."""
        values = np.asarray(positions).astype(np.uint64)
        flat = self._encrypt(values.reshape(-1))
        outside = np.flatnonzero(flat >= self.size)
        while len(outside):
            flat[outside] = self._encrypt(flat[outside])
            outside = outside[flat[outside] >= self.size]
        return flat.astype(np.int64).reshape(values.shape)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        shift = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = values >> shift, values & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << shift) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014), whose every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
