from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from launch.config import RunConfig, load_config
from launch.metrics_log import MetricsLog, read_metrics
from launch.reconstructions import Reconstruction
from launch.tracking import Tracker, wandb_mode

TINY = Path(__file__).parents[3] / "configs" / "tiny_rqvae.yaml"


@pytest.fixture
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


def config(mode: str, *overrides: str) -> RunConfig:
    return load_config(TINY, stage="rqvae", overrides=[f"tracking.wandb={mode}", *overrides])


def train_line(step: int, **values: float) -> dict[str, Any]:
    return {"phase": "full", "split": "train", "step": step, "loss": 1 / step, **values}


def test_floats_survive_bitwise_and_non_finite_values_stay_strict_json(tmp_path: Path) -> None:
    values = {"step": 1, "a": 0.1 + 0.2, "b": math.nan, "c": math.inf, "d": -math.inf, "e": 5e-324, "f": "é"}
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(values)
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(literal: str) -> None:
        raise AssertionError(literal)

    assert json.loads(text, parse_constant=refuse)["b"] == "NaN"
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(read.pop("b"))
    assert read == {key: value for key, value in values.items() if key != "b"}


def test_resume_makes_the_file_as_if_never_interrupted(tmp_path: Path) -> None:
    def write(name: str, resume_step: int, steps: range) -> bytes:
        log = MetricsLog(tmp_path / name, resume_step)
        for step in steps:
            log.append(train_line(step))
        log.close()
        return (tmp_path / name).read_bytes()

    uninterrupted = write("whole", 0, range(1, 11))
    write("parts", 0, range(1, 8))
    with (tmp_path / "parts").open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    assert write("parts", 5, range(6, 11)) == uninterrupted
    assert write("parts", 0, range(1, 11)) == uninterrupted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def test_a_damaged_line_is_reported_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\0\0\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        MetricsLog(path, resume_step=1)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1 is not a JSON object"):
        read_metrics(path)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Tracker(tmp_path, config("offline"), "rqvae", rank=1) as tracker:
        tracker.log(train_line(1))
        tracker.sync()
    assert not list(tmp_path.iterdir())


def test_time_goes_on_after_a_resume(tmp_path: Path) -> None:
    with Tracker(tmp_path, config("disabled"), "rqvae", rank=0) as tracker:
        tracker.log({**train_line(1), "time_s": 100.0})
        tracker.log({**train_line(2), "time_s": 200.0})
    with Tracker(tmp_path, config("disabled"), "rqvae", rank=0, resume_step=1) as tracker:
        tracker.log(train_line(2))
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first["stage"] == "rqvae"
    assert first["time_s"] == 100
    assert 100 <= second["time_s"] < 160


@pytest.mark.usefixtures("no_login")
def test_auto_is_online_with_a_login_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb_mode(config("auto")) == "offline"
    netrc = tmp_path / "home" / ".netrc"
    netrc.write_text("machine example.org login user password x\n")
    netrc.chmod(0o600)
    assert wandb_mode(config("auto")) == "offline"
    netrc.write_text("machine api.wandb.ai login user password x\n")
    assert wandb_mode(config("auto")) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode(config("auto")) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert wandb_mode(config("auto")) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(config("auto")) == "disabled"
    assert wandb_mode(config("offline")) == "offline"


@pytest.mark.usefixtures("no_login")
def test_an_offline_run_and_its_resume_are_read_back(tmp_path: Path) -> None:
    with Tracker(tmp_path, config("auto"), "rqvae", rank=0, environment={"commit": "abc"}) as tracker:
        for step in (1, 2, 3):
            tracker.log(train_line(step, **{"codebook/perplexity_0": 7.5 * step}))
        tracker.log({"phase": "full", "split": "validation", "step": 3, "loss": 0.25})
    with Tracker(tmp_path, config("auto"), "rqvae", rank=0, resume_step=2) as tracker:
        tracker.log(train_line(3, **{"codebook/perplexity_0": math.nan}))

    # `finish` may return before wandb's own process has written its last records; leaving Python waits for it, and
    # so does this.
    wandb.teardown()
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    segments = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [path.name for path in segments] == [f"run-{run_id}.wandb"] * 2
    first, second = (list(transaction_log(path)) for path in segments)

    rows = [history(record) for record in first if record.WhichOneof("record_type") == "history"]
    assert [row["step"] for row in rows] == [1, 2, 3, 3]
    assert [row.get("train/codebook/perplexity_0") for row in rows] == [7.5, 15.0, 22.5, None]
    assert rows[3]["validation/loss"] == 0.25
    assert [history(r)["step"] for r in second if r.WhichOneof("record_type") == "history"] == [3]

    for segment in (first, second):
        (run,) = [record.run for record in segment if record.WhichOneof("record_type") == "run"]
        assert (run.run_id, run.project, run.display_name) == (run_id, "rqvae-text", "tiny_rqvae-rqvae")
        metrics = [record.metric for record in segment if record.WhichOneof("record_type") == "metric"]
        assert any(metric.glob_name == "*" and metric.step_metric == "step" for metric in metrics)
    settings = {item.key: item.value_json for item in run.config.update}
    assert json.loads(settings["train"])["steps"] == 460
    # The mirror holds what the file holds.
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]


