from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline import StepLoader, TokenDataset
from data_pipeline.errors import FingerprintMismatchError, MissingShardError, WorkerError
from data_pipeline.loader import WorkerKind
from data_pipeline.replacement import Dataset


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


def take(dataset: Dataset, steps: int, **options: Any) -> list[tuple[int, list[int]]]:
    with StepLoader(dataset, **options) as loader:
        return [
            (step, batch["sample_index"].tolist())
            for _, (step, batch) in zip(range(steps), loader, strict=False)
        ]


def joined(dataset: Dataset, steps: int, world_size: int, **options: Any) -> list[tuple[int, list[int]]]:
    """The global batches: the ranks' slices one behind the other."""
    ranks = [take(dataset, steps, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for parts in zip(*ranks, strict=True):
        assert len({len(part[1]) for part in parts}) == 1  # no rank has more than another
    return [(parts[0][0], [i for part in parts for i in part[1]]) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize(
    ("num_workers", "kind"), [(0, "thread"), (1, "thread"), (3, "thread"), (1, "process"), (3, "process")]
)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_order_does_not_depend_on_workers_or_world_size(world_size: int, num_workers: int, kind: str) -> None:
    dataset = Numbers(103)
    expected = take(dataset, 30, global_batch_size=8, seed=3, num_workers=0)
    options: dict[str, Any] = {"num_workers": num_workers, "worker_kind": kind}
    assert joined(dataset, 30, world_size, global_batch_size=8, seed=3, **options) == expected
    assert all(len(ids) == 8 for _, ids in expected)


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


def _consume(dataset: Dataset, start_step: int, stop_at: int, log: Path, kind: str) -> None:
    """Trains, so to speak: one line of ids a step, until it is killed without warning."""
    options: dict[str, Any] = {"global_batch_size": 8, "seed": 9, "num_workers": 2, "worker_kind": kind}
    loader = StepLoader(dataset, start_step=start_step, **options)
    with log.open("a") as file, log.with_suffix(".pids").open("a") as pids:
        for step, batch in loader:
            if step == start_step:
                pids.writelines(f"{child.pid}\n" for child in multiprocessing.active_children())
                pids.flush()
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGKILL)
            file.write(f"{batch['sample_index'].tolist()}\n")
            file.flush()


def is_running(pid: int) -> bool:
    """The process exists and is not a zombie that its parent has yet to take note of."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_killed_at_20_random_steps_the_same_ids_are_consumed(built: Path, tmp_path: Path, kind: str) -> None:
    dataset = TokenDataset(built, "validation")
    log = tmp_path / "ids"
    stops = sorted(random.Random(4).sample(range(1, 6 * len(dataset) // 8), 20))
    start = 0
    for stop in stops:
        child = multiprocessing.get_context("fork").Process(
            target=_consume, args=(dataset, start, stop, log, kind)
        )
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        start = stop
    expected = take(dataset, stops[-1], global_batch_size=8, seed=9, num_workers=0)
    assert log.read_text().splitlines() == [str(ids) for _, ids in expected]
    workers = [int(line) for line in log.with_suffix(".pids").read_text().splitlines()]
    assert len(workers) == (40 if kind == "process" else 0)
    deadline = time.monotonic() + 20  # they look for their parent every 5 s
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "workers outlive the training process"
        time.sleep(0.1)


def workers() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def test_a_killed_worker_is_an_error_and_not_a_hang() -> None:
    with StepLoader(Numbers(10**6), global_batch_size=8, num_workers=2, worker_kind="process") as loader:
        next(loader)
        os.kill(workers()[0], signal.SIGKILL)
        with pytest.raises(
            (RuntimeError, WorkerError), match=r"DataLoader worker \(pid.* (killed|exited)"
        ) as caught:
            for _ in range(1000):
                next(loader)
        # torch notices the death wherever this process stands; inside the loader the error is ours
        assert isinstance(caught.value, WorkerError)
    assert not workers()


def test_a_signal_to_the_whole_job_leaves_the_workers_to_the_training_process() -> None:
    with StepLoader(Numbers(10**6), global_batch_size=8, num_workers=2, worker_kind="process") as loader:
        next(loader)
        mine = workers()
        for pid in mine:  # by another process, as Slurm does
            subprocess.run(["/bin/kill", "-TERM", str(pid)], check=True)
        time.sleep(0.2)
        for _ in range(20):
            next(loader)
        assert workers() == mine
    assert not any(map(is_running, mine))


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_an_error_of_a_worker_arrives_as_it_is(copy: Path, kind: WorkerKind) -> None:
    (copy / "train/shard-000001.index.npy").unlink()
    with StepLoader(
        TokenDataset(copy, "train"), global_batch_size=64, num_workers=1, worker_kind=kind
    ) as loader:
        for _ in range(2):
            with pytest.raises(MissingShardError) as caught:
                for _ in range(8):
                    next(loader)
            assert str(caught.value).startswith(
                f"{copy}/train/shard-000001.index.npy: listed in the manifest"
            )


def test_workers_leave_the_random_numbers_of_training_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    take(Numbers(103), 3, global_batch_size=8, num_workers=1, worker_kind="process")
    assert torch.equal(torch.get_rng_state(), before)


def test_state_says_where_to_go_on() -> None:
    dataset = Numbers(103)
    with StepLoader(dataset, global_batch_size=8, seed=5, num_workers=2) as loader:
        for step, _ in loader:
            if step == 13:
                break
        state = json.loads(json.dumps(loader.state()))
    assert state == {
        "epoch": 1,
        "step": 14,
        "seed": 5,
        "fingerprint": "numbers",
        "global_batch_size": 8,
        "shuffle_block": None,
        "source_samples": {},
        "replaced_samples": 0,
    }
    expected = take(dataset, 15, global_batch_size=8, seed=5)[14:]
    for saved in (state, {name: state[name] for name in ("epoch", "step", "seed", "fingerprint")}):
        with StepLoader(dataset, global_batch_size=8, seed=5) as loader:
            loader.load_state(saved)
            step, batch = next(loader)
            assert [(step, batch["sample_index"].tolist())] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 6}, "seed was 5, is 6"),
        ({"seed": 5, "global_batch_size": 16}, "global_batch_size was 8, is 16"),
        ({"seed": 5, "shuffle_block": 4}, r"shuffle_block was None, is \[4, 1024\]"),
    ],
)
def test_a_position_in_another_order_is_refused(options: dict[str, int], message: str) -> None:
    state = StepLoader(Numbers(103), global_batch_size=8, seed=5, start_step=3).state()
    with pytest.raises(FingerprintMismatchError, match=message):
        StepLoader(Numbers(103), **{"global_batch_size": 8, **options}).load_state(state)  # type: ignore[arg-type]


def test_shuffled_in_blocks_every_sample_comes_once_and_any_step_can_be_first() -> None:
    dataset, options = Numbers(1003), {"global_batch_size": 8, "seed": 2, "shuffle_block": 16}
    options["shuffle_window"] = 5
    epoch = take(dataset, 125, **options)
    consumed = [index for _, ids in epoch for index in ids]
    assert len(set(consumed)) == len(consumed) == 1000
    assert consumed != [index for _, ids in take(dataset, 125, global_batch_size=8, seed=2) for index in ids]
    for world_size in (1, 2, 4):
        assert joined(dataset, 5, world_size, start_step=60, **options) == epoch[60:65]


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
    assert tracemalloc.get_traced_memory()[1] < 1_000_000  # bytes
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
