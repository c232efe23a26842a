"""Reading the samples of a step, and what to do where one is damaged."""

from __future__ import annotations

import hashlib
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset import Batch, Indices
from data_pipeline.errors import CorruptShardError
from data_pipeline.mixture import MixtureDataset

OnCorrupt = Literal["raise", "replace"]
_MAX_DRAWS = 16
"""Samples tried in the place of a damaged one before the damage is raised: where so many fail, all is lost."""


class Dataset(Protocol):
    """What samples are read from: `TokenDataset`, `CodeDataset` or `MixtureDataset`."""

    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, indices: Indices, /) -> Batch:
        """The samples at these indices."""
        ...


class Replaced(NamedTuple):
    """A damaged sample that another stands in for."""

    sample: int
    by: int
    damage: str
    """What is wrong, naming the shard and the sample in it."""


StepResult = tuple[Batch, list[Replaced]] | Exception
"""A step's batch and what was replaced in it, or why it cannot be read."""


class SampleReader:
    """Reads the samples of a step.

    With `replace`, a sample whose bytes are damaged gives its place to another of its dataset (in a mixture: of its
    part), drawn from (seed, step, sample) alone, so that it is the same on any number of ranks and workers. The
    batch then holds that other sample's own `sample_index`. A missing shard is an error in either case.
    """

    def __init__(self, dataset: Dataset, on_corrupt: OnCorrupt, seed: int) -> None:
        self._dataset, self._on_corrupt, self._seed = dataset, on_corrupt, seed

    def __call__(self, step: int, indices: Indices) -> tuple[Batch, list[Replaced]]:
        """The batch, and what was replaced in it.

        Raises:
            CorruptShardError: a sample is damaged and may not or could not be replaced.
        """
        try:
            return self._dataset.read(indices), []
        except CorruptShardError:
            if self._on_corrupt == "raise":
                raise
        found, replaced = [], []
        for sample in map(int, indices):
            if (damage := self._damage(sample)) is not None:
                stand_in = self._stand_in(step, sample, damage)
                replaced.append(Replaced(sample, stand_in, str(damage)))
                sample = stand_in
            found.append(sample)
        return self._dataset.read(found), replaced

    def read_steps(self, first_step: int, indices: NDArray[np.integer]) -> tuple[StepResult, ...]:
        """Several steps at once: one read costs little more for many samples than for a few.

        Args:
            first_step: of the steps, which follow each other.
            indices: [steps, B].

        Returns:
            What calling with each step gives, up to the first error, which stands in its step's place.
        """
        try:
            batch = self._dataset.read(indices.reshape(-1))
        except Exception:  # found again where it belongs
            return self._one_by_one(first_step, indices)
        split = {name: tensor.chunk(len(indices)) for name, tensor in batch.items()}
        return tuple(
            ({name: parts[place] for name, parts in split.items()}, []) for place in range(len(indices))
        )

    def _one_by_one(self, first_step: int, indices: NDArray[np.integer]) -> tuple[StepResult, ...]:
        results: list[StepResult] = []
        for step, row in enumerate(indices, first_step):
            try:
                results.append(self(step, row))
            except Exception as error:
                results.append(error)
                break
        return tuple(results)

    def _damage(self, sample: int) -> CorruptShardError | None:
        try:
            self._dataset.read([sample])
        except CorruptShardError as error:
            return error
        return None

    def _stand_in(self, step: int, sample: int, damage: CorruptShardError) -> int:
        dataset = self._dataset
        pool = dataset.part_range(sample) if isinstance(dataset, MixtureDataset) else range(len(dataset))
        for draw in range(_MAX_DRAWS):
            key = f"stand-in:{self._seed}:{step}:{sample}:{draw}".encode()
            number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
            candidate = pool[number % len(pool)]
            if self._damage(candidate) is None:
                return candidate
        raise damage
