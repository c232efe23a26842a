"""Whichever codec or latent model a configuration or a directory holds."""

from __future__ import annotations

from pathlib import Path

from rqvae import persistence
from rqvae.codec import Codec
from rqvae.config import RQVAEConfig
from rqvae.flat_transformer import FlatTransformer
from rqvae.identity_codec import IdentityCodec
from rqvae.latent_model import LatentModel
from rqvae.rq_transformer import RQTransformer
from rqvae.rq_vae import RQVAE


def create_codec(config: RQVAEConfig) -> Codec:
    """The codec of a configuration, untrained."""
    return IdentityCodec(config) if config.model == "identity" else RQVAE(config)


def load_codec(directory: str | Path) -> Codec:
    """The codec in a directory written by `save_pretrained`, in evaluation mode.

    Raises:
        ValueError: the directory is missing, damaged or holds no codec.
    """
    name = persistence.read_config(Path(directory)).get("model")
    return (IdentityCodec if name == IdentityCodec.__name__ else RQVAE).from_pretrained(directory)


def load_latent_model(directory: str | Path) -> LatentModel:
    """The latent model in a directory, whichever class wrote it, in evaluation mode.

    Raises:
        ValueError: the directory is missing, damaged or holds something else.
    """
    name = persistence.read_config(Path(directory)).get("model")
    classes: tuple[type[LatentModel], ...] = (RQTransformer, FlatTransformer)
    for model_class in classes:
        if name == model_class.__name__:
            return model_class.from_pretrained(directory)
    raise ValueError(f"'{directory}' holds a {name}, not a latent model")
