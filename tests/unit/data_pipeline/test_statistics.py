from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline import TokenDataset
from data_pipeline.statistics import split_statistics


def test_statistics_agree_with_the_samples(built: Path) -> None:
    dataset = TokenDataset(built, "train")
    stats = split_statistics(built, "train")
    batch = dataset.read(range(len(dataset)))
    real = int((batch["document_ids"] > 0).sum())
    assert (stats.samples, stats.real_tokens, stats.documents) == (len(dataset), real, dataset.num_documents)
    assert stats.bytes_per_token == pytest.approx(int(batch["num_bytes"].sum()) / real)
    assert stats.padding_fraction == pytest.approx(1 - real / batch["document_ids"].numel())
    assert sum(stats.length_histogram.values()) == stats.documents
    lower = sum(length * count for length, count in stats.length_histogram.items())
    assert lower <= real < 2 * lower
    assert stats.mean_document_tokens == pytest.approx(real / stats.documents)
    assert stats.segments_per_document > 1


def test_the_padding_of_another_grid_is_the_mean_over_all_phases(built: Path) -> None:
    stats = split_statistics(built, "train")
    dataset = TokenDataset(built, "train")
    lengths: dict[int, int] = {}
    for rows in dataset.read_segments(range(len(dataset))):
        for _, _, length, _, _, document in rows.tolist():
            lengths[document] = lengths.get(document, 0) + length
    for grid in (1, 2, 4, 8, 32):
        positions = [grid * -(-(phase + n) // grid) for n in lengths.values() for phase in range(grid)]
        expected = 1 - sum(lengths.values()) / (sum(positions) / grid)
        assert stats.expected_padding(grid) == pytest.approx(expected)
    # the grid that the shards were built on: the phases that were drawn, and the last sample
    assert stats.padding_fraction == pytest.approx(stats.expected_padding(4), rel=0.1)
