"""What is fitted on the validation split before the test split is scored: temperatures, and the zero-rate latent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline import TokenDataset
from launch.ranks import Ranks
from launch.scored_models import Models
from rqvae import RQVAE, latent_bound
from rqvae.calibration import TEMPERATURES, OtherTemperatures, best_temperature
from rqvae.encoder import chunk_documents
from rqvae.linear_head import HeadOutput, LinearHead


@dataclass(frozen=True)
class Calibration:
    """Fitted on validation text only; None or empty where there is no such model."""

    samples: int
    """Validation samples that it was fitted on."""
    prior: list[float]
    """Temperature of the latent model, by level."""
    decoder: float | None
    base_lm: float | None
    zero_rate: float | None
    """Temperature of the decoder when it is given `mean_latent` in place of every latent."""
    mean_latent: Tensor | None
    """[codebook_dim] mean of the quantized latents."""


def prior_heads(models: Models) -> list[LinearHead]:
    """Output heads of the latent model, by level."""
    assert models.latent_model is not None
    return [models.latent_model.head(i) for i in range(models.codec.config.codebook_levels)]


def zero_rate(vae: RQVAE, mean_latent: Tensor, input_ids: Tensor, document_ids: Tensor) -> HeadOutput:
    """Score tokens without any code: every latent is the same.

    -log p(x | constant) needs no codes, so it is a likelihood at zero rate: what the decoder has learnt by itself.
    """
    documents = chunk_documents(document_ids, vae.config.compression_factor)
    latents = mean_latent.expand(*documents.shape, -1)
    return vae.decoder(latents, documents, input_ids, (document_ids > 0).float())


@torch.inference_mode()
def calibrate(
    models: Models,
    dataset: TokenDataset,
    num_samples: int,
    batch_size: int,
    device: torch.device,
    ranks: Ranks,
) -> Calibration:
    """Fit on the first samples of a split, which must not be the one that is reported.

    Temperatures are fitted one by one, each to the likelihood of what its head predicts: given the true past, these
    do not depend on each other.
    """
    count = min(num_samples, len(dataset))
    mine = ranks.share(count)
    mean = _mean_latent(models, dataset, mine, batch_size, device, ranks)
    latent = models.latent_model is not None
    with ExitStack() as stack:

        def watch(heads: Sequence[LinearHead], calls: int) -> OtherTemperatures:
            return stack.enter_context(OtherTemperatures(heads, [TEMPERATURES] * calls))

        prior = watch(prior_heads(models), models.codec.config.codebook_levels) if latent else None
        decoder = watch([models.codec.decoder.head], 1) if isinstance(models.codec, RQVAE) else None
        base_lm = watch([models.base_lm.lm.lm_head], 1) if models.base_lm is not None else None
        sums: dict[str, np.ndarray] = {}

        def add(name: str, watched: OtherTemperatures | None) -> None:
            if watched is not None:
                nats = torch.stack([call.double().sum(1) for call in watched.take()]).cpu().numpy()
                sums[name] = sums.get(name, 0.0) + nats

        for input_ids, documents in _batches(dataset, mine, batch_size, device):
            if latent:
                assert models.latent_model is not None
                latent_bound(models.codec, models.latent_model, input_ids, documents)
            elif decoder is not None:
                models.codec(input_ids, document_ids=documents)
            add("prior", prior)
            add("decoder", decoder)
            if models.base_lm is not None:
                models.base_lm(input_ids, documents)
            add("base_lm", base_lm)
            if mean is not None:
                assert isinstance(models.codec, RQVAE)
                zero_rate(models.codec, mean, input_ids, documents)
                add("zero_rate", decoder)
    parts = ranks.gather(sums)

    def fitted(name: str) -> list[float]:
        found = [part[name] for part in parts if name in part]
        return [best_temperature(row.tolist()) for row in np.sum(found, axis=0)] if found else []

    def only(name: str) -> float | None:
        return next(iter(fitted(name)), None)

    return Calibration(count, fitted("prior"), only("decoder"), only("base_lm"), only("zero_rate"), mean)


def _mean_latent(
    models: Models, dataset: TokenDataset, mine: range, batch_size: int, device: torch.device, ranks: Ranks
) -> Tensor | None:
    vae = models.codec
    if not isinstance(vae, RQVAE):
        return None
    total = torch.zeros(vae.config.codebook_dim, dtype=torch.float64)
    chunks = 0
    for input_ids, documents in _batches(dataset, mine, batch_size, device):
        codes = vae.encode(input_ids, document_ids=documents)
        real = codes[chunk_documents(documents, vae.config.compression_factor) > 0]
        total += vae.quantizer.embed(real).double().sum(0).cpu()
        chunks += len(real)
    parts = ranks.gather((total, chunks))
    mean = sum((part for part, _ in parts), torch.zeros_like(total)) / max(1, sum(n for _, n in parts))
    return mean.float().to(device)


def _batches(
    dataset: TokenDataset, samples: range, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(samples.start, samples.stop, batch_size):
        batch = dataset.read(range(start, min(start + batch_size, samples.stop)))
        yield batch["input_ids"].to(device), batch["document_ids"].to(device)
