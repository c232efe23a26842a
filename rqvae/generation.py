"""Text generation in latent space: D codes per step, K tokens per latent, decoded in parallel.

Shapes: B batch, S latents, D levels, K tokens per latent.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rqvae.layers import TransformerCache, causal_document_mask
from rqvae.rq_transformer import RQTransformer
from rqvae.rq_vae import RQVAE

DECODE_BLOCK = 32
"""Latents generated between two decodes. Decoding many positions at once is nearly free, but the end of a
text only shows once it is decoded."""


class Timing(NamedTuple):
    """Seconds spent in the parts of a generation."""

    encode_s: float
    spatial_s: float
    depth_s: float
    decode_s: float


class Generation(NamedTuple):
    """Result of `LatentGenerator.generate_tokens`."""

    token_ids: list[list[int]]
    """New tokens per prompt, cut before end-of-text and at `max_new_tokens`."""
    codes: Tensor
    """LongTensor [B, S, D] generated codes, those behind an end of text included."""
    timing: Timing


def sample(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Draw from [B, C] logits: LongTensor [B]. Temperature 0 takes the most likely entry."""
    if temperature == 0:
        return logits.argmax(-1)
    shares = (logits.float() / temperature).softmax(-1)
    return torch.multinomial(shares, 1, generator=generator).squeeze(1)


