"""The codec whose codes are some of the tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rqvae import AnchorCodec, LatentGenerator, RQVAEConfig, create_codec, latent_bound, load_codec
from tests.unit.rqvae.conftest import EOS, VOCAB_SIZE, randomize

Make = Callable[..., Any]
ABSENT = VOCAB_SIZE


@pytest.fixture
def make_anchor(make_codec_config: Make) -> Make:
    def make(**changes: Any) -> AnchorCodec:
        settings = {"model": "anchor", "codebook_levels": 2, "codebook_size": None}
        codec = create_codec(make_codec_config(**settings | changes))
        assert isinstance(codec, AnchorCodec)
        randomize(codec, seed=0)
        return codec.double().eval()

    return make


@pytest.mark.parametrize(
    ("factor", "levels", "places"),
    [(4, 2, [1, 3]), (4, 3, [0, 1, 3]), (8, 3, [1, 4, 7]), (16, 4, [3, 7, 11, 15]), (2, 1, [1])],
)
def test_codes_are_evenly_spaced_tokens(
    make_anchor: Make, tokens: Make, factor: int, levels: int, places: list[int]
) -> None:
    codec = make_anchor(compression_factor=factor, codebook_levels=levels)
    assert codec.config.codebook_sizes == (VOCAB_SIZE + 1,) * levels
    ids = tokens(2, 5 * factor)
    assert torch.equal(codec.encode(ids), ids.view(2, 5, factor)[..., places])


def test_anchors_are_certain_and_the_rest_is_scored(make_anchor: Make, packed: Any) -> None:
    codec = make_anchor()
    out = codec(packed.input_ids, document_ids=packed.document_ids)
    real = packed.document_ids > 0
    codes = codec.encode(packed.input_ids, document_ids=packed.document_ids)
    assert torch.equal(codes, out.codes)
    assert ((codes == ABSENT) == ~real.view(3, 8, 4)[..., [1, 3]]).all()
    chunks = packed.document_ids.view(3, 8, 4).amax(-1)
    nats = -codec.decode(codes, chunks).log_softmax(-1).gather(-1, packed.input_ids[..., None])[..., 0]
    torch.testing.assert_close(out.nats.double(), nats.masked_fill(~real, 0), atol=1e-5, rtol=1e-5)
    at_anchor = torch.tensor([False, True, False, True]).repeat(8)
    assert (out.nats[:, at_anchor] == 0).all()
    assert (out.nats[:, ~at_anchor][real[:, ~at_anchor]] > 0).all()
    assert out.correct[:, at_anchor][real[:, at_anchor]].all() and not out.correct[~real].any()
    torch.testing.assert_close(out.loss.double(), nats[real].sum() / real.sum(), atol=1e-5, rtol=1e-5)


def test_no_chunk_depends_on_a_later_one_nor_on_another_document(make_anchor: Make, packed: Any) -> None:
    codec = make_anchor()
    codes = codec.encode(packed.input_ids, document_ids=packed.document_ids)
    chunks = packed.document_ids.view(3, 8, 4).amax(-1)
    logits = codec.decode(codes, chunks)
    changed = codes.clone()
    changed[:, 4] = (changed[:, 4] + 1) % VOCAB_SIZE
    difference = (codec.decode(changed, chunks) - logits).nan_to_num().abs().view(3, 8, 4, -1).amax((2, 3))
    assert (difference[:, :4] == 0).all()
    assert (difference[chunks != chunks[:, 4:5]] == 0).all()
    assert (difference[:2, 4] > 1e-3).all()


def test_what_the_anchors_say_is_used(make_anchor: Make, tokens: Make) -> None:
    """The tokens between depend on the anchor that follows, and on those before."""
    codec, ids = make_anchor(), tokens(1, 8)
    codes = codec.encode(ids)
    before = codec.decode(codes)[0, [0, 2, 4]]
    for level, depends in ((0, [True, True, True]), (1, [False, True, True])):
        changed = codes.clone()
        changed[0, 0, level] = (codes[0, 0, level] + 1) % VOCAB_SIZE
        difference = (codec.decode(changed)[0, [0, 2, 4]] - before).abs().amax(1)
        assert (difference > 1e-3).tolist() == depends


def test_blocks_with_a_cache_are_the_whole(make_anchor: Make, tokens: Make) -> None:
    codec = make_anchor()
    codes = codec.encode(tokens(3, 32))
    documents = torch.ones_like(codes[..., 0])
    whole = codec.decode(codes).argmax(-1)
    cache = codec.new_decoder_cache(3, 8)
    blocks = [
        codec.decode_block(codes[:, part], documents[:, part], cache)
        for part in (slice(0, 3), slice(3, 4), slice(4, 8))
    ]
    assert torch.equal(torch.cat(blocks, dim=1), whole)
    assert torch.equal(whole.view(3, 8, 4)[..., [1, 3]], codes)


def test_places_without_a_token(make_anchor: Make) -> None:
    codec = make_anchor()
    codes = torch.tensor([[[ABSENT, 5], [6, ABSENT], [ABSENT, ABSENT]]])
    found = codec.decode_block(codes, torch.ones(1, 3).long(), codec.new_decoder_cache(1, 3))
    left, right, ended = found.view(3, 4).tolist()
    # Padding on the left stands before the first token; on the right whatever is decoded follows the end of text.
    assert left[:2] == [-1, -1] and left[2] >= 0 and left[3] == 5
    assert right[0] >= 0 and right[1] == 6 and right[2] >= 0 and right[3] == -1
    assert ended[1] == ended[3] == -1


def test_tokens_are_chosen_as_asked(make_anchor: Make, tokens: Make) -> None:
    codec = make_anchor()
    codes = codec.encode(tokens(1, 8))
    documents = torch.ones_like(codes[..., 0])
    found = codec.decode_block(
        codes, documents, codec.new_decoder_cache(1, 2), lambda logits, places: logits.argmin(-1)
    )
    logits = codec.decode(codes)
    assert torch.equal(found[0, [0, 2, 4, 6]], logits.argmin(-1)[0, [0, 2, 4, 6]])
    assert torch.equal(found[0, [1, 3, 5, 7]], codes.flatten())


def test_it_generates_with_a_latent_model_and_is_scored_with_it(
    make_anchor: Make, make_latent_model: Make, tokenizer: Any, packed: Any
) -> None:
    codec = make_anchor()
    model = make_latent_model(codebook_levels=2, codebook_size=VOCAB_SIZE + 1)
    bound = latent_bound(codec, model, packed.input_ids, packed.document_ids)
    real = packed.document_ids > 0
    assert (bound.token_nats + bound.code_nats.sum() > 0).any() and (bound.token_nats[~real] == 0).all()
    generator = LatentGenerator(codec, model, tokenizer)
    prompts = [[5, 6, 7], [8], []]
    result = generator.generate_tokens(prompts, 12, temperature=1.0, seed=3, stop_at_end_of_text=False)
    again = generator.generate_tokens(prompts, 12, temperature=1.0, seed=3, stop_at_end_of_text=False)
    other = generator.generate_tokens(prompts, 12, temperature=1.0, seed=4, stop_at_end_of_text=False)
    assert result.token_ids == again.token_ids != other.token_ids
    assert all(0 <= token < VOCAB_SIZE for row in result.token_ids for token in row)


def test_saved_and_loaded_it_is_the_same_codec(make_anchor: Make, tokens: Make, tmp_path: Path) -> None:
    codec, ids = make_anchor().float(), tokens(2, 16)
    codec.save_pretrained(tmp_path)
    loaded = load_codec(tmp_path)
    assert isinstance(loaded, AnchorCodec)
    assert loaded.codec_hash() == codec.codec_hash()
    codes = codec.encode(ids)
    assert torch.equal(loaded.decode(codes), codec.decode(codes))


def test_it_learns(make_anchor: Make, tokens: Make) -> None:
    codec = make_anchor().float().train()
    # The token between is a function of its neighbours.
    ids = tokens(32, 32)
    ids[:, 2::4] = (ids[:, 1::4] + ids[:, 3::4]) % VOCAB_SIZE
    ids[:, 0::4] = ids[:, 1::4]
    optimizer = torch.optim.Adam(codec.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = codec(ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in codec.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_levels": 4}, "needs fewer levels"),
        ({"codebook_size": 16}, "leave it out, or set it to null"),
        ({"backbone": {"shared": True}}, "no encoder to share with"),
        ({"token_dropout": 0.1}, "token_dropout: has no effect"),
        ({"quantizer": {"beam_width": 4}}, "quantizer: has no effect"),
        ({"resample": "reference"}, "resample: has no effect"),
        ({"backbone": {"decoder": "none"}}, "nothing to decode with"),
    ],
)
def test_what_makes_no_sense_is_refused(make_anchor: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_anchor(**changes)


def test_another_codec_is_refused(make_codec_config: Make, make_anchor: Make) -> None:
    with pytest.raises(ValueError, match="needs model: anchor"):
        AnchorCodec(make_codec_config())
    config: RQVAEConfig = make_anchor(backbone={"decoder": "random"}).config
    with pytest.raises(ValueError, match="has a decoder only"):
        AnchorCodec(config).load_backbone("nowhere")


def test_an_empty_prompt_begins_a_text(make_anchor: Make, make_latent_model: Make, tokenizer: Any) -> None:
    generator = LatentGenerator(
        make_anchor(), make_latent_model(codebook_levels=2, codebook_size=VOCAB_SIZE + 1), tokenizer
    )
    texts = generator.generate(["", "w5 w6"], max_new_tokens=8, temperature=1.0, seed=0)
    assert len(texts) == 2
    assert EOS < VOCAB_SIZE and all(isinstance(text, str) for text in texts)
