"""The codec's options beyond the default recipe: what each does, and that it does nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rqvae import RQVAE, BaseLM, ResidualQuantizer, RQVAEConfig
from rqvae.codebook import FiniteScalarQuantizer
from rqvae.config import QuantizerConfig
from rqvae.encoder import chunk_documents
from rqvae.quantizer import rotate_to
from rqvae.randomness import sample_seeds

MakeCodec = Callable[..., RQVAE]
MakeConfig = Callable[..., RQVAEConfig]
Tokens = Callable[..., Tensor]

FSQ = {"quantizer": {"method": "fsq", "fsq_levels": (4, 2, 2)}, "codebook_dim": 3}
OPTIONS: list[dict[str, Any]] = [
    FSQ,
    {"quantizer": {"shared_codebook": True}},
    {"quantizer": {"gradient": "rotation"}},
    {"quantizer": {"level_dropout": 0.5}},
    {"quantizer": {"beam_width": 3}},
    {"quantizer": {"rate_weight": 0.3}},
    {"token_dropout": 0.3},
    {"latent_dropout": 0.3},
    {"latent_noise": 0.3},
    {"resample": "reference"},
    {"resample": "reference", "compression_factor": 1},
    {"encoder_context": "chunk"},
    {"backbone": {"shared": True}},
    {"backbone": {"decoder": "random"}},
    {"backbone": {"decoder": "none"}},
]


def seeds_of(batch: Tensor, step: int = 0) -> Tensor:
    return sample_seeds(0, step, torch.arange(len(batch)))


def state_of(codec: RQVAE) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in codec.state_dict().items()}


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_every_option_trains_is_deterministic_and_survives_saving(
    make_codec: MakeCodec, tokens: Tokens, changes: dict[str, Any], tmp_path: Path
) -> None:
    ids = tokens(6, 32)
    documents = torch.ones_like(ids)
    documents[:, 0] = 0  # a place without a token, so that the vector for it learns too
    results = []
    for _ in range(2):
        codec = make_codec(torch.float32, **changes).train()
        # Random weights of unit gain are far from every minimum: steps of the gradient's sign go down.
        optimizer = torch.optim.Adam(codec.parameters(), lr=3e-3)
        losses = []
        for step in range(12):
            optimizer.zero_grad()
            out = codec(ids, document_ids=documents, seeds=seeds_of(ids, step))
            out.loss.backward()
            for name, parameter in codec.named_parameters():
                if name != "encoder.absent_token" or codec.config.compression_factor > 1:
                    assert parameter.grad is not None and parameter.grad.abs().amax() > 0, name
            optimizer.step()
            codec.quantizer.update_codebook_ema(step, seed=0)
            losses.append(float(out.reconstruction_loss.detach()))
        results.append(losses)
    assert results[0] == results[1]
    assert min(losses[-3:]) < 0.9 * losses[0]
    codec.eval().save_pretrained(tmp_path)
    loaded = RQVAE.from_pretrained(tmp_path)
    codes = codec.encode(ids)
    assert torch.equal(loaded.encode(ids), codes)
    torch.testing.assert_close(loaded.decode(codes), codec.decode(codes))
    assert loaded.codec_hash() == codec.codec_hash()


@pytest.mark.parametrize(
    "changes",
    [
        {"token_dropout": 0.5},
        {"latent_dropout": 0.5},
        {"latent_noise": 1.0},
        {"quantizer": {"level_dropout": 1.0}},
    ],
    ids=str,
)
def test_noise_belongs_to_training_and_to_its_seeds(
    make_codec: MakeCodec, tokens: Tokens, changes: dict[str, Any]
) -> None:
    codec, ids = make_codec(**changes), tokens(4, 32)
    quiet = codec(ids).nats
    assert torch.equal(codec(ids, seeds=seeds_of(ids, 1)).nats, quiet)
    codec.train()
    first = codec(ids, seeds=seeds_of(ids)).nats
    assert torch.equal(codec(ids, seeds=seeds_of(ids)).nats, first)
    # Wherever a sample stands in whichever batch.
    torch.testing.assert_close(codec(ids[2:], seeds=seeds_of(ids)[2:]).nats, first[2:])
    assert not torch.equal(codec(ids, seeds=seeds_of(ids, 1)).nats, first)
    assert not torch.equal(first, quiet)
    assert not torch.equal(codec(ids).nats, codec(ids).nats)  # without seeds, from torch's generator


# Noise --------------------------------------------------------------------------------------------------


def test_token_dropout_hides_tokens_from_the_encoder_only(make_codec: MakeCodec, packed: Any) -> None:
    codec = make_codec(token_dropout=0.4).train()
    real = packed.document_ids > 0
    hidden = codec._hidden_tokens(real, seeds_of(real))
    assert hidden is not None and hidden.any() and not (hidden & ~real).any()
    many = codec._hidden_tokens(torch.ones(50, 200, dtype=torch.bool), sample_seeds(0, 0, torch.arange(50)))
    assert many is not None and float(many.float().mean()) == pytest.approx(0.4, abs=0.015)
    changed = torch.where(hidden, (packed.input_ids + 1) % 90 + 2, packed.input_ids)
    with torch.no_grad():
        latents = [codec.encoder(ids, packed.document_ids, hidden) for ids in (packed.input_ids, changed)]
        open_latents = codec.encoder(packed.input_ids, packed.document_ids)
    filled = chunk_documents(packed.document_ids, 4) > 0
    assert torch.equal(latents[0][filled], latents[1][filled])
    assert not torch.allclose(latents[0][filled], open_latents[filled])
    # They are still to be reconstructed.
    out = codec(packed.input_ids, document_ids=packed.document_ids, seeds=seeds_of(real))
    assert (out.nats[hidden] > 0).all()


def test_latent_dropout_and_noise_have_the_scale_asked_for(make_codec: MakeCodec) -> None:
    real = torch.ones(64, 50, dtype=torch.bool)
    real[:, 40:] = False
    latents = torch.full((64, 50, 8), 3.0, dtype=torch.float64)
    seeds = sample_seeds(0, 0, torch.arange(64))
    dropped = make_codec(latent_dropout=0.25).train()._disturbed(latents, real, seeds)
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    assert float((dropped == 0).double().mean()) == pytest.approx(0.25, abs=0.01)
    wild = latents.masked_fill(~real[..., None], 1e6)  # padding does not set the scale
    noisy = make_codec(latent_noise=0.5).train()._disturbed(wild, real, seeds)
    assert float((noisy - wild)[real].std()) == pytest.approx(1.5, rel=0.02)


def test_level_dropout_decodes_from_leading_levels(make_codec: MakeCodec, tokens: Tokens) -> None:
    codec = make_codec(quantizer={"level_dropout": 1.0}, codebook_levels=4).train()
    ids = tokens(40, 8)
    kept = codec._kept_levels(sample_seeds(0, 0, torch.arange(4000)))
    assert kept is not None
    assert torch.bincount(kept, minlength=5).tolist() == pytest.approx([0, 1000, 1000, 1000, 1000], abs=110)
    with torch.no_grad():
        latents = codec.encoder(ids, torch.ones_like(ids))
        mask = torch.ones(latents.shape[:2], dtype=torch.bool)
        out, whole = codec.quantizer(latents, mask, kept[:40]), codec.quantizer(latents, mask)
    assert torch.equal(out.codes, whole.codes)
    assert torch.equal(out.commitment_loss, whole.commitment_loss)
    for row in range(40):
        expected = codec.quantizer.embed(out.codes[row, :, : int(kept[row])])
        torch.testing.assert_close(out.quantized[row], expected)
    never = make_codec(quantizer={"level_dropout": 0.25}).train()
    shares = never._kept_levels(sample_seeds(0, 0, torch.arange(4000)))
    # A third of the cut samples happens to keep all three levels.
    assert shares is not None
    assert float((shares < 3).float().mean()) == pytest.approx(0.25 * 2 / 3, abs=0.02)


# Quantizers ---------------------------------------------------------------------------------------------


def test_rotation_trick_is_the_rotation_and_scaling_of_the_paper() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    quantized = vectors.detach() + 0.4 * torch.randn(20, 6, dtype=torch.float64)
    weights = torch.randn(20, 6, dtype=torch.float64)
    out = rotate_to(vectors, quantized)
    assert torch.equal(out, quantized)
    out.backward(weights)
    for row in range(20):
        e, q = vectors[row].detach(), quantized[row]
        unit_e, unit_q = e / e.norm(), q / q.norm()
        r = (unit_e + unit_q) / (unit_e + unit_q).norm()
        # Fifty 2024, equation 4.
        rotation = torch.eye(6) - 2 * torch.outer(r, r) + 2 * torch.outer(unit_q, unit_e)
        torch.testing.assert_close(rotation @ unit_e, unit_q)
        expected = (q.norm() / e.norm()) * rotation.T @ weights[row]
        torch.testing.assert_close(vectors.grad[row], expected)
    zero = torch.zeros(1, 6, dtype=torch.float64, requires_grad=True)
    rotate_to(zero, quantized[:1]).sum().backward()
    assert zero.grad.isfinite().all()


def fsq(levels: tuple[int, ...], depth: int) -> ResidualQuantizer:
    size = int(torch.tensor(levels).prod())
    return ResidualQuantizer((size,) * depth, len(levels), QuantizerConfig(method="fsq", fsq_levels=levels))


def test_residual_fsq_takes_the_nearest_grid_point_and_gets_finer() -> None:
    torch.manual_seed(0)
    quantizer = fsq((4, 3, 2), depth=4).double().eval()
    latents = quantizer.bound(2 * torch.randn(4, 100, 3, dtype=torch.float64))
    assert latents.abs().max() < 1
    out = quantizer(latents, torch.ones(4, 100, dtype=torch.bool))
    residual = latents.flatten(0, 1)
    for index, level in enumerate(quantizer.levels):
        brute = torch.cdist(residual, level.codebook).argmin(1)
        assert torch.equal(out.codes.flatten(0, 1)[:, index], brute)
        residual = residual - level.codebook[brute]
        assert (residual.abs() <= level.scale / level.sizes + 1e-6).all()
    assert out.commitment_loss == 0
    assert (out.distortion[1:] < 0.3 * out.distortion[:-1]).all()


def test_fsq_learns_nothing_and_counts_usage() -> None:
    quantizer = fsq((4, 4), depth=2).train()
    before = {name: b.clone() for name, b in quantizer.named_buffers()}
    latents = torch.full((1, 30, 2), -1.0)
    quantizer.initialize(latents[0], seed=0)
    quantizer(latents, torch.ones(1, 30, dtype=torch.bool))
    assert quantizer.update_codebook_ema(step=10, seed=0) == [0, 0]
    for name, buffer in quantizer.named_buffers():
        if "ema" in name and "embed" not in name:
            assert not torch.equal(buffer, before[name])
        else:
            assert torch.equal(buffer, before[name])
    first = quantizer.levels[0]
    assert isinstance(first, FiniteScalarQuantizer)
    torch.testing.assert_close(first.ema_cluster_size[0], torch.tensor(0.99 + 0.01 * 30))


def test_a_shared_codebook_learns_from_all_levels_at_once() -> None:
    torch.manual_seed(0)
    config = QuantizerConfig(shared_codebook=True, ema_decay=0.9, threshold_ema_dead_code=0)
    quantizer = ResidualQuantizer((12, 12, 12), 4, config).train()
    vectors = torch.randn(400, 4)
    quantizer.initialize(vectors, seed=0)
    only = quantizer.levels[0]
    assert len(quantizer.levels) == 1
    assert quantizer.codebook_sizes == (12, 12, 12)
    # Deeper levels find entries of their size.
    norms = only.codebook.norm(dim=1)
    assert norms[8:].mean() < 0.7 * norms[:4].mean()
    before = only.codebook.double().clone()
    out = quantizer(vectors[None], torch.ones(1, 400, dtype=torch.bool))
    assert (out.distortion[1:] < out.distortion[:-1]).all()
    quantizer.update_codebook_ema(step=1, seed=0)
    counts, sums = torch.zeros(12, dtype=torch.float64), torch.zeros(12, 4, dtype=torch.float64)
    residual = vectors.double()
    for level in range(3):
        codes = out.codes[0, :, level]
        counts += torch.bincount(codes, minlength=12)
        sums.index_add_(0, codes, residual)
        residual = residual - before[codes]
    expected = (0.9 * before + 0.1 * sums) / (0.9 + 0.1 * counts)[:, None]
    torch.testing.assert_close(only.codebook.double(), expected, atol=1e-5, rtol=1e-4)


# Stochastic codes ---------------------------------------------------------------------------------------


def trained(temperature: float) -> tuple[ResidualQuantizer, Tensor]:
    torch.manual_seed(0)
    vectors = torch.randn(2000, 4, dtype=torch.float64)
    quantizer = ResidualQuantizer((8, 6), 4, QuantizerConfig(code_temperature=temperature)).double().eval()
    quantizer.initialize(vectors.float(), seed=0)
    return quantizer.double(), vectors[None]


def test_sampled_codes_follow_the_soft_assignment_level_by_level() -> None:
    quantizer, latents = trained(temperature=1.0)
    draws = 4000
    numbers = torch.rand(1, draws, 2, dtype=torch.float64)
    codes, targets = quantizer.sample(latents[:, :1].expand(1, draws, 4), numbers, with_soft_targets=True)
    assert targets is not None
    first = quantizer.levels[0]
    distances = (latents[0, :1] - first.codebook).square().sum(1)
    expected = (-distances / quantizer.ema_distortion[0]).softmax(0)
    torch.testing.assert_close(targets[0][0, 0], expected)
    counts = torch.bincount(codes[0, :, 0], minlength=8).double() / draws
    torch.testing.assert_close(counts, expected, atol=0.03, rtol=0)
    assert (counts > 0.02).sum() >= 2
    # The second level works on what the drawn first code left over.
    for code in codes[0, :, 0].unique():
        at = codes[0, :, 0] == code
        left = latents[0, 0] - first.codebook[code]
        second = quantizer.levels[1]
        shares = (-(left - second.codebook).square().sum(1) / quantizer.ema_distortion[1]).softmax(0)
        torch.testing.assert_close(targets[1][0, at], shares.expand(int(at.sum()), 6))


def test_cold_samples_are_the_nearest_codes_and_no_draw_is_out_of_range() -> None:
    quantizer, latents = trained(temperature=1e-6)
    numbers = torch.rand(1, latents.shape[1], 2, dtype=torch.float64)
    mask = torch.ones(latents.shape[:2], dtype=torch.bool)
    codes, nothing = quantizer.sample(latents, numbers)
    assert nothing is None
    assert torch.equal(codes, quantizer(latents, mask).codes)
    hot, latents = trained(temperature=1e6)
    for edge in (1e-9, 1 - 1e-9):
        codes, _ = hot.sample(latents, torch.full_like(numbers, edge))
        assert codes.unique(dim=1).tolist() == [[[0, 0] if edge < 0.5 else [7, 5]]]


def test_encoding_with_samples_is_a_function_of_its_generator(make_codec: MakeCodec, tokens: Tokens) -> None:
    codec, ids = make_codec(quantizer={"code_temperature": 2.0}), tokens(2, 32)
    draws = [
        codec.encode(ids, sample=True, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], codec.encode(ids))


# Architecture -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_reference_resampling_overlaps_and_keeps_the_shapes(
    make_codec: MakeCodec, tokens: Tokens, factor: int
) -> None:
    codec = make_codec(resample="reference", compression_factor=factor)
    ids = tokens(1, 8 * factor)
    codes = codec.encode(ids)
    assert codes.shape == (1, 8, 3)
    assert codec.decode(codes).shape == (1, 8 * factor, 97)
    later = ids.clone()
    later[0, -1] = 2 + (ids[0, -1] - 1) % 95
    # The future shows in earlier latents, which is why nothing is generated with them.
    with torch.no_grad():
        latents = [codec.encoder(x, torch.ones_like(x)) for x in (ids, later)]
    assert not torch.equal(latents[0][:, 0], latents[1][:, 0])


def test_reference_refinement_looks_both_ways_inside_the_document(make_codec: MakeCodec, pack: Any) -> None:
    # With K = 1 nothing overlaps, so that what crosses places is refinement alone.
    codec = make_codec(resample="reference", compression_factor=1)
    first, second = list(range(2, 10)), list(range(20, 28))
    both = pack([[(first, 0), (second, 0)]], length=16, compression_factor=1)
    other = pack([[(first, 0), ([*second[:-1], 50], 0)]], length=16, compression_factor=1)
    with torch.no_grad():
        latents = [codec.encoder(p.input_ids, p.document_ids) for p in (both, other)]
    torch.testing.assert_close(latents[0][:, :8], latents[1][:, :8])
    assert not torch.allclose(latents[0][:, 8], latents[1][:, 8])
    codes = codec.encode(both.input_ids, document_ids=both.document_ids)
    changed = codes.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 16
    logits = [codec.decode(c, both.document_ids) for c in (codes, changed)]
    torch.testing.assert_close(logits[0][:, :8], logits[1][:, :8])
    assert not torch.allclose(logits[0][:, 8], logits[1][:, 8])


@pytest.mark.parametrize(
    "quantizer", [FSQ["quantizer"], {"shared_codebook": True}, {}], ids=["fsq", "shared", "ema"]
)
def test_the_scale_of_stochastic_codes_is_that_of_their_level(quantizer: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = QuantizerConfig.model_validate(quantizer)
    model = ResidualQuantizer((16,) * 4, 3, config).train()
    latents = model.bound(torch.randn(1, 3000, 3))
    model.initialize(latents[0], seed=0)
    mask = torch.ones(latents.shape[:2], dtype=torch.bool)
    started = model.ema_distortion.clone()
    out = model(latents, mask)
    model.update_codebook_ema(step=1, seed=0)
    for level in range(4):
        mean = float(out.distortion[level]) / 3000
        assert 0.2 < float(started[level]) / mean < 5  # of the few vectors that k-means was fitted to
        expected = float(started[level]) + 0.01 * (mean - float(started[level]))
        assert float(model.ema_distortion[level]) == pytest.approx(expected, rel=1e-4)
    numbers = torch.rand(1, 3000, 4)
    codes, _ = model.eval().sample(latents, numbers)
    agreement = [float((codes[..., i] == out.codes[..., i]).float().mean()) for i in range(1)]
    assert 0.2 < agreement[0] < 0.99
    # Drawn codes still code: the deepest level leaves less than the first.
    left = [(latents - model.embed(codes[..., : i + 1])).square().sum(-1).mean() for i in (0, 3)]
    assert left[1] < 0.7 * left[0]


def test_context_free_codes_depend_on_their_chunk_alone(make_codec: MakeCodec, packed: Any) -> None:
    codec = make_codec(encoder_context="chunk")
    codes = codec.encode(packed.input_ids, document_ids=packed.document_ids)
    for chunk in range(8):
        part = slice(4 * chunk, 4 * chunk + 4)
        alone = codec.encode(packed.input_ids[:, part], document_ids=packed.document_ids[:, part])
        real = packed.document_ids[:, part].amax(1) > 0
        assert torch.equal(alone[real, 0], codes[real, chunk])


def test_a_shared_backbone_is_one_set_of_weights(
    make_codec: MakeCodec, make_base_lm: Callable[..., BaseLM], tmp_path: Path
) -> None:
    separate, shared = make_codec(), make_codec(backbone={"shared": True})
    backbone = sum(p.numel() for p in separate.decoder.backbone.parameters())
    head = separate.decoder.head.weight.numel()
    count = {codec: sum(p.numel() for p in codec.parameters()) for codec in (separate, shared)}
    assert count[separate] - count[shared] == backbone + head  # tied embeddings serve as head
    assert shared.decoder.backbone is shared.encoder.backbone
    assert not any(name.startswith("decoder.backbone") for name in shared.state_dict())
    lm = make_base_lm(torch.float32)
    lm.save_pretrained(tmp_path)
    shared.load_backbone(str(tmp_path))
    for name, parameter in shared.decoder.backbone.named_parameters():
        assert torch.equal(parameter.float(), lm.lm.model.get_parameter(name)), name
    assert torch.equal(shared.decoder.head.weight.float(), lm.lm.lm_head.weight)
    listed = [id(p) for p in shared.backbone_parameters()]
    assert len(listed) == len(set(listed)) == len(list(shared.encoder.backbone.parameters()))


@pytest.mark.parametrize("decoder", ["random", "none"])
def test_only_the_encoder_starts_from_pretrained_weights(
    make_codec: MakeCodec, make_base_lm: Callable[..., BaseLM], tmp_path: Path, decoder: str
) -> None:
    codec = make_codec(backbone={"decoder": decoder})
    make_base_lm(torch.float32).save_pretrained(tmp_path)
    before = state_of(codec)
    codec.load_backbone(str(tmp_path))
    for name, tensor in codec.state_dict().items():
        assert torch.equal(tensor, before[name]) == (
            not name.startswith("encoder.backbone") or "norm" in name
        ), name
    assert {id(p) for p in codec.backbone_parameters()} == {
        id(p) for p in codec.encoder.backbone.parameters()
    }
    assert (codec.decoder.backbone is None) == (decoder == "none")


# Configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantizer": {"method": "fsq"}}, "fsq_levels: needed with method fsq"),
        ({"quantizer": {"fsq_levels": (4, 4)}}, "fsq_levels: needed with method fsq, and only there"),
        ({"quantizer": {"method": "fsq", "fsq_levels": (4, 1)}}, "at least 2 values"),
        (FSQ | {"codebook_dim": 4}, "lists 3 dimensions, codebook_dim is 4"),
        (FSQ | {"codebook_size": 32}, "their product is 16, codebook_size is 32"),
        (
            {"quantizer": {"method": "fsq", "fsq_levels": (4, 4), "shared_codebook": True}},
            "differ in scale by level",
        ),
        (
            {"quantizer": {"shared_codebook": True}, "codebook_size": (16, 16, 8)},
            r"one codebook has one size, not \[8, 16\]",
        ),
        (
            {"quantizer": {"shared_codebook": True}, "codebook_size": 2},
            "2 entries do not go round 3 levels",
        ),
        ({"resample": "reference", "encoder_context": "chunk"}, "encoder_context: chunk is not alone"),
        ({"resample": "reference", "compression_factor": 6}, "compression_factor=6 must be a power of 2"),
        ({"backbone": {"shared": True, "decoder": "none"}}, "shared: true needs decoder: same"),
        (
            {"model": "identity", "codebook_levels": 3},
            "codebook_levels 4 and codebook_size 98; leave them out",
        ),
    ],
)
def test_impossible_settings_are_clear_errors(
    make_codec_config: MakeConfig, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_codec_config(**changes)


def test_the_gradient_of_a_tied_head_is_that_of_both_uses(make_codec: MakeCodec, tokens: Tokens) -> None:
    codec, ids = make_codec(backbone={"shared": True}).train(), tokens(2, 16)
    codec(ids).reconstruction_loss.backward()
    tied = codec.encoder.backbone.get_input_embeddings().weight.grad.clone()
    loose = make_codec(backbone={"shared": True}).train()
    loose.decoder.head.weight = torch.nn.Parameter(loose.decoder.head.weight.detach().clone())
    loose(ids).reconstruction_loss.backward()
    both = loose.encoder.backbone.get_input_embeddings().weight.grad + loose.decoder.head.weight.grad
    torch.testing.assert_close(tied, both)
    assert F.cosine_similarity(tied.flatten(), loose.decoder.head.weight.grad.flatten(), dim=0) < 0.999
