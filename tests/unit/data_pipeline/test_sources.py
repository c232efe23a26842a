from __future__ import annotations

import functools
import gzip
import http.server
import importlib.util
import json
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import build, verify
from data_pipeline.builder import build_task, merge
from data_pipeline.config import DataConfig
from data_pipeline.errors import SourceError
from data_pipeline.source_files import hash_file
from data_pipeline.sources import Document, _HubDataset, open_source, split_of

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
    assert [d.text for d in read(base | {"min_characters": 4, "max_characters": 7})] == ["one two", "deux"]


@pytest.mark.parametrize("filters", [{"languages": ["en"]}, {"min_language_score": 0.5}])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
def test_a_filter_on_a_column_that_is_not_there_is_an_error(
    kind: str, filters: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All documents would be left out otherwise, without a word."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "data").mkdir()
    if kind == "jsonl":
        (tmp_path / "data" / "a.jsonl").write_text(json.dumps({"text": "one two", "id": "1"}) + "\n")
        source = {"kind": kind, "paths": str(tmp_path / "data" / "a.jsonl")}
    else:
        pq.write_table(pa.table({"text": ["one two"], "id": ["1"]}), tmp_path / "data" / "a.parquet")
        source = {"kind": kind, "paths": str(tmp_path / "data" / "a.parquet")}
        if kind == "hub":
            source = {"kind": kind, "path": str(tmp_path / "data"), "name": None}
    assert len(read(source)) == 1
    with pytest.raises(SourceError, match="language"):
        read(source | filters)


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


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "cannot be read .*size is 0 bytes"),
        (lambda data: b"PAR1 nothing", "cannot be read .*Parquet magic bytes not found"),
        (lambda data: data[:-100], "cannot be read .*Parquet magic bytes not found"),
        (lambda data: data.replace(b"four five", b"fear five"), "cannot be read .*CRC checksum"),
    ],
)
@pytest.mark.parametrize("row_groups_per_unit", [None, 1])
def test_damaged_parquet_is_refused(
    tmp_path: Path, change: Callable[[bytes], bytes], message: str, row_groups_per_unit: int | None
) -> None:
    path = tmp_path / "x.parquet"
    options = {"write_page_checksum": True, "use_dictionary": False, "compression": "none"}
    pq.write_table(pa.table(FINEWEB), path, row_group_size=3, write_statistics=False, **options)
    source = {"kind": "parquet", "paths": str(path), "row_groups_per_unit": row_groups_per_unit}
    assert len(read(source)) == 4
    rewrite(path, change)
    with pytest.raises(SourceError, match=rf"^{path}: {message}"):
        read(source)


def compressed(name: str, data: bytes) -> bytes:
    if name.endswith(".zst"):
        return bytes(pa.compress(data, codec="zstd", asbytes=True))
    return gzip.compress(data) if name.endswith(".gz") else data


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst"])
def test_damaged_or_empty_jsonl_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    source = {"kind": "jsonl", "paths": str(path)}
    data = compressed(name, b"".join(b'{"text": "line %d"}\n' % number for number in range(5000)))
    path.write_bytes(data)
    assert len(read(source)) == 5000
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match=rf"^{path}.*(ended before|Truncated|not readable as JSON)"):
        read(source)
    for empty in (b"", compressed(name, b"\n\n")):
        path.write_bytes(empty)
        with pytest.raises(SourceError, match=f"^{path}: is empty"):
            read(source)


@pytest.mark.parametrize("url", ["s3://bucket/a.parquet", "s3://bucket/*.parquet", "gs://bucket/a.parquet"])
def test_a_store_without_its_package_names_the_package(url: str) -> None:
    package = {"s3": "s3fs", "gs": "gcsfs"}[url[:2]]
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(SourceError, match=f"needs a package that is not installed: .*[Ii]nstall {package}"):
        open_source(
            DataConfig.model_validate({"directory": "d", "source": {"kind": "parquet", "paths": url}})
        ).identity()
    with pytest.raises(SourceError, match=f"needs a package that is not installed: .*[Ii]nstall {package}"):
        read({"kind": "parquet", "paths": url})


