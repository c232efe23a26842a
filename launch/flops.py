"""Floating-point operations, counted analytically: 2 per multiply-add of matrix products and attention.

Norms, activations and embeddings look-ups are left out, as is usual (Kaplan 2020, table 1). Training counts 3
times the forward pass: the backward pass forms two products for every one. The weights of a frozen layer count 2
times if it passes gradients on, and once if nothing below it learns.
"""

from __future__ import annotations

from dataclasses import dataclass

from rqvae.config import ArchitectureConfig, RQTransformerConfig, RQVAEConfig, mlp_width


def backbone(architecture: ArchitectureConfig, context: float) -> float:
    """Forward FLOPs of one position through the layers, attending to `context` positions."""
    heads, kv = architecture.num_attention_heads, architecture.num_key_value_heads
    hidden, head_dim = architecture.hidden_size, architecture.head_dim
    weights = hidden * head_dim * (2 * heads + 2 * kv) + 3 * hidden * architecture.intermediate_size
    return architecture.num_hidden_layers * 2 * weights + attention(architecture, context)


def attention(architecture: ArchitectureConfig, context: float) -> float:
    """The part of `backbone` that has no weights: scores and weighted sums."""
    width = architecture.num_attention_heads * architecture.head_dim
    return architecture.num_hidden_layers * 4 * context * width


def head(architecture: ArchitectureConfig) -> float:
    """Forward FLOPs of the output head at one position."""
    return 2 * architecture.hidden_size * architecture.vocab_size


def block(dim: int, num_layers: int, mlp_ratio: float, context: float) -> float:
    """Forward FLOPs of one position through a `TransformerBlock`."""
    weights = 4 * dim * dim + 3 * dim * mlp_width(dim, mlp_ratio)
    return num_layers * (2 * weights + 4 * context * dim)


@dataclass(frozen=True)
class CodecFlops:
    """FLOPs of the codec per token."""

    encode: float
    """Forward pass of the encoder, the search in the codebooks included."""
    decode: float
    """Forward pass of the decoder."""
    train_frozen: float
    """Training while the pretrained backbones are frozen."""
    train_full: float
    """Training of everything."""


def codec(config: RQVAEConfig, sample_length: int) -> CodecFlops:
    """FLOPs of the codec on samples of `sample_length` tokens (causal: half of them are seen on average)."""
    architecture, factor = config.backbone.architecture, config.compression_factor
    one_backbone = backbone(architecture, sample_length / 2)
    decoder_backbone = 0 if config.backbone.decoder == "none" else one_backbone
    output = head(architecture)
    resample = 2 * config.latent_dim * architecture.hidden_size
    refinement = (
        block(config.latent_dim, config.num_latent_layers, 8 / 3, sample_length / factor / 2) / factor
    )
    projection = 2 * config.latent_dim * config.codebook_dim / factor
    search = 2 * config.codebook_dim * sum(config.codebook_sizes) / factor
    encoder_side = 2 * resample + refinement + projection  # reads states and embeddings
    decoder_side = resample + refinement + projection
    new = 3 * (encoder_side + decoder_side) + search
    # Nothing learns below the encoder's frozen backbone unless the mask token does: no backward pass through it.
    pass_on = 2 * one_backbone + attention(architecture, sample_length / 2)
    frozen = pass_on if config.token_dropout else one_backbone
    if config.backbone.decoder == "same":
        frozen += pass_on + 2 * output
    else:
        frozen += 3 * (decoder_backbone + output)
    return CodecFlops(
        encode=one_backbone + encoder_side + search,
        decode=decoder_backbone + decoder_side + output,
        train_frozen=frozen + new,
        train_full=3 * (one_backbone + decoder_backbone + output) + new,
    )


@dataclass(frozen=True)
class LatentModelFlops:
    """Forward FLOPs of the latent model per latent position."""

    spatial: float
    depth: float


def rq_transformer(config: RQTransformerConfig, num_latents: float) -> LatentModelFlops:
    """FLOPs of the RQ-transformer on sequences of `num_latents` positions."""
    levels = config.codebook_levels
    depth = block(config.depth_dim, config.depth_layers, config.mlp_ratio, levels / 2) * levels
    return LatentModelFlops(
        spatial=block(config.spatial_dim, config.spatial_layers, config.mlp_ratio, num_latents / 2),
        depth=depth
        + 2 * config.spatial_dim * config.depth_dim
        + 2 * config.depth_dim * sum(config.codebook_sizes),
    )
