from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline import StepLoader, TokenDataset
from data_pipeline.loader import Dataset


class Numbers:
    """A dataset whose samples are their own index; costs no memory, so it can be of any size."""

    fingerprint = "numbers"

    def __init__(self, size: int, broken: int = -1) -> None:
        self._size = size
        self._broken = broken

    def __len__(self) -> int:
        return self._size

    def read(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        if self._broken in indices:
            raise ValueError(f"sample {self._broken} is damaged")
        return {"sample_index": torch.as_tensor(np.asarray(indices))}


def take(dataset: Dataset, steps: int, **options: int) -> list[tuple[int, list[int]]]:
    with StepLoader(dataset, **options) as loader:  # type: ignore[arg-type]
        return [
            (step, batch["sample_index"].tolist())
            for _, (step, batch) in zip(range(steps), loader, strict=False)
        ]


def joined(dataset: Dataset, steps: int, world_size: int, **options: int) -> list[tuple[int, list[int]]]:
    """The global batches: the ranks' slices one behind the other."""
    ranks = [take(dataset, steps, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    return [(parts[0][0], [i for part in parts for i in part[1]]) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_order_does_not_depend_on_workers_or_world_size(world_size: int, num_workers: int) -> None:
    dataset = Numbers(103)
    expected = take(dataset, 30, global_batch_size=8, seed=3, num_workers=0)
    assert joined(dataset, 30, world_size, global_batch_size=8, seed=3, num_workers=num_workers) == expected


def test_every_sample_once_an_epoch_and_the_tail_dropped_for_all() -> None:
    batches = take(Numbers(103), 36, global_batch_size=8, seed=1, num_workers=1)
    epochs = [[number for _, ids in batches[first : first + 12] for number in ids] for first in (0, 12, 24)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 96
    # what is dropped differs, so over the epochs nothing is left out
    assert len(set(epochs[0]) | set(epochs[1]) | set(epochs[2])) == 103
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("start", [1, 11, 12, 13, 500])
def test_resuming_is_exact_at_any_step_and_into_any_world(start: int) -> None:
    dataset = Numbers(103)
    uninterrupted = take(dataset, start + 20, global_batch_size=8, seed=5, num_workers=2)
    for world_size in (1, 2, 4):
        resumed = joined(
            dataset, 20, world_size, global_batch_size=8, seed=5, start_step=start, num_workers=1
        )
        assert resumed == uninterrupted[start:]


def _consume(dataset: Dataset, start_step: int, stop_at: int, log: Path) -> None:
    """Trains, so to speak: one line of ids a step, until it is killed without warning."""
    loader = StepLoader(dataset, global_batch_size=8, seed=9, start_step=start_step, num_workers=2)
    with log.open("a") as file:
        for step, batch in loader:
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGKILL)
            file.write(f"{batch['sample_index'].tolist()}\n")
            file.flush()


def test_killed_at_20_random_steps_the_same_ids_are_consumed(built: Path, tmp_path: Path) -> None:
    dataset = TokenDataset(built, "validation")
    log = tmp_path / "ids"
    stops = sorted(random.Random(4).sample(range(1, 6 * len(dataset) // 8), 20))
    start = 0
    for stop in stops:
        child = multiprocessing.get_context("fork").Process(target=_consume, args=(dataset, start, stop, log))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        start = stop
    expected = take(dataset, stops[-1], global_batch_size=8, seed=9, num_workers=0)
    assert log.read_text().splitlines() == [str(ids) for _, ids in expected]


def test_state_says_where_to_go_on() -> None:
    dataset = Numbers(103)
    with StepLoader(dataset, global_batch_size=8, seed=5, num_workers=2) as loader:
        for step, _ in loader:
            if step == 13:
                break
        state = loader.state()
    assert state == {"epoch": 1, "step": 14, "seed": 5, "fingerprint": "numbers"}
    following = take(dataset, 1, global_batch_size=8, seed=state["seed"], start_step=state["step"])
    assert following == take(dataset, 15, global_batch_size=8, seed=5)[14:]


def test_seeds_give_other_orders() -> None:
    assert take(Numbers(103), 1, global_batch_size=8, seed=0) != take(
        Numbers(103), 1, global_batch_size=8, seed=1
    )


def test_a_billion_samples_start_anywhere_at_once() -> None:
    dataset = Numbers(10**9)
    tracemalloc.start()
    began = time.perf_counter()
    ((step, ids),) = take(dataset, 1, global_batch_size=64, start_step=10**7 * 3 + 12345)
    assert time.perf_counter() - began < 2
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert step == 30012345
    assert len(set(ids)) == 64


def test_damage_is_raised_where_it_stands_and_never_skipped() -> None:
    clean = take(Numbers(103), 12, global_batch_size=8, num_workers=2)
    broken = clean[5][1][3]
    with StepLoader(Numbers(103, broken), global_batch_size=8, num_workers=2) as loader:
        for expected in range(5):
            assert next(loader)[0] == expected
        for _ in range(2):
            with pytest.raises(ValueError, match=f"sample {broken} is damaged"):
                next(loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 104}, r"larger than the dataset \(103 samples\)"),
        ({"global_batch_size": 8, "world_size": 3}, "multiple of the world size"),
        ({"global_batch_size": 0}, "multiple of the world size"),
        ({"global_batch_size": 8, "world_size": 2, "rank": 2}, "rank 2 is not in a world of 2"),
        ({"global_batch_size": 8, "start_step": -1}, "cannot be negative"),
    ],
)
def test_impossible_arithmetic_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepLoader(Numbers(103), **options)  # type: ignore[arg-type]


def test_real_shards_in_several_threads(built: Path) -> None:
    dataset = TokenDataset(built, "train")
    with StepLoader(dataset, global_batch_size=16, num_workers=4, seed=2) as loader:
        for _, (step, batch) in zip(range(2 * loader.steps_per_epoch), loader, strict=False):
            again = dataset.read(loader.indices(step))
            assert all(torch.equal(batch[name], again[name]) for name in again)
