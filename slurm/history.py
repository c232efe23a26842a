"""The starts of a run under Slurm, in `slurm.jsonl` of its run directory."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

FILE = "slurm.jsonl"


def newest_step(run_directory: Path) -> int:
    """Step of the newest complete checkpoint, 0 if there is none."""
    marks = run_directory.glob("checkpoints/step-*/COMPLETE.json")
    steps = [re.fullmatch(r"step-(\d+)", mark.parent.name) for mark in marks]
    return max((int(step[1]) for step in steps if step), default=0)


def add(run_directory: Path, event: str, **values: Any) -> None:
    """One more line: `start` or `end` of an attempt, with when."""
    run_directory.mkdir(parents=True, exist_ok=True)
    line = {"event": event, "time": datetime.now().isoformat(" ", "milliseconds"), **values}
    with (run_directory / FILE).open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(run_directory: Path) -> list[dict[str, Any]]:
    """All lines, oldest first; half a line of a killed process is left out."""
    path = run_directory / FILE
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def starts_without_progress(lines: list[dict[str, Any]], job_id: str, step: int) -> int:
    """How many of the job's last starts in a row were from `step`."""
    starts = [line for line in lines if line["event"] == "start" and line["job"] == job_id]
    count = 0
    for line in reversed(starts):
        if line["step"] != step:
            break
        count += 1
    return count
