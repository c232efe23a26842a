"""The codec's invariants. Codes are compared exactly, in fp64; logits to 1e-5 (the backbones of transformers
normalise in fp32 whatever their weights are)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rqvae import RQVAE, LatentGenerator, RQVAEConfig
from rqvae.encoder import chunk_documents

MakeCodec = Callable[..., RQVAE]
Tokens = Callable[..., Tensor]
LOGITS = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def codec(make_codec: MakeCodec) -> RQVAE:
    """Shared by the tests that only read it."""
    return make_codec(codebook_levels=3, codebook_size=(16, 8, 8))


VARIANTS: list[dict[str, Any]] = [
    *({"compression_factor": factor} for factor in (1, 2, 4, 8, 16)),
    {"num_latent_layers": 0},
    {"num_latent_layers": 2, "codebook_levels": 1},
    {"codebook_size": (16, 4, 2)},
    {"quantizer": {"shared_codebook": True}},
    {"quantizer": {"method": "fsq", "fsq_levels": (4, 4)}, "codebook_dim": 2},
    {"backbone": {"shared": True}},
    {"backbone": {"decoder": "none"}},
    {"encoder_context": "chunk"},
]


# Encoding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("phase", [0, 1])
def test_codes_of_a_prefix_are_a_prefix_of_the_codes(
    make_codec: MakeCodec, tokens: Tokens, changes: dict[str, Any], phase: int
) -> None:
    codec = make_codec(**changes)
    factor = codec.config.compression_factor
    ids = tokens(2, 64)
    documents = torch.ones_like(ids)
    documents[:, : phase if factor > 1 else 0] = 0
    codes = codec.encode(ids, document_ids=documents)
    assert codes.shape == (2, 64 // factor, codec.config.codebook_levels)
    assert codes.flatten(0, 1).unique(dim=0).shape[0] >= 4
    for end in range(factor, 64, factor):
        prefix = codec.encode(ids[:, :end], document_ids=documents[:, :end])
        assert torch.equal(prefix, codes[:, : end // factor])


def test_later_tokens_change_no_earlier_code_and_earlier_ones_do_change_later_codes(
    codec: RQVAE, tokens: Tokens
) -> None:
    ids = tokens(1, 32)
    codes = codec.encode(ids)
    changed_own = changed_later = 0
    for place in range(32):
        changed = ids.clone()
        changed[0, place] = 2 + (ids[0, place] - 1) % 95
        after = codec.encode(changed)
        chunk = place // 4
        assert torch.equal(after[:, :chunk], codes[:, :chunk])
        changed_own += not torch.equal(after[:, chunk], codes[:, chunk])
        changed_later += not torch.equal(after[:, chunk + 1 :], codes[:, chunk + 1 :])
    # All tokens of a chunk count, not only its last one, and context does.
    assert changed_own >= 26
    assert changed_later >= 20


def test_a_batch_of_one_equals_a_batch_of_many(codec: RQVAE, tokens: Tokens) -> None:
    ids = tokens(8, 32)
    codes, logits = codec.encode(ids), codec.decode(codec.encode(ids))
    for row in range(8):
        alone = codec.encode(ids[row : row + 1])
        assert torch.equal(alone, codes[row : row + 1])
        torch.testing.assert_close(codec.decode(alone), logits[row : row + 1], **LOGITS)


def test_in_fp32_codes_differ_between_batch_sizes_only_within_rounding(
    make_codec: MakeCodec, tokens: Tokens
) -> None:
    codec = make_codec(dtype=torch.float32)
    ids = tokens(64, 256)
    codes = codec.encode(ids)
    documents = torch.ones_like(ids)
    residual = codec.encoder(ids, documents)
    clear = torch.ones(codes.shape[:2], dtype=torch.bool)
    for i, level in enumerate(codec.quantizer.levels):
        best = (residual[:, :, None] - level.codebook).square().sum(-1).sort(-1).values
        clear &= best[..., 1] - best[..., 0] > 1e-5 * best[..., 1]
        residual = residual - level.embed(codes[..., i])
    assert clear.numel() * codec.config.codebook_levels > 10_000
    assert int((~clear).sum()) <= 1e-4 * clear.numel() * codec.config.codebook_levels
    for row in range(64):
        alone = codec.encode(ids[row : row + 1])[0]
        assert torch.equal(alone[clear[row]], codes[row][clear[row]])


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 7, 12])
@pytest.mark.parametrize("chunks", [1, 3])
def test_left_padding_by_whole_chunks_changes_nothing(
    codec: RQVAE, tokens: Tokens, num_tokens: int, chunks: int
) -> None:
    ids = tokens(2, num_tokens)
    phase = -num_tokens % 4
    ids = F.pad(ids, (phase, 0), value=0)
    mask = (torch.arange(ids.shape[1]) >= phase).long().expand_as(ids)
    codes = codec.encode(ids, mask)
    padded_codes = codec.encode(F.pad(ids, (4 * chunks, 0), value=50), F.pad(mask, (4 * chunks, 0)))
    assert torch.equal(padded_codes[:, chunks:], codes)
    out, padded = codec(ids, mask), codec(F.pad(ids, (4 * chunks, 0)), F.pad(mask, (4 * chunks, 0)))
    torch.testing.assert_close(padded.nats[:, 4 * chunks :], out.nats, **LOGITS)
    torch.testing.assert_close(padded.loss, out.loss, **LOGITS)


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 7, 12])
def test_right_padding_changes_nothing(codec: RQVAE, tokens: Tokens, num_tokens: int) -> None:
    real = tokens(2, num_tokens)
    outputs = []
    for length in (-(-num_tokens // 4) * 4, 16, 24):
        ids = F.pad(real, (0, length - num_tokens))
        mask = (torch.arange(length) < num_tokens).long().expand_as(ids)
        outputs.append((codec.encode(ids, mask), codec(ids, mask)))
    codes, first = outputs[0]
    for padded_codes, padded in outputs[1:]:
        assert torch.equal(padded_codes[:, : codes.shape[1]], codes)
        torch.testing.assert_close(padded.nats[:, :num_tokens], first.nats[:, :num_tokens], **LOGITS)
        torch.testing.assert_close(padded.loss, first.loss, **LOGITS)


def test_what_stands_at_padding_does_not_matter(codec: RQVAE, packed: Any, tokens: Tokens) -> None:
    real = packed.document_ids > 0
    others = torch.where(real, packed.input_ids, tokens(*packed.input_ids.shape, seed=9))
    chunks = chunk_documents(packed.document_ids, 4) > 0
    before = codec(packed.input_ids, document_ids=packed.document_ids)
    after = codec(others, document_ids=packed.document_ids)
    assert torch.equal(after.codes[chunks], before.codes[chunks])
    torch.testing.assert_close(after.nats, before.nats, **LOGITS)
    torch.testing.assert_close(after.loss, before.loss, **LOGITS)


def test_packed_neighbours_change_nothing(codec: RQVAE, packed: Any) -> None:
    ids, documents = packed
    out = codec(ids, document_ids=documents)
    logits = codec.decode(out.codes, chunk_documents(documents, 4))
    num_documents = 0
    for row in range(len(ids)):
        for number in range(1, int(documents[row].max()) + 1):
            places = (documents[row] == number).nonzero().flatten()
            start, end = int(places[0]) // 4 * 4, -(-(int(places[-1]) + 1) // 4) * 4
            alone_ids = ids[row : row + 1, start:end]
            alone_mask = (documents[row : row + 1, start:end] == number).long()
            alone = codec(alone_ids, alone_mask)
            chunks = slice(start // 4, end // 4)
            assert torch.equal(alone.codes, out.codes[row : row + 1, chunks])
            torch.testing.assert_close(alone.nats, out.nats[row : row + 1, start:end], **LOGITS)
            torch.testing.assert_close(codec.decode(alone.codes), logits[row : row + 1, start:end], **LOGITS)
            num_documents += 1
    assert num_documents == 4


@pytest.mark.parametrize("changes", [*VARIANTS, {"quantizer": {"beam_width": 4}}], ids=str)
def test_neighbours_and_padding_change_nothing_whatever_the_codec(
    make_codec: MakeCodec, tokens: Tokens, pack: Any, changes: dict[str, Any]
) -> None:
    """Two documents in a row behind one another, with padding before, between and behind, and each alone."""
    codec = make_codec(**changes)
    factor = codec.config.compression_factor
    texts = [(tokens(21, seed=5).tolist(), min(3, factor - 1)), (tokens(17, seed=6).tolist(), factor // 2)]
    length = 8 * factor + 64 // factor * factor
    ids, documents = pack([texts], length, factor)
    # A chunk of padding first.
    ids, documents = F.pad(ids, (factor, 0)), F.pad(documents, (factor, 0))
    out = codec(ids, document_ids=documents)
    assert torch.equal(codec.encode(ids, document_ids=documents), out.codes)
    for number in (1, 2):
        places = (documents[0] == number).nonzero().flatten()
        start, end = int(places[0]) // factor * factor, -(-(int(places[-1]) + 1) // factor) * factor
        alone = codec(ids[:, start:end], (documents[:, start:end] == number).long())
        assert torch.equal(alone.codes, out.codes[:, start // factor : end // factor])
        torch.testing.assert_close(alone.nats, out.nats[:, start:end], **LOGITS)


def test_a_row_of_padding_takes_part_without_effect(codec: RQVAE, packed: Any) -> None:
    ids, documents = packed
    with_padding, without = codec(ids, document_ids=documents), codec(ids[:2], document_ids=documents[:2])
    torch.testing.assert_close(with_padding.loss, without.loss)
    assert (with_padding.nats[2] == 0).all()
    only = codec(ids[2:], document_ids=documents[2:])
    assert float(only.loss.detach()) == 0
    assert torch.isfinite(only.latents).all()


def test_encoding_is_not_learning(make_codec: MakeCodec, tokens: Tokens) -> None:
    codec = make_codec().train()
    before = {name: buffer.clone() for name, buffer in codec.named_buffers()}
    codes = codec.encode(tokens(2, 16))
    assert codec.training
    assert codec.quantizer.training
    assert not codes.is_inference()
    codec.quantizer.update_codebook_ema(step=1, seed=0)
    for name, buffer in codec.named_buffers():
        if name.endswith("codebook"):
            torch.testing.assert_close(buffer, before[name])


@pytest.mark.parametrize("length", [1, 5, 31])
def test_half_a_chunk_is_an_error(codec: RQVAE, tokens: Tokens, length: int) -> None:
    for call in (codec.encode, codec):
        with pytest.raises(ValueError, match=f"{length} tokens are not a whole number of chunks of 4"):
            call(tokens(1, length))


# Decoding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_logits_of_a_chunk_depend_on_no_later_code(make_codec: MakeCodec, changes: dict[str, Any]) -> None:
    codec = make_codec(**changes)
    factor, sizes = codec.config.compression_factor, torch.tensor(codec.config.codebook_sizes)
    generator = torch.Generator().manual_seed(0)
    codes = (torch.rand(2, 6, len(sizes), generator=generator) * sizes).long()
    logits = codec.decode(codes)
    assert logits.shape == (2, 6 * factor, 97)
    for place in range(6):
        changed = codes.clone()
        changed[:, place] = (codes[:, place] + 1) % sizes
        after = codec.decode(changed)
        start = place * factor
        torch.testing.assert_close(after[:, :start], logits[:, :start], **LOGITS)
        assert (after - logits)[:, start : start + factor].abs().amax(-1).min() > 1e-2
        if place < 5:
            assert (after - logits)[:, start + factor :].abs().max() > 1e-2
        torch.testing.assert_close(codec.decode(codes[:, : place + 1]), logits[:, : start + factor], **LOGITS)


@pytest.mark.parametrize("blocks", [[8], [1] * 8, [3, 1, 4], [1, 7]])
@pytest.mark.parametrize("padding", [0, 2])
def test_cached_decoding_equals_one_pass(
    codec: RQVAE, tokens: Tokens, blocks: list[int], padding: int
) -> None:
    codes = codec.encode(tokens(2, 32))
    documents = torch.ones(2, 8, dtype=torch.long)
    documents[1, :padding] = 0
    logits = codec.decode(codes, documents)
    with torch.inference_mode():
        cache = codec.decoder.new_cache(2, 8)
        parts = [
            codec.decoder(codec.quantizer.embed(block), block_documents, cache=cache)
            for block, block_documents in zip(codes.split(blocks, 1), documents.split(blocks, 1), strict=True)
        ]
    cached = torch.cat(parts, dim=1)
    real = documents.repeat_interleave(4, 1) > 0
    torch.testing.assert_close(cached[real], logits[real], **LOGITS)
    assert torch.equal(cached[real].argmax(-1), logits[real].argmax(-1))


def test_decoding_the_first_levels_only(codec: RQVAE, tokens: Tokens) -> None:
    codes = codec.encode(tokens(1, 16))
    with torch.no_grad():
        latents = codec.quantizer.levels[0].embed(codes[..., 0])
        expected = codec.decoder(latents, torch.ones(1, 4, dtype=torch.long))
    torch.testing.assert_close(codec.decode(codes[..., :1]), expected, **LOGITS)
    assert not torch.allclose(codec.decode(codes), expected, atol=0.1)


# Losses -------------------------------------------------------------------------------------------------


def test_the_losses_are_what_they_say(codec: RQVAE, packed: Any) -> None:
    ids, documents = packed
    out = codec(ids, document_ids=documents)
    real = documents > 0
    logits = codec.decode(out.codes, chunk_documents(documents, 4))
    nats = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    torch.testing.assert_close(out.nats.double(), nats * real, **LOGITS)
    assert torch.equal(out.correct, (logits.argmax(-1) == ids) & real)
    torch.testing.assert_close(out.reconstruction_loss.double(), nats[real].mean(), **LOGITS)
    chunks = chunk_documents(documents, 4) > 0
    commitment = 0.0
    for levels in range(1, 4):
        difference = out.latents - codec.quantizer.embed(out.codes[..., :levels])
        commitment += difference.square().mean(-1)[chunks].sum()
        torch.testing.assert_close(
            out.distortion[levels - 1], difference.square().sum(-1)[chunks].sum(), rtol=1e-6, atol=0
        )
    torch.testing.assert_close(out.commitment_loss, commitment * 4 / real.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        out.loss.double(), out.reconstruction_loss.double() + 0.25 * out.commitment_loss
    )
    assert float(out.rate_loss) == 0


def test_nothing_at_padding_is_ever_correct(codec: RQVAE, packed: Any) -> None:
    ids, documents = packed
    real = documents > 0
    guesses = codec.decode(codec.encode(ids, document_ids=documents), chunk_documents(documents, 4)).argmax(
        -1
    )
    out = codec(torch.where(real, ids, guesses), document_ids=documents)
    assert not out.correct[~real].any()


def test_losses_of_micro_batches_add_up(codec: RQVAE, packed: Any) -> None:
    ids, documents = packed
    whole = codec(ids, document_ids=documents)
    total = (documents > 0).sum()
    parts = [codec(ids[i : i + 1], document_ids=documents[i : i + 1], num_tokens=total) for i in range(3)]
    for name in ("loss", "reconstruction_loss", "commitment_loss"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name), **LOGITS)


def test_an_untrained_codec_is_as_good_as_chance(
    make_codec_config: Callable[..., RQVAEConfig], tokens: Tokens
) -> None:
    torch.manual_seed(0)
    out = RQVAE(make_codec_config())(tokens(4, 32))
    assert float(out.reconstruction_loss.detach()) == pytest.approx(math.log(97), abs=0.3)


def test_without_quantization_latents_pass_on(codec: RQVAE, tokens: Tokens) -> None:
    ids = tokens(2, 16)
    out = codec(ids, quantize=False)
    assert out.codes is None
    assert out.distortion.shape == (0,)
    assert float(out.commitment_loss) == 0
    with torch.no_grad():
        logits = codec.decoder(out.latents, torch.ones(2, 4, dtype=torch.long))
    nats = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    torch.testing.assert_close(out.nats.double(), nats, **LOGITS)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_mode_equals_evaluation_mode(
    make_codec: MakeCodec, packed: Any, checkpointing: bool
) -> None:
    codec = make_codec()
    ids, documents = packed
    evaluated = codec(ids, document_ids=documents)
    codec.train()
    if checkpointing:
        enable_checkpointing(codec)
    trained = codec(ids, document_ids=documents)
    assert torch.equal(trained.codes, evaluated.codes)
    assert torch.equal(trained.nats, evaluated.nats)
    assert torch.equal(trained.loss, evaluated.loss)


# Gradients ----------------------------------------------------------------------------------------------


def enable_checkpointing(codec: RQVAE) -> None:
    for part in (codec.encoder, codec.decoder):
        part.refinement.gradient_checkpointing = True
        part.backbone.gradient_checkpointing_enable({"use_reentrant": False})


def gradients(codec: RQVAE, packed: Any) -> dict[str, Tensor | None]:
    codec.zero_grad(set_to_none=True)
    codec(packed.input_ids, document_ids=packed.document_ids).loss.backward()
    return {name: parameter.grad for name, parameter in codec.named_parameters()}


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize(
    "backbone", [{}, {"shared": True}, {"decoder": "random"}, {"decoder": "none"}], ids=str
)
def test_gradients_flow_through_frozen_backbones(
    make_codec: MakeCodec, packed: Any, backbone: dict[str, Any], quantize: bool
) -> None:
    codec = make_codec(backbone=backbone).train()
    expected = gradients(codec, packed)
    backbone = {id(parameter) for parameter in codec.backbone_parameters()}
    for parameter in codec.backbone_parameters():
        parameter.requires_grad_(False)
    frozen = {name: p.detach().clone() for name, p in codec.named_parameters() if id(p) in backbone}
    optimizer = torch.optim.AdamW([p for p in codec.parameters() if p.requires_grad], lr=1e-2)
    actual = gradients(codec, packed)
    num_new = 0
    for name, parameter in codec.named_parameters():
        if id(parameter) in backbone:
            assert actual[name] is None, name
        else:
            num_new += 1
            # The same training as with everything trainable, and none of it zero.
            torch.testing.assert_close(actual[name], expected[name], atol=1e-9, rtol=1e-6, msg=name)
            assert actual[name].abs().amax() > 0, name
    assert num_new == len(expected) - len(frozen)
    assert {name.split(".")[0] for name in expected.keys() - frozen.keys()} == {"encoder", "decoder"}
    codec(packed.input_ids, document_ids=packed.document_ids, quantize=quantize).loss.backward()
    optimizer.step()
    for name, before in frozen.items():
        assert torch.equal(codec.get_parameter(name), before)


def test_everything_trains_once_the_backbones_are_released(make_codec: MakeCodec, packed: Any) -> None:
    codec = make_codec().train()
    for parameter in codec.backbone_parameters():
        parameter.requires_grad_(False)
    gradients(codec, packed)
    for parameter in codec.backbone_parameters():
        parameter.requires_grad_(True)
    for name, gradient in gradients(codec, packed).items():
        assert gradient is not None, name
        assert gradient.abs().amax() > 0, name


def test_gradient_checkpointing_updates_codebooks_once(make_codec: MakeCodec, packed: Any) -> None:
    plain, checkpointed = make_codec().train(), make_codec().train()
    enable_checkpointing(checkpointed)
    expected, actual = gradients(plain, packed), gradients(checkpointed, packed)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-9, rtol=1e-6, msg=name)
    for codec in (plain, checkpointed):
        codec.quantizer.update_codebook_ema(step=10, seed=0)
    for (name, buffer), expected_buffer in zip(checkpointed.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, expected_buffer), name
    real_chunks = int((chunk_documents(packed.document_ids, 4) > 0).sum())
    mass = checkpointed.quantizer.levels[0].ema_cluster_size.sum()
    assert float(mass) == pytest.approx(0.99 * 16 + 0.01 * real_chunks)


def test_a_few_steps_learn_one_batch(make_codec_config: Callable[..., RQVAEConfig], tokens: Tokens) -> None:
    torch.manual_seed(0)
    codec = RQVAE(make_codec_config(codebook_size=32, quantizer={"ema_decay": 0.8})).train()
    ids = tokens(4, 32)
    optimizer = torch.optim.Adam(codec.parameters(), lr=3e-3)
    losses = []
    for step in range(90):
        quantize = step >= 30
        if step == 30:
            with torch.no_grad():
                latents = codec(ids, quantize=False).latents
            codec.quantizer.initialize(latents.flatten(0, 1), seed=0)
        optimizer.zero_grad()
        out = codec(ids, quantize=quantize)
        out.loss.backward()
        optimizer.step()
        if quantize:
            codec.quantizer.update_codebook_ema(step, seed=0)
        losses.append(float(out.reconstruction_loss.detach()))
    assert losses[29] < 0.8 * losses[0]
    assert losses[-1] < 0.5 * losses[0]


# Backbones and precision --------------------------------------------------------------------------------


def test_a_llama_backbone_keeps_the_invariants(
    make_codec: MakeCodec, make_architecture: Callable[..., Any], packed: Any
) -> None:
    codec = make_codec(architecture=make_architecture(model_type="llama", tie_word_embeddings=False))
    assert type(codec.encoder.backbone).__name__ == "LlamaModel"
    codes = codec.encode(packed.input_ids, document_ids=packed.document_ids)
    alone = codec.encode(packed.input_ids[:1, 12:16], document_ids=packed.document_ids[:1, 12:16])
    assert packed.document_ids[0, 12:16].tolist() == [2, 2, 2, 2]
    assert torch.equal(alone, codes[:1, 3:4])
    assert torch.equal(
        codec.encode(packed.input_ids[1:2, :16], packed.document_ids[1:2, :16]), codes[1:2, :4]
    )


def test_bf16_weights_run_with_fp32_codebooks(make_codec: MakeCodec, tokens: Tokens) -> None:
    codec = make_codec(dtype=torch.float32)
    ids = tokens(4, 32)
    exact = codec(ids)
    codebook = codec.quantizer.levels[0].codebook.clone()
    codec.bfloat16().train()
    out = codec(ids)
    out.loss.backward()
    assert torch.equal(codec.quantizer.levels[0].codebook, codebook)
    assert out.nats.dtype == torch.float32
    assert out.reconstruction_loss.item() == pytest.approx(exact.reconstruction_loss.item(), rel=0.1)
    codec.quantizer.update_codebook_ema(step=10, seed=0)
    assert codec.quantizer.levels[0].codebook.dtype == torch.float32
    assert torch.isfinite(codec.decode(codec.encode(ids))).all()


def test_public_names_are_importable() -> None:
    import rqvae

    for name in rqvae.__all__:
        assert getattr(rqvae, name).__name__ == name
    assert rqvae.LatentGenerator is LatentGenerator
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = rqvae.Nothing
