"""What every codec can do: tokens to codes and back, and be kept on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from rqvae import persistence
from rqvae.config import RQVAEConfig
from rqvae.linear_head import LinearHead
from rqvae.sampling import ChooseTokens


def most_likely(logits: Tensor, places: Tensor) -> Tensor:
    """The most likely entry: [N, V] -> LongTensor [N]."""
    return logits.argmax(-1)


def choose_tokens(head: LinearHead, hidden: Tensor, places: Tensor, choose: ChooseTokens) -> Tensor:
    """Tokens at `places`, LongTensor [N], from their states [N, H]: LongTensor [N].

    The logits of all of them never exist at once: 16 rows of 128 tokens take 1.2 GB at V = 151,936.
    """
    blocks = zip(hidden.split(head.block_rows), places.split(head.block_rows), strict=True)
    return torch.cat([choose(head(states), where) for states, where in blocks])


class Codec(nn.Module, ABC):
    """K tokens <-> one latent of D codes. Its forward pass scores tokens and returns an `RQVAEOutput`.

    Shapes: B batch, T tokens, K compression factor, S = T / K latents, D levels, V vocabulary.
    """

    config: RQVAEConfig

    def __init__(self, config: RQVAEConfig):
        super().__init__()
        # Where the weights once started from is the run's business: a saved codec is complete without it.
        self.config = config.model_copy(
            update={"backbone": config.backbone.model_copy(update={"pretrained": None})}
        )
        self._kept_hash: str | None = None

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Load what `save_pretrained` wrote, in evaluation mode.

        Raises:
            ValueError: the directory is missing, damaged or holds something else.
        """
        return persistence.load_model(cls, RQVAEConfig, directory)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and safetensors."""
        persistence.save_model(self, self.config, directory)

    def codec_hash(self) -> str:
        """sha256 over configuration and weights: the identity of the codes this codec makes."""
        return self._kept_hash or persistence.content_hash(self, self.config)

    def keep_hash(self) -> None:
        """Go by the hash of now, whatever the weights are rounded to afterwards."""
        self._kept_hash = self.codec_hash()

    @abstractmethod
    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Codes of token chunks: LongTensor [B, T] -> LongTensor [B, T / K, D].

        Args:
            input_ids: T a multiple of K.
            attention_mask: [B, T], 0 at padding; for one document per row.
            document_ids: LongTensor [B, T], 0 at padding; for packed documents, instead of the mask.
            sample: draw every code instead of taking the nearest (`ResidualQuantizer.sample`), if there is a choice.
            generator: of the draws, on the device of the model.
        """

    @abstractmethod
    def decode(self, codes: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Logits of the tokens of every latent.

        Args:
            codes: LongTensor [B, S, D'], the first D' <= D levels.
            document_ids: LongTensor [B, S] document of every latent, 0 at padding; one document by default.

        Returns:
            [B, S * K, V].
        """

    @abstractmethod
    def new_decoder_cache(self, batch_size: int, max_latents: int) -> Any:
        """Empty cache for `decode_block`."""

    @abstractmethod
    def decode_block(
        self,
        codes: Tensor,
        documents: Tensor,
        cache: Any,
        choose: ChooseTokens = most_likely,
        num_known: int = 0,
    ) -> Tensor:
        """The tokens of further latents.

        Args:
            codes: LongTensor [B, n, D'], the first D' <= D levels of those that follow what `cache` holds.
            documents: LongTensor [B, n], 0 at padding.
            cache: extended in place.
            choose: takes the tokens that the codes leave open from their logits; called with some of them at a time.
            num_known: leading latents whose tokens nobody asks for, such as a prompt's.

        Returns:
            LongTensor [B, (n - num_known) * K]; negative where there is no token.
        """
