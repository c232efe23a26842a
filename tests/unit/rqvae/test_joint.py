from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rqvae import RQVAEWithPrior, stochastic_bound
from rqvae.encoder import chunk_documents
from rqvae.randomness import sample_seeds

Make = Callable[..., Any]

SEEDS = sample_seeds(0, 0, torch.arange(3))


@pytest.fixture
def pair(make_codec: Make, make_latent_model: Make) -> RQVAEWithPrior:
    return RQVAEWithPrior(make_codec(), make_latent_model())


def test_the_loss_is_the_stochastic_bound(pair: RQVAEWithPrior, packed: Any) -> None:
    out = pair.eval()(packed.input_ids, document_ids=packed.document_ids, seeds=SEEDS)
    bound = stochastic_bound(pair.codec, pair.prior, *packed, SEEDS)
    torch.testing.assert_close(
        out.level_divergences.double(), bound.code_nats.double().sum((0, 1)), atol=1e-4, rtol=1e-5
    )
    torch.testing.assert_close(out.codec.nats.double(), bound.token_nats.double(), atol=1e-5, rtol=1e-5)
    tokens = (packed.document_ids > 0).sum()
    expected = (bound.code_nats.double().sum() + bound.token_nats.double().sum()) / tokens
    commitment = pair.codec.config.quantizer.commitment_weight * out.codec.commitment_loss
    torch.testing.assert_close(out.loss.double(), expected + commitment, atol=1e-4, rtol=1e-5)
    assert torch.equal(out.codec.codes, bound.codes)


def test_the_rate_alone_moves_the_encoder_and_the_prior(pair: RQVAEWithPrior, packed: Any) -> None:
    pair.eval()(packed.input_ids, document_ids=packed.document_ids, seeds=SEEDS).codec.rate_loss.backward()
    reached = {name for name, p in pair.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert any(name.startswith("codec.encoder") for name in reached)
    assert any(name.startswith("prior.depth") for name in reached)
    assert any(name.startswith("prior.spatial") for name in reached)
    assert not any(name.startswith("codec.decoder") for name in reached)


def test_the_slope_of_the_rate_in_the_latents_is_that_of_finite_differences(
    pair: RQVAEWithPrior, packed: Any
) -> None:
    """Of the first level: what later levels code moves with the draw, whose gradient is copied, not exact."""
    pair = pair.double().eval()
    quantizer, numbers = pair.codec.quantizer, torch.full((1, 1, 3), 0.5, dtype=torch.float64)

    def divergence(latents: torch.Tensor) -> torch.Tensor:
        _, assignments = quantizer.sample(latents, numbers, with_soft_targets=True)
        prior = torch.full_like(assignments[0], 1 / assignments[0].shape[-1])
        return (assignments[0] * (assignments[0].log() - prior.log())).sum()

    latents = torch.randn(1, 1, quantizer.dim, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(divergence, (latents,))


def test_free_nats_are_a_floor_under_every_level(pair: RQVAEWithPrior, packed: Any) -> None:
    arguments: dict[str, Any] = {"document_ids": packed.document_ids, "seeds": SEEDS}
    pair.eval()
    exact = pair(packed.input_ids, **arguments)
    latents = (chunk_documents(packed.document_ids, 4) > 0).sum()
    mean = exact.level_divergences / latents
    floor = float(mean.max()) + 1.0
    lifted = pair(packed.input_ids, **arguments, free_nats=floor)
    tokens = (packed.document_ids > 0).sum()
    torch.testing.assert_close(
        lifted.codec.rate_loss, 3 * floor * latents / tokens, atol=1e-5, rtol=1e-5, check_dtype=False
    )
    assert not lifted.codec.rate_loss.requires_grad or not any(
        bool(g.any())
        for g in torch.autograd.grad(lifted.codec.rate_loss, list(pair.prior.parameters()), allow_unused=True)
        if g is not None
    )
    torch.testing.assert_close(lifted.level_divergences, exact.level_divergences)


def test_without_quantization_there_is_no_rate(pair: RQVAEWithPrior, packed: Any) -> None:
    out = pair.eval()(packed.input_ids, document_ids=packed.document_ids, seeds=SEEDS, quantize=False)
    assert out.codec.codes is None
    assert float(out.codec.rate_loss.detach()) == 0
    assert not out.level_divergences.any()


def test_a_batch_is_its_samples(pair: RQVAEWithPrior, packed: Any) -> None:
    pair.eval()
    whole = pair(packed.input_ids, document_ids=packed.document_ids, seeds=SEEDS)
    parts = [
        pair(ids[None], document_ids=documents[None], seeds=SEEDS[row : row + 1])
        for row, (ids, documents) in enumerate(zip(*packed, strict=True))
    ]
    assert torch.equal(whole.codec.codes, torch.cat([part.codec.codes for part in parts]))
    torch.testing.assert_close(
        whole.level_divergences, sum(part.level_divergences for part in parts), atol=1e-4, rtol=1e-5
    )


def test_codebooks_follow_what_was_drawn(pair: RQVAEWithPrior, packed: Any) -> None:
    pair.train()
    before = [level.codebook.clone() for level in pair.codec.quantizer.levels]
    pair(packed.input_ids, document_ids=packed.document_ids, seeds=SEEDS)
    (_, codes, _) = pair.codec.quantizer._pending[0]
    pair.codec.quantizer.update_codebook_ema(0, 0)
    for level, old in enumerate(before):
        moved = (pair.codec.quantizer.level(level).codebook != old).any(1).nonzero().flatten()
        assert set(codes[:, level].tolist()) <= set(moved.tolist())


def test_a_prior_of_other_codes_is_refused(make_codec: Make, make_latent_model: Make) -> None:
    with pytest.raises(ValueError, match=r"predicts codes of sizes \(32, 32, 32\)"):
        RQVAEWithPrior(make_codec(), make_latent_model(codebook_size=32))


def test_codes_that_see_the_future_bound_nothing_under_a_prior_that_reads_text(
    make_codec: Make, make_latent_model: Make
) -> None:
    prior = make_latent_model(spatial_input="tokens", vocab_size=97)
    with pytest.raises(ValueError, match="is no bound"):
        RQVAEWithPrior(make_codec(resample="reference"), prior)
