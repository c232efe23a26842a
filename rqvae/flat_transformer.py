"""The baseline of the RQ-transformer: a standard transformer over the flattened codes.

O((S D)^2) attention and D times as many positions in every layer; Lee 2022 compares against it in
section 3.2. Same inputs, outputs and configuration as `RQTransformer` (the depth fields go unused).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from rqvae import persistence
from rqvae.config import RQTransformerConfig
from rqvae.layers import LinearHead, TransformerBlock, causal_document_mask, positions_in_documents
from rqvae.rq_transformer import CodeEmbedding, RQTransformerOutput


class FlatTransformer(nn.Module):
    """Autoregressive model of the sequence code (0, 0), (0, 1), ..., (0, D-1), (1, 0), ..."""

    def __init__(self, config: RQTransformerConfig):
        super().__init__()
        self.config = config
        self.embedding = CodeEmbedding(config.codebook_sizes, config.spatial_dim)
        self.level_positions = nn.Parameter(torch.randn(config.codebook_levels, config.spatial_dim) * 0.02)
        self.start = nn.Parameter(torch.randn(config.spatial_dim) * 0.02)
        self.block = TransformerBlock(
            config.spatial_dim, config.spatial_layers, config.head_dim, config.mlp_ratio, config.rope_theta
        )
        self.heads = nn.ModuleList(LinearHead(config.spatial_dim, size) for size in config.codebook_sizes)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> FlatTransformer:
        """Load what `save_pretrained` wrote, in evaluation mode; ValueError if it does not fit."""
        return persistence.load_model(cls, RQTransformerConfig, directory)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and safetensors."""
        persistence.save_model(self, self.config, directory)

    def forward(
        self,
        codes: Tensor,
        document_ids: Tensor | None = None,
        num_tokens: Tensor | None = None,
        return_logits: bool = False,
    ) -> RQTransformerOutput:
        """Likelihood of codes under teacher forcing; arguments as in `RQTransformer.forward`."""
        batch, positions, levels = codes.shape
        if levels != self.config.codebook_levels:
            raise ValueError(f"codes have {levels} levels, the model has {self.config.codebook_levels}")
        if document_ids is None:
            document_ids = torch.ones(codes.shape[:2], dtype=torch.long, device=codes.device)
        real = document_ids > 0
        if num_tokens is None:
            num_tokens = (real.sum() * self.config.compression_factor).clamp(min=1)
        flat_documents = document_ids.repeat_interleave(levels, dim=1)
        previous = self.embedding(codes).flatten(1, 2).roll(1, dims=1)
        is_inside = torch.zeros_like(flat_documents, dtype=torch.bool)
        is_inside[:, 1:] = flat_documents[:, 1:] == flat_documents[:, :-1]
        x = torch.where(is_inside[..., None], previous, self.start.to(previous.dtype))
        x = x + self.level_positions.repeat(positions, 1)
        mask = causal_document_mask(flat_documents, flat_documents)
        hidden = self.block(x, positions_in_documents(flat_documents), mask).view(
            batch * positions, levels, -1
        )
        weights = real.flatten() / num_tokens
        outputs = [
            head(hidden[:, level], codes[..., level].flatten(), weights)
            for level, head in enumerate(self.heads)
        ]
        logits = None
        if return_logits:
            logits = [head(hidden[:, i]).view(batch, positions, -1) for i, head in enumerate(self.heads)]
        return RQTransformerOutput(
            loss=torch.stack([out.loss for out in outputs]).sum(),
            nats=torch.stack([out.nats for out in outputs], dim=-1).view(codes.shape),
            correct=torch.stack([out.correct for out in outputs], dim=-1).view(codes.shape) & real[..., None],
            logits=logits,
        )
