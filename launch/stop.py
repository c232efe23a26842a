"""When to stop early: signals, a deadline, a file. Every rank takes part in one joint decision."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType

import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)  # SIGUSR1 clashes with NCCL


class StopRequest:
    """Collects this process's reasons to stop; the training loop joins them over ranks at step boundaries.

    SIGTERM to `torchrun` or `srun` reaches the ranks, which have `torchrun --shutdown-timeout` seconds (30 by
    default) for the step and the checkpoint. The `deepspeed` launcher kills its ranks at once on SIGTERM: there use
    the STOP file (`touch RUN_DIRECTORY/STOP`) or send SIGUSR2 to a rank.

    Args:
        run_directory: where a file named STOP asks for a stop.
        max_time_s: seconds from now after which to stop; None for no limit.
    """

    def __init__(self, run_directory: Path, max_time_s: float | None):
        self._file = run_directory / "STOP"
        self._deadline = None if max_time_s is None else time.monotonic() + max_time_s
        self._reason: str | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._reason = signal.Signals(number).name

    def reason(self) -> str | None:
        """Why this process wants to stop, or None."""
        if self._reason is None and self._deadline is not None and time.monotonic() > self._deadline:
            self._reason = "max_time_s"
        if self._reason is None and self._file.exists():
            self._reason = "STOP file"
        return self._reason


def first_reason(reason: str | None) -> str | None:
    """The first rank's reason that has one."""
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    return next((text for text in reasons if text is not None), None)
