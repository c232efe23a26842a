from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from data_pipeline.dataset import TokenDataset
from data_pipeline.errors import CorruptShardError, MissingShardError
from data_pipeline.packing import PackedSample
from data_pipeline.shard_reader import ShardReader, read_samples
from data_pipeline.shards import samples_per_member, write_token_shard

ARRAYS = ("segments", "tokens")


def make_samples(count: int, length: int = 8) -> list[PackedSample]:
    samples = []
    for number in range(count):
        tokens = np.arange(number, number + length, dtype=np.uint16)
        rows = [[0, 0, 3, 0, 5, number], [0, 4, 4, 0, 6, number + 1]][: 1 + number % 2]
        samples.append(PackedSample(tokens, np.array(rows, dtype=np.int64), len(rows)))
    return samples


def test_the_bytes_are_a_function_of_the_samples(tmp_path: Path) -> None:
    one = write_token_shard(tmp_path / "a", "shard-000000", "x", make_samples(10), 4)
    other = write_token_shard(tmp_path / "b", "shard-000000", "x", make_samples(10), 4)
    assert one == other
    assert (tmp_path / "a/shard-000000.tar").read_bytes() == (tmp_path / "b/shard-000000.tar").read_bytes()
    assert (one.samples, one.tokens, one.real_tokens, one.documents, one.bytes) == (10, 80, 50, 15, 80)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "shard-000000.index.npy",
        "shard-000000.tar",
    ]


def test_tars_are_plain_and_members_are_plain_arrays(tmp_path: Path) -> None:
    write_token_shard(tmp_path, "s", "k-", make_samples(10), 4)
    with tarfile.open(tmp_path / "s.tar", "r:") as tar:
        members = tar.getmembers()
        arrays = {
            member.name: np.load(io.BytesIO(tar.extractfile(member).read()), allow_pickle=False)  # type: ignore[union-attr]
            for member in members
        }
    assert [member.name for member in members[:2]] == ["k-000000.segments.npy", "k-000000.tokens.npy"]
    assert all((m.mtime, m.uid, m.gid, m.uname) == (0, 0, 0, "") and m.isreg() for m in members)
    assert arrays["k-000002.tokens.npy"].shape == (2, 8)
    assert arrays["k-000001.segments.npy"][:, 0].tolist() == [0, 1, 1, 2, 3, 3]
    assert (tmp_path / "s.tar").read_bytes()[257:262] == b"ustar"


def test_single_samples_are_read_back(tmp_path: Path) -> None:
    samples = make_samples(11)
    entry = write_token_shard(tmp_path, "s", "k-", samples, 4)
    reader = ShardReader(tmp_path, "s", ARRAYS, 11, entry.file_bytes)
    for number in (0, 3, 4, 10):
        (row,) = reader.read("tokens", [number])
        assert np.array_equal(np.frombuffer(row, "<u2"), samples[number].tokens)
        (row,) = reader.read("segments", [number])
        segments = np.frombuffer(row, "<i8").reshape(-1, 6)
        assert np.array_equal(segments[:, 1:], samples[number].segments[:, 1:])


@pytest.mark.parametrize("read_around", [False, True])
def test_samples_of_several_shards_come_in_the_order_asked_for(tmp_path: Path, read_around: bool) -> None:
    samples = make_samples(150)
    readers = []
    for shard in range(2):
        entry = write_token_shard(tmp_path, f"s{shard}", "k-", samples[75 * shard :][:75], 4)
        readers.append(
            ShardReader(tmp_path, entry.name, ARRAYS, 75, entry.file_bytes, read_around=read_around)
        )
    order = np.random.default_rng(0).permutation(150)
    segments, tokens = read_samples(readers.__getitem__, *np.divmod(order, 75))
    assert tokens == [samples[number].tokens.tobytes() for number in order]
    assert [len(row) for row in segments] == [samples[number].segments.nbytes for number in order]
    content = bytearray((tmp_path / "s1.index.npy").read_bytes())
    content[-75 * 32 + 7] ^= 0xFF  # the highest byte of an offset
    (tmp_path / "s1.index.npy").write_bytes(content)
    readers[1] = ShardReader(tmp_path, "s1", ARRAYS, 75, readers[1]._file_bytes, read_around=read_around)
    with pytest.raises(CorruptShardError, match=r"s1\.tar: sample 0 is damaged"):
        read_samples(readers.__getitem__, np.array([0, 1]), np.array([3, 0]))


