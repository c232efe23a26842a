"""RQTransformer and its flat baseline: one contract, tested on both."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rqvae import FlatTransformer, RQTransformer, RQTransformerConfig
from rqvae.layers import causal_document_mask

Make = Callable[..., Any]
SIZES = (16, 8, 4)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # angles of rotary positions, nats and head statistics are fp32

both = pytest.mark.parametrize("model_class", [RQTransformer, FlatTransformer])


def random_codes(*shape: int, seed: int = 0) -> Tensor:
    """LongTensor [*shape, D]."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, len(SIZES), generator=generator) * torch.tensor(SIZES)).long()


def make_config(**changes: Any) -> RQTransformerConfig:
    values = {
        "spatial_dim": 32,
        "spatial_layers": 2,
        "depth_dim": 32,
        "depth_layers": 1,
        "head_dim": 16,
        "compression_factor": 4,
        "codebook_levels": 3,
        "codebook_size": SIZES,
    }
    return RQTransformerConfig.model_validate(values | changes)


@pytest.fixture(params=[RQTransformer, FlatTransformer])
def model(request: pytest.FixtureRequest, make_latent_model: Make) -> RQTransformer | FlatTransformer:
    return make_latent_model(request.param, codebook_size=SIZES)


def test_a_code_influences_what_comes_after_it_and_nothing_else(
    model: RQTransformer | FlatTransformer,
) -> None:
    codes = random_codes(1, 5)
    before = model(codes, return_logits=True).logits
    for place in range(5):
        for level in range(3):
            changed = codes.clone()
            changed[0, place, level] = (codes[0, place, level] + 1) % SIZES[level]
            after = model(changed, return_logits=True).logits
            for other_place in range(5):
                for other_level in range(3):
                    x, y = after[other_level][0, other_place], before[other_level][0, other_place]
                    if (other_place, other_level) > (place, level):
                        assert (x - y).abs().max() > 1e-4, (place, level, other_place, other_level)
                    else:
                        torch.testing.assert_close(x, y, atol=1e-10, rtol=0)


def test_packed_documents_are_isolated_and_padding_counts_for_nothing(
    model: RQTransformer | FlatTransformer,
) -> None:
    codes = random_codes(3, 8)
    documents = torch.tensor([[1, 1, 1, 2, 2, 0, 3, 0], [0, 0, 1, 1, 1, 1, 2, 2], [0] * 8])
    out = model(codes, document_ids=documents)
    real = documents > 0
    assert (out.nats[~real] == 0).all()
    assert not out.correct[~real].any()
    assert out.loss.item() == pytest.approx(out.nats.sum().item() / (4 * real.sum().item()), rel=1e-5)
    for row in range(2):
        for number in range(1, int(documents[row].max()) + 1):
            places = documents[row] == number
            alone = model(codes[row][places][None])
            torch.testing.assert_close(alone.nats[0], out.nats[row][places], **CLOSE)
            assert torch.equal(alone.correct[0], out.correct[row][places])
    others = torch.where(real[..., None], codes, random_codes(3, 8, seed=1))
    torch.testing.assert_close(model(others, document_ids=documents).nats, out.nats, **CLOSE)
    assert model(codes[2:], document_ids=documents[2:]).loss.item() == 0


def test_logits_nats_and_correct_agree(model: RQTransformer | FlatTransformer) -> None:
    codes = random_codes(2, 6)
    out = model(codes, return_logits=True)
    assert model(codes).logits is None
    assert [tuple(level.shape) for level in out.logits] == [(2, 6, size) for size in SIZES]
    for i, logits in enumerate(out.logits):
        nats = F.cross_entropy(logits.transpose(1, 2), codes[..., i], reduction="none")
        torch.testing.assert_close(out.nats[..., i].double(), nats, **CLOSE)
        assert torch.equal(out.correct[..., i], logits.argmax(-1) == codes[..., i])
    assert out.loss.item() == pytest.approx(out.nats.sum().item() / (4 * 2 * 6), rel=1e-5)


def test_prefixes_and_batches_change_nothing(model: RQTransformer | FlatTransformer) -> None:
    codes = random_codes(3, 6)
    nats = model(codes).nats
    for end in range(1, 6):
        torch.testing.assert_close(model(codes[:, :end]).nats, nats[:, :end], **CLOSE)
    torch.testing.assert_close(model(codes[1:2]).nats, nats[1:2], **CLOSE)


