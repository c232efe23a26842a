"""How benchmarks measure: rows that take turns, and peak memory in a process of its own."""

from __future__ import annotations

import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

PEAK_PREFIX = "peak extra bytes: "


def take_turns(
    rows: dict[str, Callable[[], Any]], repeats: int, device: torch.device, is_warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of every row, `repeats` times in turn after one warm-up.

    Args:
        is_warm: the rows have run before, the warm-up is left out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(int(is_warm), repeats + 1):
        for name, run in rows.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise a TimeoutError in what runs longer; None: no limit. For the main thread."""
    if seconds is None:
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def available_bytes() -> int | None:
    """Memory of this machine that is free or can be made so; None where the system does not say."""
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if match is None else 1024 * int(match[1])


def time_rows(rows: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """`take_turns` as rows of a table: name, median and spread (longest minus shortest) in ms."""
    return [
        {
            "name": name,
            "median_ms": 1e3 * statistics.median(values),
            "spread_ms": 1e3 * (max(values) - min(values)),
        }
        for name, values in take_turns(rows, repeats, device).items()
    ]


def peak_extra_bytes(run: Callable[[], Any]) -> int:
    """Growth of this process's peak resident memory over what it held before `run` (Linux).

    Raises:
        ValueError: the system does not say.
    """
    try:
        # Makes the present size the peak so far (proc(5)).
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        run()
        return max(0, _resident("VmHWM") - before)
    except OSError as error:
        raise ValueError(f"peak memory is read from /proc, as Linux has it: {error}") from error


def _resident(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/self/status has no {name}")
    return 1024 * int(match[1])


def peak_in_subprocess(module: str, request: dict[str, Any]) -> int:
    """Peak extra bytes that `python -m module REQUEST` reports with `report_peak`.

    A fresh process, because an allocator keeps what earlier measurements freed and would hide the growth.

    Raises:
        RuntimeError: it failed, with its messages.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(request)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(PEAK_PREFIX)]
    if done.returncode or not lines:
        raise RuntimeError(f"the memory measurement of {module} failed:\n{done.stderr}")
    return int(lines[-1].removeprefix(PEAK_PREFIX))


def report_peak(run: Callable[[], Any]) -> None:
    """Measure `run` and print the result for `peak_in_subprocess`."""
    print(f"{PEAK_PREFIX}{peak_extra_bytes(run)}")
