"""The codec that compresses nothing: the codes of a chunk are its tokens.

A latent model on these codes is MEGABYTE on tokens (Yu 2023): K tokens per spatial step, written one after another by
the depth transformer, nothing lost: what every learned codec has to beat. (Its likelihood is still a bound, if only
just: the codes also say where a document begins on the chunk grid and which places it leaves empty.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rqvae.codec import Codec
from rqvae.config import RQVAEConfig
from rqvae.encoder import token_documents
from rqvae.rq_vae import RQVAEOutput


class IdentityCodec(Codec):
    """K tokens <-> K codes.

    Code i of a chunk is its token i; the one code beyond the vocabulary stands for a place without a token.

    Args:
        config: with `model: identity`.

    Raises:
        ValueError: the configuration is of another codec.
    """

    def __init__(self, config: RQVAEConfig):
        super().__init__(config)
        if config.model != "identity":
            raise ValueError(f"an IdentityCodec needs model: identity, not {config.model}")
        self.absent = config.backbone.architecture.vocab_size

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, document_ids: Tensor | None = None
    ) -> RQVAEOutput:
        """Codes of the tokens, which are reconstructed with certainty; arguments as in `RQVAE.forward`."""
        document_ids = token_documents(
            input_ids, attention_mask, document_ids, self.config.compression_factor
        )
        nats = torch.zeros(input_ids.shape, device=input_ids.device)
        nothing = nats.sum()
        codes = self._codes(input_ids, document_ids)
        return RQVAEOutput(
            loss=nothing,
            reconstruction_loss=nothing,
            commitment_loss=nothing,
            rate_loss=nothing,
            codes=codes,
            latents=codes.float(),
            nats=nats,
            correct=document_ids > 0,
            distortion=nats.new_zeros(self.config.codebook_levels),
        )

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Codes of token chunks: LongTensor [B, T] -> LongTensor [B, T / K, K]; there is nothing to sample."""
        return self._codes(
            input_ids,
            token_documents(input_ids, attention_mask, document_ids, self.config.compression_factor),
        )

    def decode(self, codes: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Log-probabilities of the tokens: certain where there is a code, even where there is none.

        Args:
            codes: LongTensor [B, S, D'], the first D' <= K levels.

        Returns:
            [B, S * K, V].
        """
        missing = self.config.compression_factor - codes.shape[-1]
        tokens = nn.functional.pad(codes, (0, missing), value=self.absent).flatten(1)
        known = tokens < self.absent
        certain = torch.full((*tokens.shape, self.absent), -torch.inf, device=codes.device)
        certain.scatter_(-1, tokens.clamp(max=self.absent - 1)[..., None], 0.0)
        return certain.masked_fill_(~known[..., None], 0.0)

    def new_decoder_cache(self, batch_size: int, max_latents: int) -> Any:
        """For `decode_block`: nothing has to be remembered."""
        return None

    def decode_block(self, codes: Tensor, documents: Tensor, cache: Any) -> Tensor:
        """Tokens of further latents: LongTensor [B, S, K] -> [B, S * K]; -1 where there is no token."""
        tokens = codes.flatten(1)
        return torch.where(tokens < self.absent, tokens, -1)

    def _codes(self, input_ids: Tensor, document_ids: Tensor) -> Tensor:
        tokens = torch.where(document_ids > 0, input_ids, self.absent)
        return tokens.view(tokens.shape[0], -1, self.config.compression_factor)
