"""Text generation in latent space: D codes per step, K tokens per latent, decoded in parallel.

Shapes: B batch, S latents, D levels, K tokens per latent.
"""

from __future__ import annotations

import functools
import math
import time
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rqvae.codec import Codec
from rqvae.latent_model import LatentModel

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


def check_pair(codec: Codec, latent_model: LatentModel) -> None:
    """Refuse a latent model that was trained on the codes of another codec.

    Raises:
        ValueError: names both hashes.
    """
    expected = latent_model.config.codec_hash
    if expected is not None and expected != (actual := codec.codec_hash()):
        raise ValueError(
            f"the latent model was trained on codes of codec {expected[:12]}, this codec is "
            f"{actual[:12]}; train it on codes from this codec (launch/precompute_codes.py)"
        )


class LatentGenerator:
    """Generates text with a codec and the latent model trained on its codes.

    A prompt is padded on the left to a whole number of chunks: every phase of the chunk grid occurs in
    training, so its length does not matter.

    A latent model that reads tokens is fed those decoded from its codes, so that every latent is decoded before
    the next one is drawn. It cannot decode deferred, many latents at a time: its speed is the streaming speed.

    Raises:
        ValueError: the latent model was trained on the codes of another codec, or the codec sees the future.
    """

    def __init__(self, vae: Codec, rq_transformer: LatentModel, tokenizer: PreTrainedTokenizerBase):
        if vae.config.sees_future:
            raise ValueError(
                f"codes made with resample: {vae.config.resample} depend on the text after them, so they cannot be "
                "generated in order; train a codec with resample: chunked"
            )
        check_pair(vae, rq_transformer)
        self.vae = vae.eval()
        self.rq_transformer = rq_transformer.eval()
        self.tokenizer = tokenizer
        self.compression_factor = vae.config.compression_factor

    def generate(
        self, prompts: list[str], max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> list[str]:
        """Continue prompts; the returned texts do not repeat them.

        Args:
            temperature: of every code, and of the tokens that the codes leave open; 0 is greedy.
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
        choose = functools.partial(sample, temperature=temperature, generator=generator)
        reads_tokens = self.rq_transformer.config.reads_tokens
        text = {"input_ids": input_ids, "token_document_ids": token_documents} if reads_tokens else {}
        steps = self.rq_transformer.begin(prompt_codes, documents, num_new, **text)
        watch.add("spatial")

        decoder_cache = self.vae.new_decoder_cache(len(prompt_ids), num_prompt + num_new)
        decode_every = 1 if reads_tokens else DECODE_BLOCK if stop_at_end_of_text else num_new
        blocks: list[Tensor] = []
        tokens: list[Tensor] = []
        pending = [prompt_codes] if num_prompt else []
        pending_documents = [documents] if num_prompt else []
        ended = torch.zeros(len(prompt_ids), dtype=torch.bool, device=self._device)
        for index in range(num_new):
            codes = steps.draw(choose)
            watch.add("depth")
            blocks.append(codes)
            pending.append(codes[:, None])
            pending_documents.append(torch.ones_like(codes[:, :1]))
            is_last = index + 1 == num_new
            if is_last or (index + 1) % decode_every == 0:
                ids = self.vae.decode_block(
                    torch.cat(pending, dim=1), torch.cat(pending_documents, dim=1), decoder_cache, choose
                )
                pending, pending_documents = [], []
                tokens.append(ids if tokens else ids[:, num_prompt * self.compression_factor :])
                watch.add("decode")
                if stop_at_end_of_text:
                    ended |= (tokens[-1] == self.tokenizer.eos_token_id).any(1)
                    if ended.all():
                        break
            if not is_last:
                steps.append(codes, *((tokens[-1].clamp(min=0), tokens[-1] >= 0) if reads_tokens else ()))
                watch.add("spatial")
        # Places without a token are negative (`TokenCodec`).
        drawn = torch.cat(tokens, dim=1).tolist()
        new_ids = [[token for token in ids if token >= 0][:max_new_tokens] for ids in drawn]
        if stop_at_end_of_text:
            new_ids = [_before(ids, self.tokenizer.eos_token_id) for ids in new_ids]
        return Generation(new_ids, torch.stack(blocks, dim=1), watch.timing())

    @property
    def _device(self) -> torch.device:
        return self.rq_transformer.device

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
