"""Floating-point operations, counted analytically: 2 per multiply-add of matrix products and attention.

Norms, activations and embeddings look-ups are left out, as is usual (Kaplan 2020, table 1). Training counts 3
times the forward pass: the backward pass forms two products for every one. The weights of a frozen layer count 2
times if it passes gradients on, and once if nothing below it learns.

Also the parameters of the latent models, to match one kind with the other. Free of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    if config.model == "identity":
        return CodecFlops(encode=0.0, decode=0.0, train_frozen=0.0, train_full=0.0)
    architecture, factor = config.backbone.architecture, config.compression_factor
    if config.model == "anchor":  # a decoder only, which is a backbone with its head
        forward = backbone(architecture, sample_length / 2) + head(architecture)
        pass_on = 2 * forward + attention(architecture, sample_length / 2)
        frozen = pass_on if config.backbone.decoder == "same" else 3 * forward
        return CodecFlops(encode=0.0, decode=forward, train_frozen=frozen, train_full=3 * forward)
    # Masks that keep documents or chunks apart save nothing: what they hide is computed.
    one_backbone = backbone(architecture, sample_length / 2)
    decoder_backbone = 0.0 if config.backbone.decoder == "none" else one_backbone
    output = head(architecture)
    refinement = (
        block(config.latent_dim, config.num_latent_layers, 8 / 3, sample_length / factor / 2) / factor
    )
    projection = 2 * config.latent_dim * config.codebook_dim / factor
    search = 2 * config.codebook_dim * sum(config.codebook_sizes) / factor
    down, up = resampling(config)
    encoder_side, decoder_side = down + refinement + projection, up + refinement + projection
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


def resampling(config: RQVAEConfig) -> tuple[float, float]:
    """Forward FLOPs of down- and upsampling per token. The encoder's input is states, mostly with embeddings."""
    hidden, latent = config.backbone.architecture.hidden_size, config.latent_dim
    if config.resample == "chunked":
        return 4 * hidden * latent, 2 * hidden * latent
    steps = config.compression_factor.bit_length() - 1
    width = 2 * hidden if config.reads_embeddings else hidden
    widths = [width] * steps + [latent]
    down = sum(2 * 3 * widths[i] * widths[i + 1] / 2 ** (i + 1) for i in range(steps))
    # Of a transposed convolution with kernel 4 and stride 2, every output has 2 taps.
    up = sum(2 * 2 * hidden * hidden / 2**i for i in range(steps))
    return down or 2 * width * latent, up + 2 * hidden * latent / config.compression_factor


@dataclass(frozen=True)
class LatentModelFlops:
    """Forward FLOPs of the latent model per latent position."""

    spatial: float
    depth: float


def rq_transformer(config: RQTransformerConfig, num_latents: float) -> LatentModelFlops:
    """FLOPs of the RQ-transformer on sequences of `num_latents` positions."""
    levels, dim = config.codebook_levels, config.spatial_dim
    if config.spatial_backbone is None:
        spatial = block(dim, config.spatial_layers, config.mlp_ratio, num_latents / 2)
    else:
        spatial = backbone(config.spatial_backbone.architecture, num_latents / 2)
    if config.embedding == "shared" and config.spatial_input != "tokens":
        spatial += 2 * levels * dim * dim
    if config.reads_tokens:
        spatial += 2 * (config.compression_factor * dim * 2 * dim + 2 * dim * dim)
    depth = block(config.depth_dim, config.depth_layers, config.mlp_ratio, levels / 2) * levels
    return LatentModelFlops(
        spatial=spatial,
        depth=depth + 2 * dim * config.depth_dim + 2 * config.depth_dim * sum(config.codebook_sizes),
    )


def flat_transformer(config: RQTransformerConfig, num_latents: float) -> float:
    """Forward FLOPs of the flat transformer per latent position, on sequences of `num_latents`."""
    levels, dim = config.codebook_levels, config.spatial_dim
    stack = block(dim, config.spatial_layers, config.mlp_ratio, num_latents * levels / 2)
    return levels * stack + 2 * dim * sum(config.codebook_sizes)


def latent_model(name: str, config: RQTransformerConfig, num_latents: float) -> float:
    """Forward FLOPs per latent position of the latent model whose class is called `name`."""
    if name == "FlatTransformer":
        return flat_transformer(config, num_latents)
    parts = rq_transformer(config, num_latents)
    return parts.spatial + parts.depth


def block_parameters(dim: int, num_layers: int, mlp_ratio: float) -> int:
    """Parameters of a `TransformerBlock`: in each layer two norms, attention and SwiGLU; a final norm."""
    return num_layers * (2 * dim + 4 * dim * dim + 3 * dim * mlp_width(dim, mlp_ratio)) + dim


def _code_parameters(config: RQTransformerConfig, dim: int) -> tuple[int, int]:
    """Parameters of the embeddings of all codes, and of the heads."""
    sizes = config.codebook_sizes
    embeddings = sizes[0] if config.embedding == "shared" else sum(sizes)
    return dim * embeddings, dim * (sizes[0] if config.head == "shared" else sum(sizes))


def rq_transformer_parameters(config: RQTransformerConfig) -> int:
    """Parameters of an RQTransformer that reads codes only and has layers of its own."""
    dim, depth_dim = config.spatial_dim, config.depth_dim
    spatial = _code_parameters(config, dim)[0] + dim
    if config.embedding == "shared":
        spatial += config.codebook_levels * dim * dim
    spatial += block_parameters(dim, config.spatial_layers, config.mlp_ratio)
    depth = sum(_code_parameters(config, depth_dim)) + depth_dim * (dim + config.codebook_levels)
    return spatial + depth + block_parameters(depth_dim, config.depth_layers, config.mlp_ratio)


def flat_transformer_parameters(config: RQTransformerConfig) -> int:
    """Parameters of a FlatTransformer."""
    dim = config.spatial_dim
    return (
        sum(_code_parameters(config, dim))
        + dim * (config.codebook_levels + 1)
        + block_parameters(dim, config.spatial_layers, config.mlp_ratio)
    )


@dataclass(frozen=True)
class Match:
    """A flat transformer beside the RQ-transformer that it is to be compared with."""

    layers: int
    """Of the flat transformer."""
    parameters: float
    """Its parameters over the RQ-transformer's."""
    compute: float
    """Its forward FLOPs per sample over the RQ-transformer's."""


def match_flat_transformer(
    config: RQTransformerConfig, num_latents: int, by: Literal["parameters", "compute"]
) -> Match:
    """The number of layers that brings a flat transformer nearest to the RQ-transformer of `config`.

    Both measures are linear in the number of layers; there is at least one.

    Args:
        config: of the RQ-transformer; the flat transformer takes all but `spatial_layers` from it.
        num_latents: positions of a sample.
    """

    def ratio(measure: str, layers: int) -> float:
        flat = config.model_copy(update={"spatial_layers": layers})
        if measure == "parameters":
            return flat_transformer_parameters(flat) / rq_transformer_parameters(config)
        return flat_transformer(flat, num_latents) / latent_model("RQTransformer", config, num_latents)

    one, two = ratio(by, 1), ratio(by, 2)
    layers = max(1, round(1 + (1 - one) / (two - one)))
    return Match(layers, ratio("parameters", layers), ratio("compute", layers))
