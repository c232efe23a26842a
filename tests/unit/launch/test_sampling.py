"""Continuations of an evaluation do not depend on batches or ranks."""

from __future__ import annotations

import pytest
import torch

from launch import sampling
from launch.ranks import Ranks
from launch.sampling import continue_all, continue_with_base_lm
from rqvae import BaseLM
from rqvae.config import ArchitectureConfig
from tests.unit.rqvae.conftest import EOS, VOCAB_SIZE, randomize


@pytest.fixture(scope="module")
def base_lm() -> BaseLM:
    model = BaseLM(
        ArchitectureConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        ),
        EOS,
    )
    randomize(model, 2)
    return model.eval()


def test_draws_belong_to_contexts(base_lm: BaseLM, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = [[5, 6, 7], [8], [9, 10], [8], [], [11, 12, 13, 14]]

    def sampler(part: list[list[int]], keys: list[int], count: int, seed: int) -> list[list[int]]:
        return continue_with_base_lm(base_lm, part, count, seed, keys=keys)

    expected = continue_all(sampler, contexts, 6, 1, Ranks())
    assert [len(tokens) for tokens in expected] == [6] * 6
    assert expected[1] != expected[3]  # the same context, drawn twice
    for batch in (1, 2, 4):
        monkeypatch.setattr(sampling, "BATCH", batch)
        assert continue_all(sampler, contexts, 6, 1, Ranks()) == expected
    assert continue_all(sampler, contexts, 6, 2, Ranks()) != expected
    assert continue_with_base_lm(base_lm, contexts[:1], 6, 1) == expected[:1]


def test_greedy_is_the_most_likely(base_lm: BaseLM) -> None:
    context = [5, 6, 7]
    drawn = continue_with_base_lm(base_lm, [context, [9]], 4, 0, temperature=0.0)[0]
    ids = torch.tensor([[*context, *drawn]])
    assert base_lm(ids, torch.ones_like(ids)).correct[0, 3:].all()
