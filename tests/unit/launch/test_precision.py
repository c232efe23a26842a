"""What finished models compute in."""

from __future__ import annotations

import torch

from launch.config import load_config
from launch.precision import placed
from rqvae import BaseLM
from tests.integration.conftest import NANO


def test_frequencies_of_rotary_embeddings_are_not_rounded() -> None:
    config = load_config(NANO, overrides=["data.directory=none", "data.source.paths=[none]"])
    model = BaseLM(config.codec.backbone.architecture, 0)
    before = {name: kept.clone() for name, kept in model.named_buffers() if name.endswith("inv_freq")}
    assert before
    placed(model, torch.device("cpu"), "bf16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    after = dict(model.named_buffers())
    for name, kept in before.items():
        assert after[name].dtype == torch.float32 and torch.equal(after[name], kept)
