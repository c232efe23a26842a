"""Training that streams its shards goes on where it stopped."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from tests.integration.conftest import NANO, records, run


def test_streamed_training_resumes_bitwise_from_another_place(tmp_path: Path, nano_data: list[str]) -> None:
    """The manifest and the validation split lie in one directory, the training shards in another."""
    data = Path(nano_data[0].partition("=")[2])
    shutil.copytree(data, tmp_path / "store")
    shutil.copytree(data, tmp_path / "local", ignore=shutil.ignore_patterns("train", "test"))
    command = [
        *(sys.executable, "launch/train.py", "--config", str(NANO), "--stage", "rqvae", "name=run"),
        *(f"run_root={tmp_path}", *nano_data, f"data.directory={tmp_path / 'local'}", "train.keep_last=9"),
        f"train.streaming.url=file://{tmp_path / 'store'}",
        *("train.streaming.streams=4", "train.streaming.shuffle_buffer=8", "train.zero_stage=0"),
        *("train.steps=10", "train.checkpoint_every=4", "train.log_every=1", "train.eval_samples=2"),
        *("stages.rqvae.frozen_steps=2", "stages.rqvae.switch_warmup_steps=2"),
    ]
    whole = run(command)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    directory = tmp_path / "run" / "rqvae"
    expected = records(directory / "metrics.jsonl")
    assert expected[-1]["step"] == 10

    checkpoints = sorted((directory / "checkpoints").glob("step-*"))
    assert [int(path.name[-2:]) for path in checkpoints] == [2, 4, 8, 10]
    for path in checkpoints[2:]:
        shutil.rmtree(path)
    resumed = run(command)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert records(directory / "metrics.jsonl") == expected
    state = json.loads((directory / "checkpoints" / "step-00000010" / "COMPLETE.json").read_text())
    assert state["state"]["loader"]["step"] == 10
