"""Bootstrap intervals over documents (Efron 1979): what another choice of test documents would have given."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000


def bootstrap(
    sums: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    seed: int = 0,
    level: float = 0.95,
) -> list[float]:
    """The percentile interval of a statistic of sums over documents.

    Tokens of a document depend on each other, so that whole documents are drawn.

    Args:
        sums: [documents, m], each document's part of the sums.
        statistic: [r, m] sums of resampled documents -> [r].

    Returns:
        Lower and upper end.
    """
    generator = np.random.default_rng(seed)
    count = len(sums)
    drawn = np.stack(
        [np.bincount(generator.integers(count, size=count), minlength=count) @ sums for _ in range(RESAMPLES)]
    )
    values = statistic(drawn)
    return [float(end) for end in np.quantile(values, [(1 - level) / 2, (1 + level) / 2])]
