"""The baseline of the RQ-transformer: a standard transformer over the flattened codes.

O((S D)^2) attention and D times as many positions in every layer; Lee 2022 compares against it in
section 3.2. Same inputs, outputs and configuration as `RQTransformer` (the depth fields go unused).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rqvae.config import RQTransformerConfig
from rqvae.latent_model import (
    CodeEmbedding,
    CodeHeads,
    CodeSteps,
    LatentModel,
    shifted,
    visible_positions,
)
from rqvae.layers import TransformerBlock, causal_document_mask, positions_in_documents
from rqvae.linear_head import LinearHead
from rqvae.sampling import ChooseCodes


class FlatTransformer(LatentModel):
    """Autoregressive model of the sequence code (0, 0), (0, 1), ..., (0, D-1), (1, 0), ...

    Raises:
        ValueError: the configuration asks for what only an `RQTransformer` has.
    """

    def __init__(self, config: RQTransformerConfig):
        if config.reads_tokens or config.spatial_backbone is not None:
            raise ValueError("a FlatTransformer reads codes only and has no spatial_backbone")
        super().__init__(config)
        self.embedding = CodeEmbedding(
            config.codebook_sizes, config.spatial_dim, config.embedding == "shared"
        )
        self.level_positions = nn.Parameter(torch.randn(config.codebook_levels, config.spatial_dim) * 0.02)
        self.start = nn.Parameter(torch.randn(config.spatial_dim) * 0.02)
        self.block = TransformerBlock(
            config.spatial_dim, config.spatial_layers, config.head_dim, config.mlp_ratio, config.rope_theta
        )
        self.heads = CodeHeads(config.spatial_dim, config)

    def head(self, level: int) -> LinearHead:
        """The output head that predicts the codes of a level."""
        return self.heads.of_level(level)

    def inputs(self, codes: Tensor, documents: Tensor) -> Tensor:
        """Inputs of the stack.

        Args:
            codes: LongTensor [B, S, D].
            documents: LongTensor [B, N], N flattened positions: S * D, or one more to predict what follows.

        Returns:
            [B, N, E].
        """
        length = documents.shape[1]
        levels = self.level_positions.repeat(-(-length // self.config.codebook_levels), 1)[:length]
        return shifted(self.embedding(codes).flatten(1, 2), self.start, documents) + levels

    def _hidden_states(
        self, codes: Tensor, document_ids: Tensor, input_ids: Tensor | None, is_token: Tensor
    ) -> Tensor:
        documents = document_ids.repeat_interleave(codes.shape[-1], dim=1)
        mask = causal_document_mask(documents, documents)
        hidden = self.block(self.inputs(codes, documents), positions_in_documents(documents), mask)
        return hidden.view(-1, codes.shape[-1], hidden.shape[-1])

    def _begin(
        self,
        codes: Tensor,
        documents: Tensor,
        max_new_latents: int,
        input_ids: Tensor | None,
        is_token: Tensor | None,
    ) -> CodeSteps:
        return _FlatTransformerSteps(self, codes, documents, max_new_latents)


class _FlatTransformerSteps(CodeSteps):
    """D steps of the one stack per position."""

    def __init__(self, model: FlatTransformer, codes: Tensor, documents: Tensor, max_new_latents: int):
        self._model = model
        self._num_levels = codes.shape[-1]
        # The position to come begins with its first code.
        documents = documents.repeat_interleave(self._num_levels, dim=1)[:, : 1 - self._num_levels or None]
        self._cache = model.block.new_cache(
            len(codes), (codes.shape[1] + max_new_latents) * self._num_levels, model.start
        )
        mask = causal_document_mask(documents, documents)
        hidden = model.block(
            model.inputs(codes, documents), positions_in_documents(documents), mask, self._cache
        )
        self._hidden = hidden[:, -1]
        self._position = documents.sum(1, keepdim=True)
        self._visible = visible_positions(documents, self._cache.max_length)
        self._length = documents.shape[1]

    def draw(self, choose: ChooseCodes, num_levels: int | None = None) -> Tensor:
        if num_levels not in (None, self._num_levels):
            raise ValueError(
                "num_levels: a FlatTransformer reads the codes of all levels; use an RQTransformer"
            )
        codes: list[Tensor] = []
        for level in range(self._num_levels):
            if level:
                self._step(codes[-1], level)
            codes.append(choose(self._model.head(level)(self._hidden), level))
        return torch.stack(codes, dim=1)

    def select(self, rows: Tensor) -> None:
        self._cache.select(rows)
        self._position = self._position[rows]
        if self._visible is not None:
            self._visible = self._visible[rows]

    def append(self, codes: Tensor, input_ids: Tensor | None = None, is_token: Tensor | None = None) -> None:
        self._step(codes[:, -1], 0)

    def _step(self, previous: Tensor, level: int) -> None:
        """Read the code before one of `level`."""
        self._length += 1
        mask = None if self._visible is None else self._visible[..., : self._length]
        x = self._model.embedding.level(previous, (level - 1) % self._num_levels)
        x = (x + self._model.level_positions[level])[:, None]
        self._hidden = self._model.block(x, self._position, mask, self._cache)[:, -1]
        self._position = self._position + 1
