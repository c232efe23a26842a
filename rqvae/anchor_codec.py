"""The codec whose codes are D of the K tokens of a chunk; a decoder fills in the others, all at once.

Nothing has to be searched for or learnt on the encoder's side, and the codes are as predictable as text: what a
learned codec with D < K has to beat. Filling in tokens in parallel, given some that stand, is conditional masked
language modelling (Ghazvininejad 2019), here chunk by chunk so that text can be decoded while it is generated.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rqvae.backbone import build_backbone, load_pretrained
from rqvae.backbone_cache import new_backbone_cache
from rqvae.codec import choose_tokens, most_likely
from rqvae.config import RQVAEConfig
from rqvae.decoder import DecoderCache, decode_with_backbone
from rqvae.encoder import chunk_documents, token_documents
from rqvae.linear_head import HeadOutput, LinearHead
from rqvae.rq_vae import RQVAEOutput
from rqvae.sampling import ChooseTokens
from rqvae.token_codec import TokenCodec


class AnchorCodec(TokenCodec):
    """K tokens <-> D of them (the anchors), evenly spaced, the last token of the chunk among them.

    The decoder is a causal backbone over all places. A place is given the embedding of the first anchor at or after
    it, so that it sees that one beside, through attention, all the anchors before.

    -log p(x) = NLL(codes) + NLL(other tokens | codes) is a bound only for the codes that say where a document begins
    on the chunk grid: every text has one code sequence.

    Args:
        config: with `model: anchor`.

    Raises:
        ValueError: the configuration is of another codec.
    """

    def __init__(self, config: RQVAEConfig):
        factor, levels = config.compression_factor, config.codebook_levels
        super().__init__(config, [(level + 1) * factor // levels - 1 for level in range(levels)])
        if config.model != "anchor":
            raise ValueError(f"an AnchorCodec needs model: anchor, not {config.model}")
        architecture = config.backbone.architecture
        is_anchor = torch.zeros(factor, dtype=torch.bool)
        is_anchor[self.places] = True
        self.register_buffer("is_anchor", is_anchor, persistent=False)
        # The first anchor at or after every place.
        next_level = is_anchor.long().cumsum(0) - is_anchor.long()
        self.register_buffer("next_level", next_level, persistent=False)
        # Of unit scale and never tied to the head. Tied, at the usual 0.02: 2.05 nats per token instead of 1.74 after
        # 400 steps of tiny (tokens given anchors, K=4, D=2). The last row is for an anchor that is not there.
        self.code_embedding = nn.Embedding(self.absent + 1, architecture.hidden_size)
        self.place_embedding = nn.Parameter(torch.randn(factor, architecture.hidden_size) * 0.02)
        self.backbone = build_backbone(architecture, with_embeddings=False)
        self.head = LinearHead(architecture.hidden_size, architecture.vocab_size)

    is_anchor: Tensor
    next_level: Tensor

    def load_backbone(self, source: str) -> None:
        """Initialise backbone and head from a causal LM in Hugging Face layout.

        Raises:
            ValueError: `backbone.decoder` asks for something else.
        """
        if self.config.backbone.decoder != "same":
            raise ValueError(
                "backbone.pretrained: an anchor codec has a decoder only; use backbone.decoder: same"
            )
        load_pretrained(source, self.backbone, self.head)

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """What `load_backbone` fills and the frozen warm-up leaves alone; all else is new."""
        if self.config.backbone.decoder == "same":
            yield from self.backbone.parameters()
            yield from self.head.parameters()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        num_tokens: Tensor | None = None,
    ) -> RQVAEOutput:
        """Score the tokens between the anchors; those at anchors are certain. Arguments as in `RQVAE.forward`."""
        document_ids = token_documents(
            input_ids, attention_mask, document_ids, self.config.compression_factor
        )
        real = document_ids > 0
        if num_tokens is None:
            num_tokens = real.sum().clamp(min=1)
        codes = self._codes(input_ids, document_ids)
        unknown = real & ~self._at_anchors(input_ids)
        documents = chunk_documents(document_ids, self.config.compression_factor)
        hidden = self.hidden_states(codes, documents)
        out: HeadOutput = self.head(hidden, input_ids, unknown / num_tokens)
        nothing = torch.zeros_like(out.loss)
        return RQVAEOutput(
            loss=out.loss,
            reconstruction_loss=out.loss,
            commitment_loss=nothing,
            rate_loss=nothing,
            codes=codes,
            latents=hidden.new_zeros(*codes.shape[:2], 0),
            nats=out.nats.view_as(input_ids),
            correct=(out.correct.view_as(real) | ~unknown) & real,
            distortion=nothing.new_zeros(self.config.codebook_levels),
        )

    def hidden_states(self, codes: Tensor, documents: Tensor, cache: DecoderCache | None = None) -> Tensor:
        """Hidden states before the head.

        Args:
            codes: LongTensor [B, S, D].
            documents: LongTensor [B, S] document of every latent, 0 at padding.
            cache: filled with the latents before these; extended in place.

        Returns:
            [B, S * K, H].
        """
        x = (self.code_embedding(codes[..., self.next_level]) + self.place_embedding).flatten(1, 2)
        return decode_with_backbone(self.backbone, x, documents, self.config.compression_factor, cache)

    def decode(self, codes: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """See `Codec.decode`; certain at anchors. Anchors of levels that are left out count as places without a
        token."""
        missing = self.config.codebook_levels - codes.shape[-1]
        codes = nn.functional.pad(codes, (0, missing), value=self.absent)
        if document_ids is None:
            document_ids = torch.ones(codes.shape[:2], dtype=torch.long, device=codes.device)
        with torch.inference_mode():
            logits: Tensor = self.head(self.hidden_states(codes, document_ids))
            known = self._spread(codes)
            is_known = (known < self.absent)[..., None]
            certain = torch.full_like(logits, -torch.inf)
            certain.scatter_(-1, known.clamp(0, self.absent - 1)[..., None], 0.0)
            return torch.where(is_known, certain, logits)

    def new_decoder_cache(self, batch_size: int, max_latents: int) -> DecoderCache:
        """Empty cache for `decode_block`."""
        nothing = torch.zeros(batch_size, 0, dtype=torch.long, device=self.place_embedding.device)
        cache = new_backbone_cache(self.backbone.config, max_latents * self.config.compression_factor)
        return DecoderCache(None, cache, nothing)

    @torch.inference_mode()
    def decode_block(
        self,
        codes: Tensor,
        documents: Tensor,
        cache: DecoderCache,
        choose: ChooseTokens = most_likely,
        num_known: int = 0,
    ) -> Tensor:
        """See `Codec.decode_block`. Without a token: anchors that say so, and what stands before the first anchor of
        a chunk that begins without one."""
        hidden = self.hidden_states(codes, documents, cache)
        hidden = hidden[:, num_known * self.config.compression_factor :]
        codes = codes[:, num_known:]
        known = self._spread(codes)
        is_present = codes < self.absent
        # Padding on the left: absent anchors before a present one.
        is_left = ~is_present & (is_present.flip(-1).cumsum(-1).flip(-1) > 0)
        is_hole = is_left[..., self.next_level].flatten(1) | (
            self._at_anchors(known) & (known == self.absent)
        )
        wanted = ~self._at_anchors(known) & ~is_hole
        tokens = torch.where(is_hole, -1, known).flatten()
        places = wanted.flatten().nonzero().squeeze(1)
        tokens[places] = choose_tokens(self.head, hidden.flatten(0, 1)[places], places, choose)
        return tokens.view(known.shape)

    def _at_anchors(self, tokens: Tensor) -> Tensor:
        """BoolTensor [B, S * K]: the place of an anchor."""
        return self.is_anchor.repeat(tokens.shape[1] // len(self.is_anchor)).expand_as(tokens)

    def _spread(self, codes: Tensor) -> Tensor:
        """Codes [B, S, D] at their tokens' places, V elsewhere: [B, S * K]."""
        spread = codes.new_full((*codes.shape[:2], self.config.compression_factor), self.absent)
        spread[..., self.places] = codes
        return spread.flatten(1)
