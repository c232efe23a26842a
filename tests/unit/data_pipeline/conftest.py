"""A small real dataset, built once, that the tests read or copy."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.builder import build
from data_pipeline.config import DataConfig

_VOCABULARY = """
    the a of graph node returns value naïve 模型 matrix shape tensor array déjà vu 🙂 index of each row column
    weights applied before after softmax layer and or not if else while loops over batch dimension size
"""
WORDS = _VOCABULARY.split()


def make_text(generator: random.Random, num_words: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(num_words))


@pytest.fixture(scope="session")
def documents() -> list[dict[str, str]]:
    """300 documents of 1 to 300 words; some in other scripts, one that spells out a special token."""
    generator = random.Random(7)
    rows = [
        {"id": f"<urn:uuid:{number}>", "text": make_text(generator, generator.choice([1, 5, 40, 300]))}
        for number in range(300)
    ]
    rows[3]["text"] = "a text may mention <|endoftext|> and <|pad|> without ending"
    return rows


@pytest.fixture(scope="session")
def jsonl_file(documents: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "documents.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
    return path


MakeConfig = Callable[..., DataConfig]


@pytest.fixture(scope="session")
def make_config(jsonl_file: Path) -> MakeConfig:
    """A small jsonl configuration; keyword arguments replace its values."""

    def make(directory: Path, **changes: object) -> DataConfig:
        values: dict[str, object] = {
            "directory": str(directory),
            "source": {"kind": "jsonl", "paths": [str(jsonl_file)]},
            "tokenizer": {"kind": "bpe", "vocab_size": 320},
            "sample_length": 32,
            "document_grid": 4,
            "validation_fraction": 0.1,
            "test_fraction": 0.1,
            "samples_per_shard": 200,
            "member_bytes": 512,
        }
        return DataConfig.model_validate(values | changes)

    return make


@pytest.fixture(scope="session")
def built(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small dataset. Read-only: tests that damage it take `copy`."""
    directory = tmp_path_factory.mktemp("built") / "tokens"
    build(make_config(directory), num_workers=1)
    return directory


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """A copy of the small dataset that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "copy"))
