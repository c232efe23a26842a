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
# What another start of the same command meets again, by class or, of modules that import torch, by name. Everything
# else may be the fault of a node, the network or the file system.
_FINAL = (ValueError, TypeError, AttributeError, LookupError, NameError, ImportError, NotImplementedError)
_FINAL_NAMES = ("AssertionError", "CheckpointError", "OutOfMemoryError", "UnhealthyError")


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
        name = type(error).__name__
        retryable = not isinstance(error, _FINAL) and name not in _FINAL_NAMES
        content = {"state": "failed", "rank": rank, "error": f"{name}: {error}", "retryable": retryable}
        _write(run_directory, content)


def amend(run_directory: Path, **more: Any) -> None:
    """Add to what STATUS says, e.g. what the job around the run has decided; its time stays that of the run."""
    content = read(run_directory)
    with contextlib.suppress(OSError):
        _write(run_directory, {**content, **more})


def read(run_directory: Path) -> dict[str, Any]:
    """The content, empty if there is none."""
    try:
        return json.loads((run_directory / FILE).read_text())
    except FileNotFoundError:
        return {}


def _write(run_directory: Path, content: dict[str, Any]) -> None:
    temporary = run_directory / f"{FILE}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps({"time": datetime.now().isoformat(" ", "seconds"), **content}) + "\n")
    temporary.replace(run_directory / FILE)
