"""Likelihood of text under the latent model: bounds, and they say so.

`latent_bound`: -log p(x) <= NLL(codes of x) + NLL(x | codes of x). The codes are one of the many code sequences that
could have produced x, so the sum can only be too large.

`stochastic_bound`: -log p(x) <= E_q[NLL(x | c)] + KL(q || prior) for codes drawn from q(c | x), the negative evidence
lower bound (Kingma 2014, equation 3). It is what a codec with a rate term is trained on, and what stochastic codes
have to be judged by: bits of a code that do not help reconstruction cost nothing in it.

`rqvae/importance.py` has a tighter and dearer one. All of them bound the same p(x) = sum over codes of p(c) p(x | c).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rqvae.codec import Codec
from rqvae.encoder import chunk_documents
from rqvae.latent_model import LatentModel
from rqvae.randomness import Purpose, uniform
from rqvae.rq_vae import RQVAE


class LatentBound(NamedTuple):
    """Terms of the bound over one batch, all without gradient; nats in fp32."""

    code_nats: Tensor
    """[B, S, D], 0 at padding: -log p of every code, or with stochastic codes the divergence KL(q || prior)."""
    token_nats: Tensor
    """[B, T] given the codes, 0 at padding."""
    token_correct: Tensor
    """BoolTensor [B, T]."""
    codes: Tensor
    """LongTensor [B, S, D]."""
    distortion: Tensor
    """[D] sum over real latents of the squared norm left after every level."""
    latents: Tensor
    """[B, S, codebook_dim] before quantization; of tokens as codes, the codes."""


def check_bound(vae: Codec, latent_model: LatentModel) -> None:
    """Refuse a pair whose sum of likelihoods bounds nothing.

    Raises:
        ValueError: codes that see the future under a model that reads the text.
    """
    if vae.config.sees_future and latent_model.config.reads_tokens:
        raise ValueError(
            f"resample: {vae.config.resample} with spatial_input: tokens is no bound: the codes are scored given the "
            "text, and the text given later codes"
        )


@torch.inference_mode()
def latent_bound(
    vae: Codec, latent_model: LatentModel, input_ids: Tensor, document_ids: Tensor
) -> LatentBound:
    """Score packed documents; every real token is counted, end-of-text included, padding never.

    Args:
        input_ids: LongTensor [B, T].
        document_ids: LongTensor [B, T], 0 at padding.

    Raises:
        ValueError: codes that see the future under a model that reads the text: not a bound.
    """
    check_bound(vae, latent_model)
    scored = vae(input_ids, document_ids=document_ids)
    text = input_ids if latent_model.config.reads_tokens else None
    prior = latent_model(scored.codes, text, token_document_ids=document_ids)
    return LatentBound(
        prior.nats, scored.nats, scored.correct, scored.codes, scored.distortion, scored.latents
    )


@torch.inference_mode()
def stochastic_bound(
    vae: RQVAE, latent_model: LatentModel, input_ids: Tensor, document_ids: Tensor, seeds: Tensor
) -> LatentBound:
    """Score packed documents with one draw of stochastic codes per sample: E_q[-log p(x | c)] + KL(q || prior).

    q is that of `ResidualQuantizer.sample`. The divergence of every level is summed over its codes, given the draws
    of the levels and positions before, so that only the path is random; the expectation over the draw is the bound.

    Args:
        input_ids: LongTensor [B, T].
        document_ids: LongTensor [B, T], 0 at padding.
        seeds: LongTensor [B] of `randomness.sample_seeds`; the same draw in any batch and on any rank.

    Returns:
        `LatentBound` with the divergences in `code_nats`.

    Raises:
        ValueError: as `latent_bound`; also a codec that has nothing to draw from.
    """
    check_bound(vae, latent_model)
    latents = codec_latents(vae, input_ids, document_ids)
    numbers = uniform(seeds, Purpose.CODES, latents.shape[1], vae.config.codebook_levels)
    codes, assignments = vae.quantizer.sample(latents, numbers, with_soft_targets=True)
    assert assignments is not None
    text = input_ids if latent_model.config.reads_tokens else None
    prior = latent_model(codes, text, token_document_ids=document_ids, return_logits=True)
    documents = chunk_documents(document_ids, vae.config.compression_factor)
    divergences, distortion = [], []
    residual = latents.to(assignments[0].dtype)
    for level, (q, logits) in enumerate(zip(assignments, prior.logits, strict=True)):
        # q log q is 0 where q is 0.
        log_prior = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        divergences.append(-torch.special.entr(q).sum(-1) - (q * log_prior).sum(-1))
        residual = residual - vae.quantizer.level(level).embed(codes[..., level])
        distortion.append((residual.square().sum(-1) * (documents > 0)).sum())
    real = document_ids > 0
    tokens = vae.decoder(vae.quantizer.embed(codes), documents, input_ids, real.float())
    return LatentBound(
        torch.stack(divergences, dim=-1) * (documents > 0)[..., None],
        tokens.nats.view_as(input_ids),
        tokens.correct.view_as(real) & real,
        codes,
        torch.stack(distortion),
        latents,
    )


def codec_latents(vae: Codec, input_ids: Tensor, document_ids: Tensor) -> Tensor:
    """Latents [B, S, codebook_dim] that q(codes | text) is made from.

    Raises:
        ValueError: a codec whose codes are tokens, and certain.
    """
    if not isinstance(vae, RQVAE):
        raise ValueError(f"the {vae.config.model} codec's codes are certain: there is nothing to draw")
    return vae.quantizer.bound(vae.encoder(input_ids, document_ids))
