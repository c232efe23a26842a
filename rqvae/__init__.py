"""RQ-VAE codec of text and RQ-transformer over its codes.

Names are imported on first use, so that `rqvae.config` can be read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "AnchorCodec": "anchor_codec",
    "BaseLM": "backbone",
    "DepthTransformer": "rq_transformer",
    "FlatTransformer": "flat_transformer",
    "GenerationOptions": "generation_options",
    "IdentityCodec": "identity_codec",
    "LatentGenerator": "generation",
    "LatentModel": "latent_model",
    "Quantizer": "codebook",
    "RQTransformer": "rq_transformer",
    "RQTransformerConfig": "config",
    "RQVAE": "rq_vae",
    "RQVAEConfig": "config",
    "RQVAEWithPrior": "joint",
    "ResidualQuantizer": "quantizer",
    "RoPEAttention": "layers",
    "SpatialTransformer": "rq_transformer",
    "SwiGLUTransformerLayer": "layers",
    "TextDecoder": "decoder",
    "TextEncoder": "encoder",
    "TransformerBlock": "layers",
    "create_codec": "loading",
    "importance_bound": "importance",
    "latent_bound": "likelihood",
    "load_codec": "loading",
    "load_latent_model": "loading",
    "stochastic_bound": "likelihood",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"rqvae.{_HOME[name]}"), name)
    raise AttributeError(f"module 'rqvae' has no attribute '{name}'")
