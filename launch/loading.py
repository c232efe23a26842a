"""Which dataset and which loader a run reads its tokens with."""

from __future__ import annotations

from data_pipeline import CodeDataset, StepLoader, StreamLoader, TokenDataset
from launch.config import RunConfig


def open_tokens(config: RunConfig, split: str) -> TokenDataset:
    """The tokens of a split; the training split from where it is streamed from, if that is elsewhere."""
    streaming = config.train.streaming
    if streaming is None or streaming.url is None or split != "train":
        return TokenDataset(config.data.directory, split)
    from data_pipeline.streaming import StreamedDataset

    return StreamedDataset(config.data.directory, split, streaming.url)


def open_loader(
    config: RunConfig, dataset: TokenDataset | CodeDataset, rank: int, world_size: int, start_step: int
) -> StepLoader | StreamLoader:
    """The batches of one rank from a step on, as `train.streaming` says."""
    train = config.train
    if train.streaming is None:
        return StepLoader(
            dataset,
            global_batch_size=train.global_batch_size,
            rank=rank,
            world_size=world_size,
            seed=config.seed,
            start_step=start_step,
            num_workers=train.num_workers,
        )
    return StreamLoader(
        train.streaming.url or config.data.directory,
        global_batch_size=train.global_batch_size,
        rank=rank,
        world_size=world_size,
        seed=config.seed,
        start_step=start_step,
        num_workers=train.num_workers,
        streams=train.streaming.streams,
        shuffle_buffer=train.streaming.shuffle_buffer,
    )
