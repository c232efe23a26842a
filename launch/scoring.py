"""Likelihoods of a split, by document and in total, under every model there is."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline import TokenDataset
from data_pipeline.packing import DOCUMENT, LENGTH, NUM_BYTES
from data_pipeline.progress import Progress
from launch.calibration import Calibration, prior_heads, zero_rate
from launch.config import EvaluationConfig
from launch.ranks import Ranks
from launch.scored_models import Models
from rqvae import RQVAE, latent_bound, stochastic_bound
from rqvae.calibration import OtherTemperatures
from rqvae.encoder import chunk_documents
from rqvae.randomness import sample_seeds

MAX_KEPT_CHUNKS = 1 << 18
"""Chunks whose codes a rank keeps for statistics over pairs of levels."""

Floats = NDArray[np.float64]


@dataclass
class Scores:
    """Everything that one pass over a split finds out."""

    documents: NDArray[np.int64]
    """[n] document of every piece; one that is cut over samples has several."""
    tokens: Floats
    """[n] real tokens, end-of-text included."""
    num_bytes: Floats
    """[n] UTF-8 bytes of their text."""
    nats: dict[str, Floats]
    """By row of the table, [n]."""
    sums: dict[str, Floats]
    """Totals of the codec: correct, chunks, correct_chunks; by level code_nats, distortion."""
    code_counts: list[Floats]
    """[C] by level."""
    token_counts: Floats
    codes: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    """[m, D] codes of at most `MAX_KEPT_CHUNKS` chunks per rank."""

    def by_document(self) -> tuple[Floats, Floats, dict[str, Floats]]:
        """Tokens, bytes and nats with the pieces of a document added up."""
        _, place = np.unique(self.documents, return_inverse=True)
        count = int(place.max()) + 1 if len(place) else 0

        def add(values: Floats) -> Floats:
            return np.bincount(place, values, minlength=count).astype(np.float64)

        nats = {name: add(values) for name, values in self.nats.items()}
        return add(self.tokens), add(self.num_bytes), nats


@torch.inference_mode()
def score(
    models: Models,
    dataset: TokenDataset,
    num_samples: int,
    settings: EvaluationConfig,
    calibration: Calibration | None,
    unigram: Floats,
    device: torch.device,
    ranks: Ranks,
) -> Scores:
    """Score the first samples of a split, each rank its part; the sums do not depend on batches or ranks.

    Args:
        unigram: [V] nats of every token under the training split's frequencies.
    """
    mine = ranks.share(num_samples)
    scorer = _Scorer(models, settings, calibration, torch.from_numpy(unigram).to(device))
    progress = Progress(len(mine), "evaluate", unit="samples") if ranks.is_first else None
    with scorer:
        for start in range(mine.start, mine.stop, settings.batch_size):
            places = range(start, min(start + settings.batch_size, mine.stop))
            batch = dataset.read(places)
            segments = np.concatenate(dataset.read_segments(places))
            scorer.add({name: tensor.to(device) for name, tensor in batch.items()}, segments)
            if progress is not None:
                progress.update(len(places))
    if progress is not None:
        progress.close()
    return scorer.scores(ranks)


class _Scorer:
    """Sums up batch after batch."""

    def __init__(
        self,
        models: Models,
        settings: EvaluationConfig,
        calibration: Calibration | None,
        unigram: Tensor,
    ):
        self._models, self._settings, self._unigram = models, settings, unigram
        self._calibration = calibration
        codec = models.codec.config
        self._factor = codec.compression_factor
        self._pieces: list[NDArray[np.int64]] = []
        self._nats: dict[str, list[Floats]] = {}
        vocab_size = max(len(unigram), codec.backbone.architecture.vocab_size)
        self._sums: dict[str, Floats] = {
            "token_counts": np.zeros(vocab_size),
            **{f"code_counts_{i}": np.zeros(size) for i, size in enumerate(codec.codebook_sizes)},
        }
        self._codes: list[NDArray[np.int64]] = []
        self._stack = ExitStack()
        self._watched: dict[str, OtherTemperatures] = {}

    def __enter__(self) -> _Scorer:
        models, fitted = self._models, self._calibration
        if fitted is None:
            return self
        if models.latent_model is not None:
            self._watch("prior", prior_heads(models), fitted.prior)
        if isinstance(models.codec, RQVAE):
            assert fitted.decoder is not None
            self._watch("decoder", [models.codec.decoder.head], [fitted.decoder])
        if models.base_lm is not None:
            assert fitted.base_lm is not None
            self._watch("base_lm", [models.base_lm.lm.lm_head], [fitted.base_lm])
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _watch(self, name: str, heads: list[Any], temperatures: list[float]) -> None:
        watched = OtherTemperatures(heads, [[temperature] for temperature in temperatures])
        self._watched[name] = self._stack.enter_context(watched)

    def add(self, batch: dict[str, Tensor], segments: NDArray[np.int64]) -> None:
        """Score a batch.

        Args:
            segments: the rows of its documents, sample after sample.
        """
        self._pieces.append(segments)
        documents = batch["document_ids"]
        # Pieces are numbered from 1 in every sample; here from 1 in the whole batch, 0 being padding.
        offsets = documents.amax(1).cumsum(0) - documents.amax(1)
        self._owners = torch.where(documents > 0, documents + offsets[:, None], 0)
        self._latent(batch)
        ids, real = batch["input_ids"], documents > 0
        self._keep("unigram", self._unigram[ids] * real)
        if self._models.base_lm is not None:
            self._keep("base_lm", self._models.base_lm(ids, documents).nats)
            self._keep_calibrated("base_lm", "base_lm_calibrated")
        if self._models.identity is not None:
            bound = latent_bound(*self._models.identity, ids, documents)
            self._keep("identity_codec", bound.code_nats.double().sum(-1))
        counts = torch.bincount(ids[real], minlength=len(self._sums["token_counts"]))
        self._sums["token_counts"] += counts.cpu().numpy()

    def _latent(self, batch: dict[str, Tensor]) -> None:
        models, (ids, documents) = self._models, (batch["input_ids"], batch["document_ids"])
        real_chunks = chunk_documents(documents, self._factor) > 0
        if models.latent_model is None:
            scored = models.codec(ids, document_ids=documents)
            codes, token_nats, correct, distortion, latents = (
                scored.codes,
                scored.nats,
                scored.correct,
                scored.distortion,
                scored.latents,
            )
        else:
            bound = latent_bound(models.codec, models.latent_model, ids, documents)
            codes, token_nats, correct = bound.codes, bound.token_nats, bound.token_correct
            distortion, latents = bound.distortion, bound.latents
            self._keep("latent_codes", bound.code_nats.double().sum(-1))
            self._add("code_nats", bound.code_nats.double().sum((0, 1)))
            self._keep_calibrated("prior", "latent_codes_calibrated")
        self._keep("latent_reconstruction", token_nats)
        self._keep_calibrated("decoder", "latent_reconstruction_calibrated")
        hits = (correct | ~(documents > 0)).view(*real_chunks.shape, -1).all(-1) & real_chunks
        for name, value in (
            ("correct", correct),
            ("chunks", real_chunks),
            ("correct_chunks", hits),
        ):
            self._add(name, value.double().sum())
        self._add("distortion", distortion.double())
        self._count_codes(codes[real_chunks])
        if isinstance(models.codec, RQVAE):
            real = documents > 0
            continuous = models.codec.decoder(
                latents, chunk_documents(documents, self._factor), ids, real.float()
            )
            self._add("continuous_correct", (continuous.correct.view_as(real) & real).double().sum())
            self._add("continuous_nats", continuous.nats.double().sum())
            self._discard("decoder")
        if isinstance(models.codec, RQVAE) and self._calibration is not None:
            mean = self._calibration.mean_latent
            assert mean is not None
            assert self._calibration.zero_rate is not None
            with OtherTemperatures([models.codec.decoder.head], [[self._calibration.zero_rate]]) as at:
                zero_rate(models.codec, mean, ids, documents)
            self._keep("zero_rate", at.take()[0][0])
            self._discard("decoder")
        if self._settings.stochastic_codes and models.latent_model is not None:
            assert isinstance(models.codec, RQVAE)
            seeds = sample_seeds(0, 0, batch["sample_index"])
            drawn = stochastic_bound(models.codec, models.latent_model, ids, documents, seeds)
            self._keep("stochastic_codes", drawn.code_nats.double().sum(-1))
            self._keep("stochastic_reconstruction", drawn.token_nats)
            self._add("stochastic_nats", drawn.code_nats.double().sum((0, 1)))
            self._discard("decoder")
            self._discard("prior")

    def _count_codes(self, codes: Tensor) -> None:
        kept = codes.cpu().numpy()
        for level in range(kept.shape[1]):
            counts = self._sums[f"code_counts_{level}"]
            counts += np.bincount(kept[:, level], minlength=len(counts))
        room = MAX_KEPT_CHUNKS - sum(map(len, self._codes))
        self._codes.append(kept[:room])

    def _keep(self, name: str, nats: Tensor) -> None:
        """Nats [B, T] or [B, S], 0 at padding, added up by piece of a document."""
        owners = self._owners
        if nats.numel() != owners.numel():
            owners = chunk_documents(owners, owners.numel() // nats.numel())
        totals = torch.zeros(len(self._pieces[-1]) + 1, dtype=torch.float64, device=owners.device)
        totals.index_add_(0, owners.flatten(), nats.flatten().double())
        self._nats.setdefault(name, []).append(totals[1:].cpu().numpy())

    def _keep_calibrated(self, watched: str, name: str) -> None:
        if watched in self._watched:
            self._keep(name, torch.stack([call[0] for call in self._watched[watched].take()]).double().sum(0))

    def _discard(self, watched: str) -> None:
        if watched in self._watched:
            self._watched[watched].take()

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value.cpu().numpy()

    def scores(self, ranks: Ranks) -> Scores:
        """What all ranks have found together."""
        nats = {name: np.concatenate(parts) for name, parts in self._nats.items()}
        pieces = np.concatenate([np.zeros((0, 6), dtype=np.int64), *self._pieces])
        levels = self._models.codec.config.codebook_levels
        codes = np.concatenate([np.zeros((0, levels), dtype=np.int64), *self._codes])
        parts = ranks.gather((pieces, nats, self._sums, codes))
        filled = [part for part in parts if len(part[0])]
        sums = {
            name: np.asarray(sum(part[2][name] for part in filled), dtype=np.float64) for name in filled[0][2]
        }
        pieces = np.concatenate([part[0] for part in filled])
        return Scores(
            documents=pieces[:, DOCUMENT],
            tokens=pieces[:, LENGTH].astype(np.float64),
            num_bytes=pieces[:, NUM_BYTES].astype(np.float64),
            nats={name: np.concatenate([part[1][name] for part in filled]) for name in filled[0][1]},
            sums=sums,
            code_counts=[sums[f"code_counts_{level}"] for level in range(levels)],
            token_counts=sums["token_counts"],
            codes=np.concatenate([part[3] for part in filled]),
        )


def unigram_nats(dataset: TokenDataset) -> Floats:
    """[V] nats of every token under the frequencies of the training split `dataset`, add-one smoothed."""
    counts = np.ones(dataset.vocab_size)
    for start in range(0, len(dataset), 256):
        batch = dataset.read(range(start, min(start + 256, len(dataset))))
        real = batch["input_ids"][batch["document_ids"] > 0].numpy()
        counts += np.bincount(real, minlength=dataset.vocab_size)
    return -np.log(counts / counts.sum())
