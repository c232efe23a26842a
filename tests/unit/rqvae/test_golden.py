"""Stored outputs of a tiny fixed model: the arithmetic does not drift from one version to the next.

The weights are a formula of name and index, so that they depend on no random generator. After an intended
change of the arithmetic write the file anew with `python -m pytest tests/unit/rqvae/test_golden.py` and
`RQVAE_WRITE_GOLDEN=1`, and say in the change why the numbers moved.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from rqvae import RQVAE, FlatTransformer, LatentGenerator, RQTransformer, create_codec, latent_bound
from rqvae.encoder import chunk_documents

Make = Callable[..., Any]
FILE = Path(__file__).with_name("golden.json")


def wave(name: str, shape: torch.Size) -> Tensor:
    """Values between -1 and 1 that look random: the sine of the squared index, by name."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(index * index * 0.01 + index * 1.7 + zlib.crc32(name.encode()) % 1000).view(shape)


@torch.no_grad()
def set_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        value = wave(name, parameter.shape)
        if "norm" in name:
            value = 1 + value / 4
        elif parameter.dim() == 2:
            value *= math.sqrt(2 / parameter.shape[1])
        parameter.copy_(value)


@torch.no_grad()
def smallest_margin(codec: RQVAE, ids: Tensor) -> float:
    """By how much the second-nearest code is farther than the nearest, at the closest call (squared)."""
    residual = codec.encoder(ids, torch.ones_like(ids))
    margin = math.inf
    for level in codec.quantizer.levels:
        distances = (residual[:, :, None] - level.codebook).square().sum(-1).sort(-1)
        margin = min(margin, float((distances.values[..., 1] - distances.values[..., 0]).min()))
        residual = residual - level.embed(distances.indices[..., 0])
    return margin


@pytest.fixture(scope="module")
def actual(
    make_codec: Make, make_codec_config: Make, make_latent_model: Make, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    codec: RQVAE = make_codec()
    rq_transformer, flat = make_latent_model(RQTransformer), make_latent_model(FlatTransformer)
    for model in (codec, rq_transformer, flat):
        set_weights(model)
    for i, level in enumerate(codec.quantizer.levels):
        level.codebook.copy_(wave(f"codebook {i}", level.codebook.shape) / 2**i)
    ids = (torch.arange(64) ** 2 % 89 + 2).view(2, 32)
    documents = torch.ones_like(ids)
    documents[0, :2], documents[0, 16:], documents[1, 21:] = 0, 2, 0
    bound = latent_bound(codec, rq_transformer, ids, documents)
    prompts = [ids[0, :5].tolist(), ids[1, :8].tolist()]
    generated = LatentGenerator(codec, rq_transformer, tokenizer).generate_tokens(
        prompts, 16, stop_at_end_of_text=False
    )
    codes = codec.encode(ids)
    anchor = create_codec(make_codec_config(model="anchor", codebook_levels=2, codebook_size=None))
    anchor = anchor.double().eval()
    on_anchors = make_latent_model(
        RQTransformer,
        codebook_levels=2,
        codebook_size=98,
        depth_input="code",
        embedding="shared",
        head="shared",
    )
    for model in (anchor, on_anchors):
        set_weights(model)
    anchor_bound = latent_bound(anchor, on_anchors, ids, documents)
    by_anchors = LatentGenerator(anchor, on_anchors, tokenizer).generate_tokens(
        prompts, 16, stop_at_end_of_text=False
    )
    return {
        "anchor_token_nats": anchor_bound.token_nats.tolist(),
        "anchor_code_nats": anchor_bound.code_nats.tolist(),
        "anchor_generated_ids": by_anchors.token_ids,
        "codes": codes.tolist(),
        "smallest_margin": smallest_margin(codec, ids),
        "packed_codes": bound.codes[chunk_documents(documents, 4) > 0].tolist(),
        "logits": codec.decode(codes)[:, ::7, ::16].tolist(),
        "token_nats": bound.token_nats.tolist(),
        "code_nats": bound.code_nats.tolist(),
        "distortion": bound.distortion.tolist(),
        "commitment_loss": codec(ids).commitment_loss.item(),
        "flat_nats": flat(codes).nats.tolist(),
        "generated_codes": generated.codes.tolist(),
        "generated_ids": generated.token_ids,
    }


def test_outputs_are_the_stored_ones(actual: dict[str, Any]) -> None:
    if os.environ.get("RQVAE_WRITE_GOLDEN"):
        rounded = json.loads(json.dumps(actual), parse_float=lambda text: round(float(text), 6))
        FILE.write_text(
            "{\n" + ",\n".join(f'"{name}": {json.dumps(value)}' for name, value in rounded.items()) + "\n}\n"
        )
    stored = json.loads(FILE.read_text())
    assert stored.keys() == actual.keys()
    for name, expected in stored.items():
        value = torch.tensor(actual[name], dtype=torch.float64)
        # Integers must be equal; the backbones of transformers normalise in fp32.
        torch.testing.assert_close(
            value,
            torch.tensor(expected, dtype=torch.float64),
            atol=2e-5,
            rtol=1e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_the_stored_outputs_are_not_trivial(actual: dict[str, Any]) -> None:
    codes = torch.tensor(actual["codes"]).flatten(0, 1)
    assert actual["smallest_margin"] > 1e-4  # rounding does not decide
    assert codes.unique(dim=0).shape[0] >= 12
    assert torch.tensor(actual["generated_codes"]).flatten(0, 1).unique(dim=0).shape[0] >= 4
    assert torch.tensor(actual["logits"]).std() > 0.1
    assert torch.tensor(actual["anchor_generated_ids"]).unique().numel() >= 4
    assert torch.tensor(actual["anchor_token_nats"]).std() > 0.1
