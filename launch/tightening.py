"""The importance-weighted bound on some documents, beside the plain one on the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from data_pipeline import TokenDataset
from data_pipeline.packing import LENGTH, PHASE, START
from launch.ranks import Ranks
from launch.scored_models import Pair
from rqvae import RQVAE, importance_bound, latent_bound
from rqvae.randomness import sample_seeds

TEMPERATURES = (1.0, 0.3, 0.1, 0.03, 0.01)
"""Of the proposal; the best one is chosen on validation documents."""
BATCH = 8


def importance_report(
    pair: Pair,
    dataset: TokenDataset,
    validation: TokenDataset,
    num_documents: int,
    num_samples: int,
    device: torch.device,
    ranks: Ranks,
) -> dict[str, Any]:
    """Bounds over the first documents (pieces in their samples) of a split.

    Returns:
        documents, tokens, samples, temperature, and nats per token of both bounds: latent_bound, importance_bound.
        Empty for a codec that has nothing to draw from.
    """
    if not isinstance(pair.codec, RQVAE) or pair.codec.config.sees_future:
        return {}
    fitting = single_documents(validation, num_documents, pair.codec.config.compression_factor, device)
    nats = [_importance(pair, fitting, num_samples, t, ranks) for t in TEMPERATURES]
    temperature = TEMPERATURES[nats.index(min(nats))]
    rows = single_documents(dataset, num_documents, pair.codec.config.compression_factor, device)
    tokens = int((rows[1] > 0).sum())
    plain = 0.0
    for index in range(len(rows[0])):
        bound = latent_bound(*pair, rows[0][index : index + 1], rows[1][index : index + 1])
        plain += float(bound.code_nats.double().sum() + bound.token_nats.double().sum())
    return {
        "documents": len(rows[0]),
        "tokens": tokens,
        "samples": num_samples,
        "temperature": temperature,
        "latent_bound": plain / tokens,
        "importance_bound": _importance(pair, rows, num_samples, temperature, ranks) / tokens,
    }


def _importance(
    pair: Pair, rows: tuple[Tensor, Tensor], num_samples: int, temperature: float, ranks: Ranks
) -> float:
    ids, documents = rows
    total = 0.0
    starts = range(0, len(ids), BATCH)
    for index in ranks.share(len(starts)):
        part = slice(starts[index], starts[index] + BATCH)
        places = torch.arange(len(ids), device=ids.device)[part]
        assert isinstance(pair.codec, RQVAE)
        nats = importance_bound(
            *pair, ids[part], documents[part], sample_seeds(0, 0, places), num_samples, temperature
        )
        total += float(nats.sum())
    return sum(ranks.gather(total))


def single_documents(
    dataset: TokenDataset, count: int, factor: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The first pieces of documents, one per row with its phase: input_ids and document_ids [n <= count, T]."""
    ids = torch.zeros(count, dataset.sample_length, dtype=torch.long)
    documents = torch.zeros_like(ids)
    row, sample = 0, 0
    while row < count and sample < len(dataset):
        tokens = dataset.read([sample])["input_ids"][0]
        for segment in dataset.read_segments([sample])[0][: count - row]:
            start, phase, length = (int(segment[column]) for column in (START, PHASE, LENGTH))
            phase %= factor  # of the shards' grid, which may be coarser: whole chunks of nothing are left out
            ids[row, phase : phase + length] = tokens[start : start + length]
            documents[row, phase : phase + length] = 1
            row += 1
        sample += 1
    longest = -(-int(documents.sum(1).max() + factor) // factor) * factor
    longest = min(longest, dataset.sample_length)
    return ids[:row, :longest].to(device), documents[:row, :longest].to(device)
