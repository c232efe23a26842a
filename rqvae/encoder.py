"""Tokens -> one continuous latent per chunk of K tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rqvae.backbone import build_backbone, run_backbone
from rqvae.config import RQVAEConfig
from rqvae.layers import causal_document_mask, document_mask, positions_in_documents
from rqvae.refinement import build_refinement
from rqvae.resample import Downsample, ReferenceDownsample


def chunk_documents(document_ids: Tensor, compression_factor: int) -> Tensor:
    """Document of every chunk: LongTensor [B, T] -> [B, T / K]; 0 where the whole chunk is padding.

    A chunk holds tokens of one document only (the data pipeline restarts the grid at every document).
    """
    return document_ids.view(document_ids.shape[0], -1, compression_factor).amax(-1)


def token_documents(
    input_ids: Tensor, attention_mask: Tensor | None, document_ids: Tensor | None, compression_factor: int
) -> Tensor:
    """Document of every token, from whichever of the two was given; one document per row by default.

    Args:
        input_ids: LongTensor [B, T].
        attention_mask: [B, T], 0 at padding; for one document per row.
        document_ids: LongTensor [B, T], 0 at padding; for packed documents, instead of the mask.

    Returns:
        LongTensor [B, T].

    Raises:
        ValueError: T is not a multiple of K.
    """
    if input_ids.shape[1] % compression_factor:
        raise ValueError(
            f"{input_ids.shape[1]} tokens are not a whole number of chunks of {compression_factor}; "
            "pad them (on the left for a prompt)"
        )
    if document_ids is not None:
        return document_ids
    return torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()


class TextEncoder(nn.Module):
    """Causal backbone, strided convolution over its states and the token embeddings, causal refinement, projection.

    Latent j depends on tokens before (j + 1) K of its own document only, so that the latents of a prompt
    do not depend on what follows it. Not so with `resample: reference` or `original`.
    """

    def __init__(self, config: RQVAEConfig):
        super().__init__()
        hidden = config.backbone.architecture.hidden_size
        self.compression_factor = config.compression_factor
        self.context = config.encoder_context
        self.backbone = build_backbone(config.backbone.architecture, with_embeddings=True)
        width = 2 * hidden if config.reads_embeddings else hidden
        # Stands for the places of a chunk that hold no token. The backbone's own output there would
        # depend on whatever else is packed into the sample.
        self.absent_token = nn.Parameter(torch.randn(width) * 0.02)
        # The last states of a language model tell the next token better than their own; the embeddings beside
        # them spare the backbone carrying the tokens through (token accuracy 0.26 against 0.21 after 50 steps).
        self.embedding_norm = nn.LayerNorm(hidden, bias=False) if config.reads_embeddings else None
        # Stands for tokens that are hidden in training.
        self.mask_token = nn.Parameter(torch.randn(hidden) * 0.02) if config.token_dropout else None
        self.is_causal = config.resample == "chunked"
        resample = Downsample if self.is_causal else ReferenceDownsample
        self.downsample = resample(width, config.latent_dim, config.compression_factor)
        self.refinement = build_refinement(config)
        self.to_codebook = nn.Linear(config.latent_dim, config.codebook_dim)

    def forward(self, input_ids: Tensor, document_ids: Tensor, hidden_tokens: Tensor | None = None) -> Tensor:
        """Encode packed documents.

        Args:
            input_ids: LongTensor [B, T], T a multiple of K.
            document_ids: LongTensor [B, T], 0 at padding.
            hidden_tokens: BoolTensor [B, T], tokens that are replaced by the mask vector.

        Returns:
            Latents [B, T / K, codebook_dim]; meaningless where the chunk is all padding.
        """
        if self.context == "chunk":
            # Every chunk is a document of its own.
            chunks = (
                torch.arange(document_ids.shape[1], device=document_ids.device) // self.compression_factor
            )
            document_ids = (chunks + 1) * (document_ids > 0)
        embeddings = self.backbone.get_input_embeddings()(input_ids)
        if hidden_tokens is not None:
            assert self.mask_token is not None
            embeddings = torch.where(
                hidden_tokens[..., None], self.mask_token.to(embeddings.dtype), embeddings
            )
        hidden = run_backbone(self.backbone, embeddings, document_ids)
        if self.embedding_norm is not None:
            hidden = torch.cat([hidden, self.embedding_norm(embeddings)], dim=-1)
        hidden = torch.where((document_ids > 0)[..., None], hidden, self.absent_token.to(hidden.dtype))
        latents = self.downsample(hidden)
        documents = chunk_documents(document_ids, self.compression_factor)
        mask = causal_document_mask if self.is_causal else document_mask
        latents = self.refinement(latents, positions_in_documents(documents), mask(documents, documents))
        return self.to_codebook(latents)
