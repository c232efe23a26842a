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
from torch import Tensor, nn

from rqvae import persistence
from rqvae.codebook import (
    BLOCK_DISTANCES,
    FiniteScalarQuantizer,
    Quantizer,
    kmeans,
    nearest,
    sum_by_code,
)
from rqvae.collectives import all_reduce_sum, from_first_rank, gather_rows
from rqvae.config import QuantizerConfig, ResidualQuantizerConfig

INITIALISATION_VECTORS_PER_CODE = 32
"""k-means needs some tens of vectors per centroid; more only costs time (faiss's default minimum is 39)."""


def _joined(rows: list[Tensor]) -> Tensor:
    """The micro-batches' rows together; the usual single one is not copied."""
    return rows[0] if len(rows) == 1 else torch.cat(rows)


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
        ema_distortion: buffer [D] fp32, moving average of the squared distance that the nearest codes leave after
            every level; the scale of stochastic codes and of what a code's length costs. Never that of codes which
            were drawn, or chosen for their length: the scale would grow by what it causes, until all codes are one.
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
            level_codes = self._choose(index, residual) if given is None else given[:, index]
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
            is_nearest = codes is None and not self.config.rate_weight
            scale = (
                torch.stack(distortion) if is_nearest else self._nearest_distortion(vectors.detach(), real)
            )
            self._pending.append((seen, seen_codes, scale))
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

    def _nearest_distortion(self, vectors: Tensor, real: Tensor) -> Tensor:
        """[D] sum over real vectors [N, E] of the squared distance left after every level, by the nearest codes."""
        left = []
        for index in range(self.num_levels):
            level = self.level(index)
            vectors = vectors - level.embed(level.quantize(vectors))
            left.append((vectors.square().sum(1) * real).sum())
        return torch.stack(left)

    def _choose(self, index: int, residual: Tensor) -> Tensor:
        """Codes of one level by themselves: [N, E] -> LongTensor [N]."""
        weight = self.config.rate_weight
        # A nat costs the same at all levels: the sum of distortion and cost is what is to be small.
        return self.level(index).quantize(residual, weight * self.ema_distortion[0] if weight else None)

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
