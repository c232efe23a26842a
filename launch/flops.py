"""Floating-point operations, counted analytically: 2 per multiply-add of matrix products and attention.

Norms, activations and embeddings look-ups are left out, as is usual (Kaplan 2020, table 1). Training counts 3
times the forward pass: the backward pass forms two products for every one. A frozen layer counts 2 times: it
passes gradients on but forms none for its weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from rqvae.config import ArchitectureConfig, RQTransformerConfig, RQVAEConfig
from rqvae.layers import mlp_width


def backbone(architecture: ArchitectureConfig, context: float) -> float:
    """Forward FLOPs of one position through the layers, attending to `context` positions."""
    heads, kv = architecture.num_attention_heads, architecture.num_key_value_heads
    hidden, head_dim = architecture.hidden_size, architecture.head_dim
    weights = hidden * head_dim * (2 * heads + 2 * kv) + 3 * hidden * architecture.intermediate_size
    return architecture.num_hidden_layers * (2 * weights + 4 * context * heads * head_dim)


def head(architecture: ArchitectureConfig) -> float:
    """Forward FLOPs of the output head at one position."""
    return 2 * architecture.hidden_size * architecture.vocab_size


def block(dim: int, num_layers: int, mlp_ratio: float, context: float) -> float:
    """Forward FLOPs of one position through a `TransformerBlock`."""
    weights = 4 * dim * dim + 3 * dim * mlp_width(dim, mlp_ratio)
    return num_layers * (2 * weights + 4 * context * dim)


@dataclass(frozen=True)
class CodecFlops:
    """Forward FLOPs of the codec per token."""

    backbones: float
    """Both backbones and the head: what the warm-up freezes."""
    new_layers: float
    decode: float
    """Decoder alone."""
    encode: float

    @property
    def train_frozen(self) -> float:
        """Training FLOPs per token while the backbones are frozen."""
        return 2 * self.backbones + 3 * self.new_layers

    @property
    def train_full(self) -> float:
        """Training FLOPs per token of full training."""
        return 3 * (self.backbones + self.new_layers)


def codec(config: RQVAEConfig, sample_length: int) -> CodecFlops:
    """FLOPs of the codec on samples of `sample_length` tokens (causal: half of them are seen on average)."""
    architecture, factor = config.backbone.architecture, config.compression_factor
    one_backbone = backbone(architecture, sample_length / 2)
    resample = 2 * config.latent_dim * architecture.hidden_size
    refinement = (
        block(config.latent_dim, config.num_latent_layers, 8 / 3, sample_length / factor / 2) / factor
    )
    projection = 2 * config.latent_dim * config.codebook_dim / factor
    search = 2 * config.codebook_dim * sum(config.codebook_sizes) / factor
    encoder_side = 2 * resample + refinement + projection + search  # reads states and embeddings
    decoder_side = resample + refinement + projection
    return CodecFlops(
        backbones=2 * one_backbone + head(architecture),
        new_layers=encoder_side + decoder_side,
        encode=one_backbone + encoder_side,
        decode=one_backbone + decoder_side + head(architecture),
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


def flat_transformer(config: RQTransformerConfig, num_latents: float) -> float:
    """Forward FLOPs of the flat transformer per latent position, which is D positions of its own."""
    levels = config.codebook_levels
    layers = block(config.spatial_dim, config.spatial_layers, config.mlp_ratio, num_latents * levels / 2)
    return levels * layers + 2 * config.spatial_dim * sum(config.codebook_sizes)
