"""What the codebooks hold: usage, what every level is good for, and how much levels say about each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline import TokenDataset
from launch.calibration import Calibration, zero_rate
from launch.ranks import Ranks
from launch.scored_models import Models
from launch.scoring import Scores
from rqvae import RQVAE
from rqvae.calibration import TEMPERATURES, OtherTemperatures, best_temperature
from rqvae.codebook import compute_perplexity
from rqvae.codec import Codec
from rqvae.encoder import chunk_documents

PREFIX_SAMPLES = 64
"""Samples on which decoding from the first levels only is tried, once per level."""
FITTING_SAMPLES = 16
"""Validation samples that the temperature of every prefix is fitted on."""


def codebook_report(
    models: Models,
    scores: Scores,
    dataset: TokenDataset,
    validation: TokenDataset | None,
    calibration: Calibration | None,
    batch_size: int,
    device: torch.device,
    ranks: Ranks,
) -> dict[str, Any]:
    """The report's `codebook`; usage is that of the whole split, decoding from prefixes that of its first samples."""
    codec = models.codec.config
    chunks, tokens = float(scores.sums["chunks"]), scores.tokens.sum()
    mean = None if calibration is None else calibration.mean_latent
    prefixes = decode_prefixes(models.codec, dataset, validation, mean, batch_size, device, ranks)
    gains = -np.diff(prefixes["nats_per_token"])
    levels, curve = [], []
    bits = np.cumsum([0.0, *map(math.log2, codec.codebook_sizes)]) / codec.compression_factor
    for level, counts in enumerate(scores.code_counts):
        perplexity = float(compute_perplexity(torch.from_numpy(counts)))
        row: dict[str, Any] = {
            "codebook_size": len(counts),
            "perplexity": perplexity,
            "perplexity_normalized": perplexity / min(len(counts), chunks),
            "used_fraction": float((counts > 0).mean()),
            "dead_codes": int((counts == 0).sum()),
            "distortion": float(scores.sums["distortion"][level] / chunks),
            "token_accuracy": float(prefixes["token_accuracy"][level + 1]),
            "information_gain": float(gains[level]),
        }
        if isinstance(models.codec, RQVAE):
            row["dead_replaced"] = int(models.codec.quantizer.level(level).dead_replaced)
        if "code_nats" in scores.sums:
            row["nats_per_code"] = float(scores.sums["code_nats"][level] / chunks)
        if "stochastic_nats" in scores.sums:
            row["stochastic_kl"] = float(scores.sums["stochastic_nats"][level] / chunks)
        levels.append(row)
    for count in range(len(levels) + 1):
        point = {
            "levels": count,
            "codes_bits_per_token": float(bits[count]),
            "nats_per_token": float(prefixes["nats_per_token"][count]),
            "token_accuracy": float(prefixes["token_accuracy"][count]),
            "temperature": float(prefixes["temperatures"][count]),
        }
        if count:
            point["distortion"] = levels[count - 1]["distortion"]
        if "code_nats" in scores.sums:
            point["prior_nats_per_token"] = float(scores.sums["code_nats"][:count].sum() / tokens)
        curve.append(point)
    return {
        "levels": levels,
        "histograms": [histogram(counts) for counts in scores.code_counts],
        "rate_distortion": curve,
        "mutual_information": mutual_information(scores.codes, codec.codebook_sizes).tolist(),
        "suggested_sizes": suggest_sizes(codec.codebook_sizes, gains.tolist()),
    }


def histogram(counts: NDArray[np.float64], num_bins: int = 256) -> list[float]:
    """Counts from the most used code to the least, in at most `num_bins` bins of neighbours (their mean)."""
    return [float(part.mean()) for part in np.array_split(np.sort(counts)[::-1], min(num_bins, len(counts)))]


def decode_prefixes(
    vae: Codec,
    dataset: TokenDataset,
    validation: TokenDataset | None,
    mean_latent: Tensor | None,
    batch_size: int,
    device: torch.device,
    ranks: Ranks,
) -> dict[str, NDArray[np.float64]]:
    """Tokens decoded from the first d levels, d = 0 ... D.

    A decoder that was trained on all levels is far too sure of itself with fewer. So every prefix gets a temperature
    of its own, fitted on `validation`; without one it is 1.

    Returns:
        nats_per_token, token_accuracy and temperatures, each [D + 1]. Without any code the decoder gets
        `mean_latent`, or an empty sum where nothing was fitted.
    """
    temperatures = [1.0] * (vae.config.codebook_levels + 1)
    rest = (mean_latent, batch_size, device, ranks)
    if validation is not None and isinstance(vae, RQVAE):
        nats, _ = _prefix_sums(vae, validation, FITTING_SAMPLES, [TEMPERATURES] * len(temperatures), *rest)
        temperatures = [best_temperature(row.tolist()) for row in nats]
    nats, (hits, seen) = _prefix_sums(vae, dataset, PREFIX_SAMPLES, [(t,) for t in temperatures], *rest)
    return {
        "nats_per_token": nats[:, 0] / seen,
        "token_accuracy": hits / seen,
        "temperatures": np.array(temperatures),
    }


