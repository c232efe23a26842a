"""The codec: RQVAE = TextEncoder, ResidualQuantizer, TextDecoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rqvae.backbone import load_pretrained
from rqvae.codec import Codec, choose_tokens, most_likely
from rqvae.config import RQVAEConfig
from rqvae.decoder import DecoderCache, TextDecoder
from rqvae.encoder import TextEncoder, chunk_documents, token_documents
from rqvae.quantizer import ResidualQuantizer
from rqvae.randomness import Purpose, normal, uniform
from rqvae.sampling import ChooseTokens


class RQVAEOutput(NamedTuple):
    """Result of a training or scoring pass."""

    loss: Tensor
    """reconstruction_loss + commitment_weight * commitment_loss + rate_loss."""
    reconstruction_loss: Tensor
    """Mean negative log-likelihood of the real tokens given the codes, in nats."""
    commitment_loss: Tensor
    """Squared distance to the partial sums, per K real tokens; summed over levels, mean over dimensions."""
    rate_loss: Tensor
    """Cost of the codes under a prior trained with the codec; 0 without one."""
    codes: Tensor | None
    """LongTensor [B, S, D]; None while quantization is off."""
    latents: Tensor
    """[B, S, codebook_dim] before quantization."""
    nats: Tensor
    """[B, T] fp32 negative log-likelihood of every token, 0 at padding."""
    correct: Tensor
    """BoolTensor [B, T], False at padding."""
    distortion: Tensor
    """[D] sum over real latents of the squared norm left after every level; empty while quantization is off."""
    assignments: list[Tensor] | None = None
    """By level [B, S, C] what stochastic codes were drawn from."""


class RQVAE(Codec):
    """Residual-quantized autoencoder of text (Lee 2022, section 3.1, on causal language models)."""

    def __init__(self, config: RQVAEConfig):
        super().__init__(config)
        if config.model != "rqvae":
            raise ValueError(f"an RQVAE needs model: rqvae; model: {config.model} has nothing to train")
        self.encoder = TextEncoder(config)
        self.quantizer = ResidualQuantizer(config.codebook_sizes, config.codebook_dim, config.quantizer)
        shared = self.encoder.backbone if config.backbone.shared else None
        self.decoder = TextDecoder(config, shared)

    # Training ------------------------------------------------------------------------------------------

    def load_backbone(self, source: str) -> None:
        """Initialise from a causal LM in Hugging Face layout what `backbone.decoder` says: the encoder's
        backbone, and the decoder's with the output head."""
        settings = self.config.backbone
        if settings.shared:
            load_pretrained(source, self.encoder.backbone, self.decoder.head)
            return
        load_pretrained(source, self.encoder.backbone, None)
        if settings.decoder == "same":
            assert self.decoder.backbone is not None
            load_pretrained(source, self.decoder.backbone, self.decoder.head)

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """What `load_backbone` fills and the frozen warm-up leaves alone; all else is new."""
        modules: list[nn.Module | None] = [self.encoder.backbone]
        if self.config.backbone.decoder == "same":
            modules += [None if self.config.backbone.shared else self.decoder.backbone, self.decoder.head]
        unique = {id(p): p for module in modules if module is not None for p in module.parameters()}
        yield from unique.values()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        num_tokens: Tensor | None = None,
        quantize: bool = True,
        seeds: Tensor | None = None,
        stochastic: bool = False,
    ) -> RQVAEOutput:
        """Encode, quantize, decode, and score.

        Args:
            input_ids: LongTensor [B, T], T a multiple of K.
            attention_mask: [B, T], 0 at padding; for one document per row.
            document_ids: LongTensor [B, T], 0 at padding; for packed documents, instead of the mask.
            num_tokens: denominator of the losses; by default the real tokens of this batch. A training
                loop passes its share of the whole step's tokens.
            quantize: False passes the continuous latents on (the first part of training).
            seeds: LongTensor [B] of `randomness.sample_seeds`, for what is drawn: in training mode dropout and
                noise, and stochastic codes; by default from torch's global generator.
            stochastic: draw the codes from `ResidualQuantizer.sample` instead of taking the nearest.

        Raises:
            ValueError: T is not a multiple of K.
        """
        document_ids = self._documents(input_ids, attention_mask, document_ids)
        real = document_ids > 0
        if num_tokens is None:
            num_tokens = real.sum().clamp(min=1)
        documents = chunk_documents(document_ids, self.config.compression_factor)
        if (self.training or stochastic) and seeds is None:
            seeds = torch.randint(1 << 62, input_ids.shape[:1], device=input_ids.device)
        latents = self.encoder(input_ids, document_ids, self._hidden_tokens(real, seeds))
        latents = self.quantizer.bound(latents)
        decoder_input, drawn, assignments = latents, None, None
        if quantize:
            if stochastic:
                assert seeds is not None
                numbers = uniform(seeds, Purpose.CODES, latents.shape[1], self.config.codebook_levels)
                drawn, assignments = self.quantizer.sample(latents, numbers, with_soft_targets=True)
            quantized = self.quantizer(latents, documents > 0, self._kept_levels(seeds), drawn)
            decoder_input, codes, distortion = quantized.quantized, quantized.codes, quantized.distortion
            commitment = quantized.commitment_loss * self.config.compression_factor / num_tokens
        else:
            codes, distortion = None, latents.new_zeros(0)
            commitment = latents.new_zeros(())
        decoder_input = self._disturbed(decoder_input, documents > 0, seeds)
        out = self.decoder(decoder_input, documents, input_ids, real / num_tokens)
        rate = torch.zeros_like(out.loss)
        return RQVAEOutput(
            loss=out.loss + self.config.quantizer.commitment_weight * commitment + rate,
            reconstruction_loss=out.loss,
            commitment_loss=commitment,
            rate_loss=rate,
            codes=codes,
            latents=latents,
            nats=out.nats.view_as(input_ids),
            correct=out.correct.view_as(real) & real,
            distortion=distortion,
            assignments=assignments,
        )

    # What training adds at random; `seeds` is None outside of training.

    def _hidden_tokens(self, real: Tensor, seeds: Tensor | None) -> Tensor | None:
        """BoolTensor [B, T]: tokens that the encoder does not get to see."""
        if not self.training or not self.config.token_dropout:
            return None
        assert seeds is not None
        return (uniform(seeds, Purpose.TOKEN_DROPOUT, real.shape[1]) < self.config.token_dropout) & real

    def _kept_levels(self, seeds: Tensor | None) -> Tensor | None:
        """LongTensor [B]: leading levels that the decoder gets, of every sample."""
        share, levels = self.config.quantizer.level_dropout, self.config.codebook_levels
        if not self.training or not share:
            return None
        assert seeds is not None
        is_cut, where = uniform(seeds, Purpose.LEVEL_DROPOUT, 2).unbind(1)
        return torch.where(is_cut < share, (where * levels).long() + 1, levels)

    def _disturbed(self, latents: Tensor, real: Tensor, seeds: Tensor | None) -> Tensor:
        """Latents [B, S, E] with noise and dropout."""
        noise, dropout = self.config.latent_noise, self.config.latent_dropout
        if not self.training:
            return latents
        assert seeds is not None
        if noise:
            # By sample, so that it does not matter which others are in the batch.
            mean_square = (latents.detach().square().mean(-1) * real).sum(1) / real.sum(1).clamp(min=1)
            drawn = normal(seeds, Purpose.LATENT_NOISE, *latents.shape[1:]).to(latents.dtype)
            latents = latents + noise * mean_square.sqrt()[:, None, None] * drawn
        if dropout:
            kept = uniform(seeds, Purpose.LATENT_DROPOUT, *latents.shape[1:]) >= dropout
            latents = latents * kept / (1 - dropout)
        return latents

    # Use -----------------------------------------------------------------------------------------------

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `Codec.encode`."""
        with torch.inference_mode():
            latents = self.quantizer.bound(
                self.encoder(input_ids, self._documents(input_ids, attention_mask, document_ids))
            )
            if sample:
                shape = (*latents.shape[:2], self.config.codebook_levels)
                numbers = torch.rand(shape, generator=generator, device=latents.device)
                codes, _ = self.quantizer.sample(latents, numbers)
            else:
                mask = torch.ones(latents.shape[:2], dtype=torch.bool, device=latents.device)
                was_training = self.quantizer.training
                self.quantizer.eval()  # encoding is not learning
                codes = self.quantizer(latents, mask).codes
                self.quantizer.train(was_training)
        return codes.clone()

    def decode(self, codes: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """See `Codec.decode`."""
        if document_ids is None:
            document_ids = torch.ones(codes.shape[:2], dtype=torch.long, device=codes.device)
        with torch.inference_mode():
            return self.decoder(self.quantizer.embed(codes), document_ids)

    def new_decoder_cache(self, batch_size: int, max_latents: int) -> DecoderCache:
        """Empty cache for `decode_block`."""
        return self.decoder.new_cache(batch_size, max_latents)

    @torch.inference_mode()
    def decode_block(
        self,
        codes: Tensor,
        documents: Tensor,
        cache: DecoderCache,
        choose: ChooseTokens = most_likely,
        num_known: int = 0,
    ) -> Tensor:
        """See `Codec.decode_block`."""
        hidden = self.decoder.hidden_states(self.quantizer.embed(codes), documents, cache)
        hidden = hidden[:, num_known * self.config.compression_factor :]
        places = torch.arange(hidden.shape[:2].numel(), device=hidden.device)
        return choose_tokens(self.decoder.head, hidden.flatten(0, 1), places, choose).view(hidden.shape[:2])

    def _documents(
        self, input_ids: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None
    ) -> Tensor:
        return token_documents(input_ids, attention_mask, document_ids, self.config.compression_factor)
