"""One level of residual quantization: a codebook, its moving averages, and how it is initialised.

Shapes: N vectors, E `codebook_dim`, C codebook size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rqvae.collectives import from_first_rank, gather_rows

BLOCK_DISTANCES = {"cpu": 1 << 19, "cuda": 1 << 24}
"""Distances formed at a time, so that memory does not grow as vectors x C. Those of a CPU stay in its cache, which
halves the time; a GPU, of whatever make, wants large products."""


def nearest(vectors: Tensor, codebook: Tensor, costs: Tensor | None = None) -> Tensor:
    """Index of the nearest codebook entry in Euclidean distance, the lowest index on ties.

    Args:
        vectors: [N, E].
        codebook: [C, E].
        costs: [C], added to the squared distance to every entry.

    Returns:
        LongTensor [N].
    """
    half_norms = (codebook.square().sum(1) if costs is None else codebook.square().sum(1) + costs) / 2
    limit = BLOCK_DISTANCES["cpu" if vectors.device.type == "cpu" else "cuda"]
    rows = max(1, limit // codebook.shape[0])
    # |x - c|^2 / 2 = |x|^2 / 2 - x.c + |c|^2 / 2, and the first term is the same for every code.
    blocks = [torch.addmm(half_norms, block, codebook.T, alpha=-1).argmin(1) for block in vectors.split(rows)]
    return torch.cat(blocks) if blocks else vectors.new_zeros(0, dtype=torch.long)


def sum_by_code(vectors: Tensor, codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Number [C] and sum [C, E] of the vectors assigned to every code."""
    counts = torch.bincount(codes, minlength=codebook_size).to(vectors.dtype)
    return counts, vectors.new_zeros(codebook_size, vectors.shape[1]).index_add_(0, codes, vectors)


def kmeans(vectors: Tensor, num_clusters: int, num_iterations: int, generator: torch.Generator) -> Tensor:
    """Lloyd's algorithm from randomly chosen vectors; empty clusters are moved to random vectors.

    Args:
        vectors: [N, E] with N >= 1. With fewer vectors than clusters they are repeated with small noise.

    Returns:
        Centroids [num_clusters, E].
    """
    scale = vectors.std() if len(vectors) > 1 else vectors.new_tensor(1.0)

    def draw(count: int) -> Tensor:
        index = torch.randperm(len(vectors), generator=generator)
        if count > len(vectors):
            index = torch.randint(len(vectors), (count,), generator=generator)
        noise = torch.randn(count, vectors.shape[1], generator=generator, dtype=vectors.dtype)
        return vectors[index[:count].to(vectors.device)] + 1e-3 * scale * noise.to(vectors.device)

    centroids = draw(num_clusters)
    for _ in range(num_iterations):
        counts, sums = sum_by_code(vectors, nearest(vectors, centroids), num_clusters)
        empty = counts == 0
        centroids = torch.where(empty[:, None], centroids, sums / counts.clamp(min=1)[:, None])
        if empty.any():
            centroids[empty] = draw(int(empty.sum()))
    return centroids


def compute_perplexity(counts: Tensor) -> Tensor:
    """exp(entropy) of the usage given by `counts` [..., C]: between 1 and C. Scale-free."""
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1e-12)
    return torch.special.entr(shares).sum(-1).exp()


