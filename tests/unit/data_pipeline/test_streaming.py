from __future__ import annotations

import io
import itertools
import multiprocessing
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import webdataset

from data_pipeline import StreamLoader, TokenDataset
from data_pipeline.errors import (
    CorruptShardError,
    DatasetError,
    EmptySplitError,
    MissingShardError,
    NotADatasetError,
    UnsafeShardError,
)
from data_pipeline.files import write_json
from data_pipeline.manifest import Manifest, SplitEntry, load_manifest

SHARD = "train/shard-000001"


def take(directory: Path | str, steps: int, **options: Any) -> list[tuple[int, list[int]]]:
    options = {"global_batch_size": 8, "streams": 4, "shuffle_buffer": 10, "num_workers": 0} | options
    with StreamLoader(str(directory), **options) as loader:
        return [(step, batch["sample_index"].tolist()) for step, batch in itertools.islice(loader, steps)]


def joined(directory: Path | str, steps: int, world_size: int, **options: Any) -> list[tuple[int, list[int]]]:
    ranks = [
        take(directory, steps, rank=rank, world_size=world_size, **options) for rank in range(world_size)
    ]
    for parts in zip(*ranks, strict=True):
        assert len({len(part[1]) for part in parts}) == 1  # no rank has more than another
    return [(parts[0][0], [i for part in parts for i in part[1]]) for parts in zip(*ranks, strict=True)]


def steps_per_epoch(directory: Path | str) -> int:
    with StreamLoader(str(directory), global_batch_size=8, num_workers=0) as loader:
        return loader.steps_per_epoch


def read_epoch(directory: Path | str) -> None:
    take(directory, steps_per_epoch(directory), seed=1, streams=1)


def test_batches_are_those_of_random_access(built: Path) -> None:
    dataset = TokenDataset(built, "train")
    with StreamLoader(str(built), global_batch_size=8, streams=4, shuffle_buffer=10, num_workers=2) as loader:
        for _, batch in itertools.islice(loader, loader.steps_per_epoch + 3):
            expected = dataset.read(batch["sample_index"].numpy())
            assert batch.keys() == expected.keys()
            assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_a_signal_to_the_whole_job_leaves_the_workers_to_the_training_process(built: Path) -> None:
    before = torch.get_rng_state()
    with StreamLoader(str(built), global_batch_size=8, streams=4, num_workers=2) as loader:
        next(loader)
        mine = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
        assert len(mine) == 2
        for pid in mine:  # by another process, as Slurm does
            subprocess.run(["/bin/kill", "-TERM", str(pid)], check=True)
        time.sleep(0.2)
        for _ in range(loader.steps_per_epoch + 20):  # more than was read ahead
            next(loader)
        assert {child.pid for child in multiprocessing.active_children()} == set(mine)
    # Nor do they draw from training's random numbers.
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 2), (2, 0), (2, 1), (4, 0)])
def test_order_does_not_depend_on_workers_or_world_size(
    built: Path, world_size: int, num_workers: int
) -> None:
    steps = steps_per_epoch(built) + 5
    expected = take(built, steps, seed=3)
    assert joined(built, steps, world_size, seed=3, num_workers=num_workers) == expected