class _Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves parts of files, as object stores do; `sent` counts the bytes."""

    sent = 0

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if "Range" not in self.headers or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last or len(data) - 1) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)
        type(self).sent += len(part)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """URL of a real HTTP server of the folder `tmp_path`."""
    _Ranges.sent = 0
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Ranges, directory=str(tmp_path))
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_http(parquet: Path, tmp_path: Path, server: str) -> None:
    url = f"{server}/data/part-0.parquet"
    assert [d.text for d in read({"kind": "parquet", "paths": url})] == FINEWEB["text"]
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(b'{"text": "a"}\n')
    jsonl: dict[str, object] = {"kind": "jsonl", "paths": f"{server}/a.jsonl.gz"}
    assert [d.text for d in read(jsonl)] == ["a"]
    config = DataConfig.model_validate({"directory": "d", "source": jsonl})
    assert open_source(config).identity() == open_source(config).identity()
    for kind in ("parquet", "jsonl"):
        missing = {"kind": kind, "paths": f"{server}/none.{kind}"}
        with pytest.raises(SourceError, match=rf"'{server}/none\.{kind}' does not exist"):
            read(missing)
        with pytest.raises(SourceError, match="does not exist"):
            open_source(DataConfig.model_validate({"directory": "d", "source": missing})).identity()


def test_one_part_is_read_without_the_rest_of_the_file(tmp_path: Path, server: str) -> None:
    """Of 40 row groups one is fetched, and while a whole file is read no more than two are in memory."""
    generator = random.Random(0)
    texts = [generator.randbytes(100_000).hex() for _ in range(120)]
    table = pa.table({"text": texts, "id": [str(number) for number in range(120)]})
    path = tmp_path / "large.parquet"
    pq.write_table(table, path, row_group_size=3, compression="none", use_dictionary=False)
    del table
    size = path.stat().st_size
    source = {"kind": "parquet", "paths": f"{server}/large.parquet", "row_groups_per_unit": 1}
    opened = open_source(DataConfig.model_validate({"directory": "d", "source": source}))
    assert len(opened.units()) == 40
    _Ranges.sent = 0
    assert [document.text for document in opened.read(20)] == texts[60:63]
    assert size / 40 < _Ranges.sent < 0.6 * size  # fsspec fetches 5 MiB at least

    whole = open_source(
        DataConfig.model_validate({"directory": "d", "source": {"kind": "parquet", "paths": str(path)}})
    )
    before = pa.total_allocated_bytes()
    peak = max(pa.total_allocated_bytes() - before for _ in whole.read(0))
    assert 0 < peak < 4 * size / 40


def test_an_object_in_memory_and_a_pattern_behind_a_url(parquet: Path) -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/rows/a.parquet", parquet.read_bytes())
    store.pipe("/rows/b.parquet", parquet.read_bytes())
    assert len(read({"kind": "parquet", "paths": "memory://rows/a.parquet"})) == 4
    assert len(read({"kind": "parquet", "paths": "memory://rows/*.parquet"})) == 8
    with pytest.raises(SourceError, match=r"no file matches 'memory://rows/\*\.jsonl'"):
        read({"kind": "jsonl", "paths": "memory://rows/*.jsonl"})
    with pytest.raises(SourceError, match=r"'memory://rows/c\.parquet' does not exist"):
        read({"kind": "parquet", "paths": "memory://rows/c.parquet"})


def test_parts_of_row_groups(parquet: Path, tmp_path: Path) -> None:
    second = parquet.parent / "part-1.parquet"
    pq.write_table(pa.table(FINEWEB), second, row_group_size=1)
    pq.write_table(pa.table(FINEWEB).slice(0, 0), parquet.parent / "part-2.parquet")
    source = {"kind": "parquet", "paths": f"{parquet.parent}/*.parquet", "row_groups_per_unit": 3}
    opened = open_source(DataConfig.model_validate({"directory": "d", "source": source}))
    assert opened.units()[:3] == [
        f"{parquet}, row groups 0 to 1",
        f"{second}, row groups 0 to 2",
        f"{second}, row groups 3 to 3",
    ]
    assert [[d.text for d in opened.read(unit)] for unit in range(4)] == [
        FINEWEB["text"],
        FINEWEB["text"][:3],
        FINEWEB["text"][3:],
        [],
    ]
    files = opened.content()[0]["files"]
    assert [(file["row_groups"], file["first_unit"]) for file in files[:2]] == [(2, 0), (4, 1)]
    assert files[2]["first_unit"] == 3


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


def test_of_large_files_the_ends_and_the_size_are_always_read(tmp_path: Path) -> None:
    path = tmp_path / "large.parquet"
    content = bytearray(20 << 20)
    path.write_bytes(content)
    plain = hash_file(str(path))
    assert hash_file(str(path)) == plain
    for place in (0, 70 << 10, len(content) - 1):  # the second is in no block
        changed = content.copy()
        changed[place] = 1
        path.write_bytes(changed)
        assert (hash_file(str(path)) == plain) == (place == 70 << 10)
    path.write_bytes(bytes(len(content) + 1))
    assert hash_file(str(path)) != plain


def test_the_hub_source_on_a_local_dataset_of_the_same_schema(
    parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    source = {"kind": "hub", "path": str(parquet.parent), "name": None, "languages": ["en"]}
    documents = read(source)
    assert [document.text for document in documents] == ["one two", "x", "four five"]
    config = DataConfig.model_validate({"directory": "d", "source": source})
    assert open_source(config).identity() == open_source(config).identity()


def test_a_named_configuration_of_the_hub_is_built_in_tasks_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laid out as FineWeb is: configurations named in the card, several files each, rows of one schema."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    root = tmp_path / "fineweb"
    for name in ("sample-10BT", "CC-MAIN-2024-10"):
        (root / name).mkdir(parents=True)
        for part in range(3):
            rows = FINEWEB | {"text": [f"{name} {part} {text}" for text in FINEWEB["text"]]}
            rows["id"] = [f"<{name}-{part}-{row}>" for row in range(4)]
            pq.write_table(pa.table(rows), root / name / f"{part:03}_00000.parquet")
    (root / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample-10BT/*\n"
        "- config_name: CC-MAIN-2024-10\n  data_files:\n  - split: train\n    path: CC-MAIN-2024-10/*\n"
        "---\n"
    )

    def config(directory: str) -> DataConfig:
        return DataConfig.model_validate(
            {
                "directory": str(tmp_path / directory),
                "source": {"kind": "hub", "path": str(root), "name": "sample-10BT", "languages": ["en"]},
                "tokenizer": {"kind": "bpe", "vocab_size": 280},
                "sample_length": 16,
                "document_grid": 4,
                "validation_fraction": 0.0,
                "test_fraction": 0.0,
            }
        )

    source = open_source(config("tasks"))
    assert len(source.units()) == 3
    texts = [document.text for unit in range(3) for document in source.read(unit)]
    english = [
        text for text, language in zip(FINEWEB["text"], FINEWEB["language"], strict=True) if language == "en"
    ]
    assert texts == [f"sample-10BT {part} {text}" for part in range(3) for text in english]

    build(config("whole"), num_workers=1)
    for task in (2, 0, 1):
        build_task(config("tasks"), task, 3)
    merge(config("tasks"))
    assert content(tmp_path / "tasks") == content(tmp_path / "whole")
    assert verify(tmp_path / "tasks") == []


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_hub_that_fails_while_it_is_read_is_an_error_of_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        column_names = None
        num_shards = 1

        def shard(self, **_: int) -> Iterator[dict[str, str]]:
            yield from ()
            raise OSError("connection reset")

    opened = []

    def load_dataset(*_: object, **options: object) -> Failing:
        opened.append(options["revision"])
        return Failing()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source: dict[str, object] = {"kind": "hub", "path": str(tmp_path), "name": None}
    with pytest.raises(
        SourceError, match=r"part 0, cannot be read on: connection reset. Run the same command"
    ):
        read(source)

    # What is read is the commit that is recorded, whatever the branch does.
    monkeypatch.setattr(_HubDataset, "_commit", lambda _: "0123abc")
    with pytest.raises(SourceError, match="cannot be read on"):
        read(source | {"path": "someone/texts"})
    assert opened == [None, "0123abc"]


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
