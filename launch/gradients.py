"""The gradients of a step, where DeepSpeed keeps them between the last backward pass and the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    import deepspeed


def trained_parameters(engine: deepspeed.DeepSpeedEngine) -> Iterator[nn.Parameter]:
    """The parameters that the engine's optimizer moves."""
    optimizer = engine.optimizer
    for name in ("fp16_groups", "bit16_groups", "bf16_groups"):  # ZeRO 3; 1 and 2; 1 with bf16
        if hasattr(optimizer, name):
            for group in getattr(optimizer, name):
                yield from group
            return
    for group in optimizer.param_groups:
        yield from group["params"]


def local_gradients(engine: deepspeed.DeepSpeedEngine) -> list[list[Tensor]] | None:
    """This rank's share of the averaged gradients, by parameter group; all of them with zero_stage 0.

    Under ZeRO 1 and 2 those of Muon's groups are orthogonalised already.

    Returns:
        None where they are on a disk (offload_optimizer: nvme).
    """
    optimizer = engine.optimizer
    groups: list[list[Tensor]] = [[] for _ in optimizer.param_groups]
    if engine.zero_optimization_stage() == 0:
        for found, group in zip(groups, optimizer.param_groups, strict=True):
            found += [parameter.grad for parameter in group["params"] if parameter.grad is not None]
    elif hasattr(optimizer, "fp32_groups_gradient_flat_partition"):
        for found, flat in zip(groups, optimizer.fp32_groups_gradient_flat_partition, strict=True):
            found.append(flat)
    elif engine.zero_optimization_stage() == 3:
        if getattr(optimizer, "swap_optimizer", False):
            return None
        for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            kept = optimizer.averaged_gradients.get(index) or []
            offloaded = [flat.grad] if not kept and flat.grad is not None else []
            groups[optimizer.sub_group_to_group_id[index]] += [*kept, *offloaded]
    else:
        for index, flat in enumerate(optimizer.single_partition_of_fp32_groups):
            kept = optimizer.averaged_gradients.get(index) or []
            offloaded = [flat.grad] if not kept and flat.grad is not None else []
            groups[index] += [*kept, *offloaded]
    return groups


def squared_norms(engine: deepspeed.DeepSpeedEngine) -> Tensor:
    """This rank's part of every group's squared L2 norm: [G] fp64, to be summed over ranks."""
    groups = local_gradients(engine)
    device = engine.device
    if groups is None:
        return torch.zeros(0, dtype=torch.float64, device=device)
    shared_by = dist.get_world_size() if engine.zero_optimization_stage() == 0 else 1
    squares = torch.zeros(len(groups), dtype=torch.float64, device=device)
    for index, gradients in enumerate(groups):
        if gradients:
            norms = torch._foreach_norm([gradient.detach() for gradient in gradients])
            squares[index] = torch.stack(norms).double().square().sum().to(device) / shared_by
    return squares


def norm_metrics(engine: deepspeed.DeepSpeedEngine, squares: Tensor) -> dict[str, float]:
    """Norms before clipping, of everything and by group, from joint `squared_norms`; nothing where unknown."""
    if not len(squares):
        return {}
    names = [group["name"] for group in engine.optimizer.param_groups]
    by_group = {
        f"gradient_norm/{name}": math.sqrt(x) for name, x in zip(names, squares.tolist(), strict=True)
    }
    return {"gradient_norm": math.sqrt(float(squares.sum())), **by_group}


def step_without_update(engine: deepspeed.DeepSpeedEngine) -> None:
    """`engine.step()` that changes nothing but the engine's counters; the gradients are gone after it."""
    if engine.zero_optimization_stage() == 0:
        groups = engine.optimizer.param_groups
        kept = [group["params"] for group in groups]
        for group in groups:
            group["params"] = []
        engine.step()
        for group, parameters in zip(groups, kept, strict=True):
            group["params"] = parameters
        return
    # DeepSpeed discards a step whose gradients are not finite: its own way out, for any stage.
    filled = [gradient for group in local_gradients(engine) or [] for gradient in group if gradient.numel()]
    if filled:
        filled[0].view(-1)[0] = math.nan
    engine.step()