class Quantizer(nn.Module):
    """One level: a codebook and its moving averages.

    Buffers (fp32, saved):
        codebook: [C, E].
        ema_cluster_size: [C] moving average of the vectors assigned per step.
        ema_embed_sum: [C, E] moving average of their sum.
        dead_replaced: [] int64, codes re-seeded since the start of training.
    """

    codebook: Tensor
    ema_cluster_size: Tensor
    ema_embed_sum: Tensor
    dead_replaced: Tensor

    def __init__(self, codebook_size: int, dim: int):
        super().__init__()
        self.codebook_size = codebook_size
        self.dim = dim
        # `.float()` because a ZeRO-3 construction context turns new float tensors into bf16.
        self.register_buffer("codebook", torch.randn(codebook_size, dim).float())
        self.register_buffer("ema_cluster_size", torch.ones(codebook_size).float())
        self.register_buffer("ema_embed_sum", self.codebook.clone())
        self.register_buffer("dead_replaced", torch.zeros((), dtype=torch.long))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        # `model.bfloat16()` must not round the codebooks; moving to a device and `.double()` may pass.
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and before is not None and after.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = before.to(after.device)
        return self

    def quantize(self, vectors: Tensor, nat_cost: Tensor | None = None) -> Tensor:
        """Nearest code of every vector: [N, E] -> LongTensor [N].

        Args:
            nat_cost: [], what a nat of a code's length costs, in squared distance; a code that is a share p of all
                is -log p nats long (entropy-constrained quantization: Chou 1989).
        """
        if nat_cost is None:
            return nearest(vectors, self.codebook)
        # An average that has died out is 0, of infinite length.
        usage = self.ema_cluster_size.clamp(min=1e-12)
        return nearest(vectors, self.codebook, -nat_cost * (usage / usage.sum()).log())

    def embed(self, codes: Tensor) -> Tensor:
        """Codebook entries: LongTensor [...] -> [..., E]."""
        return F.embedding(codes, self.codebook)

    def soft_assignment(self, vectors: Tensor, temperature: Tensor) -> Tensor:
        """Probability of every code, p(code) ~ exp(-distance^2 / temperature) (Lee 2022, equation 13).

        Args:
            vectors: [N, E].
            temperature: [], in squared distance.

        Returns:
            [N, C].
        """
        # |x|^2 is the same for every code and falls out of the softmax.
        distances = torch.addmm(self.codebook.square().sum(1), vectors, self.codebook.T, alpha=-2)
        return (-distances / temperature.clamp(min=1e-12)).softmax(-1)

    def compute_perplexity(self) -> Tensor:
        """Perplexity of the moving-average usage, between 1 and C."""
        return compute_perplexity(self.ema_cluster_size)

    @torch.no_grad()
    def initialize(self, vectors: Tensor, num_iterations: int, generator: torch.Generator) -> None:
        """k-means on `vectors` [N, E], the same on all ranks."""
        # Equal vectors do not make equal bits: sums run in another order on another device.
        self.start_from(from_first_rank(kmeans(vectors, self.codebook_size, num_iterations, generator)))

    @torch.no_grad()
    def start_from(self, codebook: Tensor) -> None:
        """Take these entries [C, E], as if each had been used once per step."""
        self.codebook.copy_(codebook)
        self.ema_cluster_size.fill_(1)
        self.ema_embed_sum.copy_(self.codebook)

    @torch.no_grad()
    def apply_ema(self, counts: Tensor, sums: Tensor, decay: float) -> None:
        """Move the averages towards one step's `counts` [C] and `sums` [C, E] (joined over ranks)."""
        self.ema_cluster_size.lerp_(counts, 1 - decay)
        self.ema_embed_sum.lerp_(sums, 1 - decay)
        # A code unused for very long keeps its place instead of dividing 0 by 0.
        used = self.ema_cluster_size > 1e-6
        self.codebook[used] = self.ema_embed_sum[used] / self.ema_cluster_size[used, None]

    @torch.no_grad()
    def replace_dead_codes(self, residuals: Tensor, threshold: float, generator: torch.Generator) -> int:
        """Move codes used less than `threshold` times uniform onto random vectors of the joined batch.

        Both averages are reset together, to uniform usage at the new place; otherwise the next update
        would pull the code back or judge it dead again.

        Args:
            residuals: [N, E] what this level quantized in this step on this rank.

        Returns:
            Number of codes moved.
        """
        uniform = self.ema_cluster_size.mean()
        dead = torch.nonzero(self.ema_cluster_size < threshold * uniform).squeeze(1)
        if len(dead) == 0:
            return 0
        seeds = gather_rows(
            residuals, lambda total: torch.randperm(total, generator=generator)[: len(dead)]
        ).to(self.codebook.dtype)
        dead = dead[: len(seeds)]
        self.codebook[dead] = seeds
        self.ema_cluster_size[dead] = uniform
        self.ema_embed_sum[dead] = seeds * uniform
        self.dead_replaced += len(dead)
        return len(dead)


class FiniteScalarQuantizer(Quantizer):
    """One level whose entries are a fixed grid in [-scale, scale]^E (Mentzer 2023, section 3).

    The grid points are the centres of equal cells, so that what is left over lies within a cell's half width and
    a finer grid can go on from there, also with 2 values per dimension. (The paper's outermost points lie on the
    edges, where a second level of 2 values would gain nothing.)

    Nothing is learnt and no code can die; the averages only count usage.

    Args:
        levels: values per dimension; C is their product.
        scale: [E] half-width of the grid in every dimension.
    """

    def __init__(self, levels: tuple[int, ...], scale: Tensor):
        points = [(2 * torch.arange(size) + 1) / size - 1 for size in levels]
        grid = torch.cartesian_prod(*points).view(-1, len(levels))
        super().__init__(len(grid), len(levels))
        self.codebook.copy_(grid * scale)
        self.register_buffer("sizes", torch.tensor(levels), persistent=False)
        self.register_buffer("scale", scale.float(), persistent=False)

    sizes: Tensor
    scale: Tensor

    def quantize(self, vectors: Tensor, nat_cost: Tensor | None = None) -> Tensor:
        """Nearest grid point of every vector, dimension by dimension: [N, E] -> LongTensor [N]. All cost the same."""
        cells = ((vectors / self.scale + 1) * self.sizes / 2).floor().clamp(min=0).long()
        cells = torch.minimum(cells, self.sizes - 1)
        strides = self.sizes.flip(0).cumprod(0).flip(0) // self.sizes
        return (cells * strides).sum(1)

    def initialize(self, vectors: Tensor, num_iterations: int, generator: torch.Generator) -> None:
        """The grid stays."""

    def apply_ema(self, counts: Tensor, sums: Tensor, decay: float) -> None:
        """Count usage; the grid stays."""
        self.ema_cluster_size.lerp_(counts, 1 - decay)

    def replace_dead_codes(self, residuals: Tensor, threshold: float, generator: torch.Generator) -> int:
        """Nothing to replace: returns 0."""
        return 0
