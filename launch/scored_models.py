"""The models of a project that evaluations compare, and how to load them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from data_pipeline.code_manifest import Precision
from launch.precision import placed
from rqvae import BaseLM, LatentModel, load_codec, load_latent_model
from rqvae.codec import Codec
from rqvae.generation import check_pair

IDENTITY = "identity_codec"
"""Directory beside the other models with the identity codec (`rqvae`) and the latent model on it."""


class Pair(NamedTuple):
    """A codec and the latent model trained on its codes."""

    codec: Codec
    latent_model: LatentModel


class Models(NamedTuple):
    """What there is to evaluate."""

    codec: Codec
    latent_model: LatentModel | None
    base_lm: BaseLM | None
    identity: Pair | None = None
    missing: dict[str, str] = {}  # noqa: RUF012
    """Rows of the tables that there are no models for, and what to do about it."""

    @property
    def pair(self) -> Pair | None:
        """Codec and latent model, where there are both."""
        return None if self.latent_model is None else Pair(self.codec, self.latent_model)


def load_models(
    directory: Path,
    eos_token_id: int,
    device: torch.device,
    identity: Path | None = None,
    precision: Precision = "fp32",
) -> Models:
    """The models in `directory`; what is missing is left out, and named.

    Args:
        identity: directory of the identity codec's pair; by default `identity_codec` in `directory`.
        precision: of weights and arithmetic; codebooks stay fp32.

    Raises:
        ValueError: there is no codec, a model is damaged, or codec and latent model do not belong together.
    """
    codec = load_codec(directory / "rqvae")
    latent_model, base_lm, identity_pair = None, None, None
    missing = {}
    if (directory / "rq_transformer").is_dir():
        latent_model = load_latent_model(directory / "rq_transformer")
        check_pair(codec, latent_model)
        placed(latent_model, device, precision)
    else:
        missing["latent_bound"] = f"'{directory}/rq_transformer' is not there"
    if (directory / "base_lm").is_dir():
        base_lm = placed(BaseLM.from_pretrained(directory / "base_lm", eos_token_id), device, precision)
    else:
        missing["base_lm"] = f"'{directory}/base_lm' is not there"
    where = identity or directory / IDENTITY
    if codec.config.model == "identity":
        missing["identity_codec"] = "the codec evaluated is the identity codec itself"
    elif (where / "rqvae").is_dir():
        identity_pair = Pair(load_codec(where / "rqvae"), load_latent_model(where / "rq_transformer"))
        check_pair(*identity_pair)
        for model in identity_pair:
            placed(model, device, precision)
    else:
        missing["identity_codec"] = (
            f"'{where}' is not there: train a latent model with codec.model=identity, and give the directory of "
            "both with --identity-codec"
        )
    return Models(placed(codec, device, precision), latent_model, base_lm, identity_pair, missing)
