"""Which dataset and which loader a run reads its samples with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data_pipeline import CodeDataset, MixtureDataset, StepLoader, StreamLoader, TokenDataset
from data_pipeline.staging import staged
from launch.config import RunConfig
from launch.paths import scratch_directory, source_directories
from launch.window import joined


def reading_directories(config: RunConfig) -> dict[str, tuple[Path, Path]]:
    """`source_directories` as training reads them: their copies on this node, where `slurm.staging` makes some.

    Raises:
        ValueError: a copy is not there, or not complete.
    """
    places, scratch = source_directories(config), scratch_directory(config)
    if scratch is None:
        return places
    with_codes = config.stage == "rq_transformer"
    return {
        name: (staged(tokens, scratch), staged(codes, scratch) if with_codes else codes)
        for name, (tokens, codes) in places.items()
    }


def open_tokens(config: RunConfig, split: str, directory: Path) -> TokenDataset:
    """The tokens of a split; the training split from where it is streamed from, if that is elsewhere."""
    streaming = config.train.streaming
    if streaming is None or streaming.url is None or split != "train":
        return TokenDataset(directory, split)
    from data_pipeline.streaming import StreamedDataset

    return StreamedDataset(directory, split, streaming.url)


def open_loader(
    config: RunConfig,
    dataset: TokenDataset | CodeDataset | MixtureDataset,
    rank: int,
    world_size: int,
    state: Mapping[str, Any] | None,
    device: torch.device,
) -> StepLoader | StreamLoader:
    """The batches of one rank, as `train.streaming` says.

    Args:
        state: of the loader that a resumed run goes on from; None starts afresh.
    """
    train, data = config.train, config.data
    common: dict[str, Any] = {
        "global_batch_size": train.global_batch_size,
        "rank": rank,
        "world_size": world_size,
        "seed": config.seed,
        "num_workers": train.num_workers,
    }
    if train.streaming is not None:
        return StreamLoader(
            train.streaming.url or data.directory,
            **common,
            start_step=0 if state is None else state["step"],
            streams=train.streaming.streams,
            shuffle_buffer=train.streaming.shuffle_buffer,
        )
    loader = StepLoader(
        dataset,
        **common,
        worker_kind=train.worker_kind,
        shuffle_block=data.shuffle_block,
        shuffle_window=data.shuffle_window,
        on_corrupt=data.on_corrupt,
        max_replaced=data.max_replaced,
        sum_over_ranks=lambda count: int(joined(torch.tensor(count, device=device))),
    )
    if state is not None:
        loader.load_state(state)
    return loader
