from __future__ import annotations

import pytest

from data_pipeline import python_docs
from data_pipeline.errors import SourceError

SOURCE = '''"""Module text.

    Indented."""
import os
if os.name:
    def first():
        """First function."""
        def inner():
            "Inner text."
        return 1
class Thing:
    r"""Thing \\d text."""
    attribute = """not a docstring"""
    async def method(self):
        """Method
        text."""
def bare(): pass
def bytes_are_not_text():
    b"bytes"
'''


def test_docstrings_come_in_source_order_with_their_names() -> None:
    assert python_docs.docstrings(SOURCE) == [
        ("", "Module text.\n\nIndented."),
        ("first", "First function."),
        ("first.inner", "Inner text."),
        ("Thing", "Thing \\d text."),
        ("Thing.method", "Method\ntext."),
    ]


def test_source_for_another_python_has_none() -> None:
    assert python_docs.docstrings("print 'x'") == []
    assert python_docs.docstrings("x = '\0'") == []


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_docs, "DISTRIBUTIONS", ("click", "tokenizers", "webdataset"))
    monkeypatch.setattr(python_docs, "HELD_OUT", {"click": "test", "tokenizers": "validation"})


def test_the_corpus_is_deterministic_and_split_by_package(few: None) -> None:
    documents, description, content_hash = python_docs.read_docstrings(100)
    again = python_docs.read_docstrings(100)
    assert (documents, content_hash) == (again[0], again[2])
    assert len(documents) > 300
    assert all(len(document.text) >= 100 for document in documents)
    assert len({document.text for document in documents}) == len(documents)
    assert len({document.id for document in documents}) == len(documents)
    for document in documents:
        package = document.id.partition(":")[0]
        assert document.split in (python_docs.HELD_OUT.get(package, "train"), "train")
    assert set(description["distributions"]) == {"click", "tokenizers", "webdataset"}
    assert set(description["overlap_13_grams"]) == {
        "validation_in_train",
        "test_in_train",
        "test_in_validation",
    }
    assert python_docs.read_docstrings(200)[2] != content_hash


def test_the_identity_needs_no_reading_and_follows_what_is_installed(
    few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = python_docs.identity()
    assert before == python_docs.identity()
    monkeypatch.setattr(python_docs, "DISTRIBUTIONS", ("click", "tokenizers"))
    assert python_docs.identity() != before


def test_a_missing_distribution_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_docs, "DISTRIBUTIONS", ("click", "no-such-package"))
    with pytest.raises(SourceError, match="no-such-package, which are not installed"):
        python_docs.source_files()


def test_held_out_packages_are_in_the_list() -> None:
    assert set(python_docs.HELD_OUT) <= set(python_docs.DISTRIBUTIONS)
    files, versions = python_docs.source_files()
    assert set(versions) == set(python_docs.DISTRIBUTIONS)
    assert len(files) > 5000
    assert not any("/tests/" in file.name for file in files)


def test_a_share_of_the_training_text_keeps_the_held_out_text_whole(
    few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(python_docs, "DISTRIBUTIONS", ("click", "tokenizers", "numpy"))
    whole, _, whole_hash = python_docs.read_docstrings(200)
    part, _, part_hash = python_docs.read_docstrings(200, train_fraction=0.25)
    train = [document for document in whole if document.split == "train"]
    kept = [document for document in part if document.split == "train"]
    assert set(kept) < set(train)
    assert 0.2 < len(kept) / len(train) < 0.3
    held_out = [document for document in whole if document.split != "train"]
    assert {document.split for document in held_out} == {"validation", "test"}
    assert [document for document in part if document.split != "train"] == held_out
    assert part_hash != whole_hash
