"""What must not reach the weights: non-finite numbers, loss spikes, collapsed codebooks.

Every rank takes part in one joint decision before each optimizer step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.engine_config import GuardsConfig
from launch.stop import first_reason


class UnhealthyError(FloatingPointError):
    """Training was stopped by a guard, on all ranks, before the step that it names."""


@dataclass(frozen=True)
class Decision:
    """What all ranks do about a step."""

    skip: bool
    """Leave the weights as they are."""
    stop: str | None
    """Save and stop after this step: why."""
    squared_norms: Tensor
    """Of the gradients by group, joint."""


class Guards:
    """Judges every step.

    Args:
        config: the limits.
        rank: this process's; the first one speaks.
        state: from the checkpoint that the run goes on from, so that it judges as if it had not stopped.
    """

    def __init__(self, config: GuardsConfig, rank: int, state: Mapping[str, Any] | None = None):
        self._config, self._rank = config, rank
        self._losses: deque[float] = deque(state["losses"] if state else (), maxlen=config.spike_window)
        self.num_skipped: int = state["num_skipped"] if state else 0

    def judge(
        self, step: int, loss: Tensor, squared_norms: Tensor, stop_reason: str | None, samples: Tensor
    ) -> Decision:
        """One decision of all ranks, before the optimizer takes in the step.

        Args:
            loss: [] fp64 mean loss of this rank's samples.
            squared_norms: [G] fp64, this rank's part.
            stop_reason: why this rank wants to stop after the step, or None.
            samples: LongTensor of this rank's sample indices.

        Raises:
            UnhealthyError: the step must not be taken, and the run not go on.
        """
        bad = not math.isfinite(float(loss))
        own = loss.new_tensor([float(bad), float(stop_reason is not None), 0.0 if bad else float(loss)])
        joint = torch.cat([own, squared_norms])
        dist.all_reduce(joint)
        num_bad, num_stopping, total = joint[:3].tolist()
        mean, squares = total / dist.get_world_size(), joint[3:]
        problem, action = None, "stop"
        if num_bad or not bool(squares.isfinite().all()):
            what = f"loss on {int(num_bad)} rank(s)" if num_bad else "gradient"
            problem, action = f"non-finite {what}", self._config.non_finite
        elif self._is_spike(mean):
            usual = sum(self._losses) / len(self._losses)
            problem, action = f"loss {mean:.6g}, usually {usual:.6g}", self._config.on_loss_spike
        if problem is None:
            self._losses.append(mean)
        else:
            self._handle(problem, action, step, float(loss), samples)
        stop = first_reason(stop_reason) if num_stopping else None
        return Decision(problem is not None, stop, squares)

    def _is_spike(self, loss: float) -> bool:
        factor = self._config.loss_spike
        if factor is None or len(self._losses) < self._config.spike_window:
            return False
        return loss > factor * sum(self._losses) / len(self._losses)

    def _handle(self, problem: str, action: str, step: int, loss: float, samples: Tensor) -> None:
        """Raise, or count a skipped step and say so."""
        seen: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(seen, (loss, samples.tolist()))
        by_rank = "; ".join(f"rank {rank}: loss {x:.6g}, samples {ids}" for rank, (x, ids) in enumerate(seen))
        text = f"{problem} at step {step}; {by_rank}"
        if action == "stop":
            raise UnhealthyError(text)
        self.num_skipped += 1
        if self.num_skipped > self._config.max_skipped:
            raise UnhealthyError(
                f"{text}; {self._config.max_skipped} steps were skipped before (max_skipped)"
            )
        if self._rank == 0:
            print(f"step {step} skipped ({self.num_skipped} so far): {text}", flush=True)

    def metrics(self) -> dict[str, float]:
        """Steps that were skipped since the start of the run."""
        return {"skipped_steps": float(self.num_skipped)}

    def check_codebooks(self, step: int, metrics: Mapping[str, float]) -> None:
        """Judge the codebooks by `codebook/used_fraction_LEVEL` of `metrics`, the same on all ranks.

        Raises:
            UnhealthyError: a level uses less than `min_codebook_usage`.
        """
        floor = self._config.min_codebook_usage
        used = {name: value for name, value in metrics.items() if name.startswith("codebook/used_fraction_")}
        if floor is not None and used and min(used.values()) < floor:
            worst = min(used, key=used.__getitem__)
            raise UnhealthyError(
                f"codebooks have collapsed after step {step}: {worst} is {used[worst]:.4g}, below "
                f"min_codebook_usage {floor:g}"
            )

    def forget_losses(self) -> None:
        """Start to learn what loss is usual, because another one begins."""
        self._losses.clear()

    def state(self) -> dict[str, Any]:
        """For the checkpoint, as JSON."""
        return {"losses": list(self._losses), "num_skipped": self.num_skipped}
