from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from data_pipeline.__main__ import main, read_data_config
from data_pipeline.config import DataConfig
from data_pipeline.yaml_config import ConfigError


@pytest.fixture
def run_config(jsonl_file: Path, tmp_path: Path) -> Path:
    """A run config with a parent, and sections that are not ours."""
    data = {
        "directory": str(tmp_path / "tokens"),
        "source": {"kind": "jsonl", "paths": [str(jsonl_file)]},
        "tokenizer": {"kind": "bpe", "vocab_size": 320},
        "sample_length": 32,
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"data": data, "train": {"steps": 3}}))
    path = tmp_path / "run.yaml"
    path.write_text("extends: base.yaml\ndata: {seed: 4}\n")
    return path


def test_build_verify_inspect_stats(
    run_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = ["build", "--config", str(run_config), "data.samples_per_shard=300", "data.test_fraction=0.1"]
    assert main(build) == 0
    output = capsys.readouterr().out
    assert f"token shards: {tmp_path / 'tokens'}" in output
    assert f"next: deepspeed launch/train.py --config {run_config} --stage base_lm" in output
    assert main(build) == 0

    assert main(["verify", str(tmp_path / "tokens")]) == 0
    assert "as it was written" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "tokens"), "--samples", "1"]) == 0
    assert "train sample 0, segment 1" in capsys.readouterr().out
    assert main(["stats", str(tmp_path / "tokens")]) == 0
    output = capsys.readouterr().out
    assert "bytes per token" in output
    assert "1: 0.00%, 2: " in output

    (tmp_path / "tokens/test/shard-000000.tar").unlink()
    assert main(["verify", str(tmp_path / "tokens")]) == 1
    assert "shard-000000.tar: missing" in capsys.readouterr().out


def test_tasks_and_merge(run_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = ["build", "--config", str(run_config), "--task-index", "0", "--num-tasks", "1"]
    assert main(task) == 0
    assert "--merge" in capsys.readouterr().out
    assert main(["build", "--config", str(run_config), "--merge"]) == 0
    assert (tmp_path / "tokens/manifest.json").is_file()


def test_deduplicate_in_tasks(
    run_config: Path, jsonl_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(jsonl_file, tmp_path / "again.jsonl")
    paths = f"data.source.paths=[{jsonl_file}, {tmp_path / 'again.jsonl'}]"
    options = ["--config", str(run_config), paths, "data.deduplicate=true"]
    assert main(["build", *options, "--task-index", "0", "--num-tasks", "2"]) == 1
    assert "run `python -m data_pipeline deduplicate" in capsys.readouterr().err
    for task in ("0", "1"):
        assert main(["deduplicate", *options, "--task-index", task, "--num-tasks", "2"]) == 0
    assert f"data_pipeline deduplicate --config {run_config} --merge" in capsys.readouterr().out
    assert main(["deduplicate", *options, "--merge"]) == 0
    for task in ("0", "1"):
        assert main(["build", *options, "--task-index", task, "--num-tasks", "2"]) == 0
    assert main(["build", *options, "--merge"]) == 0
    assert main(["inspect", str(tmp_path / "tokens"), "--samples", "0"]) == 0
    shown = capsys.readouterr().out
    # the file has some texts of one word more than once by itself
    assert re.search(r"exact duplicates left out: 3\d\d of 600 documents", shown)


def test_mistakes_are_one_clear_message(run_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--config", str(run_config), "data.sample_lenght=8", "data.document_grid=0"]) == 1
    error = capsys.readouterr().err
    assert "data.sample_lenght: unknown key; did you mean data.sample_length?" in error
    assert "data.document_grid: input should be greater than 0 (got 0)" in error
    assert main(["build", "--config", str(run_config), "train.steps=3"]) == 1
    assert "reads only the section data" in capsys.readouterr().err
    assert main(["verify", "/nowhere"]) == 1
    assert "no such directory" in capsys.readouterr().err


def test_a_config_without_the_section_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("train: {steps: 3}\n")
    with pytest.raises(ConfigError, match="data: missing"):
        read_data_config(str(tmp_path / "c.yaml"), [])
    assert read_data_config(str(tmp_path / "c.yaml"), ["data.directory=d"]) == DataConfig(directory="d")
