"""Validation during training, by all ranks together."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_pipeline import CodeDataset, MixtureDataset, load_tokenizer
from launch.config import RunConfig
from launch.reconstructions import Reconstruction, predictions_of, reconstruction
from launch.task import Dataset, Task
from launch.window import Window, to_device


class Validation(NamedTuple):
    """What a validation found."""

    metrics: dict[str, float]
    code_counts: Tensor | None
    """How often every code was used: [D, C]; None where there are no codes."""
    reconstructions: list[Reconstruction]
    """Of the first samples, on rank 0; empty where nothing is reconstructed."""


def validate(
    task: Task,
    engine: Any,
    config: RunConfig,
    rank: int,
    world_size: int,
    device: torch.device,
    step: int,
) -> Validation:
    """Score the first samples of the validation split, with the same number of passes on every rank.

    Those of a mixture are taken in the weights' proportions.
    """
    dataset = task.dataset("validation")
    count = min(config.train.eval_samples, len(dataset))
    samples = dataset.evaluation_indices(count) if isinstance(dataset, MixtureDataset) else range(count)
    total = len(samples)
    window = Window(device)
    engine.eval()
    size = config.train.micro_batch_size
    shown: list[Reconstruction] = []
    to_show = config.tracking.reconstructions if rank == 0 else 0
    with torch.no_grad():
        for start in range(0, total, size * world_size):
            first = start + rank * size
            indices = [int(samples[min(index, total - 1)]) for index in range(first, first + size)]
            batch = to_device(dataset.read(indices), device)
            # A rank beyond the end takes part with padding, which counts for nothing.
            beyond = torch.arange(first, first + size, device=device) >= total
            batch["document_ids"] = batch["document_ids"].masked_fill(beyond[:, None], 0)
            head = task.reconstructing_head(engine.module) if len(shown) < to_show else None
            with predictions_of(head) as predictions:
                window.add(task.forward(engine, batch, torch.ones((), device=device), step).sums)
            if predictions:
                shown += _reconstructions(batch, predictions[0], dataset, to_show - len(shown))
    sums, _ = window.close()
    return Validation(task.metrics(sums), sums.get("code_counts"), shown)


def _reconstructions(
    batch: dict[str, Tensor], predicted: Tensor, dataset: Dataset, count: int
) -> list[Reconstruction]:
    part = next(iter(dataset.parts.values())) if isinstance(dataset, MixtureDataset) else dataset
    tokens = part.token_dataset if isinstance(part, CodeDataset) else part
    tokenizer = _tokenizer(tokens.directory)
    rows = zip(
        batch["input_ids"], predicted.view_as(batch["input_ids"]), batch["document_ids"] > 0, strict=True
    )
    found = [reconstruction(ids[real], got[real], tokenizer) for ids, got, real in rows if real.any()]
    return found[:count]


@lru_cache(maxsize=1)
def _tokenizer(directory: Path) -> Any:
    return load_tokenizer(directory)
