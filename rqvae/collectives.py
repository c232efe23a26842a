"""What ranks do together on tensors; in a single process nothing is sent."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over all ranks, in place; nothing to do in a single process."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def from_first_rank(tensor: Tensor) -> Tensor:
    """Rank 0's values on all ranks, in place; nothing to do in a single process."""
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(tensor, src=0)
    return tensor


def gather_rows(rows: Tensor, chosen: Callable[[int], Tensor]) -> Tensor:
    """Rows of the joined batch of all ranks, in rank order, without gathering the whole of it.

    Args:
        rows: [N, E], this rank's; N may differ between ranks and be 0.
        chosen: maps the total number of rows to the LongTensor of wanted indices; the same on all ranks.

    Returns:
        [len(chosen), E], the same on all ranks.
    """
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    counts = torch.zeros(world_size, dtype=torch.long, device=rows.device)
    counts[rank] = len(rows)
    all_reduce_sum(counts)
    wanted = chosen(int(counts.sum())).to(rows.device) - int(counts[:rank].sum())
    mine = (wanted >= 0) & (wanted < len(rows))
    result = rows.new_zeros(len(wanted), rows.shape[1])
    result[mine] = rows[wanted[mine]]
    return all_reduce_sum(result)
