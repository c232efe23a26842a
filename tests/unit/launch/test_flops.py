"""The analytic counts against torch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from launch import flops
from rqvae import RQVAE, FlatTransformer, LatentModel, RQTransformer
from rqvae.config import ArchitectureConfig, RQTransformerConfig, RQVAEConfig

ARCHITECTURE = ArchitectureConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)


def counted(call: Callable[[], object]) -> float:
    with (
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
        nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
    ):
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"resample": "reference"},
        {"resample": "reference", "compression_factor": 1},
        {"encoder_context": "chunk"},
        {"backbone": {"decoder": "none"}},
        {"backbone": {"decoder": "random"}},
        {"token_dropout": 0.5},
        {"backbone": {"shared": True}},
    ],
    ids=str,
)
def test_codec_counts(changes: dict[str, Any]) -> None:
    values: dict[str, Any] = {
        "codebook_levels": 3,
        "codebook_size": 32,
        "codebook_dim": 8,
        "latent_dim": 64,
        "latent_head_dim": 32,
        **changes,
        "backbone": {"architecture": ARCHITECTURE, **changes.get("backbone", {})},
    }
    config = RQVAEConfig.model_validate(values)
    vae = RQVAE(config)
    ids = torch.randint(320, (2, 64))
    # The formula counts the half of the attention that is not masked, torch counts all of it: ask for twice
    # the context.
    expected = flops.codec(config, 128)
    assert expected.encode == pytest.approx(counted(lambda: vae.encode(ids)) / ids.numel(), rel=0.02)
    codes = vae.encode(ids)
    assert expected.decode == pytest.approx(counted(lambda: vae.decode(codes)) / ids.numel(), rel=0.02)

    def step() -> None:
        with torch.enable_grad():
            vae.train()(ids).loss.backward()

    # The gradient of the head's weights is summed up by `addmm_`, which torch's counter does not know.
    not_counted = flops.head(ARCHITECTURE)
    measured = counted(step) / ids.numel() + not_counted
    assert expected.train_full == pytest.approx(measured, rel=0.02)
    for parameter in vae.backbone_parameters():
        parameter.requires_grad_(False)
    measured = counted(step) / ids.numel() + (not_counted if vae.decoder.head.weight.requires_grad else 0)
    assert expected.train_frozen == pytest.approx(measured, rel=0.02)


def latent_config(**changes: Any) -> RQTransformerConfig:
    values: dict[str, Any] = {
        "spatial_dim": 64,
        "spatial_layers": 2,
        "depth_dim": 32,
        "depth_layers": 1,
        "head_dim": 32,
        "compression_factor": 4,
        "codebook_levels": 3,
        "codebook_size": 64,
    }
    return RQTransformerConfig.model_validate(values | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head": "shared"},
        {"embedding": "shared"},
        {"spatial_input": "tokens", "vocab_size": 320},
        {"spatial_backbone": {"architecture": ARCHITECTURE}},
    ],
    ids=["plain", "shared head", "shared embedding", "tokens", "backbone"],
)
def test_rq_transformer_counts(changes: dict[str, Any]) -> None:
    config = latent_config(**changes)
    model = RQTransformer(config).eval()
    codes = torch.randint(64, (2, 16, 3))
    text = torch.randint(320, (2, 64)) if config.reads_tokens else None
    expected = flops.rq_transformer(config, 32)
    measured = counted(lambda: model(codes, text)) / 32
    assert expected.spatial + expected.depth == pytest.approx(measured, rel=0.05)
    assert flops.latent_model("RQTransformer", config, 32) == expected.spatial + expected.depth


def test_flat_transformer_counts() -> None:
    config = latent_config()
    model = FlatTransformer(config).eval()
    codes = torch.randint(64, (2, 16, 3))
    assert flops.latent_model("FlatTransformer", config, 32) == pytest.approx(
        counted(lambda: model(codes)) / 32, rel=0.02
    )


@pytest.mark.parametrize("changes", [{}, {"head": "shared"}, {"mlp_ratio": 4, "codebook_levels": 5}], ids=str)
def test_parameter_counts_are_exact(changes: dict[str, Any]) -> None:
    config = latent_config(**changes)
    for model_class, count in (
        (RQTransformer, flops.rq_transformer_parameters),
        (FlatTransformer, flops.flat_transformer_parameters),
    ):
        assert count(config) == sum(p.numel() for p in model_class(config).parameters())


@pytest.mark.parametrize("by", ["parameters", "compute"])
@pytest.mark.parametrize(
    "changes", [{}, {"spatial_layers": 9}, {"depth_dim": 128, "depth_layers": 6}], ids=str
)
def test_the_flat_baseline_is_as_near_as_whole_layers_allow(changes: dict[str, Any], by: Any) -> None:
    config, num_latents = latent_config(**changes), 16
    match = flops.match_flat_transformer(config, num_latents, by)

    def measures(model_class: type[LatentModel], layers: int) -> tuple[int, float]:
        model_config = config.model_copy(update={"spatial_layers": layers})
        parameters = sum(p.numel() for p in model_class(model_config).parameters())
        return parameters, flops.latent_model(model_class.__name__, model_config, num_latents)

    reference = measures(RQTransformer, config.spatial_layers)
    index = ("parameters", "compute").index(by)
    distances = {
        layers: abs(measures(FlatTransformer, layers)[index] - reference[index])
        for layers in range(max(1, match.layers - 1), match.layers + 2)
    }
    assert match.layers == min(distances, key=distances.__getitem__)
    parameters, compute = measures(FlatTransformer, match.layers)
    assert match.parameters == pytest.approx(parameters / reference[0])
    assert match.compute == pytest.approx(compute / reference[1])
