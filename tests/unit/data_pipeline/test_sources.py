from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import SourceError
from data_pipeline.sources import Document, open_source, split_of

FINEWEB = {
    "text": ["one two", "deux", "x", "four five"],
    "id": ["<urn:uuid:1>", "<urn:uuid:2>", "<urn:uuid:3>", "<urn:uuid:4>"],
    "dump": ["CC-MAIN-2024-10"] * 4,
    "url": ["u"] * 4,
    "date": ["d"] * 4,
    "file_path": ["f"] * 4,
    "language": ["en", "fr", "en", "en"],
    "language_score": [0.99, 0.9, 0.8, 0.5],
    "token_count": [2, 1, 1, 2],
}


def read(source: dict[str, object]) -> list[Document]:
    config = DataConfig.model_validate(
        {"directory": "d", "source": source, "validation_fraction": 0.0, "test_fraction": 0.0}
    )
    opened = open_source(config)
    return [document for unit in range(len(opened.units())) for document in opened.read(unit)]


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "part-0.parquet"
    pq.write_table(pa.table(FINEWEB), path, row_group_size=3)
    return path


def test_parquet_is_read_in_order_across_row_groups(parquet: Path) -> None:
    documents = read({"kind": "parquet", "paths": str(parquet)})
    assert [document.text for document in documents] == FINEWEB["text"]
    assert documents[0] == Document("<urn:uuid:1>", "one two", "train")


def test_filters(parquet: Path) -> None:
    base = {"kind": "parquet", "paths": str(parquet)}
    assert [d.text for d in read(base | {"languages": ["en"]})] == ["one two", "x", "four five"]
    assert [d.text for d in read(base | {"min_language_score": 0.8})] == ["one two", "deux", "x"]
    assert [d.text for d in read(base | {"min_characters": 4})] == ["one two", "deux", "four five"]


def test_parquet_behind_a_url(parquet: Path) -> None:
    assert len(read({"kind": "parquet", "paths": f"file://{parquet}"})) == 4
    assert len(read({"kind": "parquet", "paths": f"file://{parquet.parent}/*.parquet"})) == 4


def test_files_come_by_name_and_once(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name, "id": name}) + "\n")
    paths = [str(tmp_path / "b.jsonl"), str(tmp_path / "*.jsonl")]
    assert [document.text for document in read({"kind": "jsonl", "paths": paths})] == ["b", "a"]


def test_jsonl_plain_and_compressed(tmp_path: Path) -> None:
    lines = b'{"body": "t\\u00e9xt \\ud800 end", "key": 7}\n\n{"body": "no id"}\n'
    (tmp_path / "a.jsonl").write_bytes(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(lines)
    source = {"kind": "jsonl", "text_field": "body", "id_field": "key"}
    plain = read(source | {"paths": str(tmp_path / "a.jsonl")})
    assert plain[0][:2] == ("7", "téxt ? end")
    assert len(plain[1].id) == 32
    assert read(source | {"paths": str(tmp_path / "b.jsonl.gz")}) == plain


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{\n", "line 1: not readable as JSON"),
        (b'{"text": "a"}\n[1]\n', "line 2: a JSON object is needed"),
        (b'{"txt": "a"}\n', r"line 1: no text under 'text'; it has txt. Set source.text_field"),
        (b'{"text": 5}\n', "no text under 'text'"),
        (b"\xff\xfe\n", "line 1: not readable as JSON"),
    ],
)
def test_broken_jsonl_is_refused_with_its_place(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read({"kind": "jsonl", "paths": str(path)})


def test_unusable_files_are_refused(tmp_path: Path, parquet: Path) -> None:
    with pytest.raises(
        SourceError, match="no file matches 'pipe:echo'"
    ):  # a shell for webdataset, nothing here
        read({"kind": "jsonl", "paths": "pipe:echo"})
    with pytest.raises(SourceError, match="no file matches"):
        read({"kind": "parquet", "paths": str(tmp_path / "none-*.parquet")})
    with pytest.raises(SourceError, match="no column body; it has date"):
        read({"kind": "parquet", "paths": str(parquet), "text_field": "body"})
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(SourceError, match="not readable as parquet"):
        read({"kind": "parquet", "paths": str(tmp_path / "x.parquet")})


def test_identity_follows_the_bytes_not_the_name(tmp_path: Path) -> None:
    def identity(path: Path) -> str:
        return open_source(
            DataConfig.model_validate({"directory": "d", "source": {"kind": "jsonl", "paths": str(path)}})
        ).identity()

    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    (tmp_path / "b.jsonl").write_text('{"text": "a"}')
    assert identity(tmp_path / "a.jsonl") == identity(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}')
    assert identity(tmp_path / "a.jsonl") != identity(tmp_path / "b.jsonl")


def test_the_hub_source_on_a_local_dataset_of_the_same_schema(
    parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    source = {"kind": "hub", "path": str(parquet.parent), "name": None, "languages": ["en"]}
    documents = read(source)
    assert [document.text for document in documents] == ["one two", "x", "four five"]
    config = DataConfig.model_validate({"directory": "d", "source": source})
    assert open_source(config).identity() == open_source(config).identity()


def test_the_hub_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(SourceError, match=r"Without a network, use source\.kind=parquet"):
        read({"kind": "hub"})
    config = DataConfig.model_validate({"directory": "d", "source": {"kind": "hub"}})
    with pytest.raises(SourceError, match="Without a network"):
        open_source(config).identity()


def test_splits_by_id_have_the_asked_sizes_and_nest() -> None:
    ids = [f"document {number}" for number in range(5000)]
    small = [split_of(identifier, (0.02, 0.05)) for identifier in ids]
    assert 0.01 < small.count("validation") / 5000 < 0.03
    assert 0.04 < small.count("test") / 5000 < 0.06
    # a larger test split keeps the documents of the smaller one
    larger = [split_of(identifier, (0.02, 0.10)) for identifier in ids]
    assert all(b == "test" for a, b in zip(small, larger, strict=True) if a == "test")
