"""The statistics of an evaluation, each against a case that can be worked out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from launch.brier import LENGTH, brier_lm, brier_terms
from launch.codebook_report import mutual_information, suggest_sizes
from launch.compute_report import compute_report
from launch.intervals import bootstrap
from launch.ranks import Ranks
from launch.sample_quality import distinct, repetition
from launch.sampling import until_end
from rqvae.calibration import TEMPERATURES, OtherTemperatures, best_temperature
from rqvae.linear_head import LinearHead

EOS = 1


def test_brier_terms_are_unbiased() -> None:
    """Two tokens with independent draws: the mean over all pairs of samples is 2 P(y) - sum of P(x)^2."""
    shares = {5: 0.5, 6: 0.3, 7: 0.2}
    grams = {(*pair, 8, 9): shares[pair[0]] * shares[pair[1]] for pair in itertools.product(shares, repeat=2)}
    target = (6, 5, 8, 9)
    expectation = np.zeros(LENGTH)
    for first, second in itertools.product(grams, repeat=2):
        terms = brier_terms([target], [first], [second], EOS)[0]
        expectation += grams[first] * grams[second] * terms
    of_one = 2 * shares[6] - sum(p**2 for p in shares.values())
    of_two = 2 * grams[target] - sum(p**2 for p in grams.values())
    np.testing.assert_allclose(expectation, [of_one, of_two, of_two, of_two], atol=1e-12)


def test_nothing_counts_behind_an_end_of_text() -> None:
    target, first, second = [3, EOS, 0, 0], [3, EOS, 7, 8], [3, EOS, 9]
    np.testing.assert_array_equal(brier_terms([target], [first], [second], EOS), [[1, 1, 1, 1]])
    assert until_end([3, EOS, 7], EOS) == [3, EOS]
    np.testing.assert_array_equal(
        brier_terms([[3, 4, 5, 6]], [[3, 4, 5, 7]], [[3, 9, 5, 6]], EOS), [[1, 1, 1, 1 - 1]]
    )


def test_brier_lm_is_a_geometric_mean_and_not_below_zero() -> None:
    assert brier_lm(np.array([0.4, 0.2, 0.1, 0.05])) == pytest.approx(100 * (0.4 * 0.2 * 0.1 * 0.05) ** 0.25)
    assert brier_lm(np.array([0.4, 0.2, 0.1, -0.05])) == 0


def test_mutual_information_is_corrected_for_few_samples() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.integers(32, size=(2, 2000))
    independent = mutual_information(np.stack([a, b], 1), (32, 32))
    assert abs(independent[0, 1]) < 0.06  # without the correction about 31 * 31 / 4000 = 0.24
    same = mutual_information(np.stack([a, a // 2], 1), (32, 16))
    assert same[0, 1] == pytest.approx(math.log(16), abs=0.2)
    np.testing.assert_array_equal(same, same.T)


def test_suggested_sizes_keep_the_bits() -> None:
    assert suggest_sizes((256, 256, 256), [1.0, 1.0, 1.0]) == [256, 256, 256]
    sizes = suggest_sizes((256, 256, 256), [1.5, 1.0, 0.8])
    assert sizes == [1024, 256, 64]  # 8 bits each, shared out
    # Gains below 0 ask for the least; the others cannot take more than four times their size.
    assert suggest_sizes((16, 16), [1.0, -1.0]) == [64, 4]


def test_other_temperatures_are_those_of_divided_logits() -> None:
    torch.manual_seed(0)
    head = LinearHead(8, 11)
    hidden, labels = torch.randn(20, 8) * 5, torch.randint(11, (20,))
    weights = torch.ones(20)
    weights[3] = 0
    with OtherTemperatures([head], [[0.5, 2.0]]) as other:
        plain = head(hidden, labels, weights).nats  # type: ignore[union-attr]
        head(hidden)  # logits are nobody's score
        (found,) = other.take()
        assert other.take() == []
    assert len(found) == 2
    for nats, temperature in zip(found, (0.5, 2.0), strict=True):
        wanted = F.cross_entropy(head(hidden) / temperature, labels, reduction="none") * weights
        torch.testing.assert_close(nats, wanted.detach(), atol=1e-5, rtol=1e-5)
    head(hidden, labels, weights)
    assert other.take() == []  # left
    assert not torch.allclose(found[0], plain)


def test_the_right_temperature_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 16, generator=generator) * 3
    labels = torch.multinomial((logits / 2.8).softmax(-1), 1, generator=generator)[:, 0]
    nats = [float(F.cross_entropy(logits / t, labels)) for t in TEMPERATURES]
    assert best_temperature(nats) == pytest.approx(2.8, rel=0.03)
    assert best_temperature([1.0 + i for i in range(len(TEMPERATURES))]) == TEMPERATURES[0]


def test_bootstrap_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(3.0, 1.0, size=400)
    low, high = bootstrap(np.stack([values, np.ones(400)], 1), lambda sums: sums[:, 0] / sums[:, 1])
    mean, error = values.mean(), values.std() / 20
    assert low == pytest.approx(mean - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.25 * error)


def test_variety_and_repetition() -> None:
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4  # (1, 2) three times, (2, 1) once
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 - 4 / 5)
    assert repetition([1, 2]) == 0


def test_ranks_share_everything_once() -> None:
    for size in (1, 2, 5):
        parts = [Ranks(rank, size).share(13) for rank in range(size)]
        assert [i for part in parts for i in part] == list(range(13))


def test_nothing_trained_here_costs_nothing(tmp_path: pytest.TempPathFactory) -> None:
    assert compute_report(tmp_path) == {}  # type: ignore[arg-type]
