from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline import TokenDataset, verify
from data_pipeline.errors import CorruptShardError, DatasetError, NotADatasetError
from data_pipeline.files import write_json
from data_pipeline.manifest import load_manifest


def test_a_sound_directory_has_no_damage(built: Path) -> None:
    assert verify(built) == []


def test_200_bit_flips_are_each_found_and_never_read(built: Path, copy: Path) -> None:
    """Whatever bit of a shard or index flips: reading gives the true samples or an error, and verify names it.

    Where the bit belongs to a sample (its bytes, or its row of the index), both name the sample as well.
    """
    truth = TokenDataset(built, "validation")
    everything = range(len(truth))
    expected = truth.read(everything)
    files = sorted((copy / "validation").iterdir())
    generator = random.Random(3)
    of_samples = 0
    for _ in range(200):
        path = generator.choice(files)
        original = path.read_bytes()
        place = generator.randrange(len(original))
        damaged = bytearray(original)
        damaged[place] ^= 1 << generator.randrange(8)
        shard = path.name.partition(".")[0]
        sample = owner(copy / "validation", shard, path, place)
        path.write_bytes(damaged)
        lines = [line for line in verify(copy) if shard in line]
        assert any(str(path) in line for line in lines)
        try:
            batch = TokenDataset(copy, "validation").read(everything)
        except CorruptShardError as error:
            assert shard in str(error)
            if sample is not None:
                assert f"sample {sample} is damaged" in str(error)
                assert any(line.endswith(f"samples cannot be read: {sample}") for line in lines)
        else:  # the flip hit a tar header, padding, or a member's description
            assert sample is None
            assert all(torch.equal(batch[name], expected[name]) for name in expected)
        path.write_bytes(original)
        of_samples += sample is not None
    assert of_samples > 100
    assert verify(copy) == []


def owner(folder: Path, shard: str, path: Path, place: int) -> int | None:
    """The sample that a byte of a tar or of an index belongs to, if it belongs to one."""
    index_file = folder / f"{shard}.index.npy"
    index = np.load(index_file)
    if path == index_file:
        row = place - (index_file.stat().st_size - index.nbytes)
        return row // index.itemsize if row >= 0 else None
    for sample, row in enumerate(index):
        for array in index.dtype.names:
            if 0 <= place - int(row[array]["offset"]) < int(row[array]["size"]):
                return sample
    return None


def test_worker_processes_find_the_same(copy: Path) -> None:
    assert verify(copy, num_workers=2) == []
    for path in (copy / "train/shard-000001.tar", copy / "test/shard-000000.tar"):
        data = bytearray(path.read_bytes())
        data[1000] ^= 1
        path.write_bytes(data)
    (copy / "train/shard-000000.index.npy").unlink()
    damage = verify(copy, num_workers=1)
    assert len(damage) > 3
    assert verify(copy, num_workers=2) == damage


@pytest.mark.parametrize("where", ["data", "header", "member boundary", "end blocks"])
def test_cuts_are_found(copy: Path, where: str) -> None:
    import tarfile

    path = copy / "train/shard-000001.tar"
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    size = {
        "data": members[5].offset_data + 100,
        "header": members[5].offset + 200,
        "member boundary": members[6].offset,
        "end blocks": path.stat().st_size - 512,
    }[where]
    with path.open("r+b") as file:
        file.truncate(size)
    damage = verify(copy)
    assert any(line.startswith(str(path)) for line in damage)
    assert any("bytes where the manifest says" in line for line in damage)
    with pytest.raises(CorruptShardError, match=r"shard-000001\.tar: .* cut or replaced"):
        TokenDataset(copy, "train").read([250])


def test_swapped_missing_and_stale_files_are_found(copy: Path) -> None:
    train = copy / "train"
    shutil.move(train / "shard-000000.tar", copy / "x")
    shutil.move(train / "shard-000001.tar", train / "shard-000000.tar")
    shutil.move(copy / "x", train / "shard-000001.tar")
    shutil.copy(train / "shard-000003.index.npy", train / "shard-000002.index.npy")
    (train / "shard-000003.tar").unlink()
    (copy / "validation/notes.txt").write_text("x")
    text = "\n".join(verify(copy))
    for expected in (
        "shard-000000.tar: damaged, swapped or cut",
        "shard-000001.tar: damaged, swapped or cut",
        "200 of 200 samples cannot be read: 0, 1, 2",
        "shard-000002.index.npy: damaged",
        "shard-000002.tar: 200 of 200 samples cannot be read",
        "shard-000003.tar: missing",
        "notes.txt: not in the manifest",
    ):
        assert expected in text


def test_another_tokenizer_is_found(copy: Path) -> None:
    path = copy / "tokenizer/tokenizer.json"
    path.write_text(path.read_text().replace("<|pad|>", "<|dap|>"))
    assert any("not the tokenizer that the shards were made with" in line for line in verify(copy))
    path.unlink()
    assert any("no tokenizer.json" in line for line in verify(copy))


def test_the_damaged_sample_is_named(built: Path, copy: Path) -> None:
    row = TokenDataset(built, "train").read([207])["input_ids"][0].numpy().astype("<u2").tobytes()
    path = copy / "train/shard-000001.tar"
    path.write_bytes(path.read_bytes().replace(row, row[::-1], 1))
    assert any(line == f"{path}: 1 of 200 samples cannot be read: 7" for line in verify(copy))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 20}, "breaks the rules of the format"),  # a token of no vocabulary
        ({"document_grid": 7}, "breaks the rules of the format"),  # documents off the grid
        ({"sample_length": 31}, "breaks the rules of the format"),
        ({"tokens": 1}, "tokens of"),
        ({"bytes": -1}, "bytes where the manifest says"),
    ],
    ids=str,
)
def test_shards_of_sound_bytes_that_are_not_what_the_manifest_says(
    copy: Path, changes: dict[str, int], message: str
) -> None:
    """As a build with a mistake in it would leave them: every hash is right, and what they hold is not."""
    manifest = load_manifest(copy)
    split = manifest.splits["validation"]
    more = {"real_tokens": changes.pop("tokens", 0), "bytes": changes.pop("bytes", 0)}
    first = split.shards[0]
    first = first.model_copy(update={name: getattr(first, name) + by for name, by in more.items()})
    total = {name: getattr(split, name) + by for name, by in more.items()}
    split = split.model_copy(update={"shards": (first, *split.shards[1:]), **total})
    forged = manifest.model_copy(update={"splits": {**manifest.splits, "validation": split}, **changes})
    forged = forged.model_copy(update={"fingerprint": forged.compute_fingerprint()})
    write_json(copy / "manifest.json", forged.model_dump(mode="json"))
    found = [line for line in verify(copy) if "validation" in line]
    assert found and message in found[0], found
    assert str(copy / "validation/shard-000000.tar") in found[0]


def test_without_a_manifest_there_is_nothing_to_check_against(tmp_path: Path) -> None:
    with pytest.raises(NotADatasetError):
        verify(tmp_path)
    assert issubclass(NotADatasetError, DatasetError)
