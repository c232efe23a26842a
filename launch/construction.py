"""Building a model that ZeRO-3 will split, without every process holding all of it.

Only rank 0 builds and fills it whole, on the CPU. The others build it without storage; then every parameter is sent
around and split, one after another. The result is bit for bit what building it everywhere gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from launch.engine import on_all_ranks
from launch.parameters import parameters_without_storage


def build_split(
    create: Callable[[], nn.Module],
    fill: Callable[[nn.Module], None] | None,
    config: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """A model whose parameters are split over the ranks as ZeRO-3 wants them.

    Args:
        create: makes the model; seeded by the caller.
        fill: gives it its weights; None if they are loaded into the engine later.
        config: for DeepSpeed, with stage 3.
        dtype: of the parameters. Buffers stay as they are.
        device: of this rank.

    Raises:
        ValueError: `create` or `fill` raised one on some rank.
    """
    is_whole = dist.get_rank() == 0 and fill is not None

    def build() -> nn.Module:
        if not is_whole:
            with parameters_without_storage():
                return create()
        model = create()
        assert fill is not None
        fill(model)
        return model

    model = on_all_ranks(build)
    deepspeed.zero.Init(module=_OneByOne(model, dtype, device), config_dict_or_path=config, dtype=dtype)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            buffer = buffer.to(device).contiguous()
            dist.broadcast(buffer, 0)
            module.register_buffer(name, buffer, name not in module._non_persistent_buffers_set)
    return model


class _OneByOne(nn.Module):
    """Hands out the parameters of a model, giving each its storage just before DeepSpeed sends and splits it."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self._of, self._dtype, self._device = [model], dtype, device  # in a list, so that it is no submodule

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        for parameter in self._of[0].parameters(recurse):
            if parameter.is_meta:
                torch.utils.swap_tensors(parameter, self._with_storage(parameter))
            else:
                parameter.data = parameter.data.to(self._dtype)
            yield parameter

    def _with_storage(self, parameter: nn.Parameter) -> nn.Parameter:
        # No variable may hold the result while DeepSpeed splits it, or it would not be freed in time.
        storage = torch.zeros(parameter.shape, dtype=self._dtype, device=self._device)
        return nn.Parameter(storage, parameter.requires_grad)