@torch.inference_mode()
def _prefix_sums(
    vae: Codec,
    dataset: TokenDataset,
    num_samples: int,
    temperatures: Sequence[Sequence[float]],
    mean_latent: Tensor | None,
    batch_size: int,
    device: torch.device,
    ranks: Ranks,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nats [D + 1, temperatures], and [2, D + 1] of right tokens and of all."""
    count = vae.config.codebook_levels + 1
    nats, hits = np.zeros((count, len(temperatures[0]))), np.zeros((2, count))
    mine = ranks.share(min(num_samples, len(dataset)))
    for start in range(mine.start, mine.stop, batch_size):
        batch = dataset.read(range(start, min(start + batch_size, mine.stop)))
        ids, documents = batch["input_ids"].to(device), batch["document_ids"].to(device)
        codes = vae.encode(ids, document_ids=documents)
        for level, tried in enumerate(temperatures):
            mean = mean_latent if level == 0 else None
            scored, correct = _decoded(vae, codes[..., :level], mean, ids, documents, tried)
            nats[level] += scored.cpu().numpy()
            hits[:, level] += float(correct.sum()), float((documents > 0).sum())
    parts = ranks.gather((nats, hits))
    return np.sum([part[0] for part in parts], axis=0), np.sum([part[1] for part in parts], axis=0)


def _decoded(
    vae: Codec,
    codes: Tensor,
    mean: Tensor | None,
    input_ids: Tensor,
    documents: Tensor,
    temperatures: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Nats [temperatures] of all tokens together, and whether each is right [B, T], False at padding."""
    real = documents > 0
    chunks = chunk_documents(documents, vae.config.compression_factor)
    if isinstance(vae, RQVAE):
        with OtherTemperatures([vae.decoder.head], [temperatures]) as watched:
            if mean is None:
                nothing = torch.zeros(*chunks.shape, vae.config.codebook_dim, device=codes.device)
                latents = vae.quantizer.embed(codes) if codes.shape[-1] else nothing
                out = vae.decoder(latents, chunks, input_ids, real.float())
            else:
                out = zero_rate(vae, mean, input_ids, documents)
        return watched.take()[0].double().sum(1), out.correct.view_as(real) & real
    logits = vae.decode(codes, chunks).float()
    nats = F.cross_entropy(logits.transpose(1, 2), input_ids, reduction="none") * real
    return nats.double().sum()[None], (logits.argmax(-1) == input_ids) & real


def mutual_information(codes: NDArray[np.int64], sizes: Sequence[int], seed: int = 0) -> NDArray[np.float64]:
    """Nats that the codes of two levels of a chunk say about each other.

    The plug-in estimate is too large by about (C_a - 1)(C_b - 1) / 2n (Miller 1955), which is not small here. So the
    estimate for the same codes in shuffled order, where there is nothing to say, is taken off. What is left is about
    0 for independent levels, and may be a little below.

    Args:
        codes: [n, D].

    Returns:
        [D, D], symmetric, 0 on the diagonal.
    """
    levels = codes.shape[1]
    generator = np.random.default_rng(seed)
    result = np.zeros((levels, levels))
    for a in range(levels):
        shuffled = generator.permutation(codes[:, a])
        for b in range(a + 1, levels):
            # Entropies of the single levels are the same in both and cancel.
            joint, control = (_entropy(first * sizes[b] + codes[:, b]) for first in (codes[:, a], shuffled))
            result[a, b] = result[b, a] = control - joint
    return result


def _entropy(outcomes: NDArray[np.int64]) -> float:
    counts = np.unique(outcomes, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def suggest_sizes(sizes: Sequence[int], gains: Sequence[float]) -> list[int]:
    """Codebook sizes of as many bits in all, shared out in proportion to what every level has been found to remove.

    Powers of 2, at least 2 bits and at most 2 bits more than the level has now, as gains say little of sizes far from
    those they were measured at. A heuristic, to be tried by training.

    Args:
        sizes: C by level.
        gains: nats of token likelihood removed by every level; what is below 0 counts as 0.
    """
    present = np.log2(sizes)
    total = round(float(present.sum()))
    lowest, highest = np.full(len(sizes), 2.0), np.ceil(present) + 2
    weights = np.clip(gains, 0, None) + 1e-9
    low, high = 0.0, total / weights.min()
    for _ in range(200):  # the factor at which the clipped shares add up to all the bits
        factor = (low + high) / 2
        shares = np.clip(factor * weights, lowest, highest)
        low, high = (factor, high) if shares.sum() < total else (low, factor)
    bits = np.floor(shares + 1e-9)
    # Largest remainders first, while there is room.
    for level in np.argsort(bits - shares):
        if bits.sum() < total and bits[level] < highest[level]:
            bits[level] += 1
    return [int(2**b) for b in bits]
