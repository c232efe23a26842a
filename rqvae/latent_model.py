"""What the RQ-transformer and its flat baseline have in common: inputs, likelihoods, stepping, files.

Shapes: B batch, S latent positions, D levels, C codebook size, K tokens per latent, E model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rqvae import persistence
from rqvae.config import RQTransformerConfig
from rqvae.encoder import chunk_documents
from rqvae.linear_head import HeadOutput, LinearHead, is_alone_at_the_top
from rqvae.sampling import ChooseCodes


class RQTransformerOutput(NamedTuple):
    """Likelihood of codes."""

    loss: Tensor
    """Negative log-likelihood of the codes of all levels, per real token of text, in nats; with soft targets
    the cross-entropy against them."""
    level_losses: Tensor
    """[D] what the loss is the sum of."""
    nats: Tensor
    """[B, S, D] fp32, 0 at padding."""
    correct: Tensor
    """BoolTensor [B, S, D]: the code is the most likely one; False at padding."""
    logits: list[Tensor] | None
    """[B, S, C] per level; only when asked for."""


class CodeEmbedding(nn.Module):
    """One embedding per code of every level, in a single table, or of all levels together.

    Args:
        is_shared: a code has the same embedding at every level, as suits tokens; codebooks are then of one size.
    """

    def __init__(self, codebook_sizes: tuple[int, ...], dim: int, is_shared: bool = False):
        super().__init__()
        self.table = nn.Embedding(codebook_sizes[0] if is_shared else sum(codebook_sizes), dim)
        # The sum over levels has unit variance, as what it is added to. With a language model's usual 0.02 the codes
        # drown in the context: after 300 steps on tokens as codes 5.62 nats per token against 5.40.
        nn.init.normal_(self.table.weight, std=1.0 if is_shared else len(codebook_sizes) ** -0.5)
        self.level_offsets = [
            0 if is_shared else sum(codebook_sizes[:level]) for level in range(len(codebook_sizes))
        ]
        self.register_buffer("offsets", torch.tensor(self.level_offsets), persistent=False)

    offsets: Tensor

    def forward(self, codes: Tensor) -> Tensor:
        """LongTensor [..., D] -> [..., D, dim]."""
        return self.table(codes + self.offsets[: codes.shape[-1]])

    def level(self, codes: Tensor, level: int) -> Tensor:
        """Codes of one level: LongTensor [...] -> [..., dim]."""
        return self.table(codes + self.level_offsets[level])


class CodeHeads(nn.ModuleList):
    """The output heads of the D levels: one for each, or a single one that all levels share."""

    def __init__(self, dim: int, config: RQTransformerConfig):
        sizes = config.codebook_sizes
        super().__init__(LinearHead(dim, size) for size in (sizes[:1] if config.head == "shared" else sizes))

    def of_level(self, level: int) -> LinearHead:
        """The head that predicts the codes of `level`."""
        return self[level if len(self) > 1 else 0]  # type: ignore[return-value]


def inside_documents(document_ids: Tensor) -> Tensor:
    """BoolTensor [B, N]: the place before belongs to the same document."""
    inside = torch.zeros_like(document_ids, dtype=torch.bool)
    inside[:, 1:] = document_ids[:, 1:] == document_ids[:, :-1]
    return inside


def shifted(embedded: Tensor, start: Tensor, document_ids: Tensor) -> Tensor:
    """Inputs of an autoregressive model: what stands before, or `start` where a document begins.

    Args:
        embedded: [B, N, E], or [B, N - 1, E], as the last one is nobody's input.
        start: [E].
        document_ids: LongTensor [B, N].

    Returns:
        [B, N, E].
    """
    start = start.to(embedded.dtype)
    batch, length = document_ids.shape
    previous = torch.cat([start.expand(batch, 1, -1), embedded[:, : length - 1]], dim=1)
    return torch.where(inside_documents(document_ids)[..., None], previous, start)


def visible_positions(documents: Tensor, max_length: int) -> Tensor | None:
    """Which positions a step of generation sees, those to come included.

    Args:
        documents: LongTensor [B, N], 0 at the padding that some rows begin with.
        max_length: as many positions as there will be.

    Returns:
        BoolTensor [B, 1, 1, max_length] to take the front of, or None where all see everything.
    """
    if not bool((documents == 0).any()):
        return None
    return F.pad(documents > 0, (0, max_length - documents.shape[1]), value=True)[:, None, None]


class CodeSteps(ABC):
    """Codes of a batch of sequences, drawn position by position with caches."""

    @abstractmethod
    def draw(self, choose: ChooseCodes, num_levels: int | None = None) -> Tensor:
        """The codes of the next position, level by level.

        Args:
            choose: takes the codes of a level from its logits.
            num_levels: draw the first levels only; by default all D.

        Returns:
            LongTensor [B, num_levels].

        Raises:
            ValueError: `num_levels` of a model that cannot go on from some of the levels.
        """

    @abstractmethod
    def append(self, codes: Tensor, input_ids: Tensor | None = None, is_token: Tensor | None = None) -> None:
        """Make what was drawn part of the context.

        Args:
            codes: LongTensor [B, num_levels], as drawn.
            input_ids: LongTensor [B, K], what they decode to; for a model that reads tokens.
            is_token: BoolTensor [B, K], False at places that hold none; by default all hold one.
        """

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Go on from the contexts of these rows: LongTensor [b], each named any number of times, or not at all.

        To be called between `draw` and `append`.
        """


