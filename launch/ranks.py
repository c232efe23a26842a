"""Several processes that evaluate one thing together: who takes what, and how results meet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process among all of them."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Writes what all have found."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's part of `count` things, a stretch."""
        return range(self.rank * count // self.world_size, (self.rank + 1) * count // self.world_size)

    def gather(self, item: Item) -> list[Item]:
        """What every rank has, in rank order; all must call it."""
        if self.world_size == 1:
            return [item]
        items: list[Item] = [item] * self.world_size
        dist.all_gather_object(items, item)
        return items

    def gather_lists(self, items: Sequence[Item]) -> list[Item]:
        """The ranks' lists, one behind the other."""
        return [item for part in self.gather(list(items)) for item in part]


def join_ranks() -> tuple[Ranks, torch.device]:
    """Meet the other processes that torchrun or srun has started, if any, and choose this one's device."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    device = torch.device("cuda" if has_gpu else "cpu")
    if world_size == 1:
        return Ranks(), device
    if not dist.is_initialized():
        dist.init_process_group("nccl" if has_gpu else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size()), device


def leave_ranks() -> None:
    """End the group that `join_ranks` has made."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
