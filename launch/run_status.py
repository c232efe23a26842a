"""The STATUS file of a run directory: what became of the run, for people and for scripts."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from datetime import datetime
from pathlib import Path
from typing import Any

FILE = "STATUS"


def running(run_directory: Path) -> None:
    """Say that the run has started. What remains of it after a `kill -9`, when nobody holds the LOCK."""
    _write(run_directory, {"state": "running", "host": platform.node(), "pid": os.getpid()})


def finished(run_directory: Path, step: int) -> None:
    """Say that all steps are done (exit status 0)."""
    _write(run_directory, {"state": "finished", "step": step})


def stopped(run_directory: Path, step: int, reason: str) -> None:
    """Say that the run was asked to stop and has saved a checkpoint (exit status 75)."""
    _write(run_directory, {"state": "stopped", "step": step, "reason": reason})


def failed(run_directory: Path, rank: int, error: BaseException) -> None:
    """Say which error ended the run (any other exit status). The first rank to fail knows the cause; what the
    others say after it (a closed connection) is left out."""
    if read(run_directory).get("state") == "failed":
        return
    with contextlib.suppress(OSError):  # a full disk must not hide the error
        _write(run_directory, {"state": "failed", "rank": rank, "error": f"{type(error).__name__}: {error}"})


def read(run_directory: Path) -> dict[str, Any]:
    """The content, empty if there is none."""
    try:
        return json.loads((run_directory / FILE).read_text())
    except FileNotFoundError:
        return {}


def _write(run_directory: Path, content: dict[str, Any]) -> None:
    temporary = run_directory / f"{FILE}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps({**content, "time": datetime.now().isoformat(" ", "seconds")}) + "\n")
    temporary.replace(run_directory / FILE)