def history(record: Any) -> dict[str, Any]:
    return {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}


def transaction_log(path: Path) -> Iterator[Any]:
    """Records of a `.wandb` file: a 7-byte header, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    block, position, parts = 32768, 7, b""
    while position + 7 <= len(data):
        if block - position % block < 7:  # no room for a record's header: the rest of the block is padding
            position += block - position % block
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            position += block - position % block
            continue
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


@pytest.mark.usefixtures("no_login")
def test_code_counts_are_kept_and_mirrored_in_at_most_512_bins(tmp_path: Path) -> None:
    counts = [[1] * 1000, [0, 5, 2]]
    with Tracker(tmp_path, config("offline"), "rqvae", rank=0) as tracker:
        tracker.log_code_counts(200, counts)
    kept = json.loads((tmp_path / "code_counts/step-00000200.json").read_text())
    assert kept == {"step": 200, "counts": counts}
    wandb.teardown()
    (segment,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    (row,) = [history(r) for r in transaction_log(segment) if r.WhichOneof("record_type") == "history"]
    assert row["validation/codes_0.values"] == [2] * 500
    assert row["validation/codes_1.values"] == [0, 5, 2]


@pytest.mark.usefixtures("no_login")
def test_reconstructions_are_kept_and_a_few_tables_of_them_mirrored(tmp_path: Path) -> None:
    samples = [Reconstruction("a river", "a [river|lake]", 2, 1), Reconstruction("the sea", "the sea", 2, 0)]
    settings = config("offline", "stages.rqvae.steps=1000", "train.eval_every=20")
    with Tracker(tmp_path, settings, "rqvae", rank=0) as tracker:
        for step in range(20, 1001, 20):
            tracker.log_reconstructions(step, samples)
        tracker.log_reconstructions(1000, [])
    assert len(list((tmp_path / "reconstructions").iterdir())) == 50
    kept = (tmp_path / "reconstructions/step-00000020.txt").read_text()
    assert kept.startswith("# 0: 1 of 2 tokens wrong, [wanted|got]\na [river|lake]\n")
    assert "# 1: 0 of 2" in kept
    wandb.teardown()
    (segment,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = [history(r) for r in transaction_log(segment) if r.WhichOneof("record_type") == "history"]
    assert [row["step"] for row in rows] == [20, *range(100, 1001, 100)]
    tables = sorted(segment.parent.glob("files/media/table/validation/reconstructions_*.table.json"))
    assert len(tables) == len(rows)
    table = json.loads(tables[0].read_text())
    assert table["columns"] == ["text", "marked", "num_tokens", "num_wrong"]
    assert table["data"] == [list(sample) for sample in samples]


# In a process of its own: what is left of wandb's service would be in the way of other tests.
LOSES_WANDB = """
import os, signal, sys, time
from pathlib import Path
from launch.config import load_config
from launch.tracking import Tracker

def children():
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]
            if parent == str(os.getpid()) and b"wandb-core" in (stat.parent / "cmdline").read_bytes():
                yield int(stat.parent.name)
        except OSError:
            pass

config = load_config(sys.argv[1], stage="rqvae", overrides=["tracking.wandb=offline"])
tracker = Tracker(Path(sys.argv[2]), config, "rqvae", rank=0)
(service,) = children()
os.kill(service, signal.SIGTERM)
os.waitpid(service, 0)
for step in range(1, 11):
    tracker.log({"phase": "full", "split": "train", "step": step, "loss": 1.0})
    tracker.log_code_counts(step, [[1, 2], [3, 4]])
    time.sleep(0.1)
tracker.close()
sys.exit(75)
"""


def test_training_outlives_the_service_of_wandb(tmp_path: Path) -> None:
    """Slurm's SIGTERM reaches every process of a job."""
    command = [sys.executable, "-c", LOSES_WANDB, str(TINY), str(tmp_path)]
    result = subprocess.run(command, cwd=TINY.parents[1], capture_output=True, text=True, timeout=300)
    assert result.returncode == 75, result.stderr
    assert result.stderr.count("metrics.jsonl goes on without it") == 1
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 11))
