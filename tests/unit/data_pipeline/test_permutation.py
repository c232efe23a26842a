from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.permutation import BlockPermutation, Permutation


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 50))
def test_every_element_once(size: int, seed: int, epoch: int) -> None:
    order = Permutation(size, seed, epoch)(np.arange(size))
    assert np.array_equal(np.sort(order), np.arange(size))


def test_seeds_and_epochs_give_unrelated_orders() -> None:
    size = 5000
    orders = [Permutation(size, s, e)(np.arange(size)) for s, e in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    for one in range(4):
        assert abs(np.corrcoef(np.arange(size), orders[one])[0, 1]) < 0.06
        for other in range(one):
            assert (orders[one] == orders[other]).mean() < 0.005


@pytest.mark.parametrize("size", [1, 5, 16, 17, 1000])
def test_all_at_once_and_one_by_one_are_the_same(size: int) -> None:
    permutation = Permutation(size, 3, 1)
    at_once = permutation(np.arange(size))
    assert at_once.tolist() == [int(permutation(np.array([place]))[0]) for place in range(size)]


def test_small_sizes_reach_all_orders() -> None:
    seen = {tuple(Permutation(3, seed, 0)(np.arange(3)).tolist()) for seed in range(200)}
    assert len(seen) == 6


def test_positions_are_independent_of_each_other_and_of_shape() -> None:
    permutation = Permutation(10**9, 5, 2)
    block = permutation(np.arange(10**8, 10**8 + 64).reshape(8, 8))
    assert block.shape == (8, 8)
    assert block[3, 4] == permutation(np.array([10**8 + 28]))[0]
    assert block.max() < 10**9 and len(np.unique(block)) == 64


def test_the_order_is_part_of_the_format() -> None:
    # a change here breaks the resuming of every run there is
    assert Permutation(1000, 1, 2)(np.arange(6)).tolist() == [279, 39, 416, 414, 635, 709]


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="between 1 and"):
        Permutation(0, 0, 0)


@settings(max_examples=80, deadline=None)
@given(
    size=st.integers(1, 2000),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 50),
    block=st.integers(1, 300),
    window=st.integers(1, 30),
)
def test_blocks_give_every_element_once(size: int, seed: int, epoch: int, block: int, window: int) -> None:
    order = BlockPermutation(size, seed, epoch, block, window)(np.arange(size))
    assert np.array_equal(np.sort(order), np.arange(size))


def test_a_window_of_blocks_reads_few_runs_and_is_shuffled_inside() -> None:
    size, block, window = 10_000, 32, 10
    order = BlockPermutation(size, 1, 0, block, window)(np.arange(size))
    starts = []
    for first in range(0, size - block * window, block * window):
        inside = np.sort(order[first : first + block * window])
        runs = 1 + int((np.diff(inside) > 1).sum())
        assert runs <= window + 1  # one more where the circle ends in a block
        starts.append(inside[0])
    assert abs(np.corrcoef(np.arange(len(starts)), starts)[0, 1]) < 0.5  # the blocks come from anywhere
    steps = np.abs(np.diff(order[: block * window]))
    assert (steps == 1).mean() < 0.05  # and their elements are not in order


def test_blocks_of_epochs_differ_also_in_what_comes_last() -> None:
    orders = [BlockPermutation(1003, 4, epoch, 100, 3)(np.arange(1003)) for epoch in range(8)]
    assert len({tuple(order[-3:].tolist()) for order in orders}) == 8
    boundaries = {int(order[:300].min()) % 100 for order in orders}
    assert len(boundaries) > 4  # blocks are cut elsewhere, so neighbours are not the same for ever


@pytest.mark.parametrize(
    "make", [lambda n: Permutation(n, 3, 1), lambda n: BlockPermutation(n, 3, 1, 256, 1024)]
)
def test_a_billion_elements_cost_no_memory(make: object) -> None:
    tracemalloc.start()
    order = make(10**9)  # type: ignore[operator]
    for first in (0, 123_456_789, 10**9 - 4096):
        block = order(np.arange(first, first + 4096))
        assert block.min() >= 0 and block.max() < 10**9 and len(np.unique(block)) == 4096
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000, peak  # bytes; a list of the samples would take 8 * 10**9


def test_block_positions_do_not_depend_on_what_else_is_asked_for() -> None:
    order = BlockPermutation(10**9, 5, 2, 256, 64)
    block = order(np.arange(10**8, 10**8 + 64).reshape(8, 8))
    assert block.shape == (8, 8)
    assert block[3, 4] == order(np.array([10**8 + 28]))[0]


def test_the_order_in_blocks_is_part_of_the_format() -> None:
    assert BlockPermutation(1000, 1, 2, 10, 4)(np.arange(6)).tolist() == [23, 439, 757, 440, 438, 760]


def test_blocks_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BlockPermutation(10, 0, 0, 0, 4)
