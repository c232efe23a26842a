"""Which dataset of a mixture each position of the global order comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipeline.weights import find_quotas


class Interleave:
    """Assigns the positions 0, 1, 2, ... to sources so that every prefix has the weights' proportions.

    Among the first n positions source s has fewer than one more or less than w_s * n, for every n, with w_s its
    weight over the sum of the weights (Tijdeman 1980, "The chairman assignment problem": at most
    1 - 1 / (2S - 2) for S sources). The weights are taken as exact decimals, so the assignment repeats after their
    common denominator; one period is kept, 10 bytes a position, and any position is found at once.

    Attributes:
        quotas: positions of each source in a period.
        period: their sum.

    Raises:
        ValueError: see `find_quotas`.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.quotas = find_quotas(weights)
        self.period = sum(self.quotas)
        sources = _one_period(self.quotas)
        self._sources = np.array(sources, dtype=np.int16)
        self._before = np.empty(self.period, dtype=np.int64)  # positions of the same source before this one
        for source, quota in enumerate(self.quotas):
            self._before[self._sources == source] = np.arange(quota)

    def __call__(self, positions: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(source, how many positions of that source come before it) of each position."""
        periods, places = np.divmod(np.asarray(positions, dtype=np.int64), self.period)
        sources = self._sources[places].astype(np.int64)
        return sources, periods * np.array(self.quotas)[sources] + self._before[places]

    def counts(self, position: int) -> list[int]:
        """How many positions before this one each source has."""
        periods, place = divmod(position, self.period)
        rest = np.bincount(self._sources[:place], minlength=len(self.quotas)).tolist()
        return [periods * quota + more for quota, more in zip(self.quotas, rest, strict=True)]


def _one_period(quotas: Sequence[int]) -> list[int]:
    """Tijdeman's algorithm in whole numbers: of the sources that may be taken, the one whose time is up first."""
    period, slack = sum(quotas), max(1, 2 * len(quotas) - 2)
    taken = [0] * len(quotas)
    order = []
    for position in range(1, period + 1):
        best, best_deadline = -1, math.inf
        for source, quota in enumerate(quotas):
            ahead = quota * position - taken[source] * period  # (w n - count) * period
            if ahead * slack >= period or len(quotas) == 1:
                # the first position at which w n - count would exceed 1 - 1 / slack
                deadline = (taken[source] * slack + slack - 1) * period // (quota * slack) + 1
                if deadline < best_deadline:
                    best, best_deadline = source, deadline
        taken[best] += 1
        order.append(best)
    return order
