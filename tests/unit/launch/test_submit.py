"""What is refused before anything is submitted, which tasks an array gets, and the snapshot of the code."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import TokenDataset, finish_codes, write_code_shard
from data_pipeline.__main__ import main as data_pipeline_main
from data_pipeline.builder import build, build_task, deduplicate_task
from data_pipeline.config import JsonlSource
from data_pipeline.manifest import load_manifest
from launch import submit
from launch.array_tasks import missing_build_tasks, missing_code_tasks, num_build_tasks, num_code_tasks
from launch.config import RunConfig, load_config
from launch.loading import reading_directories
from launch.paths import TRAINING_SPLITS, codes_directory, model_directory
from launch.submission import Job
from launch.submission_checks import check_data, check_disk, check_plan
from launch.tasks import create_task
from tests.integration.conftest import NANO, REPOSITORY, clone_program, write_corpus


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """The latent model's stage on four files of text; nothing is built yet."""
    (tmp_path / "text").mkdir()
    write_corpus(tmp_path / "text.jsonl", 200)
    lines = (tmp_path / "text.jsonl").read_text().splitlines(keepends=True)
    for index in range(4):
        (tmp_path / "text" / f"{index}.jsonl").write_text("".join(lines[index::4]))
    places = [f"data.source.paths={tmp_path}/text/*.jsonl", f"data.directory={tmp_path / 'tokens'}"]
    return load_config(NANO, stage="rq_transformer", overrides=[*places, f"run_root={tmp_path}"])


def encode(config: RunConfig, split: str, shard: int, with_latents: bool = False) -> None:
    tokens = TokenDataset(config.data.directory, split)
    samples = len(tokens.shard_range(shard))
    write_code_shard(
        codes_directory(config),
        split,
        shard,
        np.zeros((samples, 16, 3), dtype=np.int64),
        token_dataset=tokens,
        codec_hash="c0dec",
        compression_factor=4,
        codebook_sizes=(32, 32, 32),
        latents=np.zeros((samples, 16, 2)) if with_latents else None,
    )


def encode_all(config: RunConfig, with_latents: bool = False) -> None:
    for split in TRAINING_SPLITS:
        for shard in range(len(TokenDataset(config.data.directory, split).shards)):
            encode(config, split, shard, with_latents)
    finish_codes(codes_directory(config), config.data.directory, codec_hash="c0dec", splits=TRAINING_SPLITS)


def test_data_have_to_be_complete(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="python -m data_pipeline build"):
        check_data(config)
    build(config.data, num_workers=1)
    with pytest.raises(ValueError, match=r"codes .* are not complete; submit --job precompute_codes first"):
        check_data(config)
    encode_all(config)
    check_data(config)
    shard = min((codes_directory(config) / "train").glob("*.tar"))
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ValueError, match=rf"train': 1 of 4 shards are missing or cut \({shard.stem}\)"):
        check_data(config)
    min((tmp_path / "tokens" / "validation").glob("*.tar")).unlink()
    with pytest.raises(ValueError, match=r"validation': 1 of \d shards are missing or cut"):
        check_data(config)


def test_codes_of_other_tokens(config: RunConfig) -> None:
    build(config.data, num_workers=1)
    encode_all(config)
    other = config.data.model_copy(update={"seed": 1})
    build(other, replace=True, num_workers=1)
    with pytest.raises(ValueError, match="are of other tokens"):
        check_data(config)


def test_only_missing_tasks_are_submitted(config: RunConfig) -> None:
    assert num_build_tasks(config.data, 64) == 4
    assert num_build_tasks(config.data, 3) == 3
    assert missing_build_tasks(config.data, 4) == [0, 1, 2, 3]
    for task in (0, 3):
        build_task(config.data, task, 4, num_workers=1)
    assert missing_build_tasks(config.data, 4) == [1, 2]
    build(config.data, num_workers=1)
    assert missing_build_tasks(config.data, 4) == []
    assert num_code_tasks(config, 64) == 4
    assert missing_code_tasks(config, 4, with_latents=False, precision="fp32") == [0, 1, 2, 3]


def arguments_of(job: str, config: RunConfig, *words: str) -> argparse.Namespace:
    """The command line of a submission on the data of `config`."""
    source = config.data.source
    assert isinstance(source, JsonlSource)
    places = [f"data.source.paths={source.paths[0]}", f"data.directory={config.data.directory}"]
    options = [word for word in words if word.startswith("--")]
    overrides = [*places, f"run_root={config.run_root}", *(word for word in words if word not in options)]
    return submit.parse_arguments(["--config", str(NANO), "--job", job, *options, *overrides])


