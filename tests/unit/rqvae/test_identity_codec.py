"""The codec whose codes are the tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rqvae import RQVAE, IdentityCodec, RQVAEConfig, create_codec, latent_bound, load_codec

MakeConfig = Callable[..., RQVAEConfig]


@pytest.fixture
def codec(make_architecture: Callable[..., Any]) -> IdentityCodec:
    config = RQVAEConfig.model_validate(
        {"model": "identity", "backbone": {"architecture": make_architecture().model_dump()}}
    )
    made = create_codec(config)
    assert isinstance(made, IdentityCodec)
    return made


def test_shape_follows_from_the_rest(codec: IdentityCodec) -> None:
    assert codec.config.codebook_levels == codec.config.compression_factor == 4
    assert codec.config.codebook_sizes == (98,) * 4
    inherited = codec.config.model_dump() | {"codebook_levels": None, "codebook_size": None}
    assert RQVAEConfig.model_validate(inherited) == codec.config


def test_codes_are_the_tokens_and_nothing_is_lost(codec: IdentityCodec, packed: Any) -> None:
    codes = codec.encode(packed.input_ids, document_ids=packed.document_ids)
    assert codes.shape == (3, 8, 4)
    real = packed.document_ids > 0
    assert torch.equal(codes.flatten(1)[real], packed.input_ids[real])
    assert (codes.flatten(1)[~real] == 97).all()
    logits = codec.decode(codes)
    assert torch.equal(logits.argmax(-1)[real], packed.input_ids[real])
    likelihood = logits.log_softmax(-1).gather(-1, packed.input_ids[..., None]).squeeze(-1)
    assert (likelihood[real] == 0).all()
    block = codec.decode_block(codes, packed.document_ids[:, ::4], codec.new_decoder_cache(3, 8))
    assert torch.equal(block[real], packed.input_ids[real])
    out = codec(packed.input_ids, document_ids=packed.document_ids)
    assert out.nats.sum() == out.loss == 0
    assert torch.equal(out.correct, real)


def test_leading_levels_are_leading_tokens(codec: IdentityCodec, tokens: Callable[..., Tensor]) -> None:
    ids = tokens(2, 16)
    predicted = codec.decode(codec.encode(ids)[..., :3]).argmax(-1).view(2, 4, 4)
    assert torch.equal(predicted[..., :3], ids.view(2, 4, 4)[..., :3])
    assert (predicted[..., 3] == 0).all()


def test_saved_and_loaded_it_is_the_same_codec(
    codec: IdentityCodec, make_codec: Callable[..., RQVAE], tmp_path: Path
) -> None:
    codec.save_pretrained(tmp_path / "identity")
    loaded = load_codec(tmp_path / "identity")
    assert isinstance(loaded, IdentityCodec)
    assert loaded.codec_hash() == codec.codec_hash()
    make_codec(torch.float32).save_pretrained(tmp_path / "learned")
    learned = load_codec(tmp_path / "learned")
    assert isinstance(learned, RQVAE)
    assert learned.codec_hash() != codec.codec_hash()
    with pytest.raises(ValueError, match="holds a IdentityCodec, not a RQVAE"):
        RQVAE.from_pretrained(tmp_path / "identity")
    with pytest.raises(ValueError, match="model: identity has nothing to train"):
        RQVAE(codec.config)
    with pytest.raises(ValueError, match="needs model: identity"):
        IdentityCodec(learned.config)


def test_its_bound_is_the_likelihood_of_the_codes(
    codec: IdentityCodec, make_latent_model: Callable[..., Any], packed: Any
) -> None:
    model = make_latent_model(codebook_levels=4, codebook_size=98)
    bound = latent_bound(codec, model, packed.input_ids, packed.document_ids)
    assert bound.token_nats.sum() == 0
    assert bound.code_nats.sum() > 0
    assert torch.equal(bound.token_correct, packed.document_ids > 0)


def test_half_a_chunk_is_an_error(codec: IdentityCodec, tokens: Callable[..., Tensor]) -> None:
    for call in (codec.encode, codec):
        with pytest.raises(ValueError, match="5 tokens are not a whole number of chunks of 4"):
            call(tokens(1, 5))
