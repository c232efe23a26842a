"""The latent model of a run: its configuration, with the baseline's size resolved. Free of torch."""

from __future__ import annotations

from launch import flops
from launch.config import RunConfig
from rqvae.config import RQTransformerConfig


def latent_model_config(config: RunConfig, codec_hash: str | None = None) -> RQTransformerConfig:
    """The configuration that the model is built from and saved with."""
    model = RQTransformerConfig.for_codec(config.codec, config.latent_model, codec_hash)
    match = _match(config)
    return model if match is None else model.model_copy(update={"spatial_layers": match.layers})


def describe_match(config: RunConfig) -> str | None:
    """What `latent_model.match` has come to, in a line; None where nothing is matched."""
    match = _match(config)
    if match is None:
        return None
    return (
        f"flat_transformer of {match.layers} layers, matched by {config.latent_model.match}: "
        f"{match.parameters:.3f} x the parameters and {match.compute:.3f} x the forward FLOPs per sample of the "
        "rq_transformer"
    )


def _match(config: RunConfig) -> flops.Match | None:
    by = config.latent_model.match
    if by is None:
        return None
    reference = RQTransformerConfig.for_codec(config.codec, config.latent_model)
    return flops.match_flat_transformer(
        reference, config.data.sample_length // config.codec.compression_factor, by
    )