def code_arrays(config: RunConfig, *words: str) -> list[str]:
    """The arrays that `submit --job precompute_codes` would submit."""
    args = arguments_of("precompute_codes", config, *words)
    jobs = submit.code_jobs(load_config(NANO, overrides=args.overrides), args)
    return [option for job in jobs for option in job.options]


def stochastic(config: RunConfig) -> RunConfig:
    train = config.train.model_copy(update={"stochastic_codes": True})
    return config.model_copy(update={"train": train})


def test_codes_that_training_refuses_are_made_again(config: RunConfig) -> None:
    build(config.data, num_workers=1)
    codec = model_directory(config) / "rqvae" / "config.json"
    codec.parent.mkdir(parents=True)
    codec.touch()
    encode_all(config)
    check_data(config)
    assert code_arrays(config) == []
    # Rounded otherwise, they are other codes.
    assert code_arrays(config, "--precision=bf16") == ["--array=0-3%16"]
    # There is nothing to draw from.
    drawn = "stages.rq_transformer.stochastic_codes=true"
    assert code_arrays(config, drawn) == ["--array=0-3%16"]
    with pytest.raises(ValueError, match=r"without the latents .*; submit --job precompute_codes first"):
        check_data(stochastic(config))
    for split in TRAINING_SPLITS:
        encode(config, split, 2, with_latents=True)
    assert code_arrays(config, drawn) == ["--array=0-1,3%16"]
    encode_all(config, with_latents=True)
    check_data(stochastic(config))
    assert code_arrays(config, drawn) == code_arrays(config) == []
    # The last task was killed when all its shards were written: any task writes the manifest.
    (codes_directory(config) / "codes_manifest.json").unlink()
    with pytest.raises(ValueError, match=r"codes .* are not complete; submit --job precompute_codes first"):
        check_data(config)
    assert code_arrays(config) == ["--array=0%16"]


def build_jobs(config: RunConfig, *words: str) -> list[Job]:
    """What `submit --job build_data` would submit, with two tasks for four files."""
    args = arguments_of("build_data", config, "--max-tasks=2", *words)
    return submit.build_jobs(load_config(NANO, overrides=args.overrides), args)


def run_build_job(job: Job) -> None:
    """What build_data.sh does, all tasks of an array."""
    command, words = "build", job.arguments
    if words[0] == "deduplicate":
        command, *words = words
    tasks = [["--task-index", index] for index in "01"] if "--num-tasks" in words else [[]]
    for task in tasks:
        assert data_pipeline_main([command, *task, *words]) == 0


def test_duplicates_are_found_before_the_build(config: RunConfig, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "text" / "0.jsonl", tmp_path / "text" / "9.jsonl")
    without = "data.deduplicate=true"
    assert [job.name for job in build_jobs(config)] == ["build_data", "merge_data"]
    jobs = build_jobs(config, without)
    names = ["deduplicate", "merge_duplicates", "build_data", "merge_data"]
    assert [job.name for job in jobs] == names
    assert {job.script for job in jobs} == {"build_data.sh"}
    assert [job.options for job in jobs] == [["--array=0-1%16"], [], ["--array=0-1%16"], []]
    # Only what is missing: one of the tasks, then the merge, then nothing of it.
    deduplicated = load_config(NANO, overrides=arguments_of("build_data", config, without).overrides)
    deduplicate_task(deduplicated.data, 1, 2)
    assert build_jobs(config, without)[0].options == ["--array=0%16"]
    run_build_job(jobs[0])
    assert [job.name for job in build_jobs(config, without)] == names[1:]
    run_build_job(jobs[1])
    assert [job.name for job in build_jobs(config, without)] == names[2:]
    for job in jobs[2:]:
        run_build_job(job)
    assert build_jobs(config, without) == []
    removed = load_manifest(tmp_path / "tokens").source.description["exact_duplicates"]["removed"]
    assert removed >= len((tmp_path / "text" / "9.jsonl").read_text().splitlines())


def test_room_for_checkpoints(config: RunConfig) -> None:
    check_disk(config, 1.0)
    with pytest.raises(ValueError, match=r"checkpoints of 1048576\.0 GiB do not fit into the .* GiB free"):
        check_disk(config, float(1 << 50))


