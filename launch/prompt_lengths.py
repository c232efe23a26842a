"""Does the quality of a continuation depend on how the prompt's length falls on the chunk grid?

The same continuations are scored behind prompts of 1 to 4 K tokens that end at the same place. Longer prompts help;
what must not matter is the length modulo K.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from data_pipeline import TokenDataset
from rqvae import LatentModel, latent_bound
from rqvae.codec import Codec

PROMPT_CHUNKS, CONTINUATION_CHUNKS = 4, 8
NUM_DOCUMENTS = 128


@torch.inference_mode()
def by_prompt_length(
    codec: Codec, latent_model: LatentModel, dataset: TokenDataset, device: torch.device
) -> dict[str, Any]:
    """Score continuations of 8 K tokens behind prompts of every length up to 4 K.

    Returns:
        `rows`: by prompt length, nats per token of the continuation (a bound) and its token accuracy;
        `phases`: by length modulo K, how far the nats lie above a smooth curve of the length (fitted together with
        them), with the standard error over documents. Empty without documents that are long enough.
    """
    factor = codec.config.compression_factor
    before, after = PROMPT_CHUNKS * factor, CONTINUATION_CHUNKS * factor
    texts = long_documents(dataset, before + after, NUM_DOCUMENTS)
    if len(texts) == 0:
        return {}
    nats = np.zeros((before, len(texts)))
    accuracy = np.zeros(before)
    for length in range(1, before + 1):
        padding = -length % factor
        part = torch.from_numpy(texts[:, before - length :])
        ids = torch.nn.functional.pad(part, (padding, 0)).to(device)
        documents = torch.nn.functional.pad(torch.ones_like(part), (padding, 0)).to(device)
        bound = latent_bound(codec, latent_model, ids, documents)
        scored = bound.code_nats[:, -CONTINUATION_CHUNKS:].double().sum((1, 2))
        scored += bound.token_nats[:, -after:].double().sum(1)
        nats[length - 1] = (scored / after).cpu().numpy()
        accuracy[length - 1] = float(bound.token_correct[:, -after:].float().mean())
    excess = phase_effects(nats, factor)
    return {
        "documents": len(texts),
        "continuation_tokens": after,
        "rows": [
            {"length": i + 1, "nats_per_token": float(nats[i].mean()), "token_accuracy": float(accuracy[i])}
            for i in range(before)
        ],
        "phases": [
            {
                "length_modulo": (i + 1) % factor,
                "excess_nats_per_token": float(excess[i].mean()),
                "standard_error": float(excess[i].std(ddof=1) / len(texts) ** 0.5)
                if len(texts) > 1
                else None,
            }
            for i in range(factor)
        ],
    }


def phase_effects(nats: np.ndarray, factor: int) -> np.ndarray:
    """What the length modulo K does to the nats, apart from what more context does.

    Least squares of a curve 1, n, 1/n, log n of the length n together with one term per phase; the terms add up to 0.

    Args:
        nats: [lengths 1, 2, ..., documents].

    Returns:
        [K, documents], for the lengths 1, 2, ..., K modulo K.
    """
    lengths = np.arange(1, len(nats) + 1)
    curve = np.stack([np.ones(len(nats)), lengths, 1 / lengths, np.log(lengths)], axis=1)
    # Phase i against the last one.
    contrasts = np.concatenate([np.eye(factor - 1), -np.ones((1, factor - 1))])[(lengths - 1) % factor]
    terms = np.linalg.lstsq(np.concatenate([curve, contrasts], axis=1), nats, rcond=None)[0][curve.shape[1] :]
    return np.concatenate([terms, -terms.sum(0, keepdims=True)])


def long_documents(dataset: TokenDataset, length: int, count: int) -> np.ndarray:
    """The first `length` tokens of the first documents that have them: int64 [n <= count, length]."""
    found: list[np.ndarray] = []
    for index in range(len(dataset)):
        batch = dataset.read([index])
        ids, documents = batch["input_ids"][0].numpy(), batch["document_ids"][0].numpy()
        for document in range(1, int(documents.max()) + 1):
            tokens = ids[documents == document]
            if len(tokens) >= length:
                found.append(tokens[:length])
        if len(found) >= count:
            break
    return np.stack(found[:count]).astype(np.int64) if found else np.zeros((0, length), dtype=np.int64)
