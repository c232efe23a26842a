"""The offline corpus: docstrings of the packages that this project depends on anyway. Free of torch.

Sources are parsed, never imported. The list of distributions is fixed, so extras that happen to be installed
do not change the corpus; another version of one does, and shows in the content hash.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import inspect
import os
import re
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.errors import SourceError
from data_pipeline.files import sha256_json
from data_pipeline.near_duplicates import TextSet, ngram_overlap
from data_pipeline.workers import map_in_processes

DISTRIBUTIONS = (
    "aiohttp",
    "click",
    "datasets",
    "deepspeed",
    "fonttools",
    "fsspec",
    "huggingface_hub",
    "Jinja2",
    "matplotlib",
    "mpmath",
    "networkx",
    "numpy",
    "pandas",
    "pillow",
    "pyarrow",
    "pydantic",
    "sympy",
    "tokenizers",
    "torch",
    "transformers",
    "wandb",
    "webdataset",
)

# Whole packages are held out, so that no docstring is tested whose siblings were trained on. Chosen for
# ordinary technical English, in the numpydoc style that the training packages also have, about a subject of
# their own (graphs; plotting and images), and for their size: about 5 % of the text each. Their families stay
# together: sympy and mpmath, numpy and pandas, transformers, datasets and huggingface_hub are all on the
# training side.
HELD_OUT = {"networkx": "test", "matplotlib": "validation", "pillow": "validation"}

# Tests and generated code repeat themselves; vendored copies belong to someone else's text.
_SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "_vendor", "vendor", "vendored", "third_party"})

EXTRACTION_VERSION = 1
"""Raised when the rules of this file change, so that a finished build is not taken for up to date."""


class Docstring(NamedTuple):
    """One document: `id` is DISTRIBUTION:MODULE PATH:QUALIFIED NAME, which is not part of the text."""

    id: str
    text: str
    split: str


class _File(NamedTuple):
    distribution: str
    name: str
    path: str
    hash: str


def source_files() -> tuple[list[_File], dict[str, str]]:
    """The Python files of all distributions in a fixed order, and the distributions' versions.

    Raises:
        SourceError: a distribution of the list is not installed.
    """
    files: list[_File] = []
    versions: dict[str, str] = {}
    missing = []
    for name in DISTRIBUTIONS:
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        versions[name] = distribution.version
        found = [
            _File(name, str(file), str(file.locate()), file.hash.value if file.hash is not None else "")
            for file in distribution.files or ()
            if file.suffix == ".py"
            and ".." not in file.parts
            and not _SKIPPED_FOLDERS.intersection(file.parts)
        ]
        files += sorted(found, key=lambda file: file.name)
    if missing:
        raise SourceError(
            f"the source python-docs needs the packages {', '.join(missing)}, which are not installed: "
            "install the project with its dependencies (pip install -e .)"
        )
    return files, versions


def identity() -> str:
    """Hash of what is installed, by the hashes that pip recorded: cheap, no file is read."""
    files, _ = source_files()
    return sha256_json([EXTRACTION_VERSION, [(file.distribution, file.name, file.hash) for file in files]])


_WITH_BODY = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BLOCKS = (ast.If, ast.Try, ast.With)


def docstrings(source: str) -> list[tuple[str, str]]:
    """(qualified name, cleaned docstring) of a module and all that it defines, in source order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in other people's strings
        try:
            module = ast.parse(source)
        except (SyntaxError, ValueError):  # written for another version of Python
            return []
    found: list[tuple[str, str]] = []
    pending: list[tuple[str, Any]] = [("", module)]
    while pending:
        name, node = pending.pop()
        if not isinstance(node, _BLOCKS) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                text = inspect.cleandoc(first.value.value).strip()
                found.append((name, text.encode("utf-8", "replace").decode()))  # lone surrogates are no text
        for child in reversed(node.body):
            if isinstance(child, _WITH_BODY):
                pending.append((f"{name}.{child.name}" if name else child.name, child))
            elif isinstance(child, _BLOCKS):
                pending.append((name, child))
    return found


def _extract(files: list[_File]) -> list[list[tuple[str, str]]]:
    """The docstrings of each file. Runs in a worker process."""
    gc.disable()  # syntax trees have no cycles, and looking for them takes a third of the time
    results: list[list[tuple[str, str]]] = []
    for file in files:
        try:
            source = Path(file.path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            results.append([])
            continue
        has_docstring = '"""' in source or "'''" in source or re.search(r":\s*\n\s*[rRuU]?[\"']", source)
        results.append(docstrings(source) if has_docstring else [])
    return results


def _position(document_id: str) -> float:
    """A number in [0, 1) by a hash of the id."""
    digest = hashlib.blake2b(document_id.encode(), digest_size=8, key=b"train").digest()
    return int.from_bytes(digest, "big") / 2**64


def read_docstrings(
    min_characters: int, train_fraction: float = 1.0
) -> tuple[list[Docstring], dict[str, Any], str]:
    """All docstrings without exact duplicates, split by package with near-duplicates on one side.

    A cluster of near-duplicates that touches two splits goes to training as a whole: held-out text only ever
    gets smaller and cleaner.

    Returns:
        documents, description for the manifest (versions, counts, overlap between the splits), content hash.
    """
    files, versions = source_files()
    size = 200
    parts = [files[first : first + size] for first in range(0, len(files), size)]
    results = map_in_processes(_extract, parts, min(os.cpu_count() or 1, 8))
    extracted = [found for part in results for found in part]

    documents: list[Docstring] = []
    seen: set[bytes] = set()
    short = duplicates = 0
    for file, found in zip(files, extracted, strict=True):
        for name, text in found:
            if len(text) < min_characters:
                short += 1
                continue
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if digest in seen:
                duplicates += 1
                continue
            seen.add(digest)
            split = HELD_OUT.get(file.distribution, "train")
            documents.append(Docstring(f"{file.distribution}:{file.name}:{name}", text, split))

    texts = TextSet([document.text for document in documents])
    sides = ["train", "validation", "test"]
    before = [sides.index(document.split) for document in documents]
    after = texts.one_side(before)
    documents = [
        document._replace(split=sides[side]) for document, side in zip(documents, after.tolist(), strict=True)
    ]
    documents = [d for d in documents if d.split != "train" or _position(d.id) < train_fraction]
    content_hash = sha256_json([list(document) for document in documents])
    description = {
        "distributions": versions,
        "held_out": HELD_OUT,
        "documents": len(documents),
        "left_out": {"shorter_than_min_characters": short, "exact_duplicates": duplicates},
        "near_duplicates": {
            "documents_in_clusters": texts.num_clustered,
            "moved_to_train": sum(old != new for old, new in zip(before, after.tolist(), strict=True)),
        },
        "overlap_13_grams": ngram_overlap(texts, after, sides),
    }
    return documents, description, content_hash
