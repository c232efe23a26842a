"""Weights of a mixture as whole numbers. Free of numpy and torch, so that a configuration can be checked with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

MAX_PERIOD = 100_000
"""Longest period of a mixture; it is kept in memory, 10 bytes a position."""


def find_quotas(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the proportions of the weights.

    Raises:
        ValueError: their sum is above `MAX_PERIOD`.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period > MAX_PERIOD:
        raise ValueError(
            f"the weights {', '.join(map(str, weights))} repeat after {period} samples only, more than "
            f"{MAX_PERIOD}: round them to fewer digits"
        )
    return [int(share * period) for share in shares]
