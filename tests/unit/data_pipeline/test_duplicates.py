from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import TokenDataset, build, load_tokenizer, verify
from data_pipeline import duplicates as passes
from data_pipeline.builder import build_task, deduplicate, deduplicate_task, merge, merge_duplicates
from data_pipeline.config import DataConfig
from data_pipeline.errors import DatasetError, SourceError
from data_pipeline.sources import Document

MakeConfig = Callable[..., DataConfig]


class ListSource:
    """Units of documents in memory."""

    def __init__(self, *units: Sequence[str]) -> None:
        self._units = [
            [Document(f"{unit}-{place}", text, "train") for place, text in enumerate(texts)]
            for unit, texts in enumerate(units)
        ]

    def units(self) -> Sequence[str]:
        return [f"unit {unit}" for unit in range(len(self._units))]

    def read(self, unit: int) -> Iterator[Document]:
        return iter(self._units[unit])

    def identity(self) -> str:
        return "identity"

    def content(self) -> tuple[dict[str, Any], str]:
        return {"files": []}, "hash"


def run(source: ListSource, folder: Path, bucket_rows: int = 1 << 25) -> passes.WithoutDuplicates:
    for unit in range(len(source.units())):
        passes.hash_unit(source, folder, unit)
    passes.merge_hashes(folder, source.units(), bucket_rows)
    return passes.WithoutDuplicates(source, folder)


def first_ones(rows: Sequence[Any], text: Callable[[Any], str]) -> list[Any]:
    seen: set[str] = set()
    return [row for row in rows if not (text(row) in seen or seen.add(text(row)))]  # type: ignore[func-returns-value]


@pytest.mark.parametrize("bucket_rows", [1, 7, 1 << 25])
def test_the_first_of_equal_texts_stays_in_buckets_of_any_size(tmp_path: Path, bucket_rows: int) -> None:
    generator = random.Random(bucket_rows)
    # 30 different texts over 200 places; a unit that holds nothing, one that holds one text only
    units = [[f"naïve {generator.randrange(30)}" for _ in range(60)] for _ in range(3)]
    source = ListSource(*units, [], ["always this"] * 15, ["always this", "", "end"])
    documents = [document for unit in range(6) for document in source.read(unit)]
    without = run(source, tmp_path, bucket_rows)
    kept = [document for unit in range(6) for document in without.read(unit)]
    assert kept == first_ones(documents, lambda document: document.text)
    assert without.content()[0]["exact_duplicates"] == {
        "documents": len(documents),
        "removed": len(documents) - len(kept),
    }


def test_texts_that_differ_in_anything_are_no_duplicates(tmp_path: Path) -> None:
    texts = ["a text", "a  text", "A text", "a text ", "a\u0301", "\u00e1", "", " "]
    without = run(ListSource(texts[:4], texts[4:]), tmp_path)
    assert [document.text for unit in (0, 1) for document in without.read(unit)] == texts


