"""Stochastic and importance-weighted bounds against sums over all code sequences, worked out here by themselves."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from rqvae import FlatTransformer, RQTransformer, importance_bound, latent_bound, stochastic_bound
from rqvae.randomness import sample_seeds

Make = Callable[..., Any]
TEXT = (91, 94)
TEMPERATURE = 0.7


class Toy(NamedTuple):
    """One text of two latents, 3 codes each: 9 code sequences, and everything the bounds are made of."""

    codec: Any
    latent_model: Any
    q: np.ndarray
    """[2, 3] q(code) at both positions."""
    prior: np.ndarray
    """[3, 3] -log p(c1), and [c1, c2] -log p(c1, c2) in `joint`."""
    joint: np.ndarray
    token_1: np.ndarray
    """[3] -log p(x1 | c1)."""
    token_2: np.ndarray
    """[3, 3] -log p(x2 | c1, c2)."""

    @property
    def exact(self) -> float:
        return -float(np.log(np.exp(-(self.joint + self.token_1[:, None] + self.token_2)).sum()))

    @property
    def weight_1(self) -> np.ndarray:
        return np.exp(-self.prior - self.token_1) / self.q[0]

    @property
    def weight_2(self) -> np.ndarray:
        return np.exp(-(self.joint - self.prior[:, None]) - self.token_2) / self.q[1]


@pytest.fixture(params=["codes", "tokens", "flat"])
def toy(request: pytest.FixtureRequest, make_codec: Make, make_latent_model: Make) -> Toy:
    shape = {"compression_factor": 1, "codebook_levels": 1, "codebook_size": 3}
    codec = make_codec(**shape, seed=3, quantizer={"code_temperature": TEMPERATURE})
    reads = {"spatial_input": "tokens", "vocab_size": 97} if request.param == "tokens" else {}
    model_class = FlatTransformer if request.param == "flat" else RQTransformer
    model = make_latent_model(model_class, **shape, **reads)
    text = torch.tensor([TEXT])
    sequences = torch.tensor(list(itertools.product(range(3), repeat=2)))[..., None]
    texts = text.expand(9, -1)
    with torch.no_grad():
        nats = model(sequences, texts if reads else None).nats.double().view(3, 3, 2).numpy()
        log_p = codec.decode(sequences).log_softmax(-1)
        tokens = -torch.stack([log_p[:, i, TEXT[i]] for i in range(2)], 1).view(3, 3, 2).numpy()
        latents = codec.encoder(text, torch.ones_like(text))[0]
        quantizer = codec.quantizer.level(0)
        squared = torch.cdist(latents, quantizer.codebook).square()
        q = (-squared / (TEMPERATURE * codec.quantizer.ema_distortion[0])).softmax(-1).numpy()
    return Toy(codec, model, q, nats[:, 0, 0], nats.sum(-1), tokens[:, 0, 0], tokens[..., 1])


def many(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The text, `count` times, with different draws."""
    ids = torch.tensor([TEXT]).expand(count, -1).contiguous()
    return ids, torch.ones_like(ids), sample_seeds(5, 0, torch.arange(count))


def test_all_code_sequences_together_are_the_likelihood(toy: Toy) -> None:
    ids, documents, _ = many(1)
    bound = latent_bound(toy.codec, toy.latent_model, ids, documents)
    total = float(bound.code_nats.sum() + bound.token_nats.sum())
    first, second = bound.codes[0, :, 0].tolist()
    each = toy.joint + toy.token_1[:, None] + toy.token_2
    assert total == pytest.approx(each[first, second], abs=1e-5)
    assert total > toy.exact
    # Importance sampling gives the likelihood on average, for any q.
    paths = toy.q[0][:, None] * toy.q[1]
    estimate = (paths * toy.weight_1[:, None] * toy.weight_2).sum()
    assert -np.log(estimate) == pytest.approx(toy.exact, abs=1e-5)


def test_stochastic_bound_is_the_expectation_over_all_codes(toy: Toy) -> None:
    ids, documents, seeds = many(256)
    bound = stochastic_bound(toy.codec, toy.latent_model, ids, documents, seeds)
    totals = (bound.code_nats.sum((1, 2)) + bound.token_nats.sum(1)).double().numpy()
    paths = bound.codes[..., 0].numpy()
    found = {tuple(path): total for path, total in zip(paths.tolist(), totals, strict=True)}
    assert len(found) == 9  # every path has been drawn, so that the expectation can be formed exactly
    expectation = sum(toy.q[0, a] * toy.q[1, b] * total for (a, b), total in found.items())
    log_ratio = np.log(toy.q[0])[:, None] + np.log(toy.q[1])
    wanted = (
        toy.q[0][:, None] * toy.q[1] * (log_ratio + toy.joint + toy.token_1[:, None] + toy.token_2)
    ).sum()
    assert expectation == pytest.approx(wanted, abs=1e-5)
    assert wanted > toy.exact
    share = (paths[:, 0] == 0).mean()
    assert share == pytest.approx(toy.q[0, 0], abs=4 * 0.5 / 16)


