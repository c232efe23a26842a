"""The analytic counts against torch's own counter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from launch import flops
from rqvae import RQVAE, RQTransformer
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


@pytest.mark.parametrize("token_dropout", [0.0, 0.5])
@pytest.mark.parametrize("decoder", ["same", "random", "none"])
def test_codec_counts(decoder: str, token_dropout: float) -> None:
    config = RQVAEConfig.model_validate(
        {
            "backbone": {"architecture": ARCHITECTURE, "decoder": decoder},
            "codebook_levels": 3,
            "codebook_size": 32,
            "codebook_dim": 8,
            "latent_dim": 64,
            "latent_head_dim": 32,
            "token_dropout": token_dropout,
        }
    )
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


def test_rq_transformer_counts() -> None:
    config = RQTransformerConfig(
        spatial_dim=64,
        spatial_layers=2,
        depth_dim=32,
        depth_layers=1,
        head_dim=32,
        compression_factor=4,
        codebook_levels=3,
        codebook_size=64,
    )
    model = RQTransformer(config).eval()
    codes = torch.randint(64, (2, 16, 3))
    expected = flops.rq_transformer(config, 32)
    measured = counted(lambda: model(codes)) / 32
    assert expected.spatial + expected.depth == pytest.approx(measured, rel=0.05)