def test_the_merge_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    source = ListSource([f"{number % 40}" for number in range(70)], [f"{number}" for number in range(50)])
    run(source, tmp_path, bucket_rows=10)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "merged.json").unlink()
    lost = sorted(tmp_path.glob("duplicates-*"))[2:4]
    for path in lost:
        path.unlink()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(DatasetError, match="not known yet: run `python -m data_pipeline deduplicate"):
        passes.WithoutDuplicates(source, tmp_path)
    passes.merge_hashes(tmp_path, source.units(), bucket_rows=10)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_memory_and_disk_are_as_stated(tmp_path: Path) -> None:
    """Four times the documents in buckets of the same size: the same memory, four times the disk."""
    peaks = []
    for documents in (40_000, 160_000):
        folder = tmp_path / str(documents)
        source = ListSource(
            *([str(4 * number + unit) for number in range(documents // 4)] for unit in range(4))
        )
        for unit in range(4):
            passes.hash_unit(source, folder, unit)
        expected = passes.cost(documents, 4, bucket_rows=10_000)
        assert expected.buckets == documents // 10_000
        hashes = sum(path.stat().st_size for path in folder.glob("hashes-*"))
        assert 0 <= hashes - expected.disk <= 4 * 256  # the headers of the files
        tracemalloc.start()
        passes.merge_hashes(folder, source.units(), bucket_rows=10_000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        # one unit's column of hashes is copied to find where the buckets begin
        assert 0.5 * expected.merge_memory < peaks[-1] < expected.merge_memory + 8 * documents // 4 + 100_000
    assert passes.cost(10**10, 25_000).merge_memory < 2.2 * 2**30


def test_a_text_in_every_place_does_not_fill_a_bucket(tmp_path: Path) -> None:
    source = ListSource(["always this"] * 50_000, ["always this"] * 50_000)
    for unit in range(2):
        passes.hash_unit(source, tmp_path, unit)
    tracemalloc.start()
    passes.merge_hashes(tmp_path, source.units())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    without = passes.WithoutDuplicates(source, tmp_path)
    assert [len(list(without.read(unit))) for unit in range(2)] == [1, 0]


def test_a_source_that_has_shrunk_is_noticed(tmp_path: Path) -> None:
    run(ListSource(["a", "b", "a"]), tmp_path)
    with pytest.raises(SourceError, match="unit 0: has changed since its duplicates were looked for"):
        list(passes.WithoutDuplicates(ListSource(["a"]), tmp_path).read(0))


@pytest.fixture(scope="module")
def rows(documents: list[dict[str, str]]) -> list[dict[str, str]]:
    """The documents with 100 copies of earlier ones under other ids, so in other splits, spread over them."""
    generator = random.Random(11)
    rows = [dict(row) for row in documents]
    for number in range(100):
        at = generator.randrange(1, len(rows))
        rows.insert(at, {"id": f"copy {number}", "text": rows[generator.randrange(at)]["text"]})
    return rows


def write(folder: Path, rows: list[dict[str, str]], names: list[int]) -> str:
    """Row i goes to the file names[i]."""
    folder.mkdir()
    for name in sorted(set(names)):
        lines = [json.dumps(row) + "\n" for row, own in zip(rows, names, strict=True) if own == name]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return str(folder / "*.jsonl")


@pytest.fixture(scope="module")
def with_copies(rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("copies") / "files"
    return write(folder, rows, [number // 100 for number in range(400)])


def config_of(
    make_config: MakeConfig, directory: Path, pattern: str, deduplicated: bool = True
) -> DataConfig:
    source = {"kind": "jsonl", "paths": [pattern]}
    return make_config(directory, source=source, deduplicate=deduplicated, samples_per_shard=50)


def shards(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def test_a_build_without_duplicates_is_that_of_a_source_that_has_none(
    make_config: MakeConfig, rows: list[dict[str, str]], with_copies: str, tmp_path: Path
) -> None:
    """Byte by byte, so the tokenizer too has seen no text that stays in a held-out split only."""
    clean = first_ones(list(enumerate(rows)), lambda pair: pair[1]["text"])
    pattern = write(tmp_path / "clean", [row for _, row in clean], [place // 100 for place, _ in clean])
    build(config_of(make_config, tmp_path / "expected", pattern, deduplicated=False), num_workers=1)
    manifest = build(config_of(make_config, tmp_path / "tokens", with_copies), num_workers=1)
    assert shards(tmp_path / "tokens") == shards(tmp_path / "expected")
    assert verify(tmp_path / "tokens") == []
    assert manifest.source.description["exact_duplicates"] == {
        "documents": 400,
        "removed": 400 - len(clean),
    }


def texts_of(directory: Path, split: str) -> list[str]:
    dataset, tokenizer = TokenDataset(directory, split), load_tokenizer(directory)
    found: dict[int, list[int]] = {}
    for index in range(len(dataset)):
        tokens = dataset.read([index])["input_ids"][0].tolist()
        for _, start, length, _, _, document in dataset.read_segments([index])[0].tolist():
            found.setdefault(document, []).extend(tokens[start : start + length])
    return [tokenizer.decode(tokens) for tokens in found.values()]


@pytest.mark.parametrize("deduplicated", [True, False])
def test_no_text_is_in_two_splits(
    make_config: MakeConfig, with_copies: str, tmp_path: Path, deduplicated: bool
) -> None:
    build(config_of(make_config, tmp_path / "tokens", with_copies, deduplicated), num_workers=1)
    splits = {split: texts_of(tmp_path / "tokens", split) for split in ("train", "validation", "test")}
    leaked = (set(splits["train"]) & set(splits["test"])) | (set(splits["train"]) & set(splits["validation"]))
    assert bool(leaked) != deduplicated
    assert all(len(set(texts)) == len(texts) for texts in splits.values()) == deduplicated


def test_tasks_end_in_the_same_bytes(make_config: MakeConfig, with_copies: str, tmp_path: Path) -> None:
    build(config_of(make_config, tmp_path / "expected", with_copies), num_workers=1)
    config = config_of(make_config, tmp_path / "tokens", with_copies)
    deduplicate_task(config, 1, 3)
    with pytest.raises(DatasetError, match=r"the duplicates are not known yet: run .* deduplicate"):
        build_task(config, 0, 2)
    with pytest.raises(DatasetError, match=r"3 of 4 parts of the source are not hashed yet \(.*0\.jsonl"):
        merge_duplicates(config)
    with pytest.raises(ValueError, match="task index 3"):
        deduplicate_task(config, 3, 3)
    deduplicate_task(config, 0, 3)
    deduplicate_task(config, 2, 3)
    merge_duplicates(config)
    for task in (1, 0):
        build_task(config, task, 2)
    merge(config)
    assert shards(tmp_path / "tokens") == shards(tmp_path / "expected")
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in ("tokens", "expected")]
    assert manifests[0] == manifests[1]
    deduplicate(config)  # complete, so there is nothing to do
    assert not (tmp_path / "tokens/.build").exists()
    with pytest.raises(ValueError, match=r"data\.deduplicate is off"):
        deduplicate(config_of(make_config, tmp_path / "tokens", with_copies, deduplicated=False))
