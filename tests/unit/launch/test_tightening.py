from __future__ import annotations

from pathlib import Path

import torch

from data_pipeline import TokenDataset, build
from launch.config import load_config
from launch.tightening import single_documents
from tests.integration.conftest import NANO, write_corpus


def test_documents_begin_in_the_first_chunk_on_a_coarser_grid(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text.jsonl", 60)
    overrides = [f"data.directory={tmp_path / 'data'}", f"data.source.paths={tmp_path / 'text.jsonl'}"]
    build(
        load_config(
            NANO, overrides=[*overrides, "data.document_grid=16", "data.tokenizer.vocab_size=280"]
        ).data
    )
    dataset = TokenDataset(tmp_path / "data", "train")
    _, documents = single_documents(dataset, 12, 4, torch.device("cpu"))
    first = documents.argmax(1).tolist()
    assert max(first) < 4 and len(set(first)) > 1
    segments = [row for sample in dataset.read_segments(range(len(dataset))) for row in sample][:12]
    assert documents.sum(1).tolist() == [int(length) for _, _, length, *_ in segments]  # nothing is cut
    assert first == [int(phase) % 4 for _, _, _, phase, *_ in segments]
