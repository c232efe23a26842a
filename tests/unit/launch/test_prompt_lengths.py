"""Quality by prompt length, on stand-ins whose answer is known."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from launch import prompt_lengths
from launch.prompt_lengths import by_prompt_length, long_documents, phase_effects
from rqvae import IdentityCodec, RQTransformer, RQTransformerConfig, RQVAEConfig

ARCHITECTURE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


class Documents:
    """Samples in memory: document `n` of sample `i` holds the tokens [i, n, 0, 1, 2, ...]."""

    def __init__(self, lengths: list[list[int]]):
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, indices: list[int]) -> dict[str, Tensor]:
        (index,) = indices
        ids = [
            [index, n, *(i % 30 for i in range(length - 2))]
            for n, length in enumerate(self.lengths[index], 1)
        ]
        documents = [[n] * length for n, length in enumerate(self.lengths[index], 1)]
        return {
            "input_ids": torch.tensor([list(itertools.chain(*ids))]),
            "document_ids": torch.tensor([list(itertools.chain(*documents))]),
        }


def test_long_documents_are_the_first_ones_and_cut() -> None:
    found = long_documents(Documents([[9, 5], [3, 12, 8], [20]]), 8, 3)  # type: ignore[arg-type]
    assert found[:, :2].tolist() == [[0, 1], [1, 2], [1, 3]]
    assert found.shape == (3, 8)
    assert long_documents(Documents([[4]]), 8, 3).shape == (0, 8)  # type: ignore[arg-type]


@pytest.fixture
def models() -> tuple[IdentityCodec, RQTransformer]:
    torch.manual_seed(0)
    codec = IdentityCodec(
        RQVAEConfig.model_validate(
            {"model": "identity", "compression_factor": 4, "backbone": {"architecture": ARCHITECTURE}}
        )
    )
    config = RQTransformerConfig(
        compression_factor=4,
        codebook_levels=4,
        codebook_size=41,
        spatial_dim=32,
        spatial_layers=1,
        depth_dim=32,
        depth_layers=1,
        head_dim=32,
    )
    return codec, RQTransformer(config).eval()


def test_every_length_scores_the_same_continuation(
    models: tuple[IdentityCodec, RQTransformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset: Any = Documents([[40, 48], [50]])
    seen = []
    real_bound = prompt_lengths.latent_bound

    def watch(codec: Any, model: Any, ids: Tensor, documents: Tensor) -> Any:
        seen.append((ids, documents))
        return real_bound(codec, model, ids, documents)

    monkeypatch.setattr(prompt_lengths, "latent_bound", watch)
    result = by_prompt_length(*models, dataset, torch.device("cpu"))
    assert result["documents"] == 2  # 48 tokens are needed
    assert [row["length"] for row in result["rows"]] == list(range(1, 17))
    for length, (ids, documents) in enumerate(seen, 1):
        assert ids.shape[1] % 4 == 0
        assert documents.sum(1).tolist() == [length + 32] * 2
        assert torch.equal(ids[:, -32:], seen[0][0][:, -32:])
        assert (documents[:, : -(length + 32)] == 0).all()
    assert [row["length_modulo"] for row in result["phases"]] == [1, 2, 3, 0]
    excess = [row["excess_nats_per_token"] for row in result["phases"]]
    assert np.isclose(sum(excess), 0)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_what_context_does_is_not_taken_for_the_phase(factor: int) -> None:
    lengths = np.arange(1, 4 * factor + 1)[:, None]
    slopes = np.random.default_rng(0).uniform(0.5, 2, size=(1, 20))
    for curve in (3 + 0 * lengths, 3 - 0.1 * lengths, 3 + 1 / lengths, 3 - np.log(lengths)):
        effects = phase_effects(curve * slopes, factor)
        assert effects.shape == (factor, 20)
        assert np.allclose(effects, 0, atol=1e-9)


def test_a_phase_that_matters_is_found() -> None:
    lengths = np.arange(1, 17)[:, None]
    nats = 3 + 1 / lengths + 0.2 * (lengths % 4 == 1) + np.zeros((1, 5))
    assert np.allclose(phase_effects(nats, 4), np.array([[0.15], [-0.05], [-0.05], [-0.05]]))


def test_no_long_documents_no_rows(models: tuple[IdentityCodec, RQTransformer]) -> None:
    assert by_prompt_length(*models, Documents([[10]]), torch.device("cpu")) == {}  # type: ignore[arg-type]
