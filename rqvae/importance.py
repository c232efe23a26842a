"""A tighter bound on the likelihood of text: importance sampling of its codes, position by position.

p(x) = sum over codes of p(c) p(x | c) is estimated by S particles that are drawn from q(c | x) = softmax(-distance^2
/ temperature) level by level, weighed at every latent position j by

    w_j = p(c_j | c_<j) p(x_j | c_<=j) / q(c_j | x),

and resampled in proportion to their weights before the next position. The product over positions of the mean weights
is an unbiased estimate of p(x), whatever S (Del Moral 2004; Andrieu 2010, section 4.1), so that by Jensen's
inequality E[-log estimate] >= -log p(x): a bound (Maddison 2017, equation 6: FIVO). With S = 1 it is the stochastic
bound; it falls towards the exact likelihood as S grows.

Why not simpler:
- Averaging the weights of S independent draws at each position, with the context of one of them, is no bound: the
  context was not chosen by its weight, and the product of the means is not unbiased.
- Averaging whole sequences (importance-weighted autoencoder, Burda 2016) is a bound, but gains at most log S nats per
  document. Resampling gains up to log S per position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rqvae.codec import Codec
from rqvae.encoder import chunk_documents
from rqvae.latent_model import CodeSteps, LatentModel
from rqvae.likelihood import check_bound, codec_latents
from rqvae.randomness import Purpose, uniform
from rqvae.rq_vae import RQVAE


@torch.inference_mode()
def importance_bound(
    vae: Codec,
    latent_model: LatentModel,
    input_ids: Tensor,
    document_ids: Tensor,
    seeds: Tensor,
    num_samples: int,
    temperature: float | None = None,
) -> Tensor:
    """Nats of whole documents, an upper bound in expectation.

    Args:
        input_ids: LongTensor [B, T], one document per row, its chunk grid beginning at the row's first place.
        document_ids: LongTensor [B, T], 1 at tokens, 0 at padding (the phase, and the end of the row).
        seeds: LongTensor [B] of `randomness.sample_seeds`; the same draws in any batch and on any rank.
        num_samples: S.
        temperature: of q, in place of the codec's `code_temperature`.

    Returns:
        [B] in fp64.

    Raises:
        ValueError: a row holds several documents, S < 1, the codec sees the future or has nothing to draw from, or as
            `latent_bound`.
    """
    check_bound(vae, latent_model)
    if num_samples < 1:
        raise ValueError(f"num_samples: {num_samples} is not at least 1")
    if vae.config.sees_future:
        raise ValueError("resample: reference decodes no position before the last; use latent_bound")
    documents = chunk_documents(document_ids, vae.config.compression_factor)
    real = documents > 0
    if int(document_ids.max()) > 1 or bool((real[:, 1:] & ~real[:, :-1]).any()):
        raise ValueError("importance_bound takes one document per row, from its first chunk on")
    latents = codec_latents(vae, input_ids, document_ids)
    assert isinstance(vae, RQVAE)
    particles = _Particles(vae, latent_model, len(documents), documents.shape[1], num_samples)
    levels = vae.config.codebook_levels
    # One number per code and one for every resampling.
    numbers = uniform(seeds, Purpose.PARTICLES, documents.shape[1], num_samples * levels + 1)
    nats = torch.zeros(len(documents), dtype=torch.float64, device=documents.device)
    places = zip(
        latents.unbind(1),
        _by_chunk(input_ids, vae.config.compression_factor),
        _by_chunk(document_ids > 0, vae.config.compression_factor),
        numbers.unbind(1),
        strict=True,
    )
    for place, (latent, tokens, is_token, drawn) in enumerate(places, 1):
        codes, log_weights = particles.weigh(latent, tokens, is_token, drawn[:, :-1], temperature)
        log_means = log_weights.logsumexp(1) - math.log(num_samples)
        inside = is_token.any(1)
        nats -= torch.where(inside, log_means, 0.0)
        if place < documents.shape[1]:
            shares = log_weights.softmax(1)
            particles.go_on(codes, tokens, is_token, systematic_ancestors(shares, drawn[:, -1]))
    return nats


def systematic_ancestors(shares: Tensor, numbers: Tensor) -> Tensor:
    """Resample S particles of every row: each is taken S * share times on average (Kitagawa 1996, appendix).

    Args:
        shares: [B, S], 1 in sum.
        numbers: [B] uniform in (0, 1).

    Returns:
        LongTensor [B, S].
    """
    count = shares.shape[1]
    points = (torch.arange(count, device=shares.device) + numbers[:, None].to(shares.dtype)) / count
    return torch.searchsorted(shares.cumsum(1), points.contiguous()).clamp(max=count - 1)


def _by_chunk(places: Tensor, compression_factor: int) -> tuple[Tensor, ...]:
    """[B, S * K] -> S times [B, K]."""
    return places.view(len(places), -1, compression_factor).unbind(1)


class _Particles:
    """S code sequences for every document, S * B rows side by side in the caches of both models."""

    def __init__(
        self, vae: RQVAE, latent_model: LatentModel, num_documents: int, num_latents: int, num_samples: int
    ):
        self._vae, self._count, self._device = vae, num_samples, latent_model.device
        rows = num_documents * num_samples
        nothing = torch.zeros(rows, 0, dtype=torch.long, device=self._device)
        text = {}
        if latent_model.config.reads_tokens:
            text = {"input_ids": nothing, "token_document_ids": nothing}
        empty = nothing[..., None].expand(-1, -1, vae.config.codebook_levels)
        self._steps: CodeSteps = latent_model.begin(empty, nothing, num_latents, **text)
        self._reads_tokens = latent_model.config.reads_tokens
        self._cache = vae.new_decoder_cache(rows, num_latents)
        self._first_rows = torch.arange(num_documents, device=self._device)[:, None] * num_samples

    def weigh(
        self, latents: Tensor, tokens: Tensor, is_token: Tensor, numbers: Tensor, temperature: float | None
    ) -> tuple[Tensor, Tensor]:
        """Draw the codes of the next position and weigh them.

        Args:
            latents: [B, codebook_dim].
            tokens, is_token: [B, K].
            numbers: [B, S * D].

        Returns:
            Codes LongTensor [B * S, D] and log weights [B, S] in fp64.
        """
        quantizer = self._vae.quantizer
        levels = quantizer.num_levels
        drawn, assignments = quantizer.sample(
            self._rows(latents)[:, None],
            numbers.reshape(-1, 1, levels),
            with_soft_targets=True,
            temperature=temperature,
        )
        assert assignments is not None
        codes = drawn[:, 0]
        shares = [q[:, 0].gather(1, codes[:, i, None])[:, 0] for i, q in enumerate(assignments)]
        log_q = torch.stack(shares).double().log().sum(0)
        log_p = torch.zeros(len(codes), dtype=torch.float64, device=self._device)

        def take(logits: Tensor, level: int) -> Tensor:
            chosen = codes[:, level]
            nonlocal log_p
            log_p = log_p + logits.double().log_softmax(-1).gather(1, chosen[:, None])[:, 0]
            return chosen

        self._steps.draw(take)
        scored = self._vae.decoder(
            quantizer.embed(codes[:, None]),
            torch.ones_like(codes[:, :1]),
            self._rows(tokens),
            self._rows(is_token).float(),
            self._cache,
        )
        token_nats = scored.nats.view(len(codes), -1).double().sum(1)
        return codes, (log_p - token_nats - log_q).view(-1, self._count)

    def go_on(self, codes: Tensor, tokens: Tensor, is_token: Tensor, ancestors: Tensor) -> None:
        """Make the codes of the chosen particles, LongTensor [B, S] of 0 to S - 1, everybody's past."""
        rows = (self._first_rows + ancestors).flatten()
        self._cache.select(rows)
        self._steps.select(rows)
        text = (self._rows(tokens), self._rows(is_token)) if self._reads_tokens else ()
        self._steps.append(codes[rows], *text)

    def _rows(self, of_documents: Tensor) -> Tensor:
        """[B, ...] -> [B * S, ...]."""
        return of_documents.repeat_interleave(self._count, dim=0)
