"""Quality by prompt length, on stand-ins whose answer is known."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from launch import prompt_lengths
from launch.prompt_lengths import by_prompt_length, long_documents
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
            {"kind": "identity", "compression_factor": 4, "backbone": {"architecture": ARCHITECTURE}}
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
    rows = np.array([row["nats_per_token"] for row in result["rows"]])
    line = np.polyval(np.polyfit(range(16), rows, 1), range(16))
    assert np.allclose(excess, (rows - line).reshape(4, 4).mean(0))


def test_a_model_that_minds_the_phase_is_found_out(models: tuple[IdentityCodec, RQTransformer]) -> None:
    codec, model = models
    # The code for "no token" in the first place pushes every later prediction off.
    with torch.no_grad():
        model.spatial.embedding.table.weight[40] = 30.0
    phases = by_prompt_length(codec, model, Documents([[60, 60], [60]]), torch.device("cpu"))["phases"]  # type: ignore[arg-type]
    by_phase = {row["length_modulo"]: row for row in phases}
    assert abs(by_phase[0]["excess_nats_per_token"]) > 5 * by_phase[0]["standard_error"]


def test_no_long_documents_no_rows(models: tuple[IdentityCodec, RQTransformer]) -> None:
    assert by_prompt_length(*models, Documents([[10]]), torch.device("cpu")) == {}  # type: ignore[arg-type]
