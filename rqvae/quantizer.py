"""Residual quantization with EMA codebooks.

The codebooks are fp32 buffers, never parameters: an optimizer would fight the moving averages, and
ZeRO-3 would overwrite them from its master copy. `forward` only reads them and remembers what it saw;
`update_codebook_ema` changes them, once per optimizer step, from the joined batch of all ranks. Hence
gradient checkpointing, gradient accumulation and the number of ranks change nothing.

Shapes: N vectors, E `codebook_dim`, C codebook size, D levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rqvae.config import QuantizerConfig

BLOCK_DISTANCES = 1 << 22
"""Distances formed at a time, so that memory does not grow as vectors x C."""

INITIALISATION_VECTORS_PER_CODE = 32
"""k-means needs some tens of vectors per centroid; more only costs time (faiss's default minimum is 39)."""


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest codebook entry in Euclidean distance, the lowest index on ties.

    Args:
        vectors: [N, E].
        codebook: [C, E].

    Returns:
        LongTensor [N].
    """
    half_norms = codebook.square().sum(1) / 2
    rows = max(1, BLOCK_DISTANCES // codebook.shape[0])
    # |x - c|^2 / 2 = |x|^2 / 2 - x.c + |c|^2 / 2, and the first term is the same for every code.
    blocks = [torch.addmm(half_norms, block, codebook.T, alpha=-1).argmin(1) for block in vectors.split(rows)]
    return torch.cat(blocks) if blocks else vectors.new_zeros(0, dtype=torch.long)


def sum_by_code(vectors: Tensor, codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Number [C] and sum [C, E] of the vectors assigned to every code."""
    counts = torch.bincount(codes, minlength=codebook_size).to(vectors.dtype)
    return counts, vectors.new_zeros(codebook_size, vectors.shape[1]).index_add_(0, codes, vectors)


def _joined(rows: list[Tensor]) -> Tensor:
    """The micro-batches' rows together; the usual single one is not copied."""
    return rows[0] if len(rows) == 1 else torch.cat(rows)


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

    def quantize(self, vectors: Tensor) -> Tensor:
        """Nearest code of every vector: [N, E] -> LongTensor [N]."""
        return nearest(vectors, self.codebook)

    def embed(self, codes: Tensor) -> Tensor:
        """Codebook entries: LongTensor [...] -> [..., E]."""
        return F.embedding(codes, self.codebook)

    def compute_perplexity(self) -> Tensor:
        """Perplexity of the moving-average usage, between 1 and C."""
        return compute_perplexity(self.ema_cluster_size)

    @torch.no_grad()
    def initialize(self, vectors: Tensor, num_iterations: int, generator: torch.Generator) -> None:
        """k-means on `vectors` [N, E], the same on all ranks."""
        # Equal vectors do not make equal bits: sums run in another order on another device.
        self.codebook.copy_(from_first_rank(kmeans(vectors, self.codebook_size, num_iterations, generator)))
        uniform = torch.ones_like(self.ema_cluster_size)
        self.ema_cluster_size.copy_(uniform)
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


class ResidualQuantizerOutput(NamedTuple):
    """Result of residual quantization of [B, S, E]."""

    quantized: Tensor
    """[B, S, E] sum of the chosen entries; the gradient passes straight through to the input."""
    codes: Tensor
    """LongTensor [B, S, D]."""
    commitment_loss: Tensor
    """[] sum over real positions and levels of the mean squared distance to the partial sums."""
    distortion: Tensor
    """[D] sum over real positions of the squared residual norm left after every level; no gradient."""


class ResidualQuantizer(nn.Module):
    """D quantizers, each coding what the ones before left over (Lee 2022, section 3.1, equations 2-3)."""

    def __init__(self, codebook_sizes: tuple[int, ...], dim: int, config: QuantizerConfig):
        super().__init__()
        self.config = config
        self.dim = dim
        self.levels: Sequence[Quantizer] = nn.ModuleList(  # type: ignore[assignment]
            Quantizer(size, dim) for size in codebook_sizes
        )
        # Since the last update: residuals, per level [N, E] because sums over strided rows are slow; codes [N, D].
        self._pending: list[tuple[list[Tensor], Tensor]] = []

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """C of every level."""
        return tuple(level.codebook_size for level in self.levels)

    def forward(self, latents: Tensor, mask: Tensor) -> ResidualQuantizerOutput:
        """Quantize.

        In training mode the real vectors are remembered for the next `update_codebook_ema`.

        Args:
            latents: [B, S, E] in any float dtype; quantized in fp32 (or fp64).
            mask: BoolTensor [B, S], False at padding, which is coded but counts for nothing.
        """
        work_dtype = torch.promote_types(latents.dtype, torch.float32)
        vectors = latents.to(work_dtype).reshape(-1, self.dim)
        real = mask.reshape(-1)
        residual = vectors.detach()
        total = torch.zeros_like(residual)
        commitment = vectors.new_zeros(())
        codes, residuals, distortion = [], [], []
        for level in self.levels:
            level_codes = level.quantize(residual)
            residuals.append(residual)
            codes.append(level_codes)
            total = total + level.embed(level_codes)
            difference = vectors - total
            residual = difference.detach()
            left_over = (difference.square().sum(1) * real).sum()
            # Every level's partial sum is asked to be near the input (Lee 2022, equation 7).
            commitment = commitment + left_over / self.dim
            distortion.append(left_over.detach())
        all_codes = torch.stack(codes, dim=1)
        if self.training:
            kept = torch.nonzero(real).squeeze(1)
            self._pending.append(([level_residual[kept] for level_residual in residuals], all_codes[kept]))
        quantized = vectors + (total - vectors).detach()
        return ResidualQuantizerOutput(
            quantized.to(latents.dtype).view_as(latents),
            all_codes.view(*latents.shape[:2], -1),
            commitment,
            torch.stack(distortion),
        )

    def embed(self, codes: Tensor) -> Tensor:
        """Sum of the codebook entries of the first levels given: LongTensor [..., D' <= D] -> [..., E]."""
        levels = list(self.levels)[: codes.shape[-1]]
        return sum((level.embed(codes[..., i]) for i, level in enumerate(levels)), torch.zeros(()))

    @torch.no_grad()
    def initialize(self, vectors: Tensor, seed: int) -> None:
        """k-means, level by level on what the levels before leave over; identical on all ranks.

        Args:
            vectors: [N, E], this rank's share of the vectors to initialise from.
            seed: of all random choices.

        Raises:
            ValueError: no rank has a vector.
        """
        generator = torch.Generator().manual_seed(seed)
        wanted = INITIALISATION_VECTORS_PER_CODE * max(self.codebook_sizes)
        residual = gather_rows(
            vectors.float(), lambda total: torch.randperm(total, generator=generator)[:wanted]
        ).to(self.levels[0].codebook.dtype)
        if len(residual) == 0:
            raise ValueError("no real latent vectors to initialise the codebooks from")
        for level in self.levels:
            level.initialize(residual, self.config.kmeans_iterations, generator)
            residual = residual - level.embed(level.quantize(residual))
        self._pending.clear()

    @torch.no_grad()
    def update_codebook_ema(self, step: int, seed: int) -> list[int]:
        """Learn from everything quantized in training mode since the last call, over all ranks.

        Every rank must call it, also one whose batch was all padding.

        Args:
            step: optimizer step; decides whether dead codes are searched.
            seed: of the choice of new places for dead codes, together with `step`.

        Returns:
            Codes re-seeded per level.
        """
        # A rank that has seen nothing has nothing of the right type.
        nothing = self.levels[0].codebook.new_zeros(0, self.dim)
        pending = self._pending or [
            ([nothing] * len(self.levels), nothing.new_zeros(0, len(self.levels), dtype=torch.long))
        ]
        residuals = [_joined([seen[i] for seen, _ in pending]) for i in range(len(self.levels))]
        codes = _joined([seen for _, seen in pending])
        self._pending = []
        parts: list[Tensor] = []
        for i, level in enumerate(self.levels):
            parts += sum_by_code(residuals[i], codes[:, i], level.codebook_size)
        # One message for all levels.
        joined = all_reduce_sum(torch.cat([part.flatten() for part in parts]))
        pieces = joined.split([part.numel() for part in parts])
        replaced = []
        for i, level in enumerate(self.levels):
            counts, sums = pieces[2 * i], pieces[2 * i + 1].view(-1, self.dim)
            level.apply_ema(
                counts.to(level.codebook.dtype), sums.to(level.codebook.dtype), self.config.ema_decay
            )
            replaced.append(0)
            if self.config.threshold_ema_dead_code and step % self.config.dead_code_interval == 0:
                generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 64 + i)
                replaced[i] = level.replace_dead_codes(
                    residuals[i], self.config.threshold_ema_dead_code, generator
                )
        return replaced

    def discard_pending(self) -> None:
        """Forget what was seen since the last update, for a step that is skipped."""
        self._pending.clear()

    def usage_metrics(self) -> dict[str, float]:
        """Per-level statistics for logs: perplexity, share of codes in use, re-seeded codes."""
        summary: dict[str, float] = {}
        for i, level in enumerate(self.levels):
            usage = level.ema_cluster_size
            summary[f"codebook/perplexity_{i}"] = float(level.compute_perplexity())
            summary[f"codebook/used_fraction_{i}"] = float(
                (usage >= self.config.threshold_ema_dead_code * usage.mean()).float().mean()
            )
            summary[f"codebook/dead_replaced_{i}"] = int(level.dead_replaced)
        return summary
