"""Copies of a dataset on a node's own disk."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from data_pipeline import CodeDataset, TokenDataset, finish_codes, write_code_shard
from data_pipeline.errors import CorruptShardError, MissingShardError, NotADatasetError
from data_pipeline.staging import NoRoomError, stage, staged

SPLITS = ("train", "validation")


def times(directory: Path) -> dict[str, int]:
    """When each file but the manifest was written."""
    files = [path for path in directory.rglob("*") if path.is_file() and "manifest" not in path.name]
    return {str(path.relative_to(directory)): path.stat().st_mtime_ns for path in files}


def first_shard(directory: Path) -> Path:
    return min((directory / "train").glob("*.tar"))


def test_the_copy_reads_as_the_original(built: Path, tmp_path: Path) -> None:
    place = stage(built, tmp_path, SPLITS)
    assert place == staged(built, tmp_path)
    for split in SPLITS:
        original, copy = TokenDataset(built, split), TokenDataset(place, split)
        indices = range(len(original))
        assert torch.equal(original.read(indices)["input_ids"], copy.read(indices)["input_ids"])
        assert original.fingerprint == copy.fingerprint
    assert (place / "tokenizer" / "tokenizer.json").is_file()
    assert not (place / "test").exists()


def test_codes_are_copied_too(built: Path, tmp_path: Path) -> None:
    for split in SPLITS:
        tokens = TokenDataset(built, split)
        for shard in range(len(tokens.shards)):
            codes = torch.zeros(len(tokens.shard_range(shard)), 8, 2, dtype=torch.long).numpy()
            write_code_shard(
                tmp_path / "codes",
                split,
                shard,
                codes,
                token_dataset=tokens,
                codec_hash="c0dec",
                compression_factor=4,
                codebook_sizes=(16, 16),
            )
    finish_codes(tmp_path / "codes", built, codec_hash="c0dec", splits=SPLITS)
    tokens_here = stage(built, tmp_path / "scratch", SPLITS)
    codes_here = stage(tmp_path / "codes", tmp_path / "scratch", SPLITS)
    assert codes_here != tokens_here
    dataset = CodeDataset(TokenDataset(tokens_here, "train"), codes_here, "c0dec")
    assert dataset.read([0])["codes"].shape == (1, 8, 2)


def test_an_interrupted_copy_is_taken_up(built: Path, tmp_path: Path) -> None:
    place = stage(built, tmp_path, SPLITS)
    before = times(place)
    (place / "manifest.json").unlink()  # comes last
    cut = first_shard(place)
    os.truncate(cut, cut.stat().st_size // 2)
    partial = place / "train" / ".tokens-000099.tar.1.partial"
    partial.write_bytes(b"of a killed process")
    with pytest.raises(NotADatasetError, match="no complete copy"):
        staged(built, tmp_path)
    stage(built, tmp_path, SPLITS)
    assert cut.read_bytes() == first_shard(built).read_bytes()
    assert not partial.exists()
    after = times(place)
    assert {name for name in before if before[name] != after[name]} == {str(cut.relative_to(place))}


def test_damage_is_not_copied(copy: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    shard = first_shard(copy)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptShardError, match=shard.name):
        stage(copy, scratch, SPLITS)
    assert not list(scratch.rglob(shard.name)) and not list(scratch.rglob("*.partial"))
    with pytest.raises(NotADatasetError):
        staged(copy, scratch)
    shard.unlink()
    with pytest.raises(MissingShardError, match=shard.name):
        stage(copy, scratch, SPLITS)


def test_no_room(copy: Path, tmp_path: Path) -> None:
    os.truncate(first_shard(copy), 8 << 40)  # a hole: takes no space here, and more than a disk has as a copy
    with pytest.raises(NoRoomError, match=r"needs 8192\.\d\d GiB more in '.*scratch' on this node"):
        stage(copy, tmp_path / "scratch", SPLITS)
    assert not list((tmp_path / "scratch").rglob("*.tar"))


def test_two_at_a_time_copy_once(built: Path, tmp_path: Path) -> None:
    errors: list[Exception] = []

    def work() -> None:
        try:
            stage(built, tmp_path, SPLITS)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(TokenDataset(staged(built, tmp_path), "train"))
