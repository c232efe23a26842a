"""Residual quantization with EMA codebooks.

The codebooks are fp32 buffers, never parameters: an optimizer would fight the moving averages, and
ZeRO-3 would overwrite them from its master copy. `forward` only reads them and remembers what it saw;
`update_codebook_ema` changes them, once per optimizer step, from the joined batch of all ranks. Hence
gradient checkpointing, gradient accumulation and the number of ranks change nothing.

Shapes: N vectors, E `codebook_dim`, C codebook size, D levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rqvae import persistence
from rqvae.config import QuantizerConfig, ResidualQuantizerConfig

BLOCK_DISTANCES = {"cpu": 1 << 19, "cuda": 1 << 24}
"""Distances formed at a time, so that memory does not grow as vectors x C. Those of a CPU stay in its cache, which
halves the time; a GPU, of whatever make, wants large products."""

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
    limit = BLOCK_DISTANCES["cpu" if vectors.device.type == "cpu" else "cuda"]
    rows = max(1, limit // codebook.shape[0])
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


def rotate_to(vectors: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` in value, with the gradient of a rotation and scaling of `vectors` onto it.

    The rotation trick (Fifty 2024, section 4.2): the gradient keeps its angle to the vector, where
    straight-through keeps its direction.

    Args:
        vectors, quantized: [N, E]; no gradient flows into `quantized`.
    """
    length, target_length = (
        x.detach().norm(dim=1, keepdim=True).clamp(min=1e-6) for x in (vectors, quantized)
    )
    direction, target = vectors.detach() / length, quantized.detach() / target_length
    middle = torch.nn.functional.normalize(direction + target, dim=1)
    rotated = vectors - 2 * (vectors * middle).sum(1, keepdim=True) * middle
    rotated = rotated + 2 * (vectors * direction).sum(1, keepdim=True) * target
    rotated = rotated * (target_length / length)
    # The difference is exactly 0, so that the value is that of the codes to the last bit.
    return quantized.detach() + (rotated - rotated.detach())


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

    def quantize(self, vectors: Tensor) -> Tensor:
        """Nearest grid point of every vector, dimension by dimension: [N, E] -> LongTensor [N]."""
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


class ResidualQuantizerOutput(NamedTuple):
    """Result of residual quantization of [B, S, E]."""

    quantized: Tensor
    """[B, S, E] sum of the chosen entries of the kept levels; its gradient reaches the input as `gradient` says."""
    codes: Tensor
    """LongTensor [B, S, D]."""
    commitment_loss: Tensor
    """[] sum over real positions and levels of the mean squared distance to the partial sums."""
    distortion: Tensor
    """[D] sum over real positions of the squared residual norm left after every level; no gradient."""


