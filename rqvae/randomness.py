"""Random numbers that belong to a sample, not to a process.

Whatever is drawn in training is a pure function of (seed, step, sample): the same on any number of ranks, after a
resume, and in the second forward pass of gradient checkpointing. What is drawn in generation is one of (seed, row,
position, level): the same in any batch and any order of work. A generator with a state gives none of this.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor


class Purpose(IntEnum):
    """What numbers are drawn for; tells draws from the same seeds apart."""

    TOKEN_DROPOUT = 0
    LATENT_DROPOUT = 1
    LATENT_NOISE = 2
    LEVEL_DROPOUT = 3
    CODES = 4
    PARTICLES = 5
    GENERATION = 6


# Steele 2014, figure 14 (SplitMix64), as signed 64-bit integers, whose products wrap around on every device.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    return x ^ _shifted(x, 31)


def sample_seeds(seed: int, step: int | Tensor, sample_index: Tensor) -> Tensor:
    """One seed per sample of a step.

    Args:
        seed: of the run.
        step: optimizer step, or a LongTensor of the shape of `sample_index`.
        sample_index: LongTensor [B], global.

    Returns:
        LongTensor [B].
    """
    of_seed = _mix(torch.full_like(sample_index, seed) * _GAMMA)
    steps = step if isinstance(step, Tensor) else torch.full_like(sample_index, step)
    of_step = _mix(of_seed + steps * _GAMMA)
    return _mix(of_step + (sample_index + 1) * _GAMMA)


def uniform(seeds: Tensor, purpose: int, *shape: int) -> Tensor:
    """Independent numbers in (0, 1), fp32.

    Args:
        seeds: LongTensor [B].
        purpose: one of `Purpose`.
        shape: of the numbers of one sample.

    Returns:
        [B, *shape].
    """
    # 23 bits, so that fp32 holds the halves between them too and neither 0 nor 1 comes out.
    bits = _shifted(_hashes(seeds, purpose, math.prod(shape)), 41)
    return ((bits.float() + 0.5) / (1 << 23)).view(-1, *shape)


def fine_uniform(seeds: Tensor, purpose: int, *shape: int) -> Tensor:
    """Independent numbers in (0, 1), fp64, with 52 bits: for draws among events too rare for the 23 of `uniform`.
    Arguments as there."""
    bits = _shifted(_hashes(seeds, purpose, math.prod(shape)), 12)
    return ((bits.double() + 0.5) / (1 << 52)).view(-1, *shape)


def _hashes(seeds: Tensor, purpose: int, count: int) -> Tensor:
    """LongTensor [B, count] of 64 random bits."""
    index = torch.arange(1, count + 1, device=seeds.device)
    base = _mix(seeds + torch.full_like(seeds, purpose) * _MIX_1)
    return _mix(base[:, None] + index * _GAMMA)


def normal(seeds: Tensor, purpose: int, *shape: int) -> Tensor:
    """Independent standard normal numbers [B, *shape], fp32; arguments as in `uniform`."""
    # Box-Muller.
    radius, angle = uniform(seeds, purpose, 2, *shape).unbind(1)
    return (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()
