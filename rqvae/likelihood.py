"""Likelihood of text under the latent model: a bound, and it says so.

-log p(x) <= NLL(codes of x) + NLL(x | codes of x): the codes are one of the many code sequences that
could have produced x, so the sum can only be too large.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rqvae.codec import Codec
from rqvae.latent_model import LatentModel


class LatentBound(NamedTuple):
    """Terms of the bound over one batch, all without gradient; nats in fp32."""

    code_nats: Tensor
    """[B, S, D], 0 at padding."""
    token_nats: Tensor
    """[B, T] given the codes, 0 at padding."""
    token_correct: Tensor
    """BoolTensor [B, T]."""
    codes: Tensor
    """LongTensor [B, S, D]."""
    distortion: Tensor
    """[D] sum over real latents of the squared norm left after every level."""


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
    if vae.config.sees_future and latent_model.config.reads_tokens:
        raise ValueError(
            f"resample: {vae.config.resample} with spatial_input: tokens is no bound: the codes are scored given the "
            "text, and the text given later codes"
        )
    scored = vae(input_ids, document_ids=document_ids)
    text = input_ids if latent_model.config.reads_tokens else None
    prior = latent_model(scored.codes, text, token_document_ids=document_ids)
    return LatentBound(prior.nats, scored.nats, scored.correct, scored.codes, scored.distortion)
