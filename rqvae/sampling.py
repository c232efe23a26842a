"""Choosing codes and tokens from logits: the most likely entry, or one drawn at a temperature from the likelier ones.

Every draw takes one number of its own, a function of (seed, row, position, level). So what is drawn depends neither
on what else is in the batch nor on the order of work: streamed, deferred, batched and one by one give the same text.

Shapes: B rows, S new latents, D levels, K tokens per latent, C entries to choose from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rqvae.generation_options import DrawSettings
from rqvae.randomness import Purpose, fine_uniform, sample_seeds

ChooseCodes = Callable[[Tensor, int], Tensor]
"""Logits [B, C] and the level they are of -> LongTensor [B]."""
ChooseTokens = Callable[[Tensor, Tensor], Tensor]
"""Logits [N, V] and the places they are of, LongTensor [N] into the flattened [B, n * K] -> LongTensor [N]."""


def draw(logits: Tensor, numbers: Tensor | None, settings: DrawSettings) -> Tensor:
    """Choose one entry of every row.

    Args:
        logits: [N, C].
        numbers: [N] in (0, 1), fp64; not needed at temperature 0.

    Returns:
        LongTensor [N].
    """
    if settings.temperature == 0 or settings.top_k == 1:
        return logits.argmax(-1)
    assert numbers is not None
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / settings.temperature
    if 0 < settings.top_k < logits.shape[1]:
        least = scaled.topk(settings.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    shares = scaled.softmax(-1)
    if settings.top_p < 1:
        ordered = shares.sort(-1, descending=True).values
        needed = (ordered.cumsum(-1) - ordered < settings.top_p).sum(-1, keepdim=True)
        shares = shares.masked_fill(shares < ordered.gather(1, needed - 1), 0.0)
    # In the order of the entries and not of their shares, which rounding can turn round.
    cumulative = shares.double().cumsum(-1)
    points = numbers[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


def keyed_numbers(seed: int, keys: Tensor, num_positions: int, count: int) -> Tensor:
    """Numbers in (0, 1) for `draw`, each a function of (seed, key of its row, position, index).

    Args:
        keys: LongTensor [B].
        num_positions: S.
        count: numbers for each position.

    Returns:
        [B, S, count] in fp64.
    """
    positions = torch.arange(num_positions, device=keys.device).repeat(len(keys))
    seeds = sample_seeds(seed, positions, keys.repeat_interleave(num_positions))
    return fine_uniform(seeds, Purpose.GENERATION, count).view(len(keys), num_positions, count)


class EndOfText(NamedTuple):
    """Where the end of the text may not be chosen yet."""

    token_id: int
    first_place: int
    """The first place of the new text where it may."""
    places: Sequence[int] | None
    """By level the place in the chunk of the token that a code is; None for codes that are no tokens."""


class Sampler:
    """What is chosen for a batch of rows, position by position.

    Args:
        levels: by level.
        tokens: of the tokens that the codes leave open.
        seed: of the draws.
        keys: LongTensor [B], what the draws of a row are keyed by beside the seed.
        num_latents: S.
        compression_factor: K.
        end_of_text: where it is not wanted; by default it may come anywhere.
        with_likelihood: keep `log_likelihood`.

    Attributes:
        log_likelihood: [B, S] of the codes and open tokens of every latent, under the models as they are: before
            temperature, top-k, top-p and `end_of_text`.
    """

    def __init__(
        self,
        levels: Sequence[DrawSettings],
        tokens: DrawSettings,
        seed: int,
        keys: Tensor,
        num_latents: int,
        compression_factor: int,
        end_of_text: EndOfText | None = None,
        with_likelihood: bool = False,
    ):
        self._levels, self._tokens, self._factor = levels, tokens, compression_factor
        self._end = end_of_text
        self._numbers: Tensor | None = None
        if any(settings.temperature for settings in (*levels, tokens)):
            self._numbers = keyed_numbers(seed, keys, num_latents, len(levels) + compression_factor)
        self.log_likelihood: Tensor | None = None
        if with_likelihood:
            self.log_likelihood = torch.zeros(len(keys), num_latents, device=keys.device)
        self._rows: Tensor | None = None

    def select(self, rows: Tensor) -> None:
        """Go on with these of the present rows: LongTensor [b]. `log_likelihood` keeps all of them."""
        if self._numbers is not None:
            self._numbers = self._numbers[rows]
        if self.log_likelihood is not None:
            self._rows = rows if self._rows is None else self._rows[rows]

    def codes(self, position: int) -> ChooseCodes:
        """For the codes of new latent `position`."""
        numbers = None if self._numbers is None else self._numbers[:, position].unbind(1)

        def choose(logits: Tensor, level: int) -> Tensor:
            settings = self._levels[level]
            given = logits
            if self._end is not None and self._end.places is not None:
                place = position * self._factor + self._end.places[level]
                if place < self._end.first_place:
                    given = logits.index_fill(1, _index(logits, self._end.token_id), -torch.inf)
            chosen = draw(given, None if numbers is None else numbers[level], settings)
            if self.log_likelihood is not None:
                rows = slice(None) if self._rows is None else self._rows
                self.log_likelihood[rows, position] += _log_probability(logits, chosen)
            return chosen

        return choose

    def tokens(self, first: int, count: int, rows: slice) -> ChooseTokens:
        """For the open tokens of `count` new latents from `first` on, in these of the present rows."""
        length, start = count * self._factor, len(self._levels)
        numbers = None
        if self._numbers is not None:
            numbers = self._numbers[rows, first : first + count, start:].flatten()

        def choose(logits: Tensor, places: Tensor) -> Tensor:
            row, place = places // length, places % length
            given = logits
            if self._end is not None and first * self._factor < self._end.first_place:
                too_early = first * self._factor + place < self._end.first_place
                given = logits.clone()
                given[:, self._end.token_id].masked_fill_(too_early, -torch.inf)
            chosen = draw(given, None if numbers is None else numbers[places], self._tokens)
            if self.log_likelihood is not None:
                row = row + rows.start
                row = row if self._rows is None else self._rows[row]
                self.log_likelihood.index_put_(
                    (row, first + place // self._factor), _log_probability(logits, chosen), accumulate=True
                )
            return chosen

        return choose


def _index(like: Tensor, value: int) -> Tensor:
    return torch.tensor([value], device=like.device)


def _log_probability(logits: Tensor, chosen: Tensor) -> Tensor:
    """[N, C] and LongTensor [N] -> [N] in fp32."""
    logits = logits.float()
    return logits.gather(1, chosen[:, None]).squeeze(1) - logits.logsumexp(-1)
