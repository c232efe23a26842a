"""What the codec makes of a few validation samples, for people to read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

ROWS = 128
"""Positions whose logits are formed at a time."""


class Reconstruction(NamedTuple):
    """A sample's text beside its reconstruction, in which a wrong token is `[wanted|got]`."""

    text: str
    marked: str
    num_tokens: int
    num_wrong: int


@contextmanager
def predictions_of(head: nn.Module | None) -> Iterator[list[Tensor]]:
    """The most likely tokens of every forward pass of an output head made in the meantime, LongTensor [positions].

    Under ZeRO-3 the head's weight is whole only during the forward pass, so this looks on rather than asking again.

    Args:
        head: None looks at nothing.
    """
    found: list[Tensor] = []

    def look(head: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        rows = inputs[0].flatten(0, -2).split(ROWS)
        weight: Any = head.weight
        found.append(torch.cat([F.linear(part, weight).argmax(-1) for part in rows]))

    # Before DeepSpeed's own hook, which gives the weight up.
    hook = None if head is None else head.register_forward_hook(look, prepend=True)
    try:
        yield found
    finally:
        if hook is not None:
            hook.remove()


def reconstruction(wanted: Tensor, predicted: Tensor, tokenizer: PreTrainedTokenizerBase) -> Reconstruction:
    """One sample; LongTensors [tokens], without padding."""
    pairs = list(zip(wanted.tolist(), predicted.tolist(), strict=True))
    marked, right = "", []
    for want, got in pairs:
        if want == got:
            right.append(want)
            continue
        # Together, since a character may be made of several tokens.
        marked += f"{tokenizer.decode(right)}[{tokenizer.decode([want])}|{tokenizer.decode([got])}]"
        right = []
    return Reconstruction(
        str(tokenizer.decode(wanted.tolist())),
        marked + str(tokenizer.decode(right)),
        len(pairs),
        sum(want != got for want, got in pairs),
    )