class LatentGenerator:
    """Generates text with a codec and the latent model trained on its codes.

    A prompt is padded on the left to a whole number of chunks: every phase of the chunk grid occurs in
    training, so its length does not matter.

    Raises:
        ValueError: the latent model was trained on the codes of another codec.
    """

    def __init__(self, vae: RQVAE, rq_transformer: RQTransformer, tokenizer: PreTrainedTokenizerBase):
        expected = rq_transformer.config.codec_hash
        if expected is not None and expected != (actual := vae.codec_hash()):
            raise ValueError(
                f"the RQ-transformer was trained on codes of codec {expected[:12]}, this codec is "
                f"{actual[:12]}; train it on codes from this codec (launch/precompute_codes.py)"
            )
        self.vae = vae.eval()
        self.rq_transformer = rq_transformer.eval()
        self.tokenizer = tokenizer
        self.compression_factor = vae.config.compression_factor

    def generate(
        self, prompts: list[str], max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """Continue prompts; the returned texts do not repeat them.

        Args:
            temperature: of every code; 0 is greedy.
            seed: of the sampling; the same seed gives the same texts.
        """
        prompt_ids = [self.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        result = self.generate_tokens(prompt_ids, max_new_tokens, temperature, seed)
        return [str(self.tokenizer.decode(ids)) for ids in result.token_ids]

    @torch.inference_mode()
    def generate_tokens(
        self,
        prompt_ids: list[list[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        stop_at_end_of_text: bool = True,
    ) -> Generation:
        """Continue token sequences, which may be empty and of different lengths.

        Raises:
            ValueError: no prompts, or `max_new_tokens` < 1.
        """
        if not prompt_ids or max_new_tokens < 1:
            raise ValueError("needs at least one prompt and max_new_tokens >= 1")
        stop_at_end_of_text &= self.tokenizer.eos_token_id is not None
        watch = _StopWatch(self._device)
        input_ids, token_documents = self._pad_prompts(prompt_ids)
        documents = token_documents.view(len(prompt_ids), -1, self.compression_factor).amax(-1)  # [B, P]
        if documents.shape[1]:
            prompt_codes = self.vae.encode(input_ids, document_ids=token_documents)
        else:
            levels = self.vae.config.codebook_levels
            prompt_codes = documents.new_zeros(len(prompt_ids), 0, levels)
        watch.add("encode")

        num_new = math.ceil(max_new_tokens / self.compression_factor)
        num_prompt = documents.shape[1]
        generator = torch.Generator(self._device).manual_seed(seed)
        spatial = self.rq_transformer.spatial
        decoder_cache = self.vae.decoder.new_cache(len(prompt_ids), num_prompt + num_new)
        # Input i of the spatial transformer is the latent before position i, so there is one more input
        # than prompt latents: the start vector, in front of every row's first latent.
        cache = spatial.block.new_cache(len(prompt_ids), num_prompt + num_new, spatial.start)
        context, key_documents, next_position = self._prefill(prompt_codes, documents, cache)
        watch.add("spatial")

        depth_cache = self.rq_transformer.depth.new_cache(len(prompt_ids))
        blocks: list[Tensor] = []
        tokens: list[Tensor] = []
        pending = [prompt_codes] if num_prompt else []
        is_ragged = bool((documents == 0).any())
        ended = torch.zeros(len(prompt_ids), dtype=torch.bool, device=self._device)
        for index in range(num_new):
            codes = self._sample_codes(context, depth_cache, temperature, generator)
            watch.add("depth")
            blocks.append(codes)
            pending.append(codes[:, None])
            is_last = index + 1 == num_new
            if is_last or (stop_at_end_of_text and (index + 1) % DECODE_BLOCK == 0):
                new = torch.cat(pending, dim=1)
                pending = []
                fresh = torch.ones_like(new[..., 0])
                if decoder_cache.documents.shape[1] == 0 and num_prompt:
                    fresh[:, :num_prompt] = documents
                logits = self.vae.decoder(self.vae.quantizer.embed(new), fresh, cache=decoder_cache)
                ids = logits.argmax(-1)
                tokens.append(ids[:, num_prompt * self.compression_factor :] if not tokens else ids)
                watch.add("decode")
                if stop_at_end_of_text:
                    ended |= (tokens[-1] == self.tokenizer.eos_token_id).any(1)
                    if ended.all():
                        break
            if not is_last:
                key_documents = torch.cat([key_documents, torch.ones_like(key_documents[:, :1])], dim=1)
                mask = causal_document_mask(key_documents[:, -1:], key_documents) if is_ragged else None
                x = spatial.embed(codes[:, None])
                context = spatial.step(x, next_position[:, None], mask, cache)[:, -1]
                next_position = next_position + 1
                watch.add("spatial")
        new_ids = torch.cat(tokens, dim=1)[:, :max_new_tokens].tolist()
        if stop_at_end_of_text:
            new_ids = [_before(ids, self.tokenizer.eos_token_id) for ids in new_ids]
        return Generation(new_ids, torch.stack(blocks, dim=1), watch.timing())

    @property
    def _device(self) -> torch.device:
        return self.rq_transformer.spatial.start.device

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

    def _prefill(
        self, codes: Tensor, documents: Tensor, cache: TransformerCache
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the prompt through the spatial transformer.

        Returns:
            context [B, E] of the first new position, documents [B, P + 1] of the cached inputs, and the
            position [B] of the next input.
        """
        spatial = self.rq_transformer.spatial
        batch, num_prompt = documents.shape
        # The start vector stands one place before the first latent of its row, that is on the last
        # padding chunk, or on an extra place in front of the longest rows.
        key_documents = torch.cat([documents.new_zeros(batch, 1), documents], dim=1)
        is_start = torch.ones_like(key_documents, dtype=torch.bool)
        is_start[:, :-1] = key_documents[:, 1:] > 0
        is_start &= key_documents == 0
        lengths = (documents > 0).sum(1)
        x = spatial.start.expand(batch, num_prompt + 1, -1).clone()
        if num_prompt:
            x[:, 1:] = spatial.embed(codes)
        x[is_start] = spatial.start
        key_documents = (key_documents + is_start.long()).clamp(max=1)
        positions = (key_documents.cumsum(1) - 1).clamp(min=0)
        mask = causal_document_mask(key_documents, key_documents)
        context = spatial.step(x, positions, mask, cache)[:, -1]
        return context, key_documents, lengths + 1

    def _sample_codes(
        self, context: Tensor, cache: TransformerCache, temperature: float, generator: torch.Generator
    ) -> Tensor:
        """The D codes of one position: [B, E] -> LongTensor [B, D]."""
        depth = self.rq_transformer.depth
        cache.reset()
        inputs = depth.from_context(context)[:, None] + depth.level_positions
        prefix: Tensor | None = None
        codes = []
        for level in range(depth.num_levels):
            x = inputs[:, level : level + 1]
            if prefix is not None:
                x = x + prefix
            codes.append(sample(depth.step(x, level, cache), temperature, generator))
            if level + 1 < depth.num_levels:
                embedded = depth.embedding.level(codes[-1], level)[:, None]
                prefix = embedded if prefix is None else prefix + embedded
        return torch.stack(codes, dim=1)


def _before(ids: list[int], end: int | None) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


class _StopWatch:
    """Accumulates seconds by part; waits for the device, so that parts are told apart on a GPU too."""

    def __init__(self, device: torch.device):
        self._device = device
        self._seconds = dict.fromkeys(("encode", "spatial", "depth", "decode"), 0.0)
        self._last = time.perf_counter()

    def add(self, part: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._seconds[part] += now - self._last
        self._last = now

    def timing(self) -> Timing:
        return Timing(**{f"{part}_s": seconds for part, seconds in self._seconds.items()})
