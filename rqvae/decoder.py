"""Quantized latents -> logits of K tokens per latent, all positions in parallel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from rqvae.backbone import build_backbone
from rqvae.backbone_cache import new_backbone_cache
from rqvae.config import RQVAEConfig
from rqvae.layers import TransformerCache, causal_document_mask, document_mask, positions_in_documents
from rqvae.linear_head import HeadOutput, LinearHead
from rqvae.refinement import build_refinement
from rqvae.resample import ReferenceUpsample, Upsample


class DecoderCache:
    """What the decoder keeps between blocks of latents when text is decoded as it is generated."""

    def __init__(self, refinement: TransformerCache | None, backbone: Cache | None, documents: Tensor):
        self.refinement = refinement
        self.backbone = backbone
        self.documents = documents  # LongTensor [B, latents so far]

    def select(self, rows: Tensor) -> None:
        """Go on from these rows: LongTensor [b], each named any number of times, or not at all."""
        if self.refinement is not None:
            self.refinement.select(rows)
        if self.backbone is not None:
            self.backbone.reorder_cache(rows)  # type: ignore[arg-type]
        self.documents = self.documents[rows]


def decode_with_backbone(
    backbone: nn.Module, x: Tensor, documents: Tensor, compression_factor: int, cache: DecoderCache | None
) -> Tensor:
    """Run a causal backbone over the K places of every latent.

    Args:
        x: [B, S * K, H], its inputs.
        documents: LongTensor [B, S] document of every latent, 0 at padding.
        cache: filled with the latents before these; extended in place.

    Returns:
        [B, S * K, H].
    """
    seen = documents
    if cache is not None:
        seen = cache.documents = torch.cat([cache.documents, documents], dim=1)
    tokens, seen_tokens = (d.repeat_interleave(compression_factor, 1) for d in (documents, seen))
    return backbone(
        inputs_embeds=x,
        attention_mask=causal_document_mask(tokens, seen_tokens),
        position_ids=positions_in_documents(seen_tokens)[:, -tokens.shape[1] :],
        past_key_values=cache.backbone if cache is not None else None,
        use_cache=cache is not None,
    ).last_hidden_state


class TextDecoder(nn.Module):
    """Projection from the codebook space, causal refinement, upsampling, causal backbone, output head.

    The logits of chunk j depend on latents up to j only, so text can be decoded while it is generated. Not so
    with `resample: reference` or `original`.

    Args:
        shared_backbone: the encoder's backbone with its embeddings, for `backbone.shared`.
    """

    backbone: PreTrainedModel | None

    def __init__(self, config: RQVAEConfig, shared_backbone: PreTrainedModel | None = None):
        super().__init__()
        architecture = config.backbone.architecture
        self.compression_factor = config.compression_factor
        self.is_causal = config.resample == "chunked"
        self.from_codebook = nn.Linear(config.codebook_dim, config.latent_dim)
        self.refinement = build_refinement(config)
        resample = Upsample if self.is_causal else ReferenceUpsample
        self.upsample = resample(config.latent_dim, architecture.hidden_size, config.compression_factor)
        self.norm = None
        if shared_backbone is not None:
            # Not registered: it is a part of the encoder, and its weights are to be counted and saved once.
            self.__dict__["backbone"] = shared_backbone
        elif config.backbone.decoder == "none":
            self.backbone = None
            self.norm = nn.LayerNorm(architecture.hidden_size, bias=False)  # a backbone ends with one
        else:
            self.backbone = build_backbone(architecture, with_embeddings=False)
        self.head = LinearHead(architecture.hidden_size, architecture.vocab_size)
        if shared_backbone is not None and architecture.tie_word_embeddings:
            self.head.weight = shared_backbone.get_input_embeddings().weight  # type: ignore[assignment]

    def new_cache(self, batch_size: int, max_latents: int) -> DecoderCache:
        """Empty cache for decoding block by block."""
        like = self.from_codebook.bias  # the weight may be in 8 bits
        return DecoderCache(
            self.refinement.new_cache(batch_size, max_latents, like),
            None
            if self.backbone is None
            else new_backbone_cache(self.backbone.config, max_latents * self.compression_factor),
            torch.zeros(batch_size, 0, dtype=torch.long, device=like.device),
        )

    def hidden_states(self, latents: Tensor, documents: Tensor, cache: DecoderCache | None = None) -> Tensor:
        """Hidden states before the head.

        Args:
            latents: [B, S, codebook_dim], quantized.
            documents: LongTensor [B, S] document of every latent, 0 at padding.
            cache: filled with the latents before these; extended in place.

        Returns:
            [B, S * K, H].
        """
        seen = documents if cache is None else torch.cat([cache.documents, documents], dim=1)
        # Without padding or packing a mask has nothing to say that causality does not.
        is_plain = cache is not None and cache.documents.shape[1] == 0 and bool((documents == 1).all())
        positions = positions_in_documents(seen)[:, -documents.shape[1] :]
        mask_of = causal_document_mask if self.is_causal else document_mask
        mask = None if is_plain else mask_of(documents, seen)
        x = self.from_codebook(latents.to(self.from_codebook.weight.dtype))
        x = self.refinement(x, positions, mask, cache.refinement if cache is not None else None)
        x = self.upsample(x)
        if self.backbone is None:
            assert self.norm is not None
            if cache is not None:
                cache.documents = seen
            return self.norm(x)
        return decode_with_backbone(self.backbone, x, documents, self.compression_factor, cache)

    def forward(
        self,
        latents: Tensor,
        documents: Tensor,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        cache: DecoderCache | None = None,
    ) -> Tensor | HeadOutput:
        """Logits [B, S * K, V], or the losses of `labels` [B, S * K] weighted by `weights`."""
        return self.head(self.hidden_states(latents, documents, cache), labels, weights)
