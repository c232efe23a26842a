"""Prompts of `launch/benchmark.py inference`: of a data set, or drawn at random."""

from __future__ import annotations

from pathlib import Path

import torch

from data_pipeline import TokenDataset


def prompts_from(data: Path, count: int, length: int) -> list[list[int]]:
    """The first `length` tokens of the first long enough documents of the test split.

    Raises:
        ValueError: there are not enough.
    """
    dataset = TokenDataset(data, "test")
    prompts: list[list[int]] = []
    for index in range(len(dataset)):
        batch = dataset.read([index])
        ids, documents = batch["input_ids"][0], batch["document_ids"][0]
        for document in range(1, int(documents.max()) + 1):
            tokens = ids[documents == document]
            if len(tokens) > length and len(prompts) < count:
                prompts.append(tokens[:length].tolist())
        if len(prompts) == count:
            return prompts
    raise ValueError(
        f"'{data}' has {len(prompts)} test documents of more than {length} tokens, {count} needed"
    )


def random_prompts(vocabulary: int, count: int, length: int) -> list[list[int]]:
    """Token ids drawn at random, always the same."""
    drawn = torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    return drawn.tolist()
