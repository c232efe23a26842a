"""What decoding costs per kept token, counted and not timed: layer calls in sequence, and forward FLOPs.

The prompt is left out.
"""

from __future__ import annotations

from launch import flops
from launch.config import BenchmarkConfig
from rqvae import FlatTransformer, LatentModel
from rqvae.codec import Codec
from rqvae.config import ArchitectureConfig


def ar_work_per_token(architecture: ArchitectureConfig, settings: BenchmarkConfig) -> dict[str, float]:
    """Of the autoregressive model."""
    return {
        "layer_calls_per_token": float(architecture.num_hidden_layers),
        "flops_per_token": flops.backbone(architecture, _context(settings)) + flops.head(architecture),
    }


def latent_work_per_token(
    vae: Codec, latent_model: LatentModel, settings: BenchmarkConfig, is_streaming: bool
) -> dict[str, float]:
    """Of latent decoding; streaming, the decoder runs once per latent, otherwise once over all new tokens."""
    factor, shape = vae.config.compression_factor, latent_model.config
    layers = shape.spatial_layers + shape.codebook_levels * shape.depth_layers
    if isinstance(latent_model, FlatTransformer):
        layers = shape.codebook_levels * shape.spatial_layers
    decoder_layers = 0 if vae.config.model == "identity" else vae.config.num_latent_layers
    if vae.config.model != "identity" and vae.config.backbone.decoder != "none":
        decoder_layers += vae.config.backbone.architecture.num_hidden_layers
    context = 2 * _context(settings)
    model = flops.latent_model(type(latent_model).__name__, shape, context / factor)
    return {
        "layer_calls_per_token": layers / factor
        + decoder_layers / (factor if is_streaming else settings.new_tokens),
        "flops_per_token": model / factor + flops.codec(vae.config, round(context)).decode,
    }


def _context(settings: BenchmarkConfig) -> float:
    return settings.prompt_tokens + settings.new_tokens / 2
