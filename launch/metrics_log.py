"""The file `metrics.jsonl` of a run: one strict JSON object a line.

JSON has no NaN and no infinity, so these are written as the strings "NaN", "Infinity" and "-Infinity"; `read_metrics`
turns them back into floats.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """An append-only file of JSON lines.

    Args:
        path: the file; its directory must exist.
        resume_step: the step that the run goes on from. Lines with a later step are cut; 0 starts afresh.

    Raises:
        ValueError: an existing file holds a line that is not JSON.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        if path.exists():
            _keep_until(path, resume_step)
        self._file = path.open("a", encoding="utf-8")

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line, which then survives the death of this process."""
        self._file.write(json.dumps(_strict(record), allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Force what was written to the disk, which then survives the death of the machine."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close. A second call does nothing."""
        if not self._file.closed:
            self.sync()
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, with non-finite values as floats again.

    A last line without its line end is what a killed process leaves behind, and is left out.

    Raises:
        ValueError: another line is not a JSON object.
    """
    return [
        {
            key: _NON_FINITE.get(value, value) if isinstance(value, str) else value
            for key, value in record.items()
        }
        for _, record in _lines(path)
    ]


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    # What follows the last line end is empty, or half a line of a killed process.
    complete = path.read_text(encoding="utf-8").split("\n")[:-1]
    found = []
    for number, line in enumerate(complete, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is not JSON ({error}); repair it or move the file"
            ) from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object; repair it or move the file")
        found.append((line, record))
    return found


def _keep_until(path: Path, step: int) -> None:
    """Cut the lines after `step` (all of them for step 0) by an atomic replacement."""
    kept = [line + "\n" for line, record in _lines(path) if step > 0 and record["step"] <= step]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _strict(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _spelled(value) if isinstance(value, float) else value for key, value in record.items()}


def _spelled(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
