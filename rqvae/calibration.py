"""Likelihoods at other temperatures of the output heads, for calibration (Guo 2017, section 4.2).

A model's likelihood at a temperature is that of another model, so a temperature must be fitted on other text than the
one it is reported on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from rqvae.linear_head import HeadOutput, LinearHead

TEMPERATURES = tuple(2 ** (step / 3) for step in range(-3, 13))
"""Tried by `best_temperature`: 0.5 to 16, a factor of 1.26 apart."""


class OtherTemperatures:
    """While it is entered, scores whatever the heads score at other temperatures too.

    The body of the model runs once; every temperature costs one more pass of the head.

    Args:
        heads: of one model; a head that serves several levels may be named several times.
        temperatures: for every scoring call of one forward pass of the model (one per level), those to try.
    """

    def __init__(self, heads: Iterable[LinearHead], temperatures: Sequence[Sequence[float]]):
        self._heads = list({id(head): head for head in heads}.values())
        self._temperatures = temperatures
        self._recorded: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self._handles = [head.register_forward_hook(self._record) for head in self._heads]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def take(self) -> list[Tensor]:
        """What the last forward pass scored: for every call [temperatures, N] nats, 0 where it counts for nothing."""
        recorded, self._recorded = self._recorded, []
        return recorded

    def _record(self, head: LinearHead, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, HeadOutput):
            return  # logits were asked for
        hidden, *rest = inputs
        tried = self._temperatures[len(self._recorded)]
        with torch.no_grad():
            # `forward` itself runs no hooks.
            self._recorded.append(torch.stack([head.forward(hidden / t, *rest).nats for t in tried]))  # type: ignore[union-attr]


def best_temperature(nats: Sequence[float]) -> float:
    """The temperature with the least nats, from those at `TEMPERATURES`: the vertex of the parabola through the best
    of them and its neighbours, in log temperature."""
    place = min(range(len(nats)), key=nats.__getitem__)
    if place in (0, len(nats) - 1):
        return TEMPERATURES[place]
    before, at, after = nats[place - 1 : place + 2]
    curvature = before - 2 * at + after
    shift = 0.5 * (before - after) / curvature if curvature > 0 else 0.0
    return TEMPERATURES[place] * math.exp(shift * math.log(TEMPERATURES[1] / TEMPERATURES[0]))
