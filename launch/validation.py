"""Validation during training, by all ranks together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from data_pipeline import MixtureDataset
from launch.config import RunConfig
from launch.tasks import Task
from launch.window import Window, to_device


def validate(
    task: Task,
    engine: Any,
    config: RunConfig,
    rank: int,
    world_size: int,
    device: torch.device,
    step: int,
) -> tuple[dict[str, float], Tensor | None]:
    """Score the first samples of the validation split, with the same number of passes on every rank.

    Those of a mixture are taken in the weights' proportions.

    Returns:
        Metrics, and how often every code was used: [D, C], None where there are no codes.
    """
    dataset = task.dataset("validation")
    count = min(config.train.eval_samples, len(dataset))
    samples = dataset.evaluation_indices(count) if isinstance(dataset, MixtureDataset) else range(count)
    total = len(samples)
    window = Window(device)
    engine.eval()
    size = config.train.micro_batch_size
    with torch.no_grad():
        for start in range(0, total, size * world_size):
            first = start + rank * size
            indices = [int(samples[min(index, total - 1)]) for index in range(first, first + size)]
            batch = to_device(dataset.read(indices), device)
            # A rank beyond the end takes part with padding, which counts for nothing.
            beyond = torch.arange(first, first + size, device=device) >= total
            batch["document_ids"] = batch["document_ids"].masked_fill(beyond[:, None], 0)
            window.add(task.forward(engine, batch, torch.ones((), device=device), step).sums)
    sums, _ = window.close()
    return task.metrics(sums), sums.get("code_counts")