def test_every_sample_once_an_epoch_and_the_tail_dropped_for_all(built: Path) -> None:
    size, per_epoch = len(TokenDataset(built, "train")), steps_per_epoch(built)
    assert size % 8
    batches = take(built, 3 * per_epoch, seed=1)
    epochs = [[i for _, ids in batches[e * per_epoch : (e + 1) * per_epoch] for i in ids] for e in range(3)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == per_epoch * 8
    assert epochs[0] != epochs[1]
    assert batches != take(built, 3 * per_epoch, seed=2)
    # neighbours in the shards are not neighbours in a stream: the buffer shuffles
    stream = np.array([ids[:2] for _, ids in batches[:per_epoch]]).ravel()
    assert (np.diff(stream) == 1).mean() < 0.3


@pytest.mark.parametrize("start", [7, "epoch - 1", "epoch + 9"])
def test_resuming_is_exact_at_any_step_and_into_any_world_that_divides_the_streams(
    built: Path, start: int | str
) -> None:
    first = start if isinstance(start, int) else eval(start, {"epoch": steps_per_epoch(built)})
    uninterrupted = take(built, first + 12, seed=5)
    for world_size in (1, 2, 4):
        assert joined(built, 12, world_size, seed=5, start_step=first) == uninterrupted[first:]


def test_resuming_reads_at_most_a_buffer_of_each_stream_again(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline import shard_stream, streaming

    read = []
    real = shard_stream.read_pieces

    def counting(store: Any, pieces: Any) -> Any:
        def count(samples: Iterator[Any]) -> Iterator[Any]:
            for sample in samples:
                read.append(sample.number)
                yield sample

        return real(store, pieces).compose(count)

    monkeypatch.setattr(streaming, "read_pieces", counting)
    monkeypatch.setattr(streaming, "_TOKENS_READ", 1)
    per_epoch = steps_per_epoch(built)
    take(built, 1, start_step=per_epoch - 2)
    assert 0 < len(read) <= 4 * (2 * 10 + 1)  # the buffer that the step falls into, and the next


def test_state_says_where_to_go_on(built: Path) -> None:
    options: dict[str, Any] = {"global_batch_size": 8, "streams": 4, "shuffle_buffer": 10, "seed": 5}
    per_epoch = steps_per_epoch(built)
    with StreamLoader(str(built), **options) as loader:
        list(itertools.islice(loader, per_epoch + 3))
        state = loader.state()
    assert state == {
        "epoch": 1,
        "step": per_epoch + 3,
        "seed": 5,
        "fingerprint": load_manifest(built).fingerprint,
    }


def test_any_fsspec_url(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(built), "/tokens", recursive=True)
    monkeypatch.setattr(webdataset.utils, "enforce_security", True)  # what WDS_SECURE=1 sets
    monkeypatch.setenv("GOPEN_REWRITE", "memory:=pipe:false ")
    try:
        assert joined("memory://tokens/", 5, 2) == take(built, 5)
        store.rm(f"/tokens/{SHARD}.tar")
        with pytest.raises(MissingShardError, match=r"memory://tokens/train/shard-000001.tar: listed"):
            read_epoch("memory://tokens")
    finally:
        store.rm("/tokens", recursive=True)


def test_after_any_error_the_parts_of_a_step_are_never_mixed_up(built: Path) -> None:
    """The disk fails after the first of two workers' parts, once; going on would join parts of two steps."""
    with StreamLoader(str(built), global_batch_size=8, streams=4, num_workers=2) as loader:
        sound = loader._batches

        def failing() -> Iterator[Any]:
            yield next(sound)
            raise OSError("Input/output error")

        loader._batches = failing()
        for _ in range(3):
            with pytest.raises(OSError, match="Input/output error"):
                next(loader)
            loader._batches = sound


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


def rows(directory: Path, name: str) -> np.ndarray:
    return np.load(directory / f"{name}.index.npy")


@pytest.mark.parametrize("array", ["tokens", "segments"])
def test_a_flipped_bit_is_named(copy: Path, array: str) -> None:
    flip(copy / f"{SHARD}.tar", int(rows(copy, SHARD)[array]["offset"][23]) + 1)
    with pytest.raises(CorruptShardError, match=rf"{SHARD}.tar: sample 23 is damaged.* {array} do not match"):
        read_epoch(copy)


def test_a_damaged_header_is_not_the_end_of_the_shard(copy: Path) -> None:
    first = rows(copy, SHARD)["segments"]["offset"]
    group = load_manifest(copy).samples_per_member
    flip(
        copy / f"{SHARD}.tar", int(first[3 * group]) // 512 * 512 - 512 + 3
    )  # in the name of the fourth group
    with pytest.raises(CorruptShardError, match=rf"{SHARD}.tar: at sample {3 * group}: damaged tar header"):
        read_epoch(copy)


def member_end(directory: Path, samples: int) -> int:
    last = rows(directory, SHARD)["tokens"][samples - 1]
    return -(-int(last["offset"] + last["size"]) // 512) * 512


@pytest.mark.parametrize("where", ["member", "header", "data"])
@pytest.mark.parametrize("padded", [True, False])
def test_a_cut_is_never_a_shorter_epoch(copy: Path, where: str, padded: bool) -> None:
    path = copy / f"{SHARD}.tar"
    group = load_manifest(copy).samples_per_member
    cut = member_end(copy, 5 * group) + {"member": 0, "header": 200, "data": 700}[where]
    content = path.read_bytes()
    path.write_bytes(content[:cut] + bytes(len(content) - cut) * padded)
    wanted = rf"{SHARD}.tar: .*(sample {5 * group}\b)" if padded else rf"{SHARD}.tar: {cut} bytes where"
    with pytest.raises(CorruptShardError, match=wanted):
        read_epoch(copy)


def test_swapped_missing_and_stale_files(copy: Path) -> None:
    other = "train/shard-000000"
    shutil.move(copy / f"{SHARD}.index.npy", copy / "kept")
    with pytest.raises(MissingShardError, match=f"{SHARD}.index.npy: listed"):
        read_epoch(copy)
    shutil.copy(copy / f"{other}.index.npy", copy / f"{SHARD}.index.npy")
    with pytest.raises(CorruptShardError, match=r"index.npy: damaged, stale or of another shard"):
        read_epoch(copy)
    shutil.copy(copy / "kept", copy / f"{SHARD}.index.npy")
    read_epoch(copy)
    content = (copy / f"{other}.tar").read_bytes()
    size = (copy / f"{SHARD}.tar").stat().st_size
    (copy / f"{SHARD}.tar").write_bytes(content[:size].ljust(size, b"\0"))
    with pytest.raises(CorruptShardError, match=rf"{SHARD}.tar: "):
        read_epoch(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(NotADatasetError, match="holds no manifest"):
        read_epoch(copy)


def forge(directory: Path, change: Callable[[tarfile.TarInfo], None]) -> None:
    """Rewrites the third member of a shard, and the manifest with it, as someone would who can do both."""
    path = directory / f"{SHARD}.tar"
    buffer = io.BytesIO()
    with (
        tarfile.open(path) as old,
        tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as new,
    ):
        for number, member in enumerate(old):
            content = old.extractfile(member)
            if number == 2:
                change(member)
            new.addfile(member, content)
    path.write_bytes(buffer.getvalue())
    values = load_manifest(directory).model_dump(exclude={"fingerprint", "splits"})
    splits = load_manifest(directory).splits
    shards = [
        shard.model_copy(update={"file_bytes": path.stat().st_size}) if SHARD.endswith(shard.name) else shard
        for shard in splits["train"].shards
    ]
    manifest = Manifest.create(**values, splits=splits | {"train": SplitEntry.of(shards)})
    write_json(directory / "manifest.json", manifest.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"name": "../../escaped.tokens.npy"}, "would leave the directory"),
        ({"name": "a/../../b.tokens.npy"}, "would leave the directory"),
        ({"name": "/tmp/escaped.tokens.npy"}, "would leave the directory"),
        (
            {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0},
            "is a link or another special file",
        ),
        ({"type": tarfile.LNKTYPE, "linkname": "elsewhere", "size": 0}, "is a link or another special file"),
        ({"name": "000001.pyd"}, "is a pickle"),
        ({"name": "000001.pickle"}, "is a pickle"),
        ({"name": "000001.pth"}, "is a pickle"),
        ({"name": "000001.jpg"}, "is neither tokens nor segments"),
    ],
)
def test_a_tar_that_asks_for_more_than_reading_is_refused(
    copy: Path, attributes: dict[str, Any], message: str
) -> None:
    def change(member: tarfile.TarInfo) -> None:
        for name, value in attributes.items():
            setattr(member, name, value)

    forge(copy, change)
    num_workers = 2 if attributes.get("name") == "000001.pyd" else 0
    loader = StreamLoader(str(copy), global_batch_size=8, streams=4, num_workers=num_workers)
    for _ in range(2):  # it stays refused: no step is ever skipped
        with pytest.raises(UnsafeShardError, match=message) as caught:
            for _ in range(1_000):
                next(loader)
        text = str(caught.value)
        assert f"{SHARD}.tar: at sample" in text
        assert "\n" not in text
    loader.close()


def test_a_pipe_url_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsafeShardError, match="runs a shell command and is refused"):
        StreamLoader(f"pipe:touch {tmp_path}/ran; cat", global_batch_size=8)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 8000}, "larger than the split"),
        ({"global_batch_size": 6}, r"global_batch_size \(6\) must be a multiple of streams \(4\)"),
        ({"world_size": 3}, r"streams \(4\) must be a multiple of the world size \(3\)"),
        ({"world_size": 2, "rank": 2}, "rank 2 is not in a world of 2"),
        ({"start_step": -1}, "cannot be negative"),
        ({"shuffle_buffer": 0}, "must be positive"),
    ],
)
def test_impossible_arithmetic_is_refused(built: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        take(built, 1, **options)


def test_an_empty_split_is_refused(built: Path) -> None:
    with pytest.raises(EmptySplitError, match="'nothing' has no samples"):
        take(built, 1, split="nothing")
    assert issubclass(EmptySplitError, DatasetError)
