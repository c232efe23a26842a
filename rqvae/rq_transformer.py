"""The latent model: RQTransformer = SpatialTransformer over positions, DepthTransformer over codes.

Cost O(S^2 + S D^2) instead of O((S D)^2) of one flat sequence (Lee 2022, section 3.2).

Shapes: B batch, S latent positions, D levels, C codebook size, E spatial width, G depth width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rqvae import persistence
from rqvae.config import RQTransformerConfig
from rqvae.layers import (
    HeadOutput,
    LinearHead,
    TransformerBlock,
    TransformerCache,
    causal_document_mask,
    positions_in_documents,
)


class RQTransformerOutput(NamedTuple):
    """Likelihood of codes."""

    loss: Tensor
    """Negative log-likelihood of the codes of all levels, per real token of text, in nats."""
    nats: Tensor
    """[B, S, D] fp32, 0 at padding."""
    correct: Tensor
    """BoolTensor [B, S, D]: the code is the most likely one; False at padding."""
    logits: list[Tensor] | None
    """[B, S, C] per level; only when asked for."""


class CodeEmbedding(nn.Module):
    """One embedding per code of every level, in a single table."""

    def __init__(self, codebook_sizes: tuple[int, ...], dim: int):
        super().__init__()
        self.table = nn.Embedding(sum(codebook_sizes), dim)
        nn.init.normal_(self.table.weight, std=0.02)
        self.level_offsets = [sum(codebook_sizes[:level]) for level in range(len(codebook_sizes))]
        self.register_buffer("offsets", torch.tensor(self.level_offsets), persistent=False)

    offsets: Tensor

    def forward(self, codes: Tensor) -> Tensor:
        """LongTensor [..., D] -> [..., D, dim]."""
        return self.table(codes + self.offsets[: codes.shape[-1]])

    def level(self, codes: Tensor, level: int) -> Tensor:
        """Codes of one level: LongTensor [...] -> [..., dim]."""
        return self.table(codes + self.level_offsets[level])


class SpatialTransformer(nn.Module):
    """Context of every position from the codes of the positions before (Lee 2022, equations 9-10).

    The input at position j is the sum over levels of the embeddings of the codes at j - 1; a document
    starts from a learned vector.
    """

    def __init__(self, config: RQTransformerConfig):
        super().__init__()
        self.embedding = CodeEmbedding(config.codebook_sizes, config.spatial_dim)
        self.start = nn.Parameter(torch.randn(config.spatial_dim) * 0.02)
        self.block = TransformerBlock(
            config.spatial_dim, config.spatial_layers, config.head_dim, config.mlp_ratio, config.rope_theta
        )

    def embed(self, codes: Tensor) -> Tensor:
        """Sum over levels: LongTensor [B, S, D] -> [B, S, E]."""
        return self.embedding(codes).sum(-2)

    def forward(self, codes: Tensor, document_ids: Tensor) -> Tensor:
        """Contexts [B, S, E] of all positions, from LongTensors codes [B, S, D] and document_ids [B, S]."""
        is_inside = torch.zeros_like(document_ids, dtype=torch.bool)
        is_inside[:, 1:] = document_ids[:, 1:] == document_ids[:, :-1]
        previous = self.embed(codes).roll(1, dims=1)
        x = torch.where(is_inside[..., None], previous, self.start.to(previous.dtype))
        return self.block(
            x, positions_in_documents(document_ids), causal_document_mask(document_ids, document_ids)
        )

    def step(self, x_BNE: Tensor, positions: Tensor, mask: Tensor | None, cache: TransformerCache) -> Tensor:
        """Contexts of further positions, given their inputs (`embed` of the codes before, or `start`)."""
        return self.block(x_BNE, positions, mask, cache)


class DepthTransformer(nn.Module):
    """The D codes of one position, one after another, given its context (Lee 2022, equations 11-12).

    The input at level d is the context, plus a learned level position, plus the sum of the embeddings of
    the codes before it. (Lee 2022 gives the context to the first level only; adding it everywhere costs
    nothing and lets one layer see it directly.)
    """

    def __init__(self, config: RQTransformerConfig):
        super().__init__()
        self.num_levels = config.codebook_levels
        self.embedding = CodeEmbedding(config.codebook_sizes, config.depth_dim)
        self.from_context = nn.Linear(config.spatial_dim, config.depth_dim, bias=False)
        self.level_positions = nn.Parameter(torch.randn(config.codebook_levels, config.depth_dim) * 0.02)
        self.block = TransformerBlock(
            config.depth_dim, config.depth_layers, config.head_dim, config.mlp_ratio, rope_theta=None
        )
        self.heads: Sequence[LinearHead] = nn.ModuleList(  # type: ignore[assignment]
            LinearHead(config.depth_dim, size) for size in config.codebook_sizes
        )

    def hidden_states(self, context: Tensor, codes: Tensor) -> Tensor:
        """States before the heads, with the true codes as input: [N, E] and [N, D] -> [N, D, G]."""
        x = self.from_context(context)[:, None] + self.level_positions
        prefix = self.embedding(codes[:, :-1]).cumsum(1)
        x = torch.cat([x[:, :1], x[:, 1:] + prefix], dim=1)
        return self.block(x, positions=None)

    def step(self, x_BNG: Tensor, level: int, cache: TransformerCache) -> Tensor:
        """Logits [B, C] of one level, given its input [B, 1, G]; `cache` holds the levels before."""
        return self.heads[level](self.block(x_BNG, None, None, cache)[:, 0])

    def new_cache(self, batch_size: int) -> TransformerCache:
        """Cache for the levels of one position, reused for every position."""
        return self.block.new_cache(batch_size, self.num_levels, self.level_positions)


class RQTransformer(nn.Module):
    """Autoregressive model of residual codes: p(codes) = prod over positions and levels."""

    def __init__(self, config: RQTransformerConfig):
        super().__init__()
        self.config = config
        self.spatial = SpatialTransformer(config)
        self.depth = DepthTransformer(config)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> RQTransformer:
        """Load what `save_pretrained` wrote, in evaluation mode.

        Raises:
            ValueError: the directory is missing, damaged or holds something else.
        """
        return persistence.load_model(cls, RQTransformerConfig, directory)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and safetensors."""
        persistence.save_model(self, self.config, directory)

    def forward(
        self,
        codes: Tensor,
        input_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        num_tokens: Tensor | None = None,
        return_logits: bool = False,
    ) -> RQTransformerOutput:
        """Likelihood of codes under teacher forcing.

        Args:
            codes: LongTensor [B, S, D].
            input_ids: LongTensor [B, S * K], the text itself, for models that read it; refused by this one.
            document_ids: LongTensor [B, S] document of every latent, 0 at padding; one document by default.
            num_tokens: denominator of the loss; by default K times the real positions of this batch.
            return_logits: also return the logits (memory: B S sum(C)).

        Raises:
            ValueError: `input_ids` given, or the number of levels is not the model's.
        """
        if input_ids is not None:
            raise ValueError("this RQTransformer reads codes only; call it without input_ids")
        if codes.shape[-1] != self.config.codebook_levels:
            raise ValueError(
                f"codes have {codes.shape[-1]} levels, the model has {self.config.codebook_levels}"
            )
        if document_ids is None:
            document_ids = torch.ones(codes.shape[:2], dtype=torch.long, device=codes.device)
        real = document_ids > 0
        if num_tokens is None:
            num_tokens = (real.sum() * self.config.compression_factor).clamp(min=1)
        context = self.spatial(codes, document_ids).flatten(0, 1)
        hidden = self.depth.hidden_states(context, codes.flatten(0, 1))
        weights = real.flatten() / num_tokens
        losses, nats, correct, logits = [], [], [], []
        for level, head in enumerate(self.depth.heads):
            out: HeadOutput = head(hidden[:, level], codes[..., level].flatten(), weights)
            losses.append(out.loss)
            nats.append(out.nats)
            correct.append(out.correct)
            if return_logits:
                logits.append(head(hidden[:, level]).view(*codes.shape[:2], -1))
        return RQTransformerOutput(
            loss=torch.stack(losses).sum(),
            nats=torch.stack(nats, dim=-1).view(codes.shape),
            correct=torch.stack(correct, dim=-1).view(codes.shape) & real[..., None],
            logits=logits if return_logits else None,
        )