def test_a_plan_that_does_not_fit() -> None:
    path = str(REPOSITORY / "configs" / "qwen3_8b.yaml")
    config = load_config(path, stage="rqvae")
    with pytest.raises(ValueError, match=r"GiB per GPU are needed, 16 are there; use more GPUs"):
        check_plan(config, path, [], 8, 16.0)
    with pytest.raises(ValueError, match="global_batch_size"):
        check_plan(config, path, [], 7, 80.0)


def test_training_reads_the_copies_on_the_node(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slurm.staging import copy_here

    build(config.data, num_workers=1)
    encode_all(config)
    monkeypatch.setenv("RQVAE_STAGE_DIR", str(tmp_path / "scratch"))
    with pytest.raises(ValueError, match="no complete copy"):
        reading_directories(config)
    base = config.for_stage("base_lm")
    with pytest.raises(ValueError, match="no complete copy"):
        create_task(base).dataset("train")
    assert len(create_task(base).any_part())  # what converting a checkpoint asks for, on any machine
    copy_here(config, tmp_path / "scratch")
    tokens, codes = reading_directories(config)[""]
    assert {tokens.parent, codes.parent} == {tmp_path / "scratch"}
    assert (tokens / "train").is_dir() and (codes / "codes_manifest.json").is_file()
    streamed = load_config(
        NANO, stage="rqvae", overrides=["train.streaming={streams: 2}", "data.source.paths=x"]
    )
    with pytest.raises(ValueError, match="either streamed or copied"):
        reading_directories(streamed)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The program under version control of its own."""
    return clone_program(tmp_path / "clone")


def submit_in(clone: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/submit.py", "--config", "configs/tiny.yaml", "--job", "build_data"]
    environment = {**os.environ, "PYTHONPATH": str(clone)}
    return subprocess.run(
        [*command, f"run_root={clone.parent}", f"data.directory={clone.parent}/none", *words],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_a_dry_run_prints_and_leaves_nothing(clone: Path) -> None:
    result = submit_in(clone, "--dry-run", "--sbatch=--time=8:00:00")
    assert result.returncode == 0, result.stderr
    array, merge = result.stdout.strip().splitlines()
    assert "--array=0" in array and "--time=8:00:00" in array and array.startswith("sbatch --parsable")
    assert "'--dependency=afterok:<build_data>'" in merge and "--merge" in merge
    assert sorted(path.name for path in clone.parent.iterdir()) == ["clone"]


@pytest.mark.parametrize("change", ["edited", "new", "deleted"])
def test_a_changed_tree_is_refused(clone: Path, change: str) -> None:
    file = clone / "launch" / ("new.py" if change == "new" else "eval.py")
    if change == "deleted":
        file.unlink()
    else:
        file.write_text("x = 1\n")
    for dry in ([], ["--dry-run"]):
        result = submit_in(clone, *dry)
        assert result.returncode == 2
        assert f"launch/{file.name}" in result.stderr and "--allow-dirty" in result.stderr
    assert submit_in(clone, "--dry-run", "--allow-dirty").returncode == 0


def test_a_snapshot_holds_what_was_submitted(clone: Path) -> None:
    (clone / "launch" / "eval.py").write_text("x = 1\n")
    code = (
        "from pathlib import Path; from launch.snapshot import take_snapshot; "
        "print(take_snapshot(Path('../code'), True)); print(take_snapshot(Path('../code'), True))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(clone)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    first, second = (clone / line for line in result.stdout.split())
    assert first != second  # with changes, which may be others each time
    assert (first / "launch" / "eval.py").read_text() == "x = 1\n"
    assert (first / "slurm" / "train_8b.sh").stat().st_mode & 0o111
    assert json.loads((first / "SNAPSHOT.json").read_text())["dirty"] is True
    assert not (first / ".git").exists()


def test_no_sbatch_here(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").symlink_to(str(shutil.which("git")))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    result = submit_in(clone)
    assert result.returncode == 2
    assert "sbatch cannot be started" in result.stderr and "a machine of the cluster" in result.stderr


def test_the_script_of_the_size() -> None:
    job = submit.training_job("configs/qwen3_4b.yaml", "rqvae", ["a=b"], ["--nodes=2"])
    assert (job.script, job.options) == ("train_4b.sh", ["--nodes=2"])
    assert job.arguments == ["--config", "configs/qwen3_4b.yaml", "--stage", "rqvae", "a=b"]
    assert submit.training_job("x/mine.yaml", "rqvae", [], []).script == "train_rq_transformer.sh"
