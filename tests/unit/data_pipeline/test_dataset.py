from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline import TokenDataset, load_tokenizer
from data_pipeline.errors import (
    CorruptShardError,
    DatasetError,
    EmptySplitError,
    FormatVersionError,
    MissingShardError,
    NotADatasetError,
)
from data_pipeline.manifest import load_manifest


def test_a_batch_is_what_was_packed(built: Path) -> None:
    dataset = TokenDataset(built, "train")
    batch = dataset.read([5, 2])
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
        "input_ids": (torch.int64, (2, 32)),
        "document_ids": (torch.int64, (2, 32)),
        "sample_index": (torch.int64, (2,)),
        "num_bytes": (torch.int64, (2,)),
    }
    assert batch["sample_index"].tolist() == [5, 2]
    for row, segments in enumerate(dataset.read_segments([5, 2])):
        expected = np.zeros(32, dtype=np.int64)
        for number, (_, start, length, *_) in enumerate(segments, start=1):
            expected[start : start + length] = number
        assert batch["document_ids"][row].tolist() == expected.tolist()
        assert batch["num_bytes"][row] == segments[:, 4].sum()
    padding = batch["document_ids"] == 0
    assert (batch["input_ids"][padding] == dataset.pad_token_id).all()


def test_the_whole_text_comes_back(built: Path, documents: list[dict[str, str]]) -> None:
    tokenizer = load_tokenizer(built)
    texts: list[str] = []
    total_bytes = 0
    for split in ("train", "validation", "test"):
        dataset = TokenDataset(built, split)
        batch = dataset.read(range(len(dataset)))
        tokens = batch["input_ids"][batch["document_ids"] > 0].tolist()
        assert len(tokens) == dataset.num_real_tokens
        assert batch["num_bytes"].sum() == dataset.num_bytes
        total_bytes += dataset.num_bytes
        pieces = np.split(np.array(tokens), np.flatnonzero(np.array(tokens) == dataset.eos_token_id) + 1)
        assert len(pieces) - 1 == dataset.num_documents
        texts += [tokenizer.decode(piece[:-1]) for piece in pieces[:-1]]
    assert sorted(texts) == sorted(row["text"] for row in documents)
    assert total_bytes == sum(len(row["text"].encode()) for row in documents)


def test_a_manifest_is_parsed_once_for_all_splits(built: Path, tmp_path: Path) -> None:
    manifest = TokenDataset(built, "train").manifest
    assert TokenDataset(str(built), "validation").manifest is manifest
    shutil.copy(built / "manifest.json", tmp_path)
    assert load_manifest(tmp_path) == manifest
    (tmp_path / "manifest.json").write_text((built / "manifest.json").read_text().replace("train", "trail"))
    with pytest.raises(CorruptShardError, match="does not match its fingerprint"):
        load_manifest(tmp_path)


def test_indices_outside_are_refused(built: Path) -> None:
    dataset = TokenDataset(built, "test")
    for index in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset.read([index])


def test_shard_ranges_cover_the_split(built: Path) -> None:
    dataset = TokenDataset(built, "train")
    ranges = [dataset.shard_range(index) for index in range(len(dataset.shards))]
    assert [i for r in ranges for i in r] == list(range(len(dataset)))


def test_places_that_hold_no_dataset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotADatasetError, match="no such directory; build the token shards first"):
        TokenDataset(tmp_path / "nowhere", "train")
    with pytest.raises(NotADatasetError, match=r"holds no manifest\.json"):
        TokenDataset(tmp_path, "train")
    (tmp_path / "manifest.json").write_text('{"name": "an extension"}')
    with pytest.raises(NotADatasetError, match="not the manifest of token shards"):
        TokenDataset(tmp_path, "train")


def edit(directory: Path, **changes: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_format_version_is_refused(copy: Path) -> None:
    edit(copy, format_version=99)
    with pytest.raises(FormatVersionError, match="format version 99"):
        TokenDataset(copy, "train")


def test_an_edited_manifest_is_refused(copy: Path) -> None:
    edit(copy, sample_length=64)
    with pytest.raises(CorruptShardError, match="does not match its fingerprint"):
        TokenDataset(copy, "train")
    (copy / "manifest.json").write_text('{"format": "rqvae-')
    with pytest.raises(CorruptShardError, match="not readable as JSON"):
        TokenDataset(copy, "train")


def test_an_unknown_split_is_refused(built: Path) -> None:
    with pytest.raises(
        EmptySplitError, match="'training' has no samples; there are: train, validation, test"
    ):
        TokenDataset(built, "training")


def test_a_missing_shard_is_named(copy: Path) -> None:
    (copy / "train/shard-000001.tar").unlink()
    with pytest.raises(MissingShardError, match=r"shard-000001\.tar"):
        TokenDataset(copy, "train")


def test_a_damaged_sample_is_named_and_the_others_are_read(copy: Path) -> None:
    before = TokenDataset(copy, "train").read([0, 1, 250])
    path = copy / "train/shard-000001.tar"
    data = bytearray(path.read_bytes())
    row = before["input_ids"][2].numpy().astype("<u2").tobytes()
    data[data.index(row) + 7] ^= 4
    path.write_bytes(data)
    dataset = TokenDataset(copy, "train")
    with pytest.raises(CorruptShardError, match=r"shard-000001\.tar: sample 50 is damaged: its tokens"):
        dataset.read([0, 250])
    assert torch.equal(dataset.read([0, 1])["input_ids"], before["input_ids"][:2])


def test_swapped_shards_are_noticed(copy: Path) -> None:
    one, other = copy / "train/shard-000000.tar", copy / "train/shard-000001.tar"
    shutil.move(one, copy / "x")
    shutil.move(other, one)
    shutil.move(copy / "x", other)
    dataset = TokenDataset(copy, "train")
    with pytest.raises(CorruptShardError, match="shard-000000"):
        dataset.read([0])


def test_all_errors_are_value_errors() -> None:
    assert issubclass(DatasetError, ValueError)


def test_a_dataset_can_be_moved(built: Path, copy: Path) -> None:
    assert TokenDataset(built, "train").fingerprint == TokenDataset(copy, "train").fingerprint


def test_open_shards_follow_the_limits_of_the_process() -> None:
    code = """
import resource, sys
from data_pipeline.shard_reader import open_shards
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
for wanted, expected in ((1 << 13, 256), (2048, 64), (100, 16)):
    if resource.RLIM_INFINITY != hard < wanted:
        continue
    resource.setrlimit(resource.RLIMIT_NOFILE, (50, wanted))
    assert open_shards() == expected, (wanted, open_shards())
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (wanted, wanted)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