def test_missing_and_mismatched_files_are_refused(tmp_path: Path) -> None:
    entry = write_token_shard(tmp_path, "s", "k-", make_samples(11), 4)
    write_token_shard(tmp_path, "other", "k-", make_samples(12), 4)
    with pytest.raises(CorruptShardError, match="cut or replaced"):
        ShardReader(tmp_path, "s", ARRAYS, 11, entry.file_bytes + 512)
    (tmp_path / "other.index.npy").replace(tmp_path / "s.index.npy")
    with pytest.raises(CorruptShardError, match="stale or damaged index of shard s"):
        ShardReader(tmp_path, "s", ARRAYS, 11, entry.file_bytes)
    (tmp_path / "s.index.npy").write_bytes(b"\x80\x04")
    with pytest.raises(CorruptShardError, match="stale or damaged index"):
        ShardReader(tmp_path, "s", ARRAYS, 11, entry.file_bytes)
    (tmp_path / "s.index.npy").unlink()
    with pytest.raises(MissingShardError, match=r"s\.index\.npy"):
        ShardReader(tmp_path, "s", ARRAYS, 11, entry.file_bytes)


def test_an_index_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    entry = write_token_shard(tmp_path, "s", "k-", make_samples(3), 4)
    np.save(tmp_path / "s.index.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CorruptShardError, match="stale or damaged index"):
        ShardReader(tmp_path, "s", ARRAYS, 3, entry.file_bytes)


def test_members_reach_the_size_that_object_stores_like() -> None:
    assert samples_per_member(512, 8192) == 16
    assert samples_per_member(500, 8192) == 17
    assert samples_per_member(16384, 8192) == 1


def webdataset_rows(
    directory: Path, split: str, num_workers: int, nodesplitter: Any = None
) -> tuple[list[bytes], int]:
    """All token rows of a split, as the stock library reads them, and the real tokens they hold."""
    urls = sorted(str(path) for path in (directory / split).glob("*.tar"))
    dataset = webdataset.WebDataset(
        urls, shardshuffle=False, workersplitter=webdataset.split_by_worker, nodesplitter=nodesplitter
    ).decode()
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=num_workers)
    rows, real_tokens = [], 0
    for sample in loader:
        rows += [row.tobytes() for row in np.asarray(sample["tokens.npy"])]
        real_tokens += int(np.asarray(sample["segments.npy"])[:, 2].sum())
    return rows, real_tokens


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stock_webdataset_reads_the_same_samples(built: Path, num_workers: int) -> None:
    dataset = TokenDataset(built, "train")
    assert len(dataset.shards) > 2
    rows, real_tokens = webdataset_rows(built, "train", num_workers)
    ours = dataset.read(range(len(dataset)))["input_ids"].numpy().astype("<u2")
    assert sorted(rows) == sorted(row.tobytes() for row in ours)
    assert real_tokens == dataset.num_real_tokens
    if num_workers == 0:
        assert rows == [row.tobytes() for row in ours]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stock_webdataset_shares_the_shards_out_over_nodes(
    built: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = TokenDataset(built, "train")
    assert len(dataset.shards) >= 4  # one at least for every worker of both
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(webdataset_rows(built, "train", num_workers, webdataset.split_by_node))
    assert all(rows for rows, _ in parts)
    ours = dataset.read(range(len(dataset)))["input_ids"].numpy().astype("<u2")
    assert sorted(parts[0][0] + parts[1][0]) == sorted(row.tobytes() for row in ours)
    assert parts[0][1] + parts[1][1] == dataset.num_real_tokens
