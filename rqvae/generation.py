"""Text generation in latent space: D codes per step, K tokens per latent, decoded in parallel.

`generation_options.py` says what can be asked for, `generation_loop.py` does the work, `sampling.py` chooses, and
`text_stream.py` makes text of tokens that come a few at a time.

Shapes: B batch, S latents, D levels, K tokens per latent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rqvae.codec import Codec
from rqvae.generated_row import GeneratedRow
from rqvae.generation_checks import check_length, check_options, check_pair, compile_depth_loop
from rqvae.generation_loop import Block, GenerationLoop, StopWatch, Timing
from rqvae.generation_options import DECODE_BLOCK, GenerationOptions
from rqvae.latent_model import LatentModel
from rqvae.sampling import EndOfText, Sampler
from rqvae.token_codec import TokenCodec

__all__ = ["Generation", "LatentGenerator", "Piece", "Timing", "check_pair"]


class Generation(NamedTuple):
    """Result of `LatentGenerator.generate_tokens`."""

    token_ids: list[list[int]]
    """New tokens per prompt: before end-of-text, up to the one that completes a stop string, at most
    `max_new_tokens`."""
    codes: Tensor
    """LongTensor [B, S, D] generated codes, those behind an end included; -1 where a row had left the batch."""
    timing: Timing


class Piece(NamedTuple):
    """What `LatentGenerator.stream` gives."""

    row: int
    """Which prompt."""
    text: str
    """Follows what came before for this prompt."""


class LatentGenerator:
    """Generates text with a codec and the latent model trained on its codes.

    A prompt is padded on the left to a whole number of chunks: every phase of the chunk grid occurs in
    training, so its length does not matter.

    A latent model that reads tokens is fed those decoded from its codes, so that every latent is decoded before
    the next one is drawn. It cannot decode deferred, many latents at a time: its speed is the streaming speed.

    Args:
        compile: run the depth transformer's step as one launch (`depth_step.py`). On a CPU the first text waits for
            the compiler, as does the first with another number of rows.

    Raises:
        ValueError: the latent model was trained on the codes of another codec, the codec sees the future, or there is
            nothing to compile, or nothing to compile it with.
    """

    def __init__(
        self,
        vae: Codec,
        rq_transformer: LatentModel,
        tokenizer: PreTrainedTokenizerBase,
        compile: bool = False,
    ):
        if vae.config.sees_future:
            raise ValueError(
                f"codes made with resample: {vae.config.resample} depend on the text after them, so they cannot be "
                "generated in order; train a codec with resample: chunked"
            )
        check_pair(vae, rq_transformer)
        if compile:
            compile_depth_loop(rq_transformer)
        self.vae = vae.eval()
        self.rq_transformer = rq_transformer.eval()
        self.tokenizer = tokenizer
        self.compression_factor = vae.config.compression_factor

    def generate(
        self,
        prompts: list[str],
        max_new_tokens: int = 64,
        temperature: float | Sequence[float] = 0.0,
        seed: int = 0,
        **settings: Any,
    ) -> list[str]:
        """Continue prompts; the returned texts do not repeat them.

        Args:
            temperature: of every code, and of the tokens that the codes leave open; 0 is greedy. A list has one for
                every level.
            seed: of the sampling; the same seed gives the same texts.
            settings: further fields of `GenerationOptions`.

        Raises:
            ValueError: the options do not fit each other, or the models.
        """
        options = GenerationOptions(max_new_tokens, temperature, seed, **settings)
        rows, _, _ = self._generate(self._token_ids(prompts), options, is_timed=False)
        for row in rows:
            row.end()
        return [row.text() for row in rows]

    def stream(
        self,
        prompts: list[str],
        max_new_tokens: int = 64,
        temperature: float | Sequence[float] = 0.0,
        seed: int = 0,
        **settings: Any,
    ) -> Iterator[Piece]:
        """As `generate`, but text comes as soon as it is decoded; together a prompt's pieces are what `generate`
        returns for it. No piece ends within a character, and what may begin a stop string is held back.

        Raises:
            ValueError: as `generate`, or an option that needs the whole text first.
        """
        options = GenerationOptions(max_new_tokens, temperature, seed, **settings)
        if options.best_of > 1 or options.mode == "deferred":
            raise ValueError("best_of, mode deferred: need the whole text before any is shown; use generate")
        options = replace(options, mode="streaming")
        loop, _ = self._loop(self._token_ids(prompts), options, StopWatch(self._device, False))
        return self._pieces(loop, self._new_rows(len(prompts), options, with_text=True))

    def generate_tokens(
        self,
        prompt_ids: list[list[int]],
        max_new_tokens: int,
        temperature: float | Sequence[float] = 0.0,
        seed: int = 0,
        stop_at_end_of_text: bool = True,
        **settings: Any,
    ) -> Generation:
        """Continue token sequences, which may be empty and of different lengths; arguments and errors as in
        `generate`, and the result is timed."""
        options = GenerationOptions(
            max_new_tokens, temperature, seed, stop_at_end_of_text=stop_at_end_of_text, **settings
        )
        rows, codes, timing = self._generate(prompt_ids, options, is_timed=True)
        return Generation([row.ids for row in rows], codes, timing)

    # Work ----------------------------------------------------------------------------------------------

    def _generate(
        self, prompt_ids: list[list[int]], options: GenerationOptions, is_timed: bool
    ) -> tuple[list[GeneratedRow], Tensor, Timing]:
        watch = StopWatch(self._device, is_timed)
        candidates = options.best_of
        loop, sampler = self._loop(prompt_ids, options, watch)
        rows = self._new_rows(len(prompt_ids) * candidates, options, with_text=False)
        blocks = []
        for block in loop.blocks():
            blocks.append(block)
            loop.finish(self._extend(rows, block))
        num_latents = blocks[-1].first + blocks[-1].codes.shape[1]
        codes = blocks[0].codes.new_full((len(rows), num_latents, blocks[0].codes.shape[2]), -1)
        for block in blocks:
            codes[block.rows, block.first : block.first + block.codes.shape[1]] = block.codes
        if candidates > 1:
            assert sampler.log_likelihood is not None
            scores = [
                sum(values[: row.num_latents]) / row.num_latents
                for row, values in zip(rows, sampler.log_likelihood.tolist(), strict=True)
            ]
            best = [
                max(range(start, start + candidates), key=scores.__getitem__)
                for start in range(0, len(rows), candidates)
            ]
            rows, codes = [rows[index] for index in best], codes[best]
        return rows, codes, watch.timing()

    def _pieces(self, loop: GenerationLoop, rows: list[GeneratedRow]) -> Iterator[Piece]:
        for block in loop.blocks():
            loop.finish(self._extend(rows, block))
            yield from self._new_text(rows, block.rows)
        for row in rows:
            row.end()
        yield from self._new_text(rows, range(len(rows)))

    def _new_text(self, rows: list[GeneratedRow], indices: Iterable[int]) -> Iterator[Piece]:
        for index in indices:
            if text := rows[index].new_text():
                yield Piece(index, text)

    def _extend(self, rows: list[GeneratedRow], block: Block) -> list[int]:
        """Give rows their new tokens; which of them have ended?"""
        drawn = zip(block.rows, block.tokens.tolist(), strict=True)
        return [index for index, tokens in drawn if rows[index].extend(tokens)]

    @torch.inference_mode()
    def _loop(
        self, prompt_ids: list[list[int]], options: GenerationOptions, watch: StopWatch
    ) -> tuple[GenerationLoop, Sampler]:
        if not prompt_ids:
            raise ValueError("needs at least one prompt")
        check_options(options, self.vae, self.rq_transformer)
        check_length(options, max(map(len, prompt_ids)), self.vae, self.rq_transformer)
        factor, levels = self.compression_factor, self.vae.config.codebook_levels
        num_new = math.ceil(options.max_new_tokens / factor)
        keys = list(options.row_keys or range(len(prompt_ids)))
        if len(keys) != len(prompt_ids):
            raise ValueError(f"row_keys: {len(keys)} of them for {len(prompt_ids)} prompts")
        ends_early = self._end_of_text(options) is not None or bool(options.stop)
        decode_every = options.decode_block or (DECODE_BLOCK if ends_early else num_new)
        if self.rq_transformer.config.reads_tokens or options.mode == "streaming":
            decode_every = 1
        candidates = range(options.best_of)
        keys = [key + (candidate << 40) for key in keys for candidate in candidates]
        prompt_ids = [ids for ids in prompt_ids for _ in candidates]
        sampler = Sampler(
            options.by_level(levels),
            options.of_tokens(levels),
            options.seed,
            torch.tensor(keys, device=self._device),
            num_new,
            factor,
            self._unwanted_end(options),
            with_likelihood=options.best_of > 1,
        )
        loop = GenerationLoop(
            self.vae,
            self.rq_transformer,
            sampler,
            watch,
            *self._pad_prompts(prompt_ids),
            num_new,
            options.num_levels or levels,
            decode_every,
            options.decode_rows or len(keys),
        )
        return loop, sampler

    def _end_of_text(self, options: GenerationOptions) -> int | None:
        return self.tokenizer.eos_token_id if options.stop_at_end_of_text else None

    def _unwanted_end(self, options: GenerationOptions) -> EndOfText | None:
        token_id = self._end_of_text(options)
        if token_id is None or options.min_new_tokens == 0:
            return None
        places = self.vae.places if isinstance(self.vae, TokenCodec) else None
        return EndOfText(token_id, options.min_new_tokens, places)

    def _new_rows(self, count: int, options: GenerationOptions, with_text: bool) -> list[GeneratedRow]:
        end = self._end_of_text(options)
        return [
            GeneratedRow(self.tokenizer, options, end, self.compression_factor, with_text)
            for _ in range(count)
        ]

    @property
    def _device(self) -> torch.device:
        return self.rq_transformer.device

    def _token_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        if isinstance(prompts, str):
            raise ValueError("prompts: give a list of texts, not one text")
        return [self.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]

    def _pad_prompts(self, prompt_ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Pad on the left to whole chunks and to the longest prompt: ids and documents, each [B, P * K]."""
        longest = max(len(ids) for ids in prompt_ids)
        length = math.ceil(longest / self.compression_factor) * self.compression_factor
        input_ids = torch.zeros(len(prompt_ids), length, dtype=torch.long)
        documents = torch.zeros_like(input_ids)
        for row, ids in enumerate(prompt_ids):
            if ids:
                input_ids[row, length - len(ids) :] = torch.tensor(ids)
                documents[row, length - len(ids) :] = 1
        return input_ids.to(self._device), documents.to(self._device)