def ancestor_pairs(share: float) -> list[tuple[tuple[int, int], float]]:
    """Systematic resampling of two particles, the first of weight `share`: pairs and their probabilities."""
    if share >= 0.5:
        both = 2 * share - 1
        return [((0, 0), both), ((0, 1), 1 - both)]
    both = 1 - 2 * share
    return [((1, 1), both), ((0, 1), 1 - both)]


def two_particles(toy: Toy) -> list[tuple[float, float]]:
    """All outcomes of S = 2: probability and -log estimate."""
    outcomes = []
    for first in itertools.product(range(3), repeat=2):
        weights = toy.weight_1[list(first)]
        for ancestors, chance in ancestor_pairs(weights[0] / weights.sum()):
            for second in itertools.product(range(3), repeat=2):
                past = [first[a] for a in ancestors]
                estimate = weights.mean() * np.mean(
                    [toy.weight_2[p, c] for p, c in zip(past, second, strict=True)]
                )
                probability = toy.q[0][list(first)].prod() * chance * toy.q[1][list(second)].prod()
                outcomes.append((probability, -np.log(estimate)))
    return outcomes


def test_importance_bound_falls_with_the_particles_and_stays_a_bound(toy: Toy) -> None:
    ids, documents, seeds = many(1024)
    means = {}
    for count in (1, 2, 8):
        nats = importance_bound(toy.codec, toy.latent_model, ids, documents, seeds, count).numpy()
        means[count] = nats.mean()
        error = nats.std() / 32
        if count == 1:
            outcomes = [
                (toy.q[0, a] * toy.q[1, b], -np.log(toy.weight_1[a] * toy.weight_2[a, b]))
                for a, b in itertools.product(range(3), repeat=2)
            ]
        elif count == 2:
            outcomes = two_particles(toy)
        else:
            continue
        probabilities, values = map(np.array, zip(*outcomes, strict=True))
        assert (probabilities * np.exp(-values)).sum() == pytest.approx(np.exp(-toy.exact), rel=1e-5)
        # What comes out is one of the values that can come out, and the mean is the expectation.
        assert np.abs(nats[:128, None] - values).min(1).max() < 1e-5
        expectation = (probabilities * values).sum()
        assert nats.mean() == pytest.approx(expectation, abs=5 * error)
        assert expectation > toy.exact
    assert means[1] > means[2] > means[8] > toy.exact - 1e-5
    assert means[8] - toy.exact < (means[1] - toy.exact) / 2


def test_importance_bound_does_not_depend_on_the_batch(
    make_codec: Make, make_latent_model: Make, pack: Make, tokens: Make
) -> None:
    codec, model = make_codec(), make_latent_model(spatial_input="both", vocab_size=97)
    documents = [(tokens(9, seed=1).tolist(), 3), (tokens(14, seed=2).tolist(), 0)]
    seeds = sample_seeds(0, 0, torch.arange(2))
    together = importance_bound(codec, model, *pack([[d] for d in documents], length=16), seeds, 3)
    for i, document in enumerate(documents):
        alone = importance_bound(codec, model, *pack([[document]], length=24), seeds[i : i + 1], 3)
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)
    # With a q that is certain, it is the plain bound.
    packed = pack([[d] for d in documents], length=16)
    certain = importance_bound(codec, model, *packed, seeds, 3, temperature=1e-9)
    bound = latent_bound(codec, model, *packed)
    plain = bound.code_nats.double().sum((1, 2)) + bound.token_nats.double().sum(1)
    torch.testing.assert_close(certain, plain, atol=1e-5, rtol=1e-5)


def test_stochastic_bound_counts_no_padding_and_no_neighbour(
    make_codec: Make, make_latent_model: Make, packed: Any
) -> None:
    codec, model = make_codec(), make_latent_model()
    seeds = sample_seeds(0, 0, torch.arange(3))
    bound = stochastic_bound(codec, model, *packed, seeds)
    real = packed.document_ids > 0
    assert not bound.token_nats[~real].any()
    assert not bound.code_nats[~real.view(3, 8, 4).any(-1)].any()
    assert (bound.code_nats >= -1e-6).all()
    assert (bound.distortion > 0).all()
    row = stochastic_bound(codec, model, packed.input_ids[1:2], packed.document_ids[1:2], seeds[1:2])
    torch.testing.assert_close(row.code_nats[0], bound.code_nats[1], atol=1e-5, rtol=1e-5)


def test_refusals(make_codec: Make, make_latent_model: Make, packed: Any) -> None:
    codec, model = make_codec(), make_latent_model()
    seeds = sample_seeds(0, 0, torch.arange(3))
    with pytest.raises(ValueError, match="one document per row"):
        importance_bound(codec, model, *packed, seeds, 2)
    with pytest.raises(ValueError, match="not at least 1"):
        importance_bound(codec, model, *packed, seeds, 0)
