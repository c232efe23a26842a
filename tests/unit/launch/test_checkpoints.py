"""Complete or invisible."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import checkpoints

STATE = {"step": 10, "phase": "full", "loader": {"fingerprint": "f" * 64}, "run_hash": "a" * 64}


def write_checkpoint(root: Path, step: int, size: int = 8) -> Path:
    directory = root / f"step-{step:08d}"
    directory.mkdir(parents=True)
    (directory / "weights.pt").write_bytes(b"x" * 8)
    mark = {"state": {**STATE, "step": step}, "world_size": 2, "zero_stage": 3, "files": {"weights.pt": size}}
    (directory / checkpoints.COMPLETE).write_text(json.dumps(mark))
    return directory


def test_newest_is_the_last_complete_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 20)
    unmarked = write_checkpoint(tmp_path, 30)
    (unmarked / checkpoints.COMPLETE).unlink()
    cut = write_checkpoint(tmp_path, 40, size=9)  # a file shorter than the mark says
    assert [found.state.step for found in checkpoints.find_complete(tmp_path)] == [10, 20]
    newest = checkpoints.require_newest(tmp_path)
    assert newest.state.step == 20
    (cut / "weights.pt").unlink()
    assert checkpoints.require_newest(tmp_path).state.step == 20


def test_nothing_complete_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none at all"):
        checkpoints.require_newest(tmp_path)
    (write_checkpoint(tmp_path, 30) / checkpoints.COMPLETE).unlink()
    with pytest.raises(ValueError, match=r"only incomplete ones \(step-00000030\)"):
        checkpoints.require_newest(tmp_path)
