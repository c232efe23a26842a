"""Draws from logits, and the numbers they are made with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rqvae.generation_options import DrawSettings, GenerationOptions
from rqvae.sampling import draw, keyed_numbers

LOGITS = torch.tensor([0.0, 1.0, 2.0, -1.0])


def shares_of(settings: DrawSettings, logits: torch.Tensor = LOGITS) -> torch.Tensor:
    numbers = keyed_numbers(3, torch.arange(20000), 1, 1).flatten()
    draws = draw(logits.expand(20000, -1), numbers, settings)
    return torch.bincount(draws, minlength=len(logits)) / 20000


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(0)
    torch.testing.assert_close(shares_of(DrawSettings(temperature)), expected, atol=0.015, rtol=0)


def test_temperature_0_and_top_k_1_take_the_most_likely() -> None:
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    numbers = keyed_numbers(0, torch.arange(50), 1, 1).flatten()
    assert torch.equal(draw(logits, None, DrawSettings()), logits.argmax(1))
    assert torch.equal(draw(logits, numbers, DrawSettings(5.0, top_k=1)), logits.argmax(1))
    assert not torch.equal(draw(logits, numbers, DrawSettings(5.0, top_k=2)), logits.argmax(1))


def test_top_k_and_top_p_leave_the_rest_out() -> None:
    # Shares 0.087, 0.237, 0.644, 0.032.
    for settings, kept in (
        (DrawSettings(1.0, top_k=2), [1, 2]),
        (DrawSettings(1.0, top_k=4), [0, 1, 2, 3]),
        (DrawSettings(1.0, top_k=99), [0, 1, 2, 3]),
        (DrawSettings(1.0, top_p=0.6), [2]),
        (DrawSettings(1.0, top_p=0.65), [1, 2]),
        (DrawSettings(1.0, top_p=0.9), [0, 1, 2]),
        (DrawSettings(1.0, top_p=1e-6), [2]),
        (DrawSettings(1.0, top_k=3, top_p=0.9), [1, 2]),  # of what top_k leaves: 0.090, 0.245, 0.665
    ):
        expected = torch.zeros(4)
        expected[kept] = LOGITS[kept].softmax(0)
        torch.testing.assert_close(shares_of(settings), expected, atol=0.015, rtol=0)


def test_entries_as_likely_as_the_last_one_take_part() -> None:
    shares = shares_of(DrawSettings(1.0, top_k=2), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(shares, torch.tensor([1.0, 0.0, 1.0, 1.0]) / 3, atol=0.015, rtol=0)


def test_numbers_at_the_ends_choose_entries_that_take_part() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    for number, expected in ((2.0**-53, 1), (1 - 2.0**-53, 2)):
        chosen = draw(logits, torch.tensor([number], dtype=torch.float64), DrawSettings(1.0))
        assert chosen.tolist() == [expected]


def test_numbers_belong_to_key_position_and_index() -> None:
    keys = torch.tensor([5, 0, 7])
    numbers = keyed_numbers(1, keys, 6, 4)
    assert numbers.shape == (3, 6, 4) and numbers.dtype == torch.float64
    assert numbers.unique().numel() == numbers.numel()
    assert torch.equal(keyed_numbers(1, keys[[2, 0]], 3, 2), numbers[[2, 0], :3, :2])
    assert not torch.equal(keyed_numbers(2, keys, 6, 4), numbers)


def test_lists_are_by_level() -> None:
    options = GenerationOptions(temperature=[1.0, 0.5, 0.0], top_k=(3, 2, 1), top_p=0.9)
    assert options.by_level(3) == [
        DrawSettings(1.0, 3, 0.9),
        DrawSettings(0.5, 2, 0.9),
        DrawSettings(0.0, 1, 0.9),
    ]
    assert options.of_tokens(3) == DrawSettings(0.0, 1, 0.9)
    assert GenerationOptions(temperature=1.0).of_tokens(3) == DrawSettings(1.0)
    assert GenerationOptions(temperature=1.0, token_temperature=0.0).of_tokens(3) == DrawSettings(0.0)
    with pytest.raises(
        ValueError, match=r"temperature: lists 3 values for 4 levels; give one, or one for every"
    ):
        options.by_level(4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: 0 is not at least 1"),
        ({"temperature": -1.0}, "temperature, token_temperature: must be finite, and 0 or more"),
        ({"temperature": [0.5, math.nan]}, "temperature, token_temperature: must be finite"),
        ({"token_temperature": -0.1}, "token_temperature: must be finite"),
        ({"top_k": -1}, "top_k: must be whole numbers"),
        ({"top_k": [2, 0.5]}, "top_k: must be whole numbers"),
        ({"top_p": 0.0}, "top_p: must be above 0, and at most 1"),
        ({"top_p": [1.0, 1.1]}, "top_p: must be above 0"),
        ({"mode": "fast"}, "mode: 'fast' is not one of auto, deferred, streaming"),
        ({"stop": "ab"}, "stop: give a list of strings"),
        ({"stop": ["a", ""]}, "stop: give a list of strings, none of them empty"),
        ({"min_new_tokens": 65}, "min_new_tokens: 65 is not between 0 and max_new_tokens=64"),
        ({"best_of": 0}, "best_of: 0 is not at least 1"),
        ({"best_of": 2}, "best_of: at temperature 0 all candidates are the same"),
        ({"num_levels": 0}, "num_levels: 0 is not at least 1"),
        ({"decode_rows": 0}, "decode_rows: 0 is not at least 1"),
        ({"decode_block": 4, "mode": "streaming"}, "decode_block: mode streaming decodes every latent"),
    ],
)
def test_bad_options_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**options)
