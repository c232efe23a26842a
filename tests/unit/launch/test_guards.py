"""What stops or skips a step."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from launch.engine import start_process_group
from launch.engine_config import GuardsConfig
from launch.guards import Decision, Guards, UnhealthyError


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    start_process_group()
    yield
    torch.distributed.destroy_process_group()


def judge(guards: Guards, loss: float, step: int = 5, norm: float = 1.0, stop: str | None = None) -> Decision:
    squares = torch.tensor([norm, 2.0], dtype=torch.float64)
    return guards.judge(step, torch.tensor(loss, dtype=torch.float64), squares, stop, torch.tensor([3, 4]))


def guards(state: Any = None, **settings: Any) -> Guards:
    return Guards(GuardsConfig(**settings), 0, state)


def test_a_healthy_step_is_taken_and_requests_to_stop_pass() -> None:
    decision = judge(guards(), 1.0, stop="SIGTERM")
    assert (decision.skip, decision.stop) == (False, "SIGTERM")
    assert decision.squared_norms.tolist() == [1.0, 2.0]
    assert judge(guards(), 1.0).stop is None


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan)])
def test_numbers_that_are_not_finite_stop_before_the_step(loss: float, norm: float) -> None:
    with pytest.raises(UnhealthyError, match=r"non-finite .* step 5; rank 0: .* samples \[3, 4\]"):
        judge(guards(), loss, norm=norm)


def test_they_are_skipped_by_policy_up_to_a_cap() -> None:
    careful = guards(non_finite="skip", max_skipped=2)
    assert judge(careful, math.nan).skip
    assert judge(careful, 1.0, norm=math.inf).skip
    assert not judge(careful, 1.0).skip
    assert careful.num_skipped == 2
    with pytest.raises(UnhealthyError, match="2 steps were skipped before"):
        judge(careful, math.nan)


def test_a_spike_is_measured_against_the_mean_of_the_window_and_does_not_enter_it() -> None:
    careful = guards(loss_spike=1.5, spike_window=4, on_loss_spike="skip")
    assert not judge(careful, 100.0).skip  # nothing is usual yet
    careful.forget_losses()
    for loss in (2.0, 2.2, 1.8, 2.0):
        assert not judge(careful, loss).skip
    assert not judge(careful, 2.9).skip
    assert judge(careful, 3.5).skip  # the mean is 2.225 now
    assert judge(careful, 3.5).skip
    careful.forget_losses()
    assert not judge(careful, 3.5).skip
    strict = guards(loss_spike=1.5, spike_window=1)
    judge(strict, 2.0)
    with pytest.raises(UnhealthyError, match=r"loss 3\.5, usually 2 at step 5"):
        judge(strict, 3.5)


def test_a_resumed_run_judges_alike() -> None:
    settings: dict[str, Any] = {
        "loss_spike": 1.5,
        "spike_window": 3,
        "on_loss_spike": "skip",
        "max_skipped": 1,
    }
    first = guards(**settings)
    for loss in (2.0, 2.0, 2.0, 9.0):
        judge(first, loss)
    second = guards(json.loads(json.dumps(first.state())), **settings)
    assert not judge(second, 2.9).skip
    with pytest.raises(UnhealthyError):
        judge(second, 9.0)


def test_collapsed_codebooks_stop() -> None:
    usage = {"codebook/used_fraction_0": 0.9, "codebook/used_fraction_1": 0.05, "codebook/perplexity_0": 0.0}
    guards().check_codebooks(7, usage)
    guards(min_codebook_usage=0.01).check_codebooks(7, usage)
    guards(min_codebook_usage=0.1).check_codebooks(7, {})  # quantization has not begun
    with pytest.raises(UnhealthyError, match=r"used_fraction_1 is 0.05, below min_codebook_usage 0.1"):
        guards(min_codebook_usage=0.1).check_codebooks(7, usage)
