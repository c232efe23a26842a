from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch import flops
from launch.config import STAGES, load_config
from launch.speed import Speedometer, train_flops_per_token
from launch.task import Phase

TINY = Path(__file__).parents[3] / "configs" / "tiny_rqvae.yaml"
FULL, FROZEN = Phase("full", 5, 9), Phase("frozen", 0, 5)


def test_utilisation_is_model_flops_over_the_peak_of_all_ranks() -> None:
    config = load_config(TINY, stage="rqvae", overrides=["tracking.peak_tflops=0.5"])
    speed = Speedometer(config, "fp32", torch.device("cpu"), world_size=2)
    assert speed.note is None
    sums, times = {"tokens": torch.tensor(3000.0)}, {"window_s": 2.0, "data_wait_s": 0.5}
    costs = flops.codec(config.codec, config.data.sample_length)
    for phase, cost in ((FULL, costs.train_full), (FROZEN, costs.train_frozen)):
        found = speed.metrics(phase, sums, times)
        assert (found["tokens_per_s"], found["data_wait_share"]) == (1500.0, 0.25)
        assert found["model_flops_utilisation"] == pytest.approx(1500 * cost / 1e12)


def test_it_is_left_out_with_a_note_where_the_peak_is_unknown() -> None:
    speed = Speedometer(load_config(TINY, stage="base_lm"), "fp32", torch.device("cpu"), 1)
    assert speed.note is not None
    assert "tracking.peak_tflops" in speed.note
    assert "model_flops_utilisation" not in speed.metrics(
        FULL, {"tokens": torch.tensor(1.0)}, {"window_s": 1.0}
    )


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "joint"])
def test_every_stage_has_a_cost(stage: str) -> None:
    assert train_flops_per_token(load_config(TINY, stage=stage), FULL) > 1e6  # type: ignore[arg-type]
