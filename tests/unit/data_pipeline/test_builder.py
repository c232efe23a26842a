from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import pytest

from data_pipeline import build, load_tokenizer, verify
from data_pipeline.builder import build_task, merge
from data_pipeline.config import DataConfig
from data_pipeline.dataset import TokenDataset
from data_pipeline.errors import DatasetError, NotADatasetError, SourceError
from data_pipeline.files import atomic_writer

MakeConfig = Callable[..., DataConfig]


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def files(documents: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The documents spread over 5 files; the pattern that matches them."""
    folder = tmp_path_factory.mktemp("files")
    for number in range(5):
        rows = documents[number * 60 : (number + 1) * 60]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "*.jsonl")


@pytest.fixture(scope="module")
def several(files: str, make_config: MakeConfig) -> Callable[[Path], DataConfig]:
    """A configuration of several files, so several units."""
    return lambda directory: make_config(
        directory, source={"kind": "jsonl", "paths": [files]}, samples_per_shard=50
    )


@pytest.fixture(scope="module")
def uninterrupted(
    several: Callable[[Path], DataConfig], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("uninterrupted") / "tokens"
    build(several(directory), num_workers=1)
    assert verify(directory) == []
    return content(directory)


def test_a_build_is_a_function_of_configuration_and_text(
    built: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    build(make_config(tmp_path / "again"), num_workers=1)
    assert content(tmp_path / "again") == content(built)
    assert {path.name for path in built.iterdir()} == {
        "manifest.json",
        "tokenizer",
        "train",
        "validation",
        "test",
    }


def test_the_manifest_counts_everything(built: Path, documents: list[dict[str, str]]) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    assert sum(split["documents"] for split in manifest["splits"].values()) == len(documents)
    for split in manifest["splits"].values():
        for key in ("samples", "tokens", "real_tokens", "documents", "bytes"):
            assert split[key] == sum(shard[key] for shard in split["shards"])
    assert {shard["samples"] for shard in manifest["splits"]["train"]["shards"][:-1]} == {200}
    assert manifest["source"]["description"]["files"][0]["path"].endswith("documents.jsonl")
    # settings younger than the format: at their default a directory built before them stays up to date
    assert not {"directory", "deduplicate"} & set(manifest["config"])


def test_a_complete_build_is_left_alone(copy: Path, make_config: MakeConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    manifest = build(make_config(copy))
    assert manifest == build(make_config(copy))
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_other_shards_are_only_replaced_on_request(copy: Path, make_config: MakeConfig) -> None:
    with pytest.raises(DatasetError, match=r"holds token shards of another configuration.*--replace"):
        build(make_config(copy, seed=5))
    old = TokenDataset(copy, "train")
    build(make_config(copy, seed=5, samples_per_shard=300), replace=True, num_workers=1)
    new = TokenDataset(copy, "train")
    assert new.fingerprint != old.fingerprint
    assert verify(copy) == []  # no file of the old build is left


def test_other_text_is_noticed(copy: Path, make_config: MakeConfig, jsonl_file: Path, tmp_path: Path) -> None:
    text = tmp_path / "documents.jsonl"
    shutil.copy(jsonl_file, text)
    config = make_config(tmp_path / "tokens", source={"kind": "jsonl", "paths": [str(text)]})
    build(config, num_workers=1)
    with text.open("a") as file:
        file.write('{"id": "new", "text": "one more"}\n')
    with pytest.raises(DatasetError, match="holds token shards of other text"):
        build(config)


def test_a_lost_shard_is_noticed_and_can_be_rebuilt(copy: Path, built: Path, make_config: MakeConfig) -> None:
    (copy / "train/shard-000002.tar").unlink()
    with pytest.raises(DatasetError, match=r"shard-000002\.tar is missing.*--replace"):
        build(make_config(copy))
    build(make_config(copy), replace=True, num_workers=1)
    assert content(copy) == content(built)


def test_a_directory_of_something_else_is_left_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for replace in (False, True):
        with pytest.raises(NotADatasetError, match="not empty and not a directory of token shards"):
            build(make_config(tmp_path), replace=replace)
    assert content(tmp_path) == {"thesis.tex": b"x"}


def test_tasks_and_merge_end_in_the_same_bytes(
    several: Callable[[Path], DataConfig], uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    config = several(tmp_path / "tokens")
    build_task(config, 2, 3)
    build_task(config, 0, 3)
    with pytest.raises(DatasetError, match=r"2 of 5 parts of the source are not built yet \(.*1\.jsonl"):
        merge(config)
    assert not (tmp_path / "tokens/manifest.json").exists()
    with pytest.raises(NotADatasetError, match="did not finish; run the same build command again"):
        TokenDataset(tmp_path / "tokens", "train")
    build_task(config, 1, 3)
    manifest = merge(config)
    assert content(tmp_path / "tokens") == uninterrupted
    assert merge(config) == manifest
    with pytest.raises(ValueError, match="task index 3"):
        build_task(config, 3, 3)


@pytest.mark.slow
def test_worker_processes_end_in_the_same_bytes(
    several: Callable[[Path], DataConfig], uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    build(several(tmp_path / "tokens"), num_workers=2)
    assert content(tmp_path / "tokens") == uninterrupted


def test_document_numbers_are_unique_over_the_files(uninterrupted: dict[str, bytes], tmp_path: Path) -> None:
    for name, data in uninterrupted.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    dataset = TokenDataset(tmp_path, "train")
    segments = dataset.read_segments(range(len(dataset)))
    numbers = {int(number) for rows in segments for number in rows[:, 5]}
    assert len(numbers) == dataset.num_documents


def test_the_manifest_tells_which_part_a_shard_is_from(
    several: Callable[[Path], DataConfig], tmp_path: Path
) -> None:
    manifest = build(several(tmp_path / "tokens"), num_workers=1)
    parts, first, longest = manifest.source.description["parts"], 0, 0
    dataset, tokenizer = TokenDataset(tmp_path / "tokens", "train"), load_tokenizer(tmp_path / "tokens")
    assert len(parts) == 5
    for part in parts:
        texts = " ".join(json.loads(line)["text"] for line in Path(part["name"]).read_text().splitlines())
        for shard in range(first, first + part["shards"]["train"]):
            batch = dataset.read(dataset.shard_range(shard)[:3])
            for number in range(1, int(batch["document_ids"].max()) + 1):
                for row in range(len(batch["input_ids"])):
                    ids = batch["input_ids"][row][batch["document_ids"][row] == number]
                    # Characters may be cut in two.
                    text = tokenizer.decode(ids, skip_special_tokens=True).strip("\ufffd")
                    assert text in texts
                    longest = max(longest, len(text))
        first += part["shards"]["train"]
    assert first == len(dataset.shards) and longest > 50


_FILE_EVENTS = frozenset(
    {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.copyfile"}
)


def _build_in_child(
    config: DataConfig, count: Synchronized[int], kill_at: int | None, file_size_limit: int | None
) -> None:
    """Builds; counts the operations on files of the dataset, and dies by SIGKILL just before one of them."""

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in _FILE_EVENTS and config.directory in str(arguments[0]):
            count.value += 1
            if count.value == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    if file_size_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))
    build(config, num_workers=1)


def run_child(
    config: DataConfig, kill_at: int | None = None, file_size_limit: int | None = None
) -> tuple[int, int]:
    """Builds in a forked process; its exit code and the number of its file operations."""
    context = multiprocessing.get_context("fork")
    count = context.Value("i", 0)
    child = context.Process(target=_build_in_child, args=(config, count, kill_at, file_size_limit))
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode, count.value


def assert_invisible_or_complete(directory: Path, complete: dict[str, bytes]) -> None:
    """Either there is no manifest and nothing can be read, or everything is there."""
    if (directory / "manifest.json").exists():
        visible = {n: data for n, data in content(directory).items() if not n.startswith(".build/")}
        assert visible == complete
    else:
        with pytest.raises(NotADatasetError):
            TokenDataset(directory, "train")
        for name, data in content(directory).items():
            if name.split("/")[0] in ("train", "validation", "test"):
                assert complete[name] == data  # moved by a merge under way, but whole


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
def test_killed_anywhere_and_run_again_ends_in_the_same_bytes(
    several: Callable[[Path], DataConfig], uninterrupted: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    exit_code, operations = run_child(several(tmp_path / "measured"))
    assert exit_code == 0 and operations > 100
    generator = random.Random(seed)
    config = several(tmp_path / "tokens")
    for attempt in range(5):
        # the first dies anywhere, the later ones have less left to do and die in what is left
        exit_code, _ = run_child(config, kill_at=generator.randint(1, operations // (attempt + 1)))
        assert exit_code == -signal.SIGKILL or (attempt > 0 and exit_code == 0)
        assert_invisible_or_complete(tmp_path / "tokens", uninterrupted)
    build(config, num_workers=1)
    assert content(tmp_path / "tokens") == uninterrupted


def test_killed_anywhere_while_duplicates_are_removed(
    files: str, make_config: MakeConfig, jsonl_file: Path, tmp_path: Path
) -> None:
    def config(directory: Path) -> DataConfig:
        # every document twice, the second time in a file that holds all of them
        source = {"kind": "jsonl", "paths": [files, str(jsonl_file)]}
        return make_config(directory, source=source, deduplicate=True)

    exit_code, operations = run_child(config(tmp_path / "whole"))
    assert exit_code == 0 and operations > 100
    complete = content(tmp_path / "whole")
    generator = random.Random(5)
    for attempt in range(4):
        # early, so that most of them hit the passes of the removal; the later ones have less left to do
        kill_at = generator.randint(1, operations // (2 + 2 * attempt))
        assert run_child(config(tmp_path / "tokens"), kill_at)[0] == -signal.SIGKILL
        assert_invisible_or_complete(tmp_path / "tokens", complete)
    build(config(tmp_path / "tokens"), num_workers=1)
    assert content(tmp_path / "tokens") == complete


def test_killed_in_the_merge_and_run_again_ends_in_the_same_bytes(
    several: Callable[[Path], DataConfig], uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    for unit in range(5):
        build_task(several(tmp_path / "units"), unit, 5)
    shutil.copytree(tmp_path / "units", tmp_path / "measured")
    _, operations = run_child(several(tmp_path / "measured"))
    for number, kill_at in enumerate(range(2, operations + 1, max(1, operations // 12))):
        directory = tmp_path / str(number)
        shutil.copytree(tmp_path / "units", directory)
        assert run_child(several(directory), kill_at)[0] == -signal.SIGKILL
        assert_invisible_or_complete(directory, uninterrupted)
        build(several(directory), num_workers=1)
        assert content(directory) == uninterrupted


def test_a_full_disk_leaves_nothing_half_written(
    several: Callable[[Path], DataConfig], uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    largest = max(len(data) for name, data in uninterrupted.items() if name.endswith(".tar"))
    # room for the tokenizer and the small shards, none for the largest: write() fails in the middle of it
    assert run_child(several(tmp_path / "tokens"), file_size_limit=largest - 512)[0] == 1
    assert_invisible_or_complete(tmp_path / "tokens", uninterrupted)
    assert not list((tmp_path / "tokens").rglob("*.partial"))
    build(several(tmp_path / "tokens"), num_workers=1)
    assert content(tmp_path / "tokens") == uninterrupted


def test_killed_with_its_workers_and_run_again_ends_in_the_same_bytes(
    several: Callable[[Path], DataConfig], uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    def start(directory: Path) -> BaseProcess:
        child = multiprocessing.get_context("fork").Process(
            target=build, args=(several(directory),), kwargs={"num_workers": 2}
        )
        child.start()
        return child

    began = time.monotonic()
    whole = start(tmp_path / "measured")
    whole.join()
    duration, generator = time.monotonic() - began, random.Random(11)
    assert whole.exitcode == 0
    for _ in range(4):
        child = start(tmp_path / "tokens")
        child.join(duration * generator.uniform(0.1, 0.9))  # workers start within the first part of it
        child.kill()
        child.join()
        assert child.exitcode in (-signal.SIGKILL, 0)
        assert_invisible_or_complete(tmp_path / "tokens", uninterrupted)
    build(several(tmp_path / "tokens"), num_workers=2)
    assert content(tmp_path / "tokens") == uninterrupted


def test_a_disk_that_fills_up_leaves_nothing_half_written(
    several: Callable[[Path], DataConfig],
    uninterrupted: dict[str, bytes],
    tmp_path: Path,
    small_disk: Callable[[Path, int], None],
) -> None:
    directory = tmp_path / "disk"
    directory.mkdir()
    small_disk(directory, sum(map(len, uninterrupted.values())) // 2 // 1024)
    with pytest.raises(OSError, match="No space left on device"):
        build(several(directory / "tokens"), num_workers=2)
    assert_invisible_or_complete(directory / "tokens", uninterrupted)
    assert not list(directory.rglob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(directory)], check=True)
    build(several(directory / "tokens"), num_workers=2)
    assert content(directory / "tokens") == uninterrupted


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def name_of(descriptor: int) -> str:
        return Path(f"/proc/self/fd/{descriptor}").readlink().name

    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(f"fsync {name_of(fd)}"), fsync(fd))[1])
    monkeypatch.setattr(
        os, "replace", lambda a, b: (done.append(f"rename to {Path(b).name}"), replace(a, b))[1]
    )
    with atomic_writer(tmp_path / "folder" / "shard.tar") as file:
        file.write(b"samples")
    assert done == [f"fsync .shard.tar.{os.getpid()}.partial", "rename to shard.tar", "fsync folder"]


def test_a_record_without_its_shards_is_an_error_not_a_hole(
    several: Callable[[Path], DataConfig], tmp_path: Path
) -> None:
    config = several(tmp_path / "tokens")
    build_task(config, 0, 1)
    next((tmp_path / "tokens/.build").rglob("unit-000003/train/shard-000000.tar")).unlink()
    with pytest.raises(DatasetError, match="gone although its record is there"):
        merge(config)


def test_a_pretrained_tokenizer_with_a_large_vocabulary_takes_32_bits(
    make_config: MakeConfig, built: Path, tmp_path: Path
) -> None:
    shutil.copytree(built / "tokenizer", tmp_path / "large")
    path = tmp_path / "large/tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"].append(values["added_tokens"][-1] | {"id": 70_000, "content": "<extra>"})
    vocabulary = values["model"]["vocab"]
    vocabulary |= {f"filler{number}": number for number in range(len(vocabulary), 70_000)}
    path.write_text(json.dumps(values))
    config = make_config(
        tmp_path / "tokens", tokenizer={"kind": "pretrained", "path": str(tmp_path / "large")}
    )
    manifest = build(config, num_workers=1)
    assert (manifest.token_dtype, manifest.vocab_size) == ("uint32", 70_001)
    ours, theirs = TokenDataset(tmp_path / "tokens", "train"), TokenDataset(built, "train")
    assert ours.read([0, 9])["input_ids"].tolist() == theirs.read([0, 9])["input_ids"].tolist()
    assert load_tokenizer(tmp_path / "tokens").eos_token_id == 0
    assert verify(tmp_path / "tokens") == []
    assert build(config) == manifest
    path.write_text(json.dumps(values, indent=1))
    with pytest.raises(DatasetError, match="holds token shards of other text or another tokenizer"):
        build(config)


def test_a_source_that_is_filtered_to_nothing_is_refused(
    make_config: MakeConfig, jsonl_file: Path, built: Path, tmp_path: Path
) -> None:
    config = make_config(
        tmp_path / "tokens",
        source={"kind": "jsonl", "paths": [str(jsonl_file)], "min_characters": 10**6},
        tokenizer={"kind": "pretrained", "path": str(built / "tokenizer")},
    )
    with pytest.raises(SourceError, match="no text to train on"):
        build(config, num_workers=1)


def test_an_empty_split_is_allowed_and_clear(make_config: MakeConfig, tmp_path: Path) -> None:
    build(make_config(tmp_path / "tokens", test_fraction=0.0), num_workers=1)
    with pytest.raises(DatasetError, match="'test' has no samples"):
        TokenDataset(tmp_path / "tokens", "test")
    assert verify(tmp_path / "tokens") == []


def test_the_functions_are_not_hidden_by_their_modules() -> None:
    import data_pipeline

    assert callable(data_pipeline.build)
    assert callable(data_pipeline.verify)
    assert data_pipeline.DataConfig is DataConfig
    with pytest.raises(AttributeError, match="no attribute 'bulid'"):
        data_pipeline.bulid  # noqa: B018
