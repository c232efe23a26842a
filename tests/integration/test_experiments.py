"""A sweep of real commands at the smallest size: killed, gone on with, one trial failing, and its table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.conftest import NANO, REPOSITORY, command_environment, run

SWEEP: dict[str, Any] = {
    "name": "nano",
    "question": "Does a sweep run from end to end?",
    "base": str(NANO),
    "measure": ["evaluate", "report"],
    "overrides": {"tracking": {"wandb": "disabled"}, "train": {"steps": 10}},
    "trials": {
        "anchor": {
            "overrides": {
                "codec": {
                    "model": "anchor",
                    "codebook_levels": 2,
                    "codebook_size": None,
                    "codebook_dim": 64,
                    "quantizer": {"dead_code_interval": 10},
                },
                "latent_model": {"depth_input": "code"},
            },
        },
        "identity": {
            "overrides": {
                "codec": {"model": "identity", "codebook_levels": None, "codebook_size": None},
                "latent_model": {"depth_input": "code"},
            },
            "match_compute": "anchor",
        },
        "joint": {
            "stages": ["base_lm", "joint"],
            "overrides": {
                "evaluation": {"stochastic_codes": True},
                "stages": {"joint": {"rate_weight": 0.1}},
            },
        },
        "broken": {"overrides": {"codec": {"backbone": {"pretrained": "/nowhere"}}}},
    },
}


@pytest.mark.slow  # thirty commands one after another
def test_a_sweep_from_end_to_end(tmp_path: Path, nano_data: list[str]) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    command = [
        sys.executable,
        "launch/experiments.py",
        "--sweep",
        str(path),
        f"run_root={tmp_path}",
        *nano_data,
    ]
    directory = tmp_path / "sweeps" / "nano"

    # Killed while the first trial trains its latent model.
    first = subprocess.Popen(
        [*command, "--only", "anchor"],
        cwd=REPOSITORY,
        env=command_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    waiting, deadline = directory / "anchor-seed0/logs/train-rq_transformer.log", time.monotonic() + 1500
    while not waiting.exists():
        assert first.poll() is None and time.monotonic() < deadline, "the first trial ended by itself"
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert json.loads((directory / "anchor-seed0/trial.json").read_text())["state"] == "running"

    second = run(command, timeout_s=1500)
    assert second.returncode == 1, second.stdout + second.stderr
    assert "failed: broken, seed 0: train-rqvae ended with status 2" in second.stderr
    lines = second.stdout.splitlines()
    # The base LM was trained before the kill, for all four.
    assert sum("train-base_lm: done already" in line for line in lines) == 4
    assert not any("launch/train.py" in line and "--stage base_lm" in line for line in lines)
    assert sum("--stage rq_transformer" in line for line in lines) == 2

    results = json.loads((directory / "results.json").read_text())
    anchor, identity, joint, broken = results["trials"]
    assert [trial["state"] for trial in results["trials"]] == ["finished"] * 3 + ["failed"]
    assert "/nowhere" in broken["reasons"][0]
    for trial in (anchor, identity, joint):
        figures = {name: figure["mean"] for name, figure in trial["figures"].items()}
        assert {"bound", "ar", "unigram", "uniform", "train_flops", "brier_lm"} <= set(figures)
        assert 0 < figures["ar"] < figures["uniform"]
        assert trial["figures"]["bound"]["interval_over"] == "documents"
    assert joint["figures"]["stochastic_bound"]["mean"] > 0
    assert anchor["figures"]["identity"]["mean"] == identity["figures"]["bound"]["mean"]
    # Equal compute, by what was counted after training.
    flops = [trial["figures"]["train_flops"]["mean"] for trial in (anchor, identity)]
    assert flops[1] == pytest.approx(flops[0], rel=0.03)
    for name in ("results.csv", "results.md", "anchor-seed0/report.html"):
        assert (directory / name).stat().st_size > 200

    page = run([sys.executable, "launch/report.py", str(directory)])
    assert page.returncode == 0, page.stderr
    assert (directory / "report.html").stat().st_size > 10_000
