"""Whichever codec a configuration or a directory holds."""

from __future__ import annotations

from pathlib import Path

from rqvae import persistence
from rqvae.config import RQVAEConfig
from rqvae.identity_codec import IdentityCodec
from rqvae.rq_vae import RQVAE

Codec = RQVAE | IdentityCodec


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
