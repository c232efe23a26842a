"""One level of the depth loop: eager, or as a single launch, compiled on a CPU and a CUDA graph on a GPU.

The loop takes D steps of a small stack for every latent, so that what it costs to launch the operations counts.

Shapes: B batch, D levels, G depth width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rqvae.layers import LayerCache, TransformerBlock, TransformerCache


class DepthStep:
    """Runs the stack level by level with the operations as they are.

    Args:
        like: dtype and device of the buffers.
    """

    def __init__(self, block: TransformerBlock, batch_size: int, num_levels: int, like: Tensor):
        self._block = block
        layers: list[LayerCache] = [
            _LevelCache(batch_size, block.num_heads, num_levels, block.head_dim, like) for _ in block.layers
        ]
        self._cache = TransformerCache(layers, num_levels)

    def begin(self) -> None:
        """The next call is for the first level of a position."""
        self._cache.reset()

    def __call__(self, x: Tensor) -> Tensor:
        """Input of the next level [B, 1, G] -> its state [B, G], valid until the next call."""
        return self._block(x, None, None, self._cache)[:, 0]


class CompiledDepthStep(DepthStep):
    """Runs the stack as one launch, whose shapes and addresses are the same at every level: all D slots are attended
    to, those not yet written behind a mask, and the slot to write is a number on the device."""

    def __init__(self, block: TransformerBlock, batch_size: int, num_levels: int, like: Tensor):
        self._block = block
        self._slot = torch.zeros(1, dtype=torch.long, device=like.device)
        self._slots = torch.arange(num_levels, device=like.device)
        layers: list[LayerCache] = [
            _SlotCache(batch_size, block.num_heads, num_levels, block.head_dim, like, self._slot)
            for _ in block.layers
        ]
        self._cache = TransformerCache(layers, num_levels)
        self._graph: torch.cuda.CUDAGraph | None = None
        if like.device.type == "cuda":
            self._x = like.new_zeros(batch_size, 1, like.shape[-1])
            self._graph = self._captured()
        else:
            self._launch = torch.compile(self._run)

    def begin(self) -> None:
        """See `DepthStep.begin`."""
        self._slot.zero_()

    def __call__(self, x: Tensor) -> Tensor:
        """See `DepthStep`."""
        if self._graph is None:
            return self._launch(x)
        self._x.copy_(x)
        self._graph.replay()
        return self._hidden

    def _run(self, x: Tensor) -> Tensor:
        self._cache.reset()
        mask = (self._slots <= self._slot)[None, None, None]  # [1, 1, 1, D]
        hidden = self._block(x, None, mask, self._cache)[:, 0]
        self._slot.add_(1)
        return hidden

    def _captured(self) -> torch.cuda.CUDAGraph:
        # Libraries allocate their workspaces in the first calls, which cannot be captured.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.begin()
                self._run(self._x)
        torch.cuda.current_stream().wait_stream(stream)
        self.begin()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._hidden = self._run(self._x)
        return graph


class _LevelCache(LayerCache):
    """One position at a time; the views of the buffers are made once, as the same ones serve every latent."""

    def __init__(self, batch_size: int, num_heads: int, max_length: int, head_dim: int, like: Tensor):
        super().__init__(batch_size, num_heads, max_length, head_dim, like)
        levels = range(max_length)
        self._slots = [(self.keys[:, :, i : i + 1], self.values[:, :, i : i + 1]) for i in levels]
        self._seen = [(self.keys[:, :, : i + 1], self.values[:, :, : i + 1]) for i in levels]

    def append(self, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        slot_keys, slot_values = self._slots[start]
        slot_keys.copy_(keys)
        slot_values.copy_(values)
        return self._seen[start]


class _SlotCache(LayerCache):
    """All slots at once; `slot` [1] says which one is written."""

    def __init__(
        self, batch_size: int, num_heads: int, max_length: int, head_dim: int, like: Tensor, slot: Tensor
    ):
        super().__init__(batch_size, num_heads, max_length, head_dim, like)
        self._slot = slot

    def append(self, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self._slot, keys)
        self.values.index_copy_(2, self._slot, values)
        return self.keys, self.values
