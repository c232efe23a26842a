from __future__ import annotations

import pytest
from pydantic import ValidationError

from data_pipeline.config import DataConfig


def test_defaults_are_the_offline_corpus() -> None:
    config = DataConfig(directory="d")
    assert config.source.kind == "python-docs"
    assert config.tokenizer.kind == "bpe"
    assert DataConfig.model_validate(config.model_dump()) == config


def test_one_path_is_a_list_of_one() -> None:
    config = DataConfig.model_validate(
        {"directory": "d", "source": {"kind": "parquet", "paths": "a/*.parquet"}}
    )
    assert config.source.paths == ("a/*.parquet",)  # type: ignore[union-attr]
    assert config.split_fractions == (0.01, 0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_length": 30}, "multiple of document_grid"),
        ({"test_fraction": 0.1}, "no effect with the source python-docs"),
        ({"deduplicate": True}, "which leaves out exact duplicates anyway: remove it"),
        (
            {"source": {"kind": "parquet", "paths": ["a"], "row_groups_per_unit": 0}},
            "greater than or equal to 1",
        ),
        (
            {
                "source": {"kind": "jsonl", "paths": ["a"]},
                "validation_fraction": 0.5,
                "test_fraction": 0.5,
            },
            "nothing to train on",
        ),
        ({"source": {"kind": "jsonl", "paths": []}}, "at least 1 item"),
        ({"tokenizer": {"kind": "bpe", "vocab_size": 100}}, "greater than or equal to 258"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate({"directory": "d"} | changes)