class ResidualQuantizer(nn.Module):
    """D quantizers, each coding what the ones before left over (Lee 2022, section 3.1, equations 2-3).

    Args:
        codebook_sizes: C of every level.
        dim: E.

    Attributes:
        levels: the quantizers: one per level, or a single one that serves all (`shared_codebook`).
        ema_distortion: buffer [D] fp32, moving average of the squared distance left after every level; the scale
            of stochastic codes.
        codec_hash: of the codec that it was saved from, if it was loaded by itself.
    """

    ema_distortion: Tensor

    def __init__(self, codebook_sizes: tuple[int, ...], dim: int, config: QuantizerConfig):
        super().__init__()
        self.config = config
        self.dim = dim
        self.num_levels = len(codebook_sizes)
        self.codec_hash: str | None = None
        self.levels: Sequence[Quantizer]
        if config.fsq_levels is not None:
            finer = 1 / torch.tensor(config.fsq_levels)  # n values leave 1 / n of the width
            self.levels = nn.ModuleList(  # type: ignore[assignment]
                FiniteScalarQuantizer(config.fsq_levels, finer**level) for level in range(self.num_levels)
            )
        else:
            sizes = codebook_sizes[:1] if config.shared_codebook else codebook_sizes
            self.levels = nn.ModuleList(Quantizer(size, dim) for size in sizes)  # type: ignore[assignment]
        self.register_buffer("ema_distortion", torch.ones(self.num_levels).float())
        # Since the last update: residuals, per level [N, E] because sums over strided rows are slow; codes [N, D];
        # summed squared distances [D].
        self._pending: list[tuple[list[Tensor], Tensor, Tensor]] = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ResidualQuantizer:
        before = self.ema_distortion
        super()._apply(fn, recurse)
        if self.ema_distortion.dtype in (torch.bfloat16, torch.float16):  # as in `Quantizer`
            self.ema_distortion = before.to(self.ema_distortion.device)
        return self

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> ResidualQuantizer:
        """Load what `save_pretrained` wrote, in evaluation mode; ValueError if it is something else."""

        def create(config: ResidualQuantizerConfig) -> ResidualQuantizer:
            quantizer = cls(config.codebook_sizes, config.codebook_dim, config.quantizer)
            quantizer.codec_hash = config.codec_hash
            return quantizer

        return persistence.load_model(cls, ResidualQuantizerConfig, directory, create)

    def save_pretrained(self, directory: str | Path, codec_hash: str | None = None) -> None:
        """Write `config.json` and safetensors. `codec_hash` says which codec it is a part of."""
        config = ResidualQuantizerConfig(
            codebook_sizes=self.codebook_sizes,
            codebook_dim=self.dim,
            quantizer=self.config,
            codec_hash=codec_hash,
        )
        persistence.save_model(self, config, directory)

    def level(self, index: int) -> Quantizer:
        """The quantizer that serves a level."""
        return self.levels[0 if self.config.shared_codebook else index]

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """C of every level."""
        return tuple(self.level(index).codebook_size for index in range(self.num_levels))

    def bound(self, latents: Tensor) -> Tensor:
        """Latents as they are quantized: for fixed grids brought into [-1, 1], in fp32; else as they are."""
        if self.config.method == "ema":
            return latents
        return latents.to(torch.promote_types(latents.dtype, torch.float32)).tanh()

    @torch.no_grad()
    def search(self, vectors: Tensor) -> Tensor:
        """Codes of the nearest sum of entries that a beam search finds (multi-path encoding: Babenko 2014, section 3;
        Liu 2015, section 3.2).

        Greedy choice is the best for its level, not for the sum. The `beam_width` best partial sums are kept from
        level to level, and the last level's best is taken.

        Args:
            vectors: [N, E] in fp32 (or fp64).

        Returns:
            LongTensor [N, D].
        """
        width = self.config.beam_width
        limit = BLOCK_DISTANCES["cpu" if vectors.device.type == "cpu" else "cuda"]
        rows = max(1, limit // (width * max(self.codebook_sizes)))
        found = [self._search_block(block, width) for block in vectors.split(rows)]
        return torch.cat(found) if found else vectors.new_zeros(0, self.num_levels, dtype=torch.long)

    def _search_block(self, vectors: Tensor, width: int) -> Tensor:
        residuals = vectors[:, None]  # [N, beams, E]
        codes = torch.zeros(len(vectors), 1, 0, dtype=torch.long, device=vectors.device)
        for index in range(self.num_levels):
            codebook = self.level(index).codebook
            beams = residuals.shape[1]
            # Half of the squared norm left after every code of every beam.
            left = torch.addmm(
                codebook.square().sum(1) / 2, residuals.flatten(0, 1), codebook.T, alpha=-1
            ).view(len(vectors), beams, -1)
            left = left + residuals.square().sum(2, keepdim=True) / 2
            wanted = 1 if index == self.num_levels - 1 else width
            best = left.flatten(1).topk(min(wanted, left[0].numel()), dim=1, largest=False).indices
            beam, code = best // len(codebook), best % len(codebook)
            row = torch.arange(len(vectors), device=vectors.device)[:, None]
            residuals = residuals[row, beam] - codebook[code]
            codes = torch.cat([codes[row, beam], code[..., None]], dim=2)
        return codes[:, 0]

    def forward(
        self,
        latents: Tensor,
        mask: Tensor,
        kept_levels: Tensor | None = None,
        codes: Tensor | None = None,
    ) -> ResidualQuantizerOutput:
        """Quantize.

        In training mode the real vectors are remembered for the next `update_codebook_ema`.

        Args:
            latents: [B, S, E] in any float dtype, through `bound`; quantized in fp32 (or fp64).
            mask: BoolTensor [B, S], False at padding, which is coded but counts for nothing.
            kept_levels: LongTensor [B], leading levels that `quantized` is made of; all by default. Codes,
                losses and codebooks are not touched by it.
            codes: LongTensor [B, S, D] chosen elsewhere, as by `sample`; by default the nearest.
        """
        work_dtype = torch.promote_types(latents.dtype, torch.float32)
        vectors = latents.to(work_dtype).reshape(-1, self.dim)
        real = mask.reshape(-1)
        if kept_levels is not None:
            kept_levels = kept_levels.repeat_interleave(latents.shape[1])[:, None]
        residual = vectors.detach()
        total = torch.zeros_like(residual)
        kept = total
        commitment = vectors.new_zeros(())
        chosen, residuals, distortion = [], [], []
        given = None if codes is None else codes.flatten(0, 1)
        if given is None and self.config.beam_width > 1:
            given = self.search(residual)
        for index in range(self.num_levels):
            level = self.level(index)
            level_codes = level.quantize(residual) if given is None else given[:, index]
            residuals.append(residual)
            chosen.append(level_codes)
            total = total + level.embed(level_codes)
            difference = vectors - total
            residual = difference.detach()
            if kept_levels is not None:
                kept = torch.where(kept_levels > index, total, kept)
            left_over = (difference.square().sum(1) * real).sum()
            # Every level's partial sum is asked to be near the input (Lee 2022, equation 7).
            commitment = commitment + left_over / self.dim
            distortion.append(left_over.detach())
        all_codes = torch.stack(chosen, dim=1)
        if self.training:
            # The first residual may be the caller's own memory.
            if real.all():
                seen, seen_codes = [residuals[0].clone(), *residuals[1:]], all_codes
            else:
                rows = torch.nonzero(real).squeeze(1)
                seen, seen_codes = [level_residual[rows] for level_residual in residuals], all_codes[rows]
            self._pending.append((seen, seen_codes, torch.stack(distortion)))
        if kept_levels is None:
            kept = total
        if self.config.method == "fsq":
            commitment = vectors.new_zeros(())  # a grid has nothing to be near to (Mentzer 2023, table 1)
        if self.config.gradient == "rotation":
            quantized = rotate_to(vectors, kept)
        else:
            quantized = vectors + (kept - vectors).detach()
        return ResidualQuantizerOutput(
            quantized.to(latents.dtype).view_as(latents),
            all_codes.view(*latents.shape[:2], -1),
            commitment,
            torch.stack(distortion),
        )

    def sample(
        self,
        latents: Tensor,
        numbers: Tensor,
        with_soft_targets: bool = False,
        temperature: float | None = None,
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Stochastic codes: every level drawn from its soft assignment of what the draws before left over.

        Lee 2022, section 3.2.3: sampled codes as inputs and their distributions as targets keep the latent
        model from relying on codes that it will not predict exactly. The distributions pass gradients on to the
        latents.

        Args:
            latents: [B, S, E], through `bound`.
            numbers: [B, S, D] uniform in (0, 1), one per draw.
            with_soft_targets: also return the distributions that were drawn from.
            temperature: in place of `code_temperature`.

        Returns:
            LongTensor [B, S, D], and by level [B, S, C] or None.
        """
        if temperature is None:
            temperature = self.config.code_temperature
        work_dtype = torch.promote_types(latents.dtype, torch.float32)
        residual = latents.to(work_dtype).reshape(-1, self.dim)
        codes: list[Tensor] = []
        targets: list[Tensor] = []
        for index in range(self.num_levels):
            level = self.level(index)
            shares = level.soft_assignment(residual, temperature * self.ema_distortion[index])
            if with_soft_targets:
                targets.append(shares.view(*latents.shape[:2], -1))
            cumulative = shares.cumsum(1)
            draws = numbers[..., index].reshape(-1, 1).to(work_dtype) * cumulative[:, -1:]
            codes.append(
                torch.searchsorted(cumulative.detach(), draws.detach())
                .squeeze(1)
                .clamp(max=level.codebook_size - 1)
            )
            residual = residual - level.embed(codes[-1])
        return torch.stack(codes, dim=1).view(numbers.shape), targets if with_soft_targets else None

    def embed(self, codes: Tensor) -> Tensor:
        """Sum of the codebook entries of the first levels given: LongTensor [..., D' <= D] -> [..., E]."""
        parts = (self.level(i).embed(codes[..., i]) for i in range(codes.shape[-1]))
        return sum(parts, torch.zeros(()))

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
        if self.config.shared_codebook:
            self._initialize_shared(residual, generator)
        for index in range(self.num_levels):
            level = self.level(index)
            if not self.config.shared_codebook:
                level.initialize(residual, self.config.kmeans_iterations, generator)
            residual = residual - level.embed(level.quantize(residual))
            self.ema_distortion[index] = from_first_rank(residual.square().sum(1).mean())
        self._pending.clear()

    def _initialize_shared(self, vectors: Tensor, generator: torch.Generator) -> None:
        """One codebook of entries for every level: C / D from k-means on each level's residuals.

        k-means on the latents alone would give deeper levels no entry small enough.
        """
        only = self.levels[0]
        parts, left = [], only.codebook_size
        rest = vectors
        for index in range(self.num_levels):
            share = left // (self.num_levels - index)
            part = from_first_rank(kmeans(rest, share, self.config.kmeans_iterations, generator))
            rest = rest - part[nearest(rest, part)]
            left -= share
            parts.append(part)
        only.start_from(torch.cat(parts))

    @torch.no_grad()
    def update_codebook_ema(self, step: int, seed: int) -> list[int]:
        """Learn from everything quantized in training mode since the last call, over all ranks.

        Every rank must call it, also one whose batch was all padding.

        Args:
            step: optimizer step; decides whether dead codes are searched.
            seed: of the choice of new places for dead codes, together with `step`.

        Returns:
            Codes re-seeded per codebook.
        """
        # A rank that has seen nothing has nothing of the right type.
        nothing = self.levels[0].codebook.new_zeros(0, self.dim)
        pending = self._pending or [
            (
                [nothing] * self.num_levels,
                nothing.new_zeros(0, self.num_levels, dtype=torch.long),
                nothing.new_zeros(self.num_levels),
            )
        ]
        residuals = [_joined([seen[i] for seen, _, _ in pending]) for i in range(self.num_levels)]
        codes = list(_joined([seen for _, seen, _ in pending]).unbind(1))
        distortion = torch.stack([seen for _, _, seen in pending]).sum(0)
        self._pending = []
        num_vectors = distortion.new_tensor([len(residuals[0])])
        if self.config.shared_codebook:
            # Its only quantizer served all levels. Vector by vector, so that the joined order is that of the
            # samples on any number of ranks.
            residuals = [torch.stack(residuals, dim=1).flatten(0, 1)]
            codes = [torch.stack(codes, dim=1).flatten()]
        parts: list[Tensor] = [num_vectors, distortion]
        for level, its_residuals, its_codes in zip(self.levels, residuals, codes, strict=True):
            parts += sum_by_code(its_residuals, its_codes, level.codebook_size)
        # One message for all levels.
        joined = all_reduce_sum(torch.cat([part.flatten() for part in parts]))
        num_vectors, distortion, *pieces = joined.split([part.numel() for part in parts])
        if num_vectors > 0:
            mean = (distortion / num_vectors).to(self.ema_distortion.dtype)
            self.ema_distortion.lerp_(mean, 1 - self.config.ema_decay)
        replaced = []
        for i, level in enumerate(self.levels):
            counts, sums = pieces[2 * i], pieces[2 * i + 1].view(-1, self.dim)
            dtype = level.codebook.dtype
            level.apply_ema(counts.to(dtype), sums.to(dtype), self.config.ema_decay)
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
        """Statistics for logs, per codebook: perplexity, share of codes in use, re-seeded codes."""
        summary: dict[str, float] = {}
        for i, level in enumerate(self.levels):
            usage = level.ema_cluster_size
            summary[f"codebook/perplexity_{i}"] = float(level.compute_perplexity())
            summary[f"codebook/used_fraction_{i}"] = float(
                (usage >= self.config.threshold_ema_dead_code * usage.mean()).float().mean()
            )
            summary[f"codebook/dead_replaced_{i}"] = int(level.dead_replaced)
        return summary
