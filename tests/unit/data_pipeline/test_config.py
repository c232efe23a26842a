from __future__ import annotations

import pytest
from pydantic import ValidationError

from data_pipeline.config import READING_FIELDS, DataConfig


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


def mixed(**changes: object) -> DataConfig:
    sources = [{"directory": "runs/data/web", "weight": 3}, {"directory": "runs/data/books", "weight": 1}]
    return DataConfig.model_validate({"directory": "runs/data/web/", "mixture": sources, **changes})


def test_the_sources_of_a_mixture_are_named_after_their_directories() -> None:
    assert [(source.name, source.weight) for source in mixed().mixture] == [("web", 3), ("books", 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"directory": "elsewhere"}, r"directory \(elsewhere\) must be one of the mixture's"),
        (
            {
                "mixture": [{"directory": "a/x", "weight": 1}, {"directory": "b/x", "weight": 1}],
                "directory": "a/x",
            },
            "the names x, x are not all different",
        ),
        ({"mixture": [{"directory": "runs/data/web", "weight": 0}]}, "greater than 0"),
        (
            {
                "mixture": [
                    {"directory": "runs/data/web", "weight": 1.2345678},
                    {"directory": "b", "weight": 9.8765431},
                ]
            },
            "round them to fewer digits",
        ),
        ({"shuffle_block": 0}, "greater than 0"),
        ({"on_corrupt": "skip"}, "'raise' or 'replace'"),
    ],
)
def test_reading_options_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        mixed(**changes)


def test_how_shards_are_read_changes_neither_what_is_built_nor_an_existing_run() -> None:
    plain = DataConfig(directory="d")
    reading = mixed(directory="runs/data/web", shuffle_block=64, shuffle_window=9, on_corrupt="replace")
    assert reading.build_values() == plain.build_values()
    assert not READING_FIELDS & plain.build_values().keys() and not READING_FIELDS & plain.run_values().keys()
    assert READING_FIELDS & reading.run_values().keys() == {"mixture", "shuffle_block", "shuffle_window"}
    # what to do with damage may be changed when it has stopped a run
    assert plain.run_values() == DataConfig(directory="d", on_corrupt="replace", max_replaced=3).run_values()
