from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline import MixtureDataset, StepLoader, TokenDataset
from data_pipeline.errors import CorruptShardError, MissingShardError
from data_pipeline.replacement import SampleReader

DAMAGED = (57, 203)


@pytest.fixture
def damaged(copy: Path) -> TokenDataset:
    """Two samples with a flipped bit, in different shards."""
    clean = TokenDataset(copy, "train")
    for index in DAMAGED:
        path = copy / "train" / f"{clean.shards[index // 200].name}.tar"
        data = bytearray(path.read_bytes())
        row = clean.read([index])["input_ids"][0].numpy().astype("<u2").tobytes()
        data[data.index(row) + 9] ^= 1
        path.write_bytes(data)
    return TokenDataset(copy, "train")


def epoch(dataset: TokenDataset | MixtureDataset, world_size: int = 1, **options: Any) -> list[list[int]]:
    """Sample indices of every step of an epoch, the ranks' slices joined."""
    ranks = []
    for rank in range(world_size):
        loader = StepLoader(
            dataset,
            global_batch_size=8,
            rank=rank,
            world_size=world_size,
            seed=1,
            on_corrupt="replace",
            **options,
        )
        with loader, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ranks.append([next(loader)[1]["sample_index"].tolist() for _ in range(loader.steps_per_epoch)])
    return [[index for part in parts for index in part] for parts in zip(*ranks, strict=True)]


def test_by_default_damage_is_an_error(damaged: TokenDataset) -> None:
    with (
        StepLoader(damaged, global_batch_size=8, seed=1) as loader,
        pytest.raises(CorruptShardError, match="is damaged"),
    ):
        for _ in range(loader.steps_per_epoch):
            next(loader)


def test_another_sample_takes_the_place_on_any_number_of_ranks_and_workers(damaged: TokenDataset) -> None:
    plan = StepLoader(damaged, global_batch_size=8, seed=1)
    planned = np.array([plan.indices(step) for step in range(plan.steps_per_epoch)])
    found = np.array(epoch(damaged, num_workers=0))
    replaced = np.isin(planned, DAMAGED)
    assert replaced.sum() == 2
    assert np.array_equal(found[~replaced], planned[~replaced])
    assert not np.isin(found, DAMAGED).any()
    for options in ({"world_size": 2}, {"world_size": 4, "num_workers": 3}, {"worker_kind": "process"}):
        assert np.array_equal(epoch(damaged, **options), found)


def test_the_batch_holds_the_whole_other_sample(damaged: TokenDataset) -> None:
    batch, ((sample, stand_in, damage),) = SampleReader(damaged, "replace", 1)(4, [3, DAMAGED[0], 8])
    assert sample == DAMAGED[0] and "sample 57 is damaged" in damage
    assert batch["sample_index"].tolist() == [3, stand_in, 8]
    expected = damaged.read([3, stand_in, 8])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    again = SampleReader(damaged, "replace", 1)
    others = {again(step, [DAMAGED[0]])[1][0].by for step in range(20)}
    assert len(others) > 10  # drawn anew at every step


def test_replacing_is_said_once_counted_and_goes_on_counting_after_a_resume(damaged: TokenDataset) -> None:
    options: dict[str, Any] = {"global_batch_size": 8, "seed": 1, "on_corrupt": "replace"}
    with StepLoader(damaged, **options) as loader, pytest.warns(UserWarning) as caught:
        for _ in range(2 * loader.steps_per_epoch):
            next(loader)
    counts = loader.state()["replaced_samples"]
    assert 2 < counts <= 4  # a sample may be in the tail that an epoch drops
    assert loader.metrics() == {"data/replaced_samples": counts}
    messages = sorted(str(warning.message) for warning in caught)
    assert len(messages) == 2
    assert "shard-000000.tar: sample 57 is damaged: its tokens" in messages[0]
    assert "shard-000001.tar: sample 3 is damaged" in messages[1] and "takes its place" in messages[1]
    with StepLoader(damaged, **options) as resumed:
        resumed.load_state(loader.state())
        assert resumed.state() == loader.state()


def test_all_ranks_count_what_was_replaced_on_any(built: Path) -> None:
    loader = StepLoader(
        TokenDataset(built, "train"),
        global_batch_size=8,
        on_corrupt="replace",
        max_replaced=30,
        sum_over_ranks=lambda n: n + 10,
    )
    with loader:
        for _ in range(3):
            next(loader)
        assert loader.metrics() == {"data/replaced_samples": 30}
        with pytest.raises(CorruptShardError, match=r"40 damaged samples.* more than data\.max_replaced=30"):
            next(loader)


def test_too_much_damage_stops_after_all(damaged: TokenDataset) -> None:
    with pytest.raises(CorruptShardError, match=r"2 damaged samples.* data\.max_replaced=1: .* is damaged"):
        epoch(damaged, max_replaced=1)


def test_where_all_is_damaged_nothing_stands_in(damaged: TokenDataset) -> None:
    for shard in damaged.shards:
        (damaged.directory / "train" / f"{shard.name}.tar").write_bytes(b"cut")
    with pytest.raises(CorruptShardError, match="cut or replaced"):
        SampleReader(TokenDataset(damaged.directory, "train"), "replace", 0)(0, [1, 2])


def test_a_missing_shard_is_never_replaced(damaged: TokenDataset) -> None:
    (damaged.directory / "train/shard-000000.tar").unlink()
    with pytest.raises(MissingShardError):
        SampleReader(damaged, "replace", 0)(0, [1])


def test_in_a_mixture_the_same_part_gives_the_other_sample(built: Path, damaged: TokenDataset) -> None:
    mixture = MixtureDataset({"clean": TokenDataset(built, "train"), "bad": damaged}, {"clean": 1, "bad": 1})
    first = len(mixture.parts["clean"])
    read = SampleReader(mixture, "replace", 0)
    for step in range(20):
        batch, replaced = read(step, [5, first + DAMAGED[1]])
        assert len(replaced) == 1 and first <= replaced[0].by < len(mixture)
        assert batch["sample_index"].tolist() == [5, replaced[0].by]
