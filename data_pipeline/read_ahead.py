"""Reading ahead of the training loop: in it, in threads, or in processes. The results come in the order asked for.

Each of the three is a generator over an endless stream of requests; closing it stops what it started.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.utils.data

from data_pipeline.errors import WorkerError

Request = tuple[int, np.ndarray]
"""A step, and the indices of its samples and of those of the steps after it."""
Result = TypeVar("Result")
_PREFETCH_PER_WORKER = 2


def read_inline(read: Callable[..., Result], requests: Iterator[Request]) -> Generator[Result]:
    """Reads when asked."""
    for request in requests:
        yield read(*request)


def read_in_threads(
    read: Callable[..., Result], requests: Iterator[Request], num_workers: int
) -> Generator[Result]:
    """Threads of this process read ahead."""
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="data")
    pending: deque[Future[Result]] = deque()
    try:
        for request in requests:
            pending.append(pool.submit(read, *request))
            if len(pending) > num_workers * _PREFETCH_PER_WORKER:
                yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def read_in_processes(
    read: Callable[..., Any], requests: Iterator[Request], num_workers: int
) -> Generator[Any]:
    """Processes of torch's DataLoader read ahead. They end with this one, within seconds of its death.

    Raises:
        WorkerError: a worker died. Errors of `read` arrive as they are.
    """
    loader = torch.utils.data.DataLoader(
        _Reads(read),
        sampler=requests,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=_PREFETCH_PER_WORKER,
        collate_fn=_unchanged,
        **worker_options(),
    )
    iterator = start_workers(loader)
    try:
        while True:
            result = next(iterator)
            if isinstance(result, Exception):
                raise result
            yield _convert(result, torch.from_numpy, np.ndarray)
    except RuntimeError as error:
        problem = str(error).strip()
        if not problem.startswith("DataLoader worker"):
            raise
    finally:
        del iterator, loader  # ends the processes, also where a traceback holds on to this frame
    # Not raised from torch's error, whose traceback would keep the other processes alive.
    raise WorkerError(
        f"a process that reads data died ({problem}). If it was killed, the machine may be out of memory: lower "
        "train.num_workers, or set train.worker_kind=thread"
    )


def worker_options() -> dict[str, Any]:
    """Of any DataLoader whose processes read for training."""
    return {
        "worker_init_fn": partial(_end_with_the_parent_only, os.getpid()),
        # Its seed must not be drawn from the generator that training draws from.
        "generator": torch.Generator(),
    }


def start_workers(loader: torch.utils.data.DataLoader[Any]) -> Iterator[Any]:
    """`iter(loader)`, whose processes do not take SIGTERM, from their start on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Reads(torch.utils.data.Dataset[Any]):
    def __init__(self, read: Callable[..., Any]) -> None:
        self._read = read

    def __getitem__(self, request: Request) -> Any:
        try:
            # Arrays go through the pipe. Tensors would go through shared memory, a file each: 2 to 7 times slower
            # for batches of this size, and containers often have little of it.
            return _convert(self._read(*request), torch.Tensor.numpy, torch.Tensor)
        except Exception as error:
            return error  # DataLoader would put the traceback into the message


def _convert(value: Any, change: Callable[[Any], Any], kind: type) -> Any:
    """`value` with everything of a kind changed, inside tuples and dictionaries as well."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: _convert(item, change, kind) for key, item in value.items()}
    if type(value) is tuple:
        return tuple(_convert(item, change, kind) for item in value)
    return value


def _unchanged(value: Any) -> Any:
    return value


def _end_with_the_parent_only(parent: int, _: int) -> None:
    """Leaves SIGTERM to the training process, unless it sends it, and ends within a second of its death.

    Slurm and torchrun send it to every process of a job, and training then still wants data for its last step.
    torch's own watch for the parent is not enough: it waits for a batch to go through a pipe that nobody reads.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def watch() -> None:
        while os.getppid() == parent:
            received = signal.sigtimedwait({signal.SIGTERM}, 1)
            if received is not None and received.si_pid == parent:
                break
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
