"""Keys and values of a Hugging Face backbone in buffers that are allocated once.

The library's `DynamicCache` copies all it holds at every step; its `StaticCache` attends to all it could hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig
from transformers.cache_utils import DynamicLayer


def new_backbone_cache(config: PretrainedConfig, max_length: int) -> Cache:
    """Empty cache for `max_length` positions; it takes dtype, device and batch size from what is put into it."""
    return Cache(layers=[_BufferedLayer(max_length) for _ in range(config.num_hidden_layers)])


class _BufferedLayer(DynamicLayer):
    """`keys` and `values` are the filled front of buffers."""

    def __init__(self, max_length: int):
        super().__init__()
        self._max_length = max_length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        batch, heads, _, _ = key_states.shape
        self._buffers = [
            states.new_zeros(batch, heads, self._max_length, states.shape[-1])
            for states in (key_states, value_states)
        ]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self._max_length:
            raise ValueError(f"the cache holds {self._max_length} positions, {end} needed")
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        return self._show(end)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:
            self._buffers = [buffer[beam_idx] for buffer in self._buffers]
            self._show(self.get_seq_length())

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[:, :, :length] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values
