"""Codec and latent model trained together on the bound itself, the negative evidence lower bound

    E_q[-log p(x | c)] + KL(q(c | x) || p(c)),    q(c | x) = prod over levels of softmax(-distance^2 / temperature)

(Kingma 2014, equation 3), p(c) being the latent model. Bits of a code that do not help reconstruction then cost
nothing, and the codec is asked for codes that can be predicted. The divergence's gradient reaches the encoder through
the distances and the latent model through its logits; the reconstruction's is copied past the draw (straight
through). Codebooks follow the latents as ever.

Shapes: B batch, T tokens, S = T / K latents, D levels, C codebook size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rqvae.encoder import chunk_documents, token_documents
from rqvae.latent_model import LatentModel
from rqvae.likelihood import check_bound
from rqvae.rq_vae import RQVAE, RQVAEOutput


class JointOutput(NamedTuple):
    """Result of a training or scoring pass of codec and prior."""

    loss: Tensor
    """The codec's loss and the rate loss."""
    codec: RQVAEOutput
    """With `rate_loss` in it."""
    level_divergences: Tensor
    """[D] KL(q || prior) of every level, summed over real latents, in nats; 0 while quantization is off."""


class RQVAEWithPrior(nn.Module):
    """An RQVAE and the latent model of its codes, as one module.

    Args:
        codec: as made; its quantizer's `code_temperature` is that of q.
        prior: over its codes.

    Raises:
        ValueError: the prior is of codes of another shape, or codec and prior together bound nothing.
    """

    def __init__(self, codec: RQVAE, prior: LatentModel):
        super().__init__()
        if prior.config.codebook_sizes != codec.config.codebook_sizes:
            raise ValueError(
                f"the latent model predicts codes of sizes {prior.config.codebook_sizes}, the codec's have "
                f"{codec.config.codebook_sizes}"
            )
        check_bound(codec, prior)
        self.codec = codec
        self.prior = prior

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        num_tokens: Tensor | None = None,
        quantize: bool = True,
        seeds: Tensor | None = None,
        rate_weight: float = 1.0,
        free_nats: float = 0.0,
    ) -> JointOutput:
        """Encode, draw codes, score them and the text.

        Args:
            input_ids, attention_mask, document_ids, num_tokens, quantize, seeds: as in `RQVAE.forward`.
            rate_weight: weight of the divergence in the loss (beta of Higgins 2017).
            free_nats: a level's mean divergence per latent of this batch counts as no less (free bits, Kingma 2016,
                appendix C.8): below it nothing is gained by saying less.
        """
        factor = self.codec.config.compression_factor
        document_ids = token_documents(input_ids, attention_mask, document_ids, factor)
        if num_tokens is None:
            num_tokens = (document_ids > 0).sum().clamp(min=1)
        out: RQVAEOutput = self.codec(
            input_ids,
            document_ids=document_ids,
            num_tokens=num_tokens,
            quantize=quantize,
            seeds=seeds,
            stochastic=True,
        )
        levels = self.codec.config.codebook_levels
        if out.codes is None:
            return JointOutput(out.loss, out, out.loss.new_zeros(levels))
        assert out.assignments is not None
        prior = self.prior(
            out.codes,
            input_ids if self.prior.config.reads_tokens else None,
            token_document_ids=document_ids,
            num_tokens=num_tokens,
            soft_targets=out.assignments,
        )
        real = chunk_documents(document_ids, factor) > 0
        # q log q is 0 where q is 0, but its slope is not finite there.
        entropies = torch.stack(
            [(torch.special.entr(q.clamp(min=1e-30)).sum(-1) * real).sum() for q in out.assignments]
        )
        divergences = prior.level_losses - entropies / num_tokens
        floor = free_nats * real.sum() / num_tokens
        rate = rate_weight * torch.maximum(divergences, floor).sum()
        codec = out._replace(loss=out.loss + rate, rate_loss=rate)
        return JointOutput(codec.loss, codec, divergences.detach() * num_tokens)
