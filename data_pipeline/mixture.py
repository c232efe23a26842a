"""Several datasets trained on together, in fixed proportions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.codes import CodeDataset
from data_pipeline.dataset import Batch, Indices, TokenDataset
from data_pipeline.errors import MixtureError
from data_pipeline.files import sha256_json
from data_pipeline.interleave import Interleave
from data_pipeline.order import MixtureOrder, Shuffle


class MixtureDataset:
    """The samples of several datasets of one kind, one dataset's indices behind the other's.

    `StepLoader` draws from each part by its weight, not by its size, and each part begins its next epoch when it
    is used up.

    Args:
        parts: the datasets by name, all `TokenDataset` or all `CodeDataset`.
        weights: by name, the share of the samples that each gives, relative to the others.

    Attributes:
        parts: the datasets by name.
        fingerprint: hash of the parts' fingerprints and weights, in this order.
        sample_length: T.

    Raises:
        MixtureError: parts differ in something that must be the same in a batch; names all of it.
        ValueError: see `Interleave`.
    """

    def __init__(self, parts: Mapping[str, TokenDataset | CodeDataset], weights: Mapping[str, float]) -> None:
        self.parts = dict(parts)
        _refuse_differences(self.parts)
        self._datasets = list(self.parts.values())
        self._interleave = Interleave([weights[name] for name in self.parts])
        self._first = np.cumsum([0, *(len(part) for part in self._datasets)])
        quotas = self._interleave.quotas
        self.fingerprint = sha256_json(
            [[part.fingerprint, quota] for part, quota in zip(self._datasets, quotas, strict=True)]
        )
        self.sample_length = self._datasets[0].sample_length

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, indices: Indices) -> Batch:
        """The samples at these indices, in this order; `sample_index` counts through all parts.

        Raises:
            CorruptShardError: names the shard and the sample whose bytes are damaged.
            IndexError: there is no such sample.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"samples {wanted.min()}..{wanted.max()} of {len(self)} in a mixture")
        owners = np.searchsorted(self._first, wanted, side="right") - 1
        pieces, places = [], []
        for source in np.unique(owners).tolist():
            here = np.flatnonzero(owners == source)
            batch = self._datasets[source].read(wanted[here] - self._first[source])
            batch["sample_index"] = batch["sample_index"] + int(self._first[source])
            pieces.append(batch)
            places.append(here)
        back = torch.from_numpy(np.argsort(np.concatenate(places)))
        return {name: torch.cat([piece[name] for piece in pieces])[back] for name in pieces[0]}

    def order(self, shuffle: Shuffle) -> MixtureOrder:
        """What training goes through."""
        return MixtureOrder([len(part) for part in self._datasets], self._interleave, shuffle)

    def counts(self, position: int) -> dict[str, int]:
        """How many samples of each part stand before a position of the order."""
        return dict(zip(self.parts, self._interleave.counts(position), strict=True))

    def part_range(self, index: int) -> range:
        """The samples of the part that a sample is of."""
        part = int(np.searchsorted(self._first, index, side="right"))
        return range(int(self._first[part - 1]), int(self._first[part]))

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """[count] samples in the weights' proportions, drawn with replacement."""
        sources, _ = self._interleave(np.arange(count))
        places = (
            torch.rand(count, generator=generator, dtype=torch.float64).numpy()
            * np.diff(self._first)[sources]
        )
        return torch.from_numpy(self._first[sources] + places.astype(np.int64))

    def evaluation_indices(self, count: int) -> NDArray[np.int64]:
        """The first `count` samples in the weights' proportions, unshuffled; fewer where a part is used up."""
        sources, ranks = self._interleave(np.arange(count))
        sizes = np.diff(self._first)
        used_up = np.flatnonzero(ranks >= sizes[sources])
        stop = int(used_up[0]) if len(used_up) else count
        return (self._first[sources] + ranks)[:stop]


def _refuse_differences(parts: Mapping[str, TokenDataset | CodeDataset]) -> None:
    described = {name: _must_agree(part) for name, part in parts.items()}
    differing = []
    for what in dict.fromkeys(key for values in described.values() for key in values):
        values = {name: values.get(what, "none") for name, values in described.items()}
        if len(set(values.values())) > 1:
            differing.append(
                f"{what} is " + ", ".join(f"{value} in {name}" for name, value in values.items())
            )
    if differing:
        raise MixtureError(
            f"the datasets of a mixture do not fit together: {'; '.join(differing)}. Build all with the same "
            "settings, and with one tokenizer (data.tokenizer={kind: pretrained, path: DIR/tokenizer} of the "
            "first)"
        )


def _must_agree(part: TokenDataset | CodeDataset) -> dict[str, Any]:
    tokens = part.token_dataset if isinstance(part, CodeDataset) else part
    values = {
        "kind": type(part).__name__,
        "tokenizer hash": tokens.manifest.tokenizer_sha256[:16],
        **{
            name: getattr(tokens, name)
            for name in ("vocab_size", "sample_length", "document_grid", "eos_token_id", "pad_token_id")
        },
    }
    if isinstance(part, CodeDataset):
        names = ("codec_hash", "compression_factor", "codebook_sizes", "with_latents")
        values |= {name: getattr(part, name) for name in names}
    return values
