"""What the build benchmark compares, each a program of its own.

    python -m launch.build_rows ours|datasets|datatrove DIRECTORY WORKERS

DIRECTORY holds text/*.jsonl and a tokenizer/. A worker process imports what its program's main module does: run from
the benchmark itself, every worker would load all of the benchmarks first. Exit status 3: the library is not here.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from data_pipeline import build
from data_pipeline.config import DataConfig, JsonlSource, PretrainedTokenizerConfig

NOT_INSTALLED = 3


def run_ours(root: Path, workers: int) -> None:
    """`data_pipeline.build`."""
    shutil.rmtree(root / "ours", ignore_errors=True)
    config = DataConfig(
        directory=str(root / "ours"),
        source=JsonlSource(paths=(str(root / "text" / "*.jsonl"),)),
        tokenizer=PretrainedTokenizerConfig(path=str(root / "tokenizer")),
        sample_length=1024,
        validation_fraction=0.01,
        test_fraction=0.01,
    )
    build(config, num_workers=workers)


def run_datasets(root: Path, workers: int) -> None:
    """`datasets.map`, and its result saved."""
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
        num_proc=workers,
    )
    encoded.save_to_disk(str(root / "datasets" / "out"), num_proc=workers)


def run_datatrove(root: Path, workers: int) -> None:
    """datatrove's DocumentTokenizer, without shuffling."""
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
        tasks=workers,
        workers=workers,
        logging_dir=str(root / "datatrove" / "logs"),
    ).run()


ROWS = {"ours": run_ours, "datasets": run_datasets, "datatrove": run_datatrove}


def main() -> int:
    """Command line; returns the exit status."""
    row, directory, workers = sys.argv[1:]
    try:
        ROWS[row](Path(directory), int(workers))
    except ImportError as error:
        print(error, file=sys.stderr)
        return NOT_INSTALLED
    return 0


if __name__ == "__main__":
    sys.exit(main())
