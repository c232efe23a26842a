"""BrierLM: how well samples agree with the text, for models with and without a likelihood (CALM, arXiv 2510.27688).

The Brier score of a prediction P of an n-gram y is 2 P(y) - sum over x of P(x)^2, at most 1, and best in expectation
for the true P. From two independent samples x1 and x2 of the model it is estimated without bias as

    [x1 = y] + [x2 = y] - [x1 = x2].

BrierLM is 100 times the geometric mean of its means for n = 1, 2, 3, 4. A mean that comes out below 0, as small
samples of a bad model's may, counts as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline import TokenDataset
from launch.intervals import bootstrap
from launch.ranks import Ranks
from launch.sampling import Sampler, continue_all, until_end

LENGTH = 4


class Offsets(NamedTuple):
    """Places in held-out text, with what stands before and behind them."""

    contexts: list[list[int]]
    """From the start of the document, or of its piece in the sample."""
    targets: list[list[int]]
    """The `LENGTH` tokens that follow."""
    documents: NDArray[np.int64]
    """[n] which document, from 0."""


def choose_offsets(dataset: TokenDataset, num_documents: int, per_document: int, seed: int = 0) -> Offsets:
    """Random offsets in random documents; every model is scored at these.

    A document takes part with the first of its pieces met that has a token before and `LENGTH` behind an offset.
    """
    generator = np.random.default_rng(seed)
    contexts, targets, documents = [], [], []
    seen = 0
    for index in generator.permutation(len(dataset)):
        batch = dataset.read([index])
        ids, pieces = batch["input_ids"][0].numpy(), batch["document_ids"][0].numpy()
        for piece in range(1, int(pieces.max()) + 1):
            tokens = ids[pieces == piece].tolist()
            places = np.arange(1, len(tokens) - LENGTH + 1)
            if len(places) == 0 or seen == num_documents:
                continue
            for place in generator.permutation(places)[:per_document].tolist():
                contexts.append(tokens[:place])
                targets.append(tokens[place : place + LENGTH])
                documents.append(seen)
            seen += 1
        if seen == num_documents:
            break
    return Offsets(contexts, targets, np.array(documents, dtype=np.int64))


def brier_terms(
    targets: Sequence[Sequence[int]],
    first: Sequence[Sequence[int]],
    second: Sequence[Sequence[int]],
    eos_token_id: int,
) -> NDArray[np.float64]:
    """[n, LENGTH] estimates for n-grams of 1 to `LENGTH` tokens. Nothing counts behind an end of text."""
    y, one, two = (_table(rows, eos_token_id) for rows in (targets, first, second))

    def same(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.logical_and.accumulate(a == b, axis=1).astype(np.float64)

    return same(one, y) + same(two, y) - same(one, two)


def _table(rows: Sequence[Sequence[int]], eos_token_id: int) -> NDArray[np.int64]:
    table = np.full((len(rows), LENGTH), -1, dtype=np.int64)
    for i, row in enumerate(rows):
        kept = until_end(row[:LENGTH], eos_token_id)
        table[i, : len(kept)] = kept
    return table


def brier_lm(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., LENGTH] Brier-n -> [...]."""
    return 100 * np.clip(means, 0, None).prod(-1) ** (1 / LENGTH)


def brier_report(
    rows: dict[str, Sampler],
    dataset: TokenDataset,
    num_documents: int,
    per_document: int,
    ranks: Ranks,
) -> dict[str, Any]:
    """The report's `brier_lm`: a figure by row, and `intervals`, `brier_n`, `offsets`, `documents`."""
    offsets = choose_offsets(dataset, num_documents, per_document)
    report: dict[str, Any] = {"intervals": {}, "brier_n": {}}
    for name, sampler in rows.items():
        first, second = (
            continue_all(sampler, offsets.contexts, LENGTH, seed, ranks) for seed in (1 << 20, 2 << 20)
        )
        terms = brier_terms(offsets.targets, first, second, dataset.eos_token_id)
        count = int(offsets.documents.max()) + 1
        sums = np.stack(
            [np.bincount(offsets.documents, terms[:, n], minlength=count) for n in range(LENGTH)], axis=1
        )
        sizes = np.bincount(offsets.documents, minlength=count).astype(np.float64)
        report[name] = float(brier_lm(terms.mean(0)))
        report["brier_n"][name] = terms.mean(0).tolist()
        report["intervals"][name] = bootstrap(
            np.concatenate([sums, sizes[:, None]], axis=1), lambda s: brier_lm(s[:, :-1] / s[:, -1:])
        )
    return report | {"offsets": len(offsets.contexts), "documents": int(offsets.documents.max()) + 1}
