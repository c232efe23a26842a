"""Tokens per second of our loaders beside webdataset, litdata and mosaicml-streaming, on the same samples.

Before it is timed, a row must deliver exactly the samples that were written. Then it reads an epoch of them, or what
it manages of one in two seconds, shuffled, into LongTensors [B, T]. Ours checks every sample's crc32 and delivers
document ids as well. Cold means that the row's files were dropped from the page cache by posix_fadvise(DONTNEED)
just before, all readers closed.
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
import zlib
from collections import Counter
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launch.environment import describe_environment
from launch.loader_rows import OURS, PEERS, LoaderShape, Row

_LONGEST_S = 2.0
SHAPE = LoaderShape(samples=16_384, length=1_024, batch=8)


def benchmark_loader(shape: LoaderShape = SHAPE, num_workers: int = 2, repeats: int = 5) -> dict[str, Any]:
    """Tokens/s single-process and with workers, cache warm and cold; time to the first batch at a random place."""
    if shape.samples % shape.batch:
        raise ValueError(f"{shape.samples} samples are not whole batches of {shape.batch}")
    tokens = np.random.default_rng(0).integers(0, 1 << 16, (shape.samples, shape.length), dtype=np.uint16)
    with tempfile.TemporaryDirectory() as directory:
        rows, missing = _written(Path(directory), shape, tokens)
        for row in rows:
            check_row(row, tokens)
        modes = {
            f"{workers} workers, {cache}": _take_turns(rows, workers, cache == "cold", repeats)
            for workers in (0, num_workers)
            for cache in ("warm", "cold")
        }
        first = _first_batches([row for row in rows if isinstance(row, OURS)], repeats)
    return {
        "shape": shape._asdict(),
        "modes": {mode: _summary(measured) for mode, measured in modes.items()},
        "missing": missing,
        "first_batch_at_a_random_position_ms": first,
        "versions": {row.package: metadata.version(row.package) for row in rows},
        "repeats": repeats,
        "environment": describe_environment(),
    }


def _written(
    root: Path, shape: LoaderShape, tokens: NDArray[np.uint16]
) -> tuple[list[Row], list[dict[str, str]]]:
    """The rows whose files are written, and why others are not."""
    rows: list[Row] = []
    missing = []
    for kind in (*OURS, *PEERS):
        row = kind(root / kind.name, shape)
        try:
            row.write(tokens)
            rows.append(row)
        except ImportError as error:
            missing.append(
                {
                    "name": kind.name,
                    "reason": str(error),
                    "install": f"pip install {kind.package or kind.name}",
                }
            )
    return rows, missing


def check_row(row: Row, tokens: NDArray[np.uint16]) -> None:
    """Every sample once an epoch, in another order than they were written in.

    Raises:
        RuntimeError: what is read is something else.
    """
    expected = [zlib.crc32(sample.astype("<i8").tobytes()) for sample in tokens]
    batches = islice(row.batches(0, seed=0), row.shape.samples // row.shape.batch)
    read = [zlib.crc32(sample.numpy().tobytes()) for batch in batches for sample in batch]
    if Counter(read) != Counter(expected) or read == expected:
        raise RuntimeError(
            f"{row.name} does not deliver the samples that were written: {len(read)} of {len(expected)}, "
            f"{(Counter(read) & Counter(expected)).total()} of them right"
        )


def _take_turns(rows: list[Row], num_workers: int, cold: bool, repeats: int) -> dict[str, list[float]]:
    """Tokens/s of every row, `repeats` times in turn after a warm-up: what follows the first batch."""
    speeds: dict[str, list[float]] = {row.name: [] for row in rows}
    for turn in range(repeats + 1):
        for row in rows:
            gc.collect()
            if cold:
                drop_from_page_cache(row.directory)
            speed = _read_epoch(row, num_workers, seed=turn)
            if turn:
                speeds[row.name].append(speed)
    return speeds


def _read_epoch(row: Row, num_workers: int, seed: int) -> float:
    """Tokens/s of what follows the first batch: the rest of the epoch, or what is read of it in a few seconds."""
    batches = row.batches(num_workers, seed)
    next(batches)
    first = time.perf_counter()
    read, stop = 0, first
    for batch in islice(batches, row.shape.samples // row.shape.batch - 1):
        read += batch.numel()
        stop = time.perf_counter()
        if stop - first > _LONGEST_S:
            break
    del batches
    return read / (stop - first)


def drop_from_page_cache(directory: Path) -> None:
    """Make the next read of every file below `directory` a read from the disk."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())  # what is not written yet cannot be dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _first_batches(rows: list[Row], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds from nothing to the first batch, cache cold, no workers."""
    generator = np.random.default_rng(1)
    times: dict[str, list[float]] = {row.name: [] for row in rows}
    for _ in range(repeats):
        for row in rows:
            step = int(generator.integers(10 * row.shape.samples // row.shape.batch))
            drop_from_page_cache(row.directory)
            start = time.perf_counter()
            next(row.batches(0, seed=0, start_step=step))
            times[row.name].append(1e3 * (time.perf_counter() - start))
    return {name: {"median": statistics.median(values), "max": max(values)} for name, values in times.items()}


def _summary(speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Rows of a table, and ours over the best of the others."""
    rows = {
        name: {"tokens_per_s": statistics.median(values), "spread": max(values) - min(values)}
        for name, values in speeds.items()
    }
    best = max(
        (kind.name for kind in PEERS if kind.name in rows), key=lambda name: rows[name]["tokens_per_s"]
    )
    over = {kind.name: rows[kind.name]["tokens_per_s"] / rows[best]["tokens_per_s"] for kind in OURS}
    return {"rows": rows, "best_peer": best, "over_best_peer": over}


def print_loader(result: dict[str, Any]) -> None:
    """The result for a person."""
    print("{samples} samples of {length} tokens, batches of {batch}".format(**result["shape"]))
    for mode, table in result["modes"].items():
        print(mode)
        for name, row in table["rows"].items():
            print(f"  {name:20}{row['tokens_per_s'] / 1e6:9.1f} M tokens/s  spread {row['spread'] / 1e6:.1f}")
        ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in table["over_best_peer"].items())
        print(f"  over {table['best_peer']}, the best of the others: {ratios}")
    for row in result["missing"]:
        print(f"not measured: {row['name']} ({row['reason']}); {row['install']}")
    for name, row in result["first_batch_at_a_random_position_ms"].items():
        print(f"first batch at a random position, {name}: {row['median']:.0f} ms, at most {row['max']:.0f}")
    print(f"{result['repeats']} turns; versions {result['versions']}")
