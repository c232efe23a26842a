"""The loop of generation: codes drawn latent by latent, decoded a block at a time; rows that end leave the batch.

Shapes: B rows present, P prompt latents, S new latents, D levels, K tokens per latent.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rqvae.codec import Codec
from rqvae.latent_model import LatentModel
from rqvae.sampling import Sampler


class Timing(NamedTuple):
    """Seconds spent in the parts of a generation."""

    encode_s: float
    spatial_s: float
    depth_s: float
    decode_s: float


class StopWatch:
    """Accumulates seconds by part; waits for the device, so that parts are told apart on a GPU too.

    Args:
        runs: False measures nothing, and waits for nothing.
    """

    def __init__(self, device: torch.device, runs: bool):
        self._device, self._runs = device, runs
        self._seconds = dict.fromkeys(("encode", "spatial", "depth", "decode"), 0.0)
        self._last = time.perf_counter()

    def add(self, part: str) -> None:
        """What has passed since the last call belongs to `part`."""
        if not self._runs:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._seconds[part] += now - self._last
        self._last = now

    def skip(self) -> None:
        """What has passed since the last call belongs to none of the parts."""
        self._last = time.perf_counter()

    def timing(self) -> Timing:
        """The sums; not a number where nothing was measured."""
        seconds = self._seconds if self._runs else dict.fromkeys(self._seconds, float("nan"))
        return Timing(**{f"{part}_s": value for part, value in seconds.items()})


class Block(NamedTuple):
    """Latents that were drawn and decoded."""

    rows: list[int]
    """Which rows, counted as the loop began with them."""
    first: int
    """The first of the latents, counted among the new ones."""
    codes: Tensor
    """LongTensor [B, n, num_levels]."""
    tokens: Tensor
    """LongTensor [B, n * K], negative where there is no token."""


class GenerationLoop:
    """Continues prompts by `num_new` latents.

    Args:
        input_ids: LongTensor [B, P * K], padded on the left.
        token_documents: LongTensor [B, P * K], 1 at tokens of the prompt, 0 at padding.
        num_new: S.
        num_levels: levels drawn of every latent.
        decode_every: latents between two decodes.
        decode_rows: rows decoded at a time.
    """

    def __init__(
        self,
        codec: Codec,
        latent_model: LatentModel,
        sampler: Sampler,
        watch: StopWatch,
        input_ids: Tensor,
        token_documents: Tensor,
        num_new: int,
        num_levels: int,
        decode_every: int,
        decode_rows: int,
    ):
        self._codec, self._sampler, self._watch = codec, sampler, watch
        self._num_new, self._num_levels, self._decode_every = num_new, num_levels, decode_every
        self._reads_tokens = latent_model.config.reads_tokens
        batch, factor = len(input_ids), codec.config.compression_factor
        documents = token_documents.view(batch, -1, factor).amax(-1)  # [B, P]
        self._num_prompt = documents.shape[1]
        if self._num_prompt:
            codes = codec.encode(input_ids, document_ids=token_documents)
        else:
            codes = documents.new_zeros(batch, 0, codec.config.codebook_levels)
        watch.add("encode")
        text = {"input_ids": input_ids, "token_document_ids": token_documents} if self._reads_tokens else {}
        self._steps = latent_model.begin(codes, documents, num_new, **text)
        watch.add("spatial")
        self._device = input_ids.device
        self._rows = list(range(batch))
        self._finished: set[int] = set()
        self._groups = [
            (
                min(decode_rows, batch - start),
                codec.new_decoder_cache(min(decode_rows, batch - start), self._num_prompt + num_new),
            )
            for start in range(0, batch, decode_rows)
        ]
        # Latents that wait to be decoded. The prompt's come first, at the levels that all of them are decoded from.
        self._codes = [codes[..., :num_levels]]
        self._documents = [documents]

    def finish(self, rows: Collection[int]) -> None:
        """These rows, counted as the loop began with them, have ended: nothing more is computed for them."""
        self._finished.update(rows)

    @torch.inference_mode()
    def blocks(self) -> Iterator[Block]:
        """Draw and decode until all rows have ended, or all latents are drawn."""
        decoded = 0
        for position in range(self._num_new):
            drawn = self._steps.draw(self._sampler.codes(position), self._num_levels)
            self._codes.append(drawn[:, None])
            self._documents.append(torch.ones_like(drawn[:, :1]))
            self._watch.add("depth")
            is_last = position + 1 == self._num_new
            tokens: Tensor | None = None
            if is_last or (position + 1) % self._decode_every == 0:
                codes, tokens = self._decode(decoded)
                yield Block(self._rows, decoded, codes, tokens)
                self._watch.skip()
                decoded = position + 1
                if len(self._finished) == len(self._rows):
                    return
                if self._finished and not is_last:
                    kept = self._leave()
                    drawn, tokens = drawn[kept], tokens[kept]
            if not is_last:
                text = (tokens.clamp(min=0), tokens >= 0) if self._reads_tokens and tokens is not None else ()
                self._steps.append(drawn, *text)
                self._watch.add("spatial")

    def _decode(self, first: int) -> tuple[Tensor, Tensor]:
        """Codes and tokens of the new latents that wait, from `first` on."""
        codes, documents = torch.cat(self._codes, dim=1), torch.cat(self._documents, dim=1)
        num_known = 0 if first else self._num_prompt
        count = codes.shape[1] - num_known
        tokens, start = [], 0
        for size, cache in self._groups:
            rows = slice(start, start + size)
            choose = self._sampler.tokens(first, count, rows)
            tokens.append(self._codec.decode_block(codes[rows], documents[rows], cache, choose, num_known))
            start += size
        self._codes, self._documents = [], []
        self._watch.add("decode")
        return codes[:, num_known:], torch.cat(tokens)

    def _leave(self) -> Tensor:
        """Let go of the rows that have ended: which of the present rows remain, LongTensor [b]."""
        kept = [index for index, row in enumerate(self._rows) if row not in self._finished]
        groups: list[tuple[int, Any]] = []
        start = 0
        for size, cache in self._groups:
            inside = [index - start for index in kept if start <= index < start + size]
            start += size
            if cache is not None and 0 < len(inside) < size:
                cache.select(torch.tensor(inside, device=self._device))
            if inside:
                groups.append((len(inside), cache))
        self._groups = groups
        self._rows = [self._rows[index] for index in kept]
        self._finished.clear()
        rows = torch.tensor(kept, device=self._device)
        self._steps.select(rows)
        self._sampler.select(rows)
        return rows
