"""Worker processes that never outlive the command that started them.

Every worker watches a pipe whose writing end only the parent holds. It closes when the parent dies, by whatever
signal, and when the parent gives up; the worker then ends at once. What it was writing stays invisible.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from data_pipeline.errors import WorkerError
from data_pipeline.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_processes(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    num_workers: int,
    progress: Progress | None = None,
) -> list[Result]:
    """`function` of every item, in their order, computed in worker processes.

    The first error, and Ctrl-C, stop all workers at once.

    Args:
        function: importable from its module; so are its results picklable.
        progress: counts the items.

    Raises:
        WorkerError: a worker was killed from outside.
    """
    results: dict[int, Result] = {}
    with _pool(min(num_workers, len(items))) as pool:
        with _interrupts_held_back():
            futures = {pool.submit(function, item): place for place, item in enumerate(items)}
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            if progress is not None:
                progress.update()
    return [results[place] for place in range(len(items))]


@contextmanager
def _pool(num_workers: int) -> Iterator[ProcessPoolExecutor]:
    # spawned, not forked: the caller may hold threads
    context = multiprocessing.get_context("spawn")
    parent_lives, held = context.Pipe(duplex=False)
    with (
        parent_lives,
        held,
        ProcessPoolExecutor(
            num_workers,
            mp_context=context,
            initializer=_begin,
            initargs=(parent_lives, max(1, len(os.sched_getaffinity(0)) // num_workers)),
        ) as pool,
    ):
        try:
            yield pool
        except BrokenProcessPool as error:
            raise WorkerError(
                "a worker process was killed, perhaps for lack of memory; run the same command again, with "
                "fewer --num-workers: what is done is kept"
            ) from error
        except BaseException:
            held.close()  # before the executor waits for the work under way
            raise


def _begin(parent_lives: Connection, num_threads: int) -> None:
    # the items are worked on side by side: each process tokenizes on its share of the cores
    os.environ["RAYON_NUM_THREADS"] = str(num_threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if num_threads > 1 else "false"
    threading.Thread(target=_end_with_parent, args=(parent_lives,), daemon=True).start()


def _end_with_parent(parent_lives: Connection) -> None:
    wait([parent_lives])  # nothing is ever sent, so it is ready only once it is closed
    os._exit(1)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, which a terminal sends to all; the parent sees it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
