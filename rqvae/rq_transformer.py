"""The latent model: RQTransformer = SpatialTransformer over positions, DepthTransformer over codes.

Cost O(S^2 + S D^2) instead of O((S D)^2) of one flat sequence (Lee 2022, section 3.2).

Shapes: B batch, S latent positions, D levels, C codebook size, K tokens per latent, E spatial width, G depth
width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from rqvae.backbone import build_backbone, load_pretrained
from rqvae.backbone_cache import new_backbone_cache
from rqvae.config import ArchitectureConfig, RQTransformerConfig
from rqvae.depth_step import CompiledDepthStep, DepthStep
from rqvae.latent_model import (
    CodeEmbedding,
    CodeHeads,
    CodeSteps,
    LatentModel,
    shifted,
    visible_positions,
)
from rqvae.layers import TransformerBlock, TransformerCache, causal_document_mask, positions_in_documents
from rqvae.linear_head import LinearHead
from rqvae.sampling import ChooseCodes


class BackboneBlock(nn.Module):
    """A Hugging Face backbone in the place of a `TransformerBlock`.

    Args:
        with_embeddings: keep its token embeddings.
    """

    def __init__(self, architecture: ArchitectureConfig, with_embeddings: bool):
        super().__init__()
        self.backbone = build_backbone(architecture, with_embeddings)

    def new_cache(self, batch_size: int, max_length: int, like: Tensor) -> Cache:
        """Empty cache; it takes dtype and device from what is put into it."""
        return new_backbone_cache(self.backbone.config, max_length)

    def forward(
        self, x_BNE: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache | None = None
    ) -> Tensor:
        """Run the stack; as in `TransformerBlock`, but no mask is for a single position with a cache only."""
        return self.backbone(
            inputs_embeds=x_BNE,
            attention_mask=mask,
            position_ids=positions.expand(x_BNE.shape[:2]),
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state


class ChunkEmbedding(nn.Module):
    """The K tokens of a latent as one vector: their embeddings side by side, then a two-layer MLP.

    This is how CALM feeds decoded tokens back (arXiv 2510.27688, section on the autoregressive input).
    """

    def __init__(self, dim: int, compression_factor: int):
        super().__init__()
        self.compression_factor = compression_factor
        # Stands for the places of a chunk that hold no token, whatever else is found there.
        self.absent_token = nn.Parameter(torch.randn(dim) * 0.02)
        first = nn.Linear(compression_factor * dim, 2 * dim, bias=False)
        second = nn.Linear(2 * dim, dim, bias=False)
        # SiLU halves small inputs; so the result starts at the scale of the embeddings, like that of the codes.
        nn.init.normal_(first.weight, std=first.in_features**-0.5)
        nn.init.normal_(second.weight, std=2 * second.in_features**-0.5)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, embedded: Tensor, is_token: Tensor) -> Tensor:
        """Token embeddings [B, S * K, E] and BoolTensor [B, S * K] -> [B, S, E]."""
        embedded = torch.where(is_token[..., None], embedded, self.absent_token.to(embedded.dtype))
        batch, length, dim = embedded.shape
        factor = self.compression_factor
        return self.mlp(embedded.reshape(batch, length // factor, factor * dim))


class SpatialTransformer(nn.Module):
    """Context of every position from the positions before (Lee 2022, equations 9-10).

    The input at position j is made of position j - 1: the sum over levels of the embeddings of its codes (with
    `embedding: shared` a linear map of all of them), an embedding of its tokens (`ChunkEmbedding`), or both added. A
    document starts from a learned vector.
    """

    def __init__(self, config: RQTransformerConfig):
        super().__init__()
        dim = config.spatial_dim
        self.embedding: CodeEmbedding | None = None
        if config.spatial_input != "tokens":
            self.embedding = CodeEmbedding(config.codebook_sizes, dim, config.embedding == "shared")
        # Embeddings that do not tell levels apart are put side by side, not added.
        self.join: nn.Linear | None = None
        if self.embedding is not None and config.embedding == "shared":
            self.join = nn.Linear(config.codebook_levels * dim, dim, bias=False)
            nn.init.normal_(self.join.weight, std=self.join.in_features**-0.5)
        self.start = nn.Parameter(torch.randn(dim) * 0.02)
        self.block: TransformerBlock | BackboneBlock
        if config.spatial_backbone is None:
            self.block = TransformerBlock(
                dim, config.spatial_layers, config.head_dim, config.mlp_ratio, config.rope_theta
            )
        else:
            self.block = BackboneBlock(config.spatial_backbone.architecture, config.reads_tokens)
        self.chunk_embedding: ChunkEmbedding | None = None
        self.token_embedding: nn.Embedding | None = None
        if config.reads_tokens:
            assert config.vocab_size is not None  # the configuration has seen to it
            self.chunk_embedding = ChunkEmbedding(dim, config.compression_factor)
            if config.spatial_backbone is None:  # else the backbone has one
                self.token_embedding = nn.Embedding(config.vocab_size, dim)
                nn.init.normal_(self.token_embedding.weight, std=0.02)

    def embed(self, codes: Tensor, input_ids: Tensor | None = None, is_token: Tensor | None = None) -> Tensor:
        """What positions are for those that follow.

        Args:
            codes: LongTensor [B, S, D].
            input_ids: LongTensor [B, S * K], for a model that reads tokens.
            is_token: BoolTensor [B, S * K], False at places that hold none; by default all hold one.

        Returns:
            [B, S, E].
        """
        embedded = None
        if self.embedding is not None:
            embedded = self.embedding(codes)
            if self.join is None:
                embedded = embedded.sum(-2)
            else:  # levels that were left out are nothing, as in a sum
                embedded = embedded.flatten(-2)
                embedded = self.join(F.pad(embedded, (0, self.join.in_features - embedded.shape[-1])))
        if self.chunk_embedding is not None:
            assert input_ids is not None
            if is_token is None:
                is_token = torch.ones_like(input_ids, dtype=torch.bool)
            chunks = self.chunk_embedding(self._embed_tokens(input_ids), is_token)
            embedded = chunks if embedded is None else embedded + chunks
        assert embedded is not None
        return embedded

    def _embed_tokens(self, input_ids: Tensor) -> Tensor:
        if self.token_embedding is not None:
            return self.token_embedding(input_ids)
        assert isinstance(self.block, BackboneBlock)
        return self.block.backbone.get_input_embeddings()(input_ids)

    def forward(
        self,
        codes: Tensor,
        document_ids: Tensor,
        input_ids: Tensor | None = None,
        is_token: Tensor | None = None,
        cache: TransformerCache | Cache | None = None,
    ) -> Tensor:
        """Contexts of all positions.

        Args:
            codes: LongTensor [B, S, D]; those of the last position are nobody's input and may be left out.
            document_ids: LongTensor [B, S].
            input_ids, is_token: as in `embed`.
            cache: empty; filled.

        Returns:
            [B, S, E].
        """
        x = shifted(self.embed(codes, input_ids, is_token), self.start, document_ids)
        mask = causal_document_mask(document_ids, document_ids)
        return self.block(x, positions_in_documents(document_ids), mask, cache)


class DepthTransformer(nn.Module):
    """The D codes of one position, one after another, given its context (Lee 2022, equations 11-12).

    The input at level d is the context, plus a learned level position, plus the sum of the embeddings of the codes
    before it, or with `depth_input: code` that of the one before it. (Lee 2022 gives the context to the first level
    only; adding it everywhere costs nothing and lets one layer see it directly.)
    """

    def __init__(self, config: RQTransformerConfig):
        super().__init__()
        self.num_levels = config.codebook_levels
        self.adds_up = config.depth_input == "sum"
        self.embedding = CodeEmbedding(config.codebook_sizes, config.depth_dim, config.embedding == "shared")
        self.from_context = nn.Linear(config.spatial_dim, config.depth_dim, bias=False)
        self.level_positions = nn.Parameter(torch.randn(config.codebook_levels, config.depth_dim) * 0.02)
        self.block = TransformerBlock(
            config.depth_dim, config.depth_layers, config.head_dim, config.mlp_ratio, rope_theta=None
        )
        self.heads = CodeHeads(config.depth_dim, config)
        self.is_compiled = False
        self._steps: dict[tuple[int, torch.dtype, torch.device], CompiledDepthStep] = {}

    def hidden_states(self, context: Tensor, codes: Tensor) -> Tensor:
        """States before the heads, with the true codes as input: [N, E] and [N, D] -> [N, D, G]."""
        x = self.from_context(context)[:, None] + self.level_positions
        prefix = self.embedding(codes[:, :-1])
        if self.adds_up:
            prefix = prefix.cumsum(1)
        x = torch.cat([x[:, :1], x[:, 1:] + prefix], dim=1)
        return self.block(x, positions=None)

    def draw(self, context: Tensor, step: DepthStep, choose: ChooseCodes, num_levels: int) -> Tensor:
        """The first codes of one position: [B, E] -> LongTensor [B, num_levels]; `choose` as in `CodeSteps.draw`."""
        step.begin()
        # One row per level, so that the loop below has nothing to slice or reshape.
        inputs = (self.from_context(context)[:, None] + self.level_positions).split(1, dim=1)
        prefix: Tensor | None = None
        codes: list[Tensor] = []
        for level, x in enumerate(inputs[:num_levels]):
            if level:
                embedded = self.embedding.level(codes[-1], level - 1)[:, None]
                prefix = prefix + embedded if prefix is not None and self.adds_up else embedded
                x = x + prefix
            codes.append(choose(self.heads.of_level(level)(step(x)), level))
        return torch.stack(codes, dim=1)

    def new_step(self, batch_size: int) -> DepthStep:
        """The step from level to level, with buffers that serve every position."""
        if not self.is_compiled:
            return DepthStep(self.block, batch_size, self.num_levels, self.level_positions)
        # Compiling takes time, and a batch size comes again.
        key = (batch_size, self.level_positions.dtype, self.level_positions.device)
        if key not in self._steps:
            self._steps[key] = CompiledDepthStep(
                self.block, batch_size, self.num_levels, self.level_positions
            )
        return self._steps[key]


class RQTransformer(LatentModel):
    """Autoregressive model of residual codes: p(codes) = prod over positions and levels."""

    def __init__(self, config: RQTransformerConfig):
        if config.spatial_backbone is not None:
            # Where the weights once started from is the run's business, as in `RQVAE`.
            without = config.spatial_backbone.model_copy(update={"pretrained": None})
            config = config.model_copy(update={"spatial_backbone": without})
        super().__init__(config)
        self.spatial = SpatialTransformer(config)
        self.depth = DepthTransformer(config)

    def load_backbone(self, source: str) -> None:
        """Initialise the `spatial_backbone` from a causal LM in Hugging Face layout.

        Raises:
            ValueError: the model has none, or the weights do not fit.
        """
        if not isinstance(self.spatial.block, BackboneBlock):
            raise ValueError("this model has no spatial_backbone to load weights into")
        load_pretrained(source, self.spatial.block.backbone, None)

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """What `load_backbone` fills; all else is new."""
        if isinstance(self.spatial.block, BackboneBlock):
            yield from self.spatial.block.parameters()

    def head(self, level: int) -> LinearHead:
        """The output head that predicts the codes of a level."""
        return self.depth.heads.of_level(level)

    def _hidden_states(
        self, codes: Tensor, document_ids: Tensor, input_ids: Tensor | None, is_token: Tensor
    ) -> Tensor:
        context = self.spatial(codes, document_ids, input_ids, is_token)
        return self.depth.hidden_states(context.flatten(0, 1), codes.flatten(0, 1))

    def _begin(
        self,
        codes: Tensor,
        documents: Tensor,
        max_new_latents: int,
        input_ids: Tensor | None,
        is_token: Tensor | None,
    ) -> CodeSteps:
        return _RQTransformerSteps(self, codes, documents, max_new_latents, input_ids, is_token)


class _RQTransformerSteps(CodeSteps):
    """One step of the spatial transformer per position, D of the depth transformer."""

    def __init__(
        self,
        model: RQTransformer,
        codes: Tensor,
        documents: Tensor,
        max_new_latents: int,
        input_ids: Tensor | None,
        is_token: Tensor | None,
    ):
        spatial = model.spatial
        self._spatial, self._depth = spatial, model.depth
        self._cache = spatial.block.new_cache(len(codes), codes.shape[1] + max_new_latents, spatial.start)
        self._step = model.depth.new_step(len(codes))
        self._context = spatial(codes, documents, input_ids, is_token, self._cache)[:, -1]
        self._position = documents.sum(1, keepdim=True)
        self._visible = visible_positions(documents, codes.shape[1] + max_new_latents)
        self._length = documents.shape[1]

    def draw(self, choose: ChooseCodes, num_levels: int | None = None) -> Tensor:
        return self._depth.draw(self._context, self._step, choose, num_levels or self._depth.num_levels)

    def select(self, rows: Tensor) -> None:
        if len(rows) != len(self._position):
            self._step = self._depth.new_step(len(rows))
        if isinstance(self._cache, TransformerCache):
            self._cache.select(rows)
        else:
            self._cache.reorder_cache(rows)  # type: ignore[arg-type]
        self._position = self._position[rows]
        if self._visible is not None:
            self._visible = self._visible[rows]

    def append(self, codes: Tensor, input_ids: Tensor | None = None, is_token: Tensor | None = None) -> None:
        self._length += 1
        mask = None if self._visible is None else self._visible[..., : self._length]
        x = self._spatial.embed(codes[:, None], input_ids, is_token)
        self._context = self._spatial.block(x, self._position, mask, self._cache)[:, -1]
        self._position = self._position + 1
