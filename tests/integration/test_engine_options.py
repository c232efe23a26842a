"""What the engine can do on CPUs, trained for some steps on two ranks, beside plain ZeRO-3. Slow: many launches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import NANO, REPOSITORY, launcher, records, run

pytestmark = pytest.mark.slow


def train(tmp_path: Path, name: str, data: list[str], *options: str) -> list[dict[str, Any]]:
    """Train the codec of nano.yaml; its log without what depends on the clock."""
    settings = ["--config", str(NANO), "--stage", "rqvae", f"name={name}", f"run_root={tmp_path}"]
    result = run([*launcher(2), *settings, "tracking.wandb=disabled", *data, *options], timeout_s=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return records(tmp_path / name / "rqvae/metrics.jsonl")


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, nano_data: list[str]) -> list[dict[str, Any]]:
    return train(tmp_path_factory.mktemp("plain"), "plain", nano_data)


@pytest.mark.parametrize(
    "options",
    [
        ["train.zero_stage=0"],
        ["train.zero_stage=1"],
        ["train.zero_stage=2"],
        ["train.zero_stage=2", "train.offload_optimizer=cpu"],
        ["train.offload_optimizer=cpu", "train.offload_param=cpu"],
        ["train.communication={reduce_bucket_size: 1000, prefetch_bucket_size: 100, overlap_comm: false}"],
    ],
    ids=" ".join,
)
def test_they_train_alike(
    options: list[str], plain: list[dict[str, Any]], tmp_path: Path, nano_data: list[str]
) -> None:
    lines = train(tmp_path, "option", nano_data, *options)
    assert losses(lines) == pytest.approx(losses(plain), rel=1e-5)
    for line, expected in zip(lines, plain, strict=True):
        norms = {name: value for name, value in expected.items() if name.startswith("gradient_norm")}
        assert {name: line[name] for name in norms} == pytest.approx(norms, rel=1e-3)
        assert line["split"] == "validation" or norms["gradient_norm"] > 0


def test_both_ways_of_freezing_train_bitwise_alike(
    plain: list[dict[str, Any]], tmp_path: Path, nano_data: list[str]
) -> None:
    lines = train(tmp_path, "option", nano_data, "train.phase_method=zero_lr")
    assert {line["phase"] for line in lines} == {"frozen", "full"}
    for line, expected in zip(lines, plain, strict=True):
        assert {name: line[name] for name in expected} == expected
        if line["phase"] == "frozen" and line["split"] == "train":
            assert line["gradient_norm/backbone"] == line["learning_rate/backbone"] == 0.0


def test_muon_under_zero_1_and_3(plain: list[dict[str, Any]], tmp_path: Path, nano_data: list[str]) -> None:
    muon = ["train.optimizer=muon", "train.gradient_clipping=0"]
    third = train(tmp_path, "third", nano_data, *muon)
    first = train(tmp_path, "first", nano_data, *muon, "train.zero_stage=1")
    assert losses(first) == pytest.approx(losses(third), rel=1e-5)
    assert losses(third)[-1] < 0.9 * losses(third)[0]
    assert losses(third) != pytest.approx(losses(plain), rel=1e-3)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_skipped_step_leaves_everything_as_it_was(
    zero_stage: int, tmp_path: Path, nano_data: list[str]
) -> None:
    """A learning rate that makes the loss jump, after which every step is a spike: validation stands still."""
    guards = "train.guards={loss_spike: 1.0000001, spike_window: 2, on_loss_spike: skip, max_skipped: 100}"
    more = ["train.learning_rate=0.2", "train.log_every=1", f"train.zero_stage={zero_stage}"]
    lines = train(tmp_path, "skipping", nano_data, guards, *more)
    steps = [line for line in lines if line["split"] == "train"]
    assert steps[-1]["skipped_steps"] - steps[9]["skipped_steps"] == 10
    assert steps[0]["skipped_steps"] == 0
    validations = [line for line in lines if line["split"] == "validation"]
    assert validations[0]["loss"] == validations[1]["loss"]


def test_codes_that_collapse_stop_the_run(tmp_path: Path, nano_data: list[str]) -> None:
    settings = ["--config", str(NANO), "--stage", "rqvae", "name=collapse", f"run_root={tmp_path}"]
    floor = "train.guards={min_codebook_usage: 0.999}"
    command = [sys.executable, str(REPOSITORY / "launch/train.py"), *settings, "tracking.wandb=disabled"]
    result = run(
        [*command, *nano_data, floor, "codec.quantizer={ema_decay: 0.1, threshold_ema_dead_code: 0.9}"]
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert "below min_codebook_usage" in result.stderr
