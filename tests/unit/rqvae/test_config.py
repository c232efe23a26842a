from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from rqvae import RQTransformerConfig, RQVAEConfig
from rqvae.config import ArchitectureConfig, LatentModelConfig


def test_reading_a_configuration_does_not_import_torch() -> None:
    code = (
        "import sys; import rqvae; from rqvae import RQVAEConfig, RQTransformerConfig; "
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_codebook_size_counts_for_all_levels(make_codec_config: Callable[..., RQVAEConfig]) -> None:
    assert make_codec_config(codebook_size=16, codebook_levels=3).codebook_sizes == (16, 16, 16)
    assert make_codec_config(codebook_size=[16, 8, 4]).codebook_sizes == (16, 8, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_size": (16, 8)}, "lists 2 sizes for codebook_levels=3"),
        ({"codebook_size": 1}, "at least 2 entries"),
        ({"codebook_size": (16, 8, 1)}, "at least 2 entries"),
        ({"latent_dim": 40}, "latent_dim .40. must be a multiple of latent_head_dim .16."),
        ({"compression_factor": 0}, "greater than 0"),
        ({"codebook_sizes": 3}, "codebook_sizes"),
        ({"quantizer": {"ema_decay": 1.0}}, "less than 1"),
        (
            {"quantizer": {"rate_weight": 0.1, "beam_width": 2}},
            "rate_weight: needs method ema and beam_width 1",
        ),
    ],
)
def test_an_impossible_codec_is_refused(
    make_codec_config: Callable[..., RQVAEConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        make_codec_config(**changes)


def test_an_impossible_architecture_is_refused(make_architecture: Callable[..., ArchitectureConfig]) -> None:
    with pytest.raises(ValidationError, match="must be a multiple of num_key_value_heads"):
        make_architecture(num_attention_heads=3, num_key_value_heads=2)
    with pytest.raises(ValidationError, match="model_type"):
        make_architecture(model_type="bert")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spatial_dim": 40}, "spatial_dim .40. must be a multiple of head_dim"),
        ({"depth_dim": 40}, "depth_dim .40. must be a multiple of head_dim"),
        ({"codebook_size": (8, 8)}, "lists 2 sizes for codebook_levels=3"),
        ({"codebook_size": (16, 8, 8), "head": "shared"}, "head: shared needs codebooks of one size"),
        (
            {"codebook_size": (16, 8, 8), "embedding": "shared"},
            "embedding: shared needs codebooks of one size",
        ),
        ({"spatial_input": "tokens"}, "spatial_input: tokens needs vocab_size"),
        ({"spatial_input": "both"}, "spatial_input: both needs vocab_size"),
        ({"spatial_dim": 64}, "spatial_dim .64. must be the spatial_backbone's hidden_size .32."),
        ({"spatial_layers": 3}, "spatial_layers .3. must be the spatial_backbone's num_hidden_layers .2."),
        ({"spatial_input": "tokens", "vocab_size": 50}, "vocab_size .97. must be the codec's .50."),
    ],
)
def test_an_impossible_latent_model_is_refused(
    make_architecture: Callable[..., ArchitectureConfig], changes: dict[str, Any], message: str
) -> None:
    values: dict[str, Any] = {
        "compression_factor": 4,
        "codebook_levels": 3,
        "codebook_size": 16,
        "head_dim": 16,
    }
    if "spatial_backbone" in message or "codec's" in message:
        values |= {"spatial_dim": 32, "spatial_layers": 2}
        values["spatial_backbone"] = {"architecture": make_architecture()}
    RQTransformerConfig.model_validate(values)
    with pytest.raises(ValidationError, match=message):
        RQTransformerConfig.model_validate(values | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"match": "parameters"}, "match: only a flat_transformer is matched"),
        ({"model": "flat_transformer", "spatial_input": "both"}, "a flat_transformer reads codes only"),
        ({"model": "flat_transformer", "depth_input": "code"}, "a flat_transformer has no depth transformer"),
        ({"model": "flat_transformer", "spatial_backbone": {}}, "layers of its own only"),
    ],
)
def test_options_that_only_one_kind_of_latent_model_has(
    make_architecture: Callable[..., ArchitectureConfig], changes: dict[str, Any], message: str
) -> None:
    if "spatial_backbone" in changes:
        changes |= {
            "spatial_dim": 32,
            "spatial_layers": 2,
            "spatial_backbone": {"architecture": make_architecture()},
        }
    with pytest.raises(ValidationError, match=message):
        LatentModelConfig.model_validate(changes)
