"""The layers at latent resolution, on either side of the quantizer."""

from __future__ import annotations

from rqvae.config import RQVAEConfig
from rqvae.layers import TransformerBlock


def build_refinement(config: RQVAEConfig) -> TransformerBlock:
    """`num_latent_layers` layers on [B, S, latent_dim], with a final norm (but for the original's)."""
    is_original = config.resample == "original"
    return TransformerBlock(
        config.latent_dim,
        config.num_latent_layers,
        config.latent_head_dim,
        2.67 if is_original else 8 / 3,
        None if is_original else 1e4,
        # The reference's layout has no lone norm.
        has_norm=config.resample == "chunked" or (config.num_latent_layers > 0 and not is_original),
        has_biases=is_original,
    )
