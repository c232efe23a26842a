"""Random numbers keyed by seed, step and sample."""

from __future__ import annotations

import pytest
import torch

from rqvae.randomness import normal, sample_seeds, uniform

INDEX = torch.arange(64)


def test_numbers_belong_to_the_sample_not_to_its_batch() -> None:
    seeds = sample_seeds(3, 17, INDEX)
    whole = uniform(seeds, 0, 5, 7)
    assert whole.shape == (64, 5, 7)
    assert torch.equal(uniform(sample_seeds(3, 17, INDEX[40:43]), 0, 5, 7), whole[40:43])


@pytest.mark.parametrize("other", [(4, 17, 0), (3, 18, 0), (3, 17, 1)])
def test_another_seed_step_or_purpose_gives_other_numbers(other: tuple[int, int, int]) -> None:
    seed, step, purpose = other
    first = uniform(sample_seeds(3, 17, INDEX), 0, 100)
    second = uniform(sample_seeds(seed, step, INDEX), purpose, 100)
    assert (first == second).float().mean() < 1e-3
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
    assert abs(correlation) < 0.05


def test_seeds_of_neighbouring_steps_and_samples_do_not_meet() -> None:
    seeds = torch.cat([sample_seeds(seed, step, INDEX) for seed in range(8) for step in range(50)])
    assert len(seeds.unique()) == len(seeds)


def test_uniform_numbers_are_uniform_and_independent() -> None:
    numbers = uniform(sample_seeds(0, 0, torch.arange(200)), 0, 1000)
    assert numbers.min() > 0 and numbers.max() < 1
    counts = torch.histc(numbers, 20, 0, 1)
    expected = numbers.numel() / 20
    # Chi-squared with 19 degrees of freedom exceeds 43.8 once in a thousand.
    assert float(((counts - expected) ** 2 / expected).sum()) < 43.8
    for a, b in ((numbers[:, :-1], numbers[:, 1:]), (numbers[:-1], numbers[1:])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.01


def test_normal_numbers_have_the_right_moments() -> None:
    numbers = normal(sample_seeds(0, 0, torch.arange(200)), 0, 1000)
    assert abs(numbers.mean()) < 0.01
    assert abs(numbers.std() - 1) < 0.01
    assert abs((numbers**4).mean() - 3) < 0.1
    assert (numbers.abs() > 1.96).float().mean() == pytest.approx(0.05, abs=0.003)