def test_losses_of_micro_batches_add_up(model: RQTransformer | FlatTransformer) -> None:
    codes = random_codes(4, 6)
    total = torch.tensor(4 * 4 * 6)
    parts = [model(part, num_tokens=total).loss for part in codes.split([1, 3])]
    torch.testing.assert_close(sum(parts), model(codes).loss)


@both
def test_an_untrained_model_is_as_good_as_chance_and_learns(model_class: type[RQTransformer]) -> None:
    torch.manual_seed(0)
    model = model_class(make_config())
    codes = random_codes(4, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = model(codes)
    for level, size in enumerate(SIZES):
        assert first.nats[..., level].mean().item() == pytest.approx(math.log(size), abs=0.15)
    assert first.loss.item() == pytest.approx(math.log(math.prod(SIZES)) / 4, abs=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        model(codes).loss.backward()
        optimizer.step()
    assert model(codes).loss.item() < 0.4 * first.loss.item()


@both
def test_every_parameter_gets_a_gradient_and_checkpointing_does_not_change_it(
    model_class: type[RQTransformer], make_latent_model: Make
) -> None:
    model = make_latent_model(model_class, codebook_size=SIZES).train()
    codes = random_codes(2, 6)
    gradients = []
    for checkpointing in (False, True):
        for name, module in model.named_modules():
            if name.endswith("block"):
                module.gradient_checkpointing = checkpointing
        model.zero_grad()
        model(codes).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-9, rtol=1e-6)


def test_levels_have_embeddings_of_their_own(make_latent_model: Make) -> None:
    embedding = make_latent_model(codebook_size=SIZES).spatial.embedding
    tables = embedding.table.weight.split(SIZES)
    codes = random_codes(2, 5)
    expected = torch.stack([table[codes[..., i]] for i, table in enumerate(tables)], dim=-2)
    assert torch.equal(embedding(codes), expected)
    assert torch.equal(embedding(codes[..., :2]), expected[..., :2, :])
    for level in range(3):
        assert torch.equal(embedding.level(codes[..., level], level), expected[..., level, :])


def test_steps_with_caches_equal_teacher_forcing(make_latent_model: Make) -> None:
    model: RQTransformer = make_latent_model(codebook_size=SIZES)
    codes = random_codes(2, 6)
    expected = model(codes, return_logits=True).logits
    spatial, depth = model.spatial, model.depth
    cache, depth_cache = spatial.block.new_cache(2, 6, spatial.start), depth.new_cache(2)
    x = spatial.start.expand(2, 1, -1)
    with torch.no_grad():
        for place in range(6):
            context = spatial.step(x, torch.full((2, 1), place), None, cache)[:, 0]
            inputs = depth.from_context(context)[:, None] + depth.level_positions
            depth_cache.reset()
            prefix = torch.zeros_like(inputs[:, :1])
            for level in range(3):
                logits = depth.step(inputs[:, level : level + 1] + prefix, level, depth_cache)
                torch.testing.assert_close(logits, expected[level][:, place], **CLOSE)
                prefix = prefix + depth.embedding.level(codes[:, place, level], level)[:, None]
            x = spatial.embed(codes[:, place : place + 1])


def test_the_context_of_a_position_is_made_of_whole_positions_before(make_latent_model: Make) -> None:
    spatial = make_latent_model(codebook_size=SIZES).spatial
    codes, documents = random_codes(1, 6), torch.ones(1, 6, dtype=torch.long)
    inputs = torch.cat([spatial.start.expand(1, 1, -1), spatial.embed(codes)[:, :-1]], dim=1)
    expected = spatial.block(inputs, torch.arange(6)[None], causal_document_mask(documents, documents))
    torch.testing.assert_close(spatial(codes, documents), expected, **CLOSE)


@both
@pytest.mark.parametrize("changes", [{"codebook_levels": 1, "codebook_size": 16}, {"depth_dim": 64}], ids=str)
def test_other_shapes(model_class: type[RQTransformer], changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = make_config(**changes)
    codes = random_codes(2, 3)[..., : config.codebook_levels]
    assert model_class(config)(codes).nats.shape == codes.shape


@both
def test_codes_with_another_number_of_levels_are_an_error(model_class: type[RQTransformer]) -> None:
    with pytest.raises(ValueError, match="codes have 2 levels, the model has 3"):
        model_class(make_config())(random_codes(2, 3)[..., :2])


def test_text_is_refused() -> None:
    with pytest.raises(ValueError, match="without input_ids"):
        RQTransformer(make_config())(random_codes(1, 2), input_ids=torch.zeros(1, 8, dtype=torch.long))
