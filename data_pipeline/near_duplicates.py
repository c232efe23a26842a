"""Near-duplicates and n-gram overlap of a corpus in memory, in whole-corpus numpy operations.

Clusters are found by MinHash with banding (Broder 1997; Leskovec et al., "Mining of Massive Datasets",
section 3.4) over shingles of 5 words.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SHINGLE_WORDS = 5
# 16 bands of 4 rows: a pair of Jaccard similarity s shares a band with probability 1 - (1 - s^4)^16, which is
# 0.64 at s = 0.5 and 0.99 at 0.7. Pairs so found count as near-duplicates when 60 % of their 64 hashes agree.
_BANDS, _ROWS = 16, 4
_MIN_AGREEMENT = 0.6
_OVERLAP_WORDS = 13  # GPT-3 (Brown et al. 2020, appendix C) measured contamination in 13-grams


class TextSet:
    """The words of many texts as one array of word ids.

    Attributes:
        words: [W] uint64, a random 64-bit number for each different word.
        starts: [N + 1] where each text's words begin.
        num_clustered: texts that have a near-duplicate.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        vocabulary: dict[str, int] = {}
        ids: list[int] = []
        counts = []
        pattern = re.compile(r"\w+")
        for text in texts:
            found = pattern.findall(text.lower())
            counts.append(len(found))
            ids += [vocabulary.setdefault(word, len(vocabulary)) for word in found]
        numbers = _random_numbers(b"words", len(vocabulary))
        self.words = numbers[np.array(ids, dtype=np.int64)]
        self.starts = np.cumsum([0, *counts])
        self.clusters = self._cluster()
        sizes = np.bincount(self.clusters, minlength=1)
        self.num_clustered = int((sizes[self.clusters] > 1).sum())

    def ngrams(self, length: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Hashes of all word n-grams inside the texts, and the text of each."""
        if len(self.words) < length:
            return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
        count = len(self.words) - length + 1
        hashes = np.zeros(count, dtype=np.uint64)
        for offset in range(length):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + self.words[offset : offset + count]
        hashes ^= hashes >> np.uint64(29)
        owners = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        inside = owners[:count] == owners[length - 1 :]
        return hashes[inside], owners[:count][inside]

    def _cluster(self) -> NDArray[np.int64]:
        """[N] cluster numbers: texts linked by near-duplicate pairs, also through others, share one."""
        num_texts = len(self.starts) - 1
        parents = np.arange(num_texts)
        shingles, owners = self.ngrams(_SHINGLE_WORDS)
        if not len(shingles):
            return parents
        present, first = np.unique(owners, return_index=True)
        multipliers = _random_numbers(b"multipliers", _BANDS * _ROWS) | np.uint64(1)
        # multiply by a random odd number, keep the top bits: a universal hash (Dietzfelbinger et al. 1997)
        signatures = np.stack(
            [np.minimum.reduceat((shingles * m) >> np.uint64(32), first) for m in multipliers], axis=1
        )
        pairs = []
        for band in range(_BANDS):
            rows = signatures[:, band * _ROWS : (band + 1) * _ROWS]
            keys = np.zeros(len(rows), dtype=np.uint64)
            for column in rows.T:
                keys = (keys ^ column) * np.uint64(0x9E3779B97F4A7C15)
                keys ^= keys >> np.uint64(32)
            order = np.argsort(keys, kind="stable")
            same = keys[order[1:]] == keys[order[:-1]]
            pairs.append(np.stack([order[:-1][same], order[1:][same]], axis=1))
        linked = np.unique(np.concatenate(pairs), axis=0)
        agreement = (signatures[linked[:, 0]] == signatures[linked[:, 1]]).mean(axis=1)
        linked = present[linked[agreement >= _MIN_AGREEMENT]]
        return _components(num_texts, linked)

    def one_side(self, sides: Sequence[int]) -> NDArray[np.int64]:
        """[N] sides with every cluster that touches several moved to the lowest-numbered of them."""
        lowest = np.full(int(self.clusters.max(initial=0)) + 1, np.iinfo(np.int64).max)
        np.minimum.at(lowest, self.clusters, np.asarray(sides, dtype=np.int64))
        return lowest[self.clusters]


def _random_numbers(purpose: bytes, count: int) -> NDArray[np.uint64]:
    """[count] fixed numbers that no release of a library will change."""
    return np.frombuffer(hashlib.shake_256(purpose).digest(8 * count), dtype="<u8")


def _components(size: int, edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """[size] the smallest member of each node's connected component."""
    labels = np.arange(size)
    while True:
        lower = np.minimum(labels[edges[:, 0]], labels[edges[:, 1]])
        before = labels.copy()
        np.minimum.at(labels, edges[:, 0], lower)
        np.minimum.at(labels, edges[:, 1], lower)
        labels = labels[labels]  # a label's own label: halves the remaining distance
        if np.array_equal(before, labels):
            return labels


def ngram_overlap(texts: TextSet, sides: NDArray[np.int64], names: Sequence[str]) -> dict[str, Any]:
    """Share of each later side's 13-grams, and of its texts, that also stand in an earlier side."""
    hashes, owners = texts.ngrams(_OVERLAP_WORDS)
    present = [np.unique(hashes[sides[owners] == side]) for side in range(len(names) - 1)]
    report: dict[str, Any] = {}
    for later in range(1, len(names)):
        mine = sides[owners] == later
        own, own_texts = hashes[mine], owners[mine]
        for earlier in range(later):
            shared = _in_sorted(own, present[earlier])
            report[f"{names[later]}_in_{names[earlier]}"] = {
                "ngrams": int(shared.sum()),
                "share_of_ngrams": round(float(shared.mean()), 6) if len(shared) else 0.0,
                "texts": len(np.unique(own_texts[shared])),
                "share_of_texts": round(
                    len(np.unique(own_texts[shared])) / max((sides == later).sum(), 1), 6
                ),
            }
    return report


def _in_sorted(values: NDArray[np.uint64], ordered: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether each value is in the sorted array: several times faster than np.isin, which sorts both."""
    if not len(ordered):
        return np.zeros(len(values), dtype=bool)
    places = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return np.asarray(ordered[places] == values)