class LatentModel(nn.Module, ABC):
    """An autoregressive model of residual codes: p(codes) = prod over positions and levels."""

    def __init__(self, config: RQTransformerConfig):
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    # Persistence ---------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Load what `save_pretrained` wrote, in evaluation mode.

        Raises:
            ValueError: the directory is missing, damaged or holds something else.
        """
        return persistence.load_model(cls, RQTransformerConfig, directory)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and safetensors."""
        persistence.save_model(self, self.config, directory)

    # Likelihood ----------------------------------------------------------------------------------------

    def forward(
        self,
        codes: Tensor,
        input_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        num_tokens: Tensor | None = None,
        return_logits: bool = False,
        token_document_ids: Tensor | None = None,
        soft_targets: Sequence[Tensor] | None = None,
    ) -> RQTransformerOutput:
        """Likelihood of codes under teacher forcing.

        Args:
            codes: LongTensor [B, S, D].
            input_ids: LongTensor [B, S * K], the text itself; for a model that reads tokens, which needs it.
            document_ids: LongTensor [B, S] document of every latent, 0 at padding; one document by default.
            num_tokens: denominator of the loss; by default K times the real positions of this batch.
            return_logits: also return the logits (memory: B S sum(C)).
            token_document_ids: LongTensor [B, S * K], instead of `document_ids`: document of every token, 0
                where a chunk holds none. Without it a real chunk counts as full.
            soft_targets: by level [B, S, C] probabilities, which the loss is then the cross-entropy against
                (Lee 2022, section 3.2.3); `nats` stay those of `codes`.

        Raises:
            ValueError: the number of levels is not the model's, both kinds of document ids are given, or
                `input_ids` are missing or not wanted.
        """
        factor = self.config.compression_factor
        if codes.shape[-1] != self.config.codebook_levels:
            raise ValueError(
                f"codes have {codes.shape[-1]} levels, the model has {self.config.codebook_levels}"
            )
        self._check_text(input_ids)
        if token_document_ids is not None:
            if document_ids is not None:
                raise ValueError("give document_ids or token_document_ids, not both")
            document_ids = chunk_documents(token_document_ids, factor)
        if document_ids is None:
            document_ids = torch.ones(codes.shape[:2], dtype=torch.long, device=codes.device)
        if token_document_ids is None:
            token_document_ids = document_ids.repeat_interleave(factor, dim=1)
        real = document_ids > 0
        if num_tokens is None:
            num_tokens = (real.sum() * factor).clamp(min=1)
        hidden = self._hidden_states(codes, document_ids, input_ids, token_document_ids > 0)
        weights = real.flatten() / num_tokens
        losses, nats, correct, logits = [], [], [], []
        for level in range(self.config.codebook_levels):
            head, labels = self.head(level), codes[..., level].flatten()
            out: HeadOutput
            if soft_targets is None:
                out = head(hidden[:, level], labels, weights)
            else:
                out = _soft_cross_entropy(head(hidden[:, level]), labels, weights, soft_targets[level])
            losses.append(out.loss)
            nats.append(out.nats)
            correct.append(out.correct)
            if return_logits:
                logits.append(head(hidden[:, level]).view(*codes.shape[:2], -1))
        level_losses = torch.stack(losses)
        return RQTransformerOutput(
            loss=level_losses.sum(),
            level_losses=level_losses,
            nats=torch.stack(nats, dim=-1).view(codes.shape),
            correct=torch.stack(correct, dim=-1).view(codes.shape) & real[..., None],
            logits=logits if return_logits else None,
        )

    @abstractmethod
    def head(self, level: int) -> LinearHead:
        """The output head that predicts the codes of a level."""

    @abstractmethod
    def _hidden_states(
        self, codes: Tensor, document_ids: Tensor, input_ids: Tensor | None, is_token: Tensor
    ) -> Tensor:
        """States before the heads, with the true codes as input: [B * S, D, width].

        Args: codes, document_ids [B, S] and input_ids as in `forward`; is_token BoolTensor [B, S * K].
        """

    # Generation ----------------------------------------------------------------------------------------

    def begin(
        self,
        codes: Tensor,
        document_ids: Tensor,
        max_new_latents: int,
        input_ids: Tensor | None = None,
        token_document_ids: Tensor | None = None,
    ) -> CodeSteps:
        """Read prompts and get ready to continue them.

        Args:
            codes: LongTensor [B, P, D], padded on the left; P may be 0.
            document_ids: LongTensor [B, P], 1 at latents of the prompt, 0 at padding.
            max_new_latents: how many positions can be drawn.
            input_ids: LongTensor [B, P * K], for a model that reads tokens.
            token_document_ids: LongTensor [B, P * K], for a model that reads tokens: 0 where a chunk holds none.
        """
        self._check_text(input_ids)
        # The next position belongs to the text, even where a prompt is empty.
        documents = torch.cat([document_ids, document_ids.new_ones(len(document_ids), 1)], dim=1)
        is_token = None if token_document_ids is None else token_document_ids > 0
        return self._begin(codes, documents, max_new_latents, input_ids, is_token)

    @abstractmethod
    def _begin(
        self,
        codes: Tensor,
        documents: Tensor,
        max_new_latents: int,
        input_ids: Tensor | None,
        is_token: Tensor | None,
    ) -> CodeSteps:
        """As `begin`, with `documents` [B, P + 1] of the prompt and of the position that follows it."""

    def _check_text(self, input_ids: Tensor | None) -> None:
        if input_ids is not None and not self.config.reads_tokens:
            raise ValueError("this model reads codes only; call it without input_ids")
        if input_ids is None and self.config.reads_tokens:
            raise ValueError(
                f"this model reads tokens (spatial_input: {self.config.spatial_input}); give input_ids"
            )


def _soft_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, targets: Tensor) -> HeadOutput:
    """Loss against `targets` [..., C], likelihood of `labels` [N], from logits [N, C]."""
    log_probabilities = logits.float().log_softmax(-1)
    losses = -(targets.flatten(0, -2).float() * log_probabilities).sum(-1)
    with torch.no_grad():
        label_logits = log_probabilities.gather(1, labels[:, None])
        nats = (-label_logits).squeeze(1).masked_fill(weights == 0, 0.0)
        # A copy: the graph holds the log-probabilities.
        correct = is_alone_at_the_top(log_probabilities.clone(), labels[:, None], label_logits)
    return HeadOutput(torch.dot(losses, weights.float()), nats, correct)
