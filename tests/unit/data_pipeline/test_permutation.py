from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.permutation import Permutation


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
