"""Text to tokens on disk: our build beside datatrove's DocumentTokenizer and datasets.map, MB of text per second.

All read the same JSON lines files, one for each process, with the same fast tokenizer, on the same cores. The text
is the docstrings of the installed dependencies, repeated where there are too few of them. Ours does more than
the others: phases, packing, byte counts, checksums, fsync. Starting processes counts, for every row.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_pipeline import build
from data_pipeline.config import (
    BPETokenizerConfig,
    DataConfig,
    JsonlSource,
    PretrainedTokenizerConfig,
)
from data_pipeline.python_docs import docstrings, source_files
from data_pipeline.tokenizer import save_bpe, train_bpe
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
            OURS: lambda: _run_ours(root, shape),
            DATASETS: lambda: _run_datasets(root, shape),
        }
        missing = []
        version = None
        try:
            _run_datatrove(root, shape)  # it says what it lacks only when it is used
            version = metadata.version("datatrove")
            runs[DATATROVE] = lambda: _run_datatrove(root, shape)
        except ImportError as error:
            missing.append(
                {"name": DATATROVE, "reason": str(error), "install": "pip install -e .[benchmark-data]"}
            )
        seconds = take_turns(runs, repeats, torch.device("cpu"))
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


def _run_ours(root: Path, shape: BuildShape) -> None:
    shutil.rmtree(root / "ours", ignore_errors=True)
    config = DataConfig(
        directory=str(root / "ours"),
        source=JsonlSource(paths=(str(root / "text" / "*.jsonl"),)),
        tokenizer=PretrainedTokenizerConfig(path=str(root / "tokenizer")),
        sample_length=1024,
        validation_fraction=0.01,
        test_fraction=0.01,
    )
    build(config, num_workers=shape.workers)


def _run_datasets(root: Path, shape: BuildShape) -> None:
    from datasets import disable_progress_bars, load_dataset

    from data_pipeline.tokenizer import load_fast_tokenizer

    disable_progress_bars()
    shutil.rmtree(root / "datasets", ignore_errors=True)
    tokenizer = load_fast_tokenizer(root / "tokenizer")
    rows = load_dataset(
        "json",
        data_files=[str(path) for path in sorted((root / "text").glob("*.jsonl"))],
        split="train",
        cache_dir=str(root / "datasets" / "cache"),
    )
    encoded = rows.map(
        lambda batch: {"input_ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
        batched=True,
        remove_columns=rows.column_names,
        num_proc=shape.workers,
    )
    encoded.save_to_disk(str(root / "datasets" / "out"), num_proc=shape.workers)


def _run_datatrove(root: Path, shape: BuildShape) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    shutil.rmtree(root / "datatrove", ignore_errors=True)
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(root / "text"), doc_progress=False),
            DocumentTokenizer(
                str(root / "datatrove" / "out"),
                tokenizer_name_or_path=str(root / "tokenizer" / "tokenizer.json"),
                eos_token="<|endoftext|>",  # noqa: S106
                shuffle_documents=False,
            ),
        ],
        tasks=shape.workers,
        workers=shape.workers,
        logging_dir=str(root / "datatrove" / "logs"),
    ).run()


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
