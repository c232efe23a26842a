"""The codec that compresses nothing: the codes of a chunk are its tokens.

A latent model on these codes is MEGABYTE on tokens (Yu 2023): K tokens per spatial step, written one after another by
the depth transformer, nothing lost: what every learned codec has to beat. (Its likelihood is still a bound, if only
just: the codes also say where a document begins on the chunk grid and which places it leaves empty, log2 K bits a
document at most; 0.0035 bits per byte at K=8 in documents of 168 tokens.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rqvae.codec import most_likely
from rqvae.config import RQVAEConfig
from rqvae.encoder import token_documents
from rqvae.rq_vae import RQVAEOutput
from rqvae.sampling import ChooseTokens
from rqvae.token_codec import TokenCodec


class IdentityCodec(TokenCodec):
    """K tokens <-> K codes.

    Args:
        config: with `model: identity`.

    Raises:
        ValueError: the configuration is of another codec.
    """

    def __init__(self, config: RQVAEConfig):
        super().__init__(config, range(config.compression_factor))
        if config.model != "identity":
            raise ValueError(f"an IdentityCodec needs model: identity, not {config.model}")

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

    def decode_block(
        self,
        codes: Tensor,
        documents: Tensor,
        cache: Any,
        choose: ChooseTokens = most_likely,
        num_known: int = 0,
    ) -> Tensor:
        """See `Codec.decode_block`; no token is left open, and -1 is none."""
        tokens = codes[:, num_known:].flatten(1)
        return torch.where(tokens < self.absent, tokens, -1)
