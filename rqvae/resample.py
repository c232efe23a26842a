"""Between token resolution and latent resolution.

Kernel and stride are both K, so no chunk reaches into another one: latent j is made of tokens
[jK, (j+1)K) and token jK+i of latent j. Causality between chunks is the business of the transformers.

The `Reference...` pair is the overlapping one of charleslow/rq_vae, kept for the ablation and its checkpoints: its
convolutions reach into the chunks beside, also where another document begins there, and upsampling reads the next
latent.
"""

from __future__ import annotations

import torch.nn.functional as F
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


class _ConvolutionStack(nn.Module):
    """Convolutions over the sequence, each followed by GELU and a norm over channels."""

    def __init__(self, convolutions: list[nn.Module], widths: list[int]):
        super().__init__()
        self.convolutions = nn.ModuleList(convolutions)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = norm(F.gelu(convolution(x.transpose(1, 2))).transpose(1, 2))
        return x


class ReferenceDownsample(_ConvolutionStack):
    """log2(K) convolutions of kernel 3, stride 2 and padding 1: [B, T, H] -> [B, T / K, L]."""

    def __init__(self, in_dim: int, out_dim: int, compression_factor: int):
        steps = compression_factor.bit_length() - 1
        if steps == 0:
            super().__init__([nn.Conv1d(in_dim, out_dim, 1)], [out_dim])
            return
        widths = [in_dim] * (steps - 1) + [out_dim]
        super().__init__([nn.Conv1d(in_dim, width, 3, stride=2, padding=1) for width in widths], widths)


class ReferenceUpsample(nn.Module):
    """log2(K) transposed convolutions of kernel 4, stride 2 and padding 1: [B, S, L] -> [B, S * K, H]."""

    def __init__(self, in_dim: int, out_dim: int, compression_factor: int):
        super().__init__()
        steps = compression_factor.bit_length() - 1
        self.proj = nn.Linear(in_dim, out_dim)
        self.stack = _ConvolutionStack(
            [nn.ConvTranspose1d(out_dim, out_dim, 4, stride=2, padding=1) for _ in range(steps)],
            [out_dim] * steps,
        )

    def forward(self, x_BSL: Tensor) -> Tensor:
        """[B, S, L] -> [B, S * K, H]."""
        return self.stack(self.proj(x_BSL))
