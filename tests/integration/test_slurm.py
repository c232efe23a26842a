"""Real sbatch on a two-node Slurm of this machine: `make test-slurm`, of which `make test-slurm-short` is the first.

Needs root and Debian's packages for slurm/local_cluster.sh; skips with the reason where it cannot start one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from launch import run_status
from slurm import history
from tests.integration.conftest import NANO, clone_program, records
from tests.integration.local_slurm import (
    CLUSTER,
    CPU_ONLY,
    Cluster,
    NoSlurmError,
    losses,
    running_cluster,
    wait_for_step,
)

pytestmark = pytest.mark.slurm
# One phase, for tests of what is around the training.
TWO_STEPS = ["train.steps=2", "train.frozen_steps=0", "train.switch_warmup_steps=0"]
TWO_STEPS += ["train.quantizer_warmup_steps=0", "train.warmup_steps=1", "tracking.wandb=disabled"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    try:
        with running_cluster(tmp_path_factory.mktemp("slurm"), 18600 + 10 * worker) as started:
            yield started
    except NoSlurmError as error:
        pytest.skip(str(error))


def test_two_nodes_stop_requeue_and_finish(cluster: Cluster, nano_data: list[str]) -> None:
    job, directory = cluster.train("requeued", nano_data, options=["--export=ALL,RQVAE_PREFLIGHT=full"])
    wait_for_step(directory, 3)
    cluster.output("scancel", "--signal=USR2", job)
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    events = [line for line in history.read(directory) if line["event"] == "end"]
    assert [event["requeued"] for event in events] == [True, False]
    assert events[0]["outcome"] == "stopped: SIGUSR2"
    status = run_status.read(directory)
    assert status["state"] == "finished" and status["slurm"]["restart"] == 1
    assert "bus bandwidth" in cluster.log(job)
    assert {path.name for path in (directory / "logs" / f"{job}.0").iterdir()} == {"node-0", "node-1"}
    # Nothing was lost or done twice, over both starts.
    assert sorted(step for split, step in losses(directory) if split == "train") == list(range(1, 9))


@pytest.mark.slow
def test_same_losses_as_without_a_stop(cluster: Cluster, nano_data: list[str]) -> None:
    job, whole = cluster.train("whole", nano_data)
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    for name, end in (
        ("requeue", ["scontrol", "requeue"]),
        ("usr2", ["scancel", "--batch", "--signal=USR2"]),
    ):
        job, directory = cluster.train(name, nano_data)
        wait_for_step(directory, 3)
        cluster.output(*end, job)
        assert cluster.wait(job) == "COMPLETED", cluster.log(job)
        assert losses(directory) == losses(whole), name


@pytest.mark.slow
def test_the_time_limit_in_mid_training_costs_nothing(cluster: Cluster, nano_data: list[str]) -> None:
    endless = ["train.steps=100000", "tracking.wandb=disabled"]
    # Slurm looks at time limits every half minute; it announces this one a minute before, to the batch script only.
    options = ["--nodes=1", "--time=60", "--signal=B:USR2@60"]
    job, limited = cluster.train("limited", nano_data, *endless, options=options)
    wait_for_step(limited, 3)
    hours, minutes, _ = (int(part) for part in cluster.field(job, "RunTime").split(":"))
    cluster.output("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")
    cluster.wait_until_pending(job)
    cluster.output("scontrol", "update", f"JobId={job}", "TimeLimit=60", "StartTime=now")
    end = next(line for line in history.read(limited) if line["event"] == "end")
    assert (end["outcome"], end["requeued"]) == ("stopped: SIGUSR2", True)
    last = end["step"] + 3
    wait_for_step(limited, last)
    cluster.output("scancel", job)
    assert [line["step"] for line in history.read(limited) if line["event"] == "start"] == [0, end["step"]]

    job, whole = cluster.train("unlimited", nano_data, *endless, options=["--nodes=1"])
    wait_for_step(whole, last)
    cluster.output("scancel", job)
    both = [
        {key: loss for key, loss in losses(place).items() if key[1] <= last} for place in (limited, whole)
    ]
    assert both[0] == both[1]
    assert [step for split, step in both[0] if split == "train"] == list(range(1, last + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "setting"),
    [("preflight", "RQVAE_MIN_FREE_GIB=1000000"), ("staging", "RQVAE_STAGE_DIR=/proc/no-disk")],
)
def test_a_bad_node_is_named_and_left_out(
    cluster: Cluster, nano_data: list[str], step: str, setting: str
) -> None:
    """Everything that runs on the first node that the job gets has a setting that it cannot fulfil."""
    place = cluster.directory / f"bad_{step}"
    place.mkdir()
    bad, prolog, site = place / "node", place / "prolog.sh", place / "site.sh"
    prolog.write_text(
        f'#!/bin/bash\n[[ -e {bad} ]] || echo "$SLURMD_NODENAME" >{bad}\n'
        f'if [[ $(<{bad}) = "$SLURMD_NODENAME" ]]; then echo "export {setting}"; fi\n'
    )
    prolog.chmod(0o755)
    site.write_text(
        f"source {cluster.environment['RQVAE_SITE']}\n"
        f"export RQVAE_STAGE_DIR={place / 'scratch'} RQVAE_SRUN_OPTIONS=--task-prolog={prolog}\n"
    )
    # The ranks of the good node do not get the setting, and read the copy that was made there.
    options = ["--nodes=1", f"--export=ALL,RQVAE_SITE={site}"]
    job, directory = cluster.train(f"bad_{step}_run", nano_data, *TWO_STEPS, options=options)
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    first, second = (line for line in history.read(directory) if line["event"] == "start")
    assert first["nodes"] == [bad.read_text().strip()] != second["nodes"]
    assert cluster.field(job, "ExcNodeList") == first["nodes"][0]
    assert f"slurm.{step}: {first['nodes'][0]}: " in cluster.log(job)
    outcomes = [line["outcome"] for line in history.read(directory) if line["event"] == "end"]
    assert outcomes == [f"bad node: {first['nodes'][0]}", "finished"]
    assert "slurm.staging: 1 nodes, 0 bad" in cluster.log(job)
    assert len(list((place / "scratch").glob("*/manifest.json"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("size", ["1.7b", "4b"])
def test_the_other_sizes(cluster: Cluster, nano_data: list[str], size: str) -> None:
    job, directory = cluster.train(f"size_{size}", nano_data, *TWO_STEPS, options=["--nodes=1"], size=size)
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    assert run_status.read(directory)["slurm"]["outcome"] == "finished"
    assert [step for split, step in losses(directory) if split == "train"] == [1, 2]


@pytest.mark.slow
def test_a_submitted_job_runs_its_snapshot(cluster: Cluster, nano_data: list[str], tmp_path: Path) -> None:
    """train_0.6b.sh, submitted by launch/submit.py; the program changes while the job waits."""
    clone = clone_program(tmp_path / "clone")
    words = ["--config", "configs/qwen3_0.6b.yaml", "--gpus-per-node=0", "--sbatch=--cpus-per-task=1"]
    result = subprocess.run(
        [sys.executable, "launch/submit.py", *words, *cluster.overrides("submitted", nano_data, *TWO_STEPS)],
        cwd=clone,
        env={**cluster.environment, "PYTHONPATH": str(clone)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for program in ("launch", "slurm"):
        (clone / program / "train.py").write_text("raise SystemExit('not what was submitted')\n")
    project = cluster.directory / "submitted"
    job = json.loads((project / "jobs.jsonl").read_text())["id"]
    assert cluster.wait(job) == "COMPLETED", (project / "slurm" / f"rqvae-{job}.out").read_text()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, capture_output=True, text=True)
    git = json.loads((project / "rqvae" / "env" / "git.json").read_text())
    assert git == {"commit": head.stdout.strip(), "dirty": False}


@pytest.mark.slow
def test_a_plain_scancel_saves_and_is_not_requeued(cluster: Cluster, nano_data: list[str]) -> None:
    job, directory = cluster.train("cancelled", nano_data)
    wait_for_step(directory, 3)
    cluster.output("scancel", job)
    assert cluster.wait(job) == "CANCELLED"
    time.sleep(5)
    status = run_status.read(directory)
    assert status["state"] == "stopped" and status["slurm"]["requeued"] is False, cluster.log(job)
    assert history.newest_step(directory) >= 3


@pytest.mark.slow
def test_a_mistake_is_not_repeated(cluster: Cluster, nano_data: list[str]) -> None:
    job, directory = cluster.train("mistake", nano_data, "data.directory=/nowhere")
    assert cluster.wait(job) == "FAILED"
    assert [line.get("requeued") for line in history.read(directory)] == [None, False]


@pytest.mark.slow
def test_preemption(cluster: Cluster, nano_data: list[str]) -> None:
    job, directory = cluster.train("preempted", nano_data, "train.steps=100000")
    wait_for_step(directory, 3)
    words = ["--nodes=2", *CPU_ONLY, "--exclusive", "--partition=urgent"]
    urgent = cluster.sbatch(*words, "slurm/run.sh", "launch/submit.py", "--help")
    cluster.wait_until_pending(job)
    reached = max(line["step"] for line in records(directory / "metrics.jsonl"))
    assert cluster.wait(urgent) == "COMPLETED", cluster.log(urgent)
    cluster.output("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for_step(directory, reached + 1)
    cluster.output("scancel", job)
    first, second = (line for line in history.read(directory) if line["event"] == "start")
    assert first["step"] == 0 and reached - 1 <= second["step"] <= reached
    steps = [step for split, step in losses(directory) if split == "train"]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("back", ["at_once", "later"])
def test_a_dead_node_costs_no_more_than_since_the_checkpoint(
    cluster: Cluster, nano_data: list[str], back: str
) -> None:
    """A node that is back before Slurm takes it for dead leaves an srun that waits for ever."""
    settings = ["train.steps=100000", "train.checkpoint_every=2", "tracking.wandb=disabled"]
    place = str(cluster.directory / "cluster")
    options = ["--export=ALL,RQVAE_SHUTDOWN_S=20"]
    job, directory = cluster.train(f"dead_{back}", nano_data, *settings, options=options)
    wait_for_step(directory, 5)
    subprocess.run([CLUSTER, "kill-node", "n2", place], check=True)
    if back == "at_once":
        subprocess.run([CLUSTER, "start-node", "n2", place], check=True)
    cluster.wait_until_pending(job)
    reached = max(line["step"] for line in records(directory / "metrics.jsonl"))
    subprocess.run([CLUSTER, "start-node", "n2", place], check=True)
    if back == "at_once":
        cluster.output("scontrol", "update", f"JobId={job}", "StartTime=now")
    # Else by itself, after Slurm's two minutes: until then the other node takes the job for a revoked one, and an
    # earlier start ends it for good.
    wait_for_step(directory, reached + 1)
    cluster.output("scancel", job)
    first, second = (line for line in history.read(directory) if line["event"] == "start")
    assert first["step"] == 0 and reached - 2 <= second["step"] <= reached
    steps = [step for split, step in losses(directory) if split == "train"]
    assert steps == list(range(1, len(steps) + 1))


def pipeline(cluster: Cluster, corpus: Path, name: str) -> Callable[[], dict[str, str]]:
    """What submits the chain on four files of text and returns the ids of its jobs so far; each call again."""
    parts = cluster.directory / f"{name}_parts"
    parts.mkdir()
    lines = corpus.read_text().splitlines(keepends=True)
    for index in range(4):
        (parts / f"{index}.jsonl").write_text("".join(lines[index::4]))
    words = ["--config", str(NANO), "--job", "pipeline", "--gpus-per-node=0", "--no-snapshot"]
    words += ["--sbatch=--gpus=0", "--sbatch=--cpus-per-task=1"]
    overrides = [f"run_root={cluster.directory}", f"name={name}", "tracking.wandb=disabled", "train.steps=4"]
    overrides += [f"data.directory={cluster.directory}/{name}_shards", f"data.source.paths={parts}/*.jsonl"]
    overrides += ["stages.rqvae={frozen_steps: 1, switch_warmup_steps: 1, quantizer_warmup_steps: 1}"]

    def submit() -> dict[str, str]:
        cluster.output(sys.executable, "launch/submit.py", *words, *overrides, "train.warmup_steps=1")
        return jobs_of(cluster.directory / name)

    return submit


def jobs_of(project: Path) -> dict[str, str]:
    """The newest job of each name."""
    lines = (project / "jobs.jsonl").read_text().splitlines()
    return {line["name"]: line["id"] for line in map(json.loads, lines)}


@pytest.mark.slow
def test_one_killed_task_is_redone_alone(cluster: Cluster, nano_corpus: Path) -> None:
    submit = pipeline(cluster, nano_corpus, "killed")
    first = submit()
    cluster.output("scancel", f"{first['build_data']}_2")
    # The rest of the chain goes with it, once the other tasks are done.
    assert cluster.wait(first["submit_rest"]) == "CANCELLED"
    assert cluster.wait(first["merge_data"]) == "CANCELLED"
    again = submit()
    tasks = cluster.output("scontrol", "show", "job", again["build_data"], "--oneliner").splitlines()
    assert [line.split("ArrayTaskId=")[1].split()[0].partition("%")[0] for line in tasks] == ["2"]
    assert cluster.wait(again["merge_data"]) == "COMPLETED"
    assert cluster.wait(again["submit_rest"]) == "COMPLETED"
    cluster.output("scancel", *jobs_of(cluster.directory / "killed").values())


@pytest.mark.slow
def test_pipeline_to_the_report(cluster: Cluster, nano_corpus: Path) -> None:
    submit = pipeline(cluster, nano_corpus, "pipeline")
    assert cluster.wait(submit()["submit_rest"]) == "COMPLETED"
    project = cluster.directory / "pipeline"
    assert cluster.wait(jobs_of(project)["report"], 3600) == "COMPLETED"
    assert (project / "report.html").is_file()


@pytest.mark.slow
def test_a_sweep_as_an_array_and_its_table(cluster: Cluster, nano_data: list[str]) -> None:
    """Two tasks with a trial each, which share data and base LM: one makes them while the other waits."""
    tokens = {"codec": {"model": "identity", "codebook_levels": None, "codebook_size": None}}
    content = {
        "name": "array",
        "question": "Which?",
        "base": str(NANO),
        "measure": ["evaluate"],
        "trials": {
            "ar": {"stages": ["base_lm"]},
            "tokens": {"overrides": {**tokens, "latent_model": {"depth_input": "code"}}},
        },
    }
    sweep = cluster.directory / "array.yaml"
    sweep.write_text(yaml.safe_dump(content))
    options = ["--gpus=0", "--cpus-per-task=1"]
    words = [f"run_root={cluster.directory}", "tracking.wandb=disabled", *nano_data]
    script = ["slurm/experiments.sh", "--sweep", str(sweep)]
    array = cluster.sbatch("--array=0-1", *options, *script, *words)
    table = cluster.sbatch(f"--dependency=afterany:{array}", *options, *script, "--merge", *words)
    assert cluster.wait(table, 1800) == "COMPLETED", cluster.log(table)
    results = json.loads((cluster.directory / "sweeps/array/results.json").read_text())
    assert [(trial["trial"], trial["state"]) for trial in results["trials"]] == [
        ("ar", "finished"),
        ("tokens", "finished"),
    ]
    assert results["trials"][1]["figures"]["bound"]["mean"] > 0
    assert len(list((cluster.directory / "sweeps/shared").glob("base_lm-*"))) == 1
