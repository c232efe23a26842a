from __future__ import annotations

import random

import numpy as np

from data_pipeline.near_duplicates import TextSet, ngram_overlap


def unrelated(number: int, num_words: int = 60) -> list[str]:
    generator = random.Random(number)
    return [" ".join(f"w{generator.randrange(5000)}" for _ in range(num_words)) for _ in range(number)]


def test_near_duplicates_share_a_cluster_and_others_do_not() -> None:
    texts = unrelated(50)
    copies = [text.replace(text.split()[-1], "changed") for text in texts[:10]]
    clusters = TextSet(texts + copies).clusters
    assert (clusters[:10] == clusters[50:]).all()
    assert len(np.unique(clusters)) == 50


def test_clusters_are_transitive() -> None:
    words = unrelated(1, 100)[0].split()
    chain = [" ".join(words[shift : shift + 80]) for shift in (0, 6, 12, 18)]
    assert len(np.unique(TextSet(chain).clusters)) == 1


def test_a_cluster_goes_to_its_lowest_side_as_a_whole() -> None:
    texts = unrelated(6)
    texts += [texts[0] + " end", texts[1] + " end"]
    sides = TextSet(texts).one_side([2, 2, 2, 0, 1, 0, 1, 0])
    assert sides.tolist() == [1, 0, 2, 0, 1, 0, 1, 0]


def test_texts_shorter_than_a_shingle_stay_alone() -> None:
    assert TextSet(["one two", "one two three", "", "!!"]).clusters.tolist() == [0, 1, 2, 3]
    assert TextSet([]).num_clustered == 0


def test_overlap_counts_ngrams_and_texts() -> None:
    shared = " ".join(f"s{number}" for number in range(13))
    texts = [f"x y z {shared}", f"{shared} end", " ".join(f"t{number}" for number in range(14))]
    report = ngram_overlap(TextSet(texts), np.array([0, 2, 2]), ["train", "validation", "test"])
    assert report["test_in_train"] == {
        "ngrams": 1,
        "share_of_ngrams": 0.25,
        "texts": 1,
        "share_of_texts": 0.5,
    }
    assert report["validation_in_train"]["texts"] == 0


def test_an_ngram_never_runs_over_the_end_of_a_text() -> None:
    hashes, owners = TextSet(["a b c", "d e f"]).ngrams(2)
    assert owners.tolist() == [0, 0, 1, 1]
    assert len(np.unique(hashes)) == 4
