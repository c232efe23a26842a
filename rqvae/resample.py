"""Between token resolution and latent resolution.

Kernel and stride are both K, so no chunk reaches into another one: latent j is made of tokens
[jK, (j+1)K) and token jK+i of latent j. Causality between chunks is the business of the transformers.
"""

from __future__ import annotations

from torch import Tensor, nn


class Downsample(nn.Module):
    """Strided convolution, kernel = stride = K, written as the matrix product it is."""

    def __init__(self, in_dim: int, out_dim: int, compression_factor: int):
        super().__init__()
        self.compression_factor = compression_factor
        self.proj = nn.Linear(compression_factor * in_dim, out_dim)

    def forward(self, x_BTH: Tensor) -> Tensor:
        """[B, T, H] -> [B, T / K, L]."""
        batch, length, _ = x_BTH.shape
        return self.proj(x_BTH.reshape(batch, length // self.compression_factor, -1))


class Upsample(nn.Module):
    """Transposed convolution, kernel = stride = K, written as the matrix product it is."""

    def __init__(self, in_dim: int, out_dim: int, compression_factor: int):
        super().__init__()
        self.compression_factor = compression_factor
        self.proj = nn.Linear(in_dim, compression_factor * out_dim)

    def forward(self, x_BSL: Tensor) -> Tensor:
        """[B, S, L] -> [B, S * K, H]."""
        batch, length, _ = x_BSL.shape
        return self.proj(x_BSL).reshape(batch, length * self.compression_factor, -1)
