"""Text to tokens on disk: our build beside datatrove's DocumentTokenizer and datasets.map, MB of text per second.

All read the same JSON lines files, one for each process, with the same fast tokenizer, on the same cores. The text
is the docstrings of the installed dependencies, repeated where there are too few of them. Ours does more than
the others: phases, packing, byte counts, checksums, fsync. Every row is a program of its own, started each time.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_pipeline.config import BPETokenizerConfig
from data_pipeline.progress import Progress
from data_pipeline.python_docs import docstrings, source_files
from data_pipeline.tokenizer import save_bpe, train_bpe
from launch.build_rows import NOT_INSTALLED
from launch.environment import describe_environment
from launch.measurement import take_turns

OURS, DATATROVE, DATASETS = "data_pipeline build", "datatrove DocumentTokenizer", "datasets.map"
_MIN_CHARACTERS = 100


class BuildShape(NamedTuple):
    """What is built."""

    mib: float = 24.0
    workers: int = 2
    vocabulary: int = 4096


def benchmark_build(shape: BuildShape | None = None, repeats: int = 3) -> dict[str, Any]:
    """MB of UTF-8 text per second of every row."""
    shape = shape or BuildShape()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        num_bytes = _write_corpus(root, shape)
        runs: dict[str, Callable[[], Any]] = {
            OURS: lambda: _run("ours", root, shape),
            DATASETS: lambda: _run("datasets", root, shape),
        }
        missing = []
        version = None
        try:
            _run("datatrove", root, shape)  # it says what it lacks only when it is used
            version = metadata.version("datatrove")
            runs[DATATROVE] = lambda: _run("datatrove", root, shape)
        except ImportError as error:
            missing.append(
                {"name": DATATROVE, "reason": str(error), "install": "pip install -e .[benchmark-data]"}
            )
        with Progress(len(runs) * (repeats + 1), "building", unit="builds") as progress:
            seconds = take_turns(
                {name: _counted(run, name, progress) for name, run in runs.items()},
                repeats,
                torch.device("cpu"),
            )
    rows = {
        name: {
            "mb_per_s": num_bytes / 1e6 / statistics.median(times),
            "spread": num_bytes / 1e6 * (1 / min(times) - 1 / max(times)),
        }
        for name, times in seconds.items()
    }
    return {
        "mb": num_bytes / 1e6,
        "workers": shape.workers,
        "vocabulary": shape.vocabulary,
        "rows": rows,
        "over": {name: rows[OURS]["mb_per_s"] / rows[name]["mb_per_s"] for name in rows if name != OURS},
        "missing": missing,
        "versions": {"datatrove": version, "datasets": metadata.version("datasets")},
        "repeats": repeats,
        "environment": describe_environment(),
    }


def _counted(run: Callable[[], Any], name: str, progress: Progress) -> Callable[[], None]:
    def counted() -> None:
        run()
        progress.update(last=name)

    return counted


def _write_corpus(root: Path, shape: BuildShape) -> int:
    """One file for each worker, and the tokenizer. Returns the bytes of text."""
    texts = list(_texts(shape.mib))
    (root / "text").mkdir()
    for worker in range(shape.workers):
        with (root / "text" / f"{worker:03d}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(worker, len(texts), shape.workers):
                file.write(json.dumps({"id": str(number), "text": texts[number]}) + "\n")
    config = BPETokenizerConfig(vocab_size=shape.vocabulary)
    save_bpe(train_bpe(texts[: len(texts) // 4 + 1], config), root / "tokenizer")
    return sum(len(text.encode()) for text in texts)


def _texts(mib: float) -> Iterator[str]:
    files, _ = source_files()
    left = mib * 2**20
    for file in cycle(files):
        try:
            source = Path(file.path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for _, text in docstrings(source):
            if len(text) >= _MIN_CHARACTERS:
                yield text
                left -= len(text.encode())
        if left <= 0:
            return


def _run(row: str, root: Path, shape: BuildShape) -> None:
    """A row, as a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.build_rows", row, str(root), str(shape.workers)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == NOT_INSTALLED:
        raise ImportError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        raise ValueError(f"{row} ended with status {done.returncode}:\n{done.stderr[-2000:]}")


def print_build(result: dict[str, Any]) -> None:
    """The result for a person."""
    print(f"{result['mb']:.1f} MB of text, {result['workers']} processes")
    for name, row in result["rows"].items():
        print(f"  {name:30}{row['mb_per_s']:8.2f} MB/s  spread {row['spread']:.2f}")
    for name, ratio in result["over"].items():
        print(f"  {ratio:.2f}x {name}")
    for row in result["missing"]:
        print(f"not measured: {row['name']} ({row['reason']}); {row['install']}")
    print(f"{result['repeats']} turns; versions {result['versions']}")
