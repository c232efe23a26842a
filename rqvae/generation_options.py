"""What can be asked of a generation. Free of torch, so that a command line is checked before models are loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Mode = Literal["auto", "deferred", "streaming"]

DECODE_BLOCK = 32
"""Latents generated between two decodes. Decoding many positions at once is nearly free, but the end of a
text only shows once it is decoded."""


class DrawSettings(NamedTuple):
    """How one code or token is chosen."""

    temperature: float = 0.0
    """0 takes the most likely entry."""
    top_k: int = 0
    """Entries that take part, the likeliest first (Fan 2018, section 5.4); what is as likely as the last of them does
    too. 0: all."""
    top_p: float = 1.0
    """The fewest, likeliest entries that hold this share of the probability take part (Holtzman 2020, section 3.1);
    what is as likely as the last of them does too."""


@dataclass(frozen=True)
class GenerationOptions:
    """Settings of `LatentGenerator`.

    `temperature`, `top_k` and `top_p` are one value, or a list with one for every level of the codes. The tokens that
    the codes leave open are drawn as the last level is, but at `token_temperature` where that is given.

    Raises:
        ValueError: a value is out of range, or contradicts another.
    """

    max_new_tokens: int = 64
    temperature: float | Sequence[float] = 0.0
    """0 is greedy."""
    seed: int = 0
    """Of the draws: a text is a function of the seed, its prompt and its row's key."""
    top_k: int | Sequence[int] = 0
    """See `DrawSettings`."""
    top_p: float | Sequence[float] = 1.0
    """See `DrawSettings`."""
    token_temperature: float | None = None
    """Of the tokens that the codes leave open."""
    row_keys: Sequence[int] | None = None
    """What the draws of every row are keyed by, beside the seed; by default its index in the call. Rows that keep
    their keys keep their texts, whatever they are generated together with."""
    mode: Mode = "auto"
    """deferred: latents first, text decoded from `decode_block` of them at a time, which is fastest. streaming: every
    latent is decoded before the next one is drawn, as a latent model that reads tokens needs it. auto: deferred where
    that can be. All give the same text."""
    stop_at_end_of_text: bool = True
    stop: Sequence[str] = ()
    """Strings at which a text ends; they are not part of it."""
    min_new_tokens: int = 0
    """No end of text is chosen, and no stop string counts, within so many tokens."""
    num_levels: int | None = None
    """Draw the first levels of every latent only: faster, and coarser. For residual codes, best those of a codec
    trained with level dropout; the latent model, trained on all levels, reads the missing ones as zero."""
    best_of: int = 1
    """Candidates drawn for every prompt; the one with the highest log-likelihood per latent is returned, under the
    models at temperature 1, tokens that the codes leave open included."""
    decode_block: int | None = None
    """Latents decoded at a time in deferred decoding; by default 32, or all where nothing can end a text early."""
    decode_rows: int | None = None
    """Rows decoded at a time; by default all. Fewer take less memory."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: {self.max_new_tokens} is not at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: {self.min_new_tokens} is not between 0 and max_new_tokens={self.max_new_tokens}"
            )
        if isinstance(self.stop, str) or not all(isinstance(stop, str) and stop for stop in self.stop):
            raise ValueError("stop: give a list of strings, none of them empty")
        if self.mode not in ("auto", "deferred", "streaming"):
            raise ValueError(f"mode: {self.mode!r} is not one of auto, deferred, streaming")
        for name in ("best_of", "num_levels", "decode_block", "decode_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} is not at least 1")
        if self.decode_block is not None and self.mode == "streaming":
            raise ValueError("decode_block: mode streaming decodes every latent at once; use mode deferred")
        temperatures, top_ks, top_ps = map(_listed, (self.temperature, self.top_k, self.top_p))
        tokens = [] if self.token_temperature is None else [self.token_temperature]
        if not all(0 <= value < math.inf for value in [*temperatures, *tokens]):
            raise ValueError("temperature, token_temperature: must be finite, and 0 or more")
        if not all(isinstance(value, int) and value >= 0 for value in top_ks):
            raise ValueError("top_k: must be whole numbers, 0 (all entries) or more")
        if not all(0 < value <= 1 for value in top_ps):
            raise ValueError("top_p: must be above 0, and at most 1 (all entries)")
        if self.best_of > 1 and not any([*temperatures, *tokens]):
            raise ValueError("best_of: at temperature 0 all candidates are the same; raise temperature")

    def by_level(self, num_levels: int) -> list[DrawSettings]:
        """How the codes of every level are chosen.

        Raises:
            ValueError: a list has not one entry for every level.
        """
        columns = [self._column(name, num_levels) for name in DrawSettings._fields]
        return [DrawSettings(*values) for values in zip(*columns, strict=True)]

    def of_tokens(self, num_levels: int) -> DrawSettings:
        """How the tokens that the codes leave open are chosen."""
        last = self.by_level(num_levels)[-1]
        return last if self.token_temperature is None else last._replace(temperature=self.token_temperature)

    def _column(self, name: str, num_levels: int) -> list[Any]:
        value = getattr(self, name)
        if not isinstance(value, Sequence):
            return [value] * num_levels
        if len(value) != num_levels:
            raise ValueError(
                f"{name}: lists {len(value)} values for {num_levels} levels; give one, or one for every level"
            )
        return list(value)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) else [value]
