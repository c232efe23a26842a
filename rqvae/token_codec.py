"""What codecs have in common whose codes are tokens: nothing is searched for, codes are looked up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rqvae.codec import Codec
from rqvae.config import RQVAEConfig
from rqvae.encoder import token_documents


class TokenCodec(Codec):
    """Code d of a chunk is its token at place `places[d]`, or V, the code beyond the vocabulary, where there is none.

    Args:
        places: in the chunk, one for each level.
    """

    def __init__(self, config: RQVAEConfig, places: Sequence[int]):
        super().__init__(config)
        self.absent = config.backbone.architecture.vocab_size
        self.places = list(places)

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `Codec.encode`; there is nothing to sample."""
        return self._codes(
            input_ids,
            token_documents(input_ids, attention_mask, document_ids, self.config.compression_factor),
        )

    def _codes(self, input_ids: Tensor, document_ids: Tensor) -> Tensor:
        tokens = torch.where(document_ids > 0, input_ids, self.absent)
        return tokens.view(tokens.shape[0], -1, self.config.compression_factor)[..., self.places]
