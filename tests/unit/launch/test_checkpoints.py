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


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path, 10)
    (write_checkpoint(tmp_path, 20) / "weights.pt").unlink()
    found = checkpoints.start_from(tmp_path)
    assert found is not None and found.state.step == 10
    told = capsys.readouterr().out
    assert "step-00000020' is damaged ('weights.pt' is missing or cut); going on from" in told
    assert "step-00000010' before it" in told
    mark = write_checkpoint(tmp_path, 25) / checkpoints.COMPLETE
    mark.write_text(mark.read_text()[:30])
    assert checkpoints.start_from(tmp_path) == found
    assert f"('{checkpoints.COMPLETE}' is missing or cut)" in capsys.readouterr().out
    write_checkpoint(tmp_path, 30)
    assert checkpoints.start_from(tmp_path) is not None
    assert capsys.readouterr().out == ""  # nothing is lost by an older one


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh(tmp_path: Path) -> None:
    assert checkpoints.start_from(tmp_path) is None  # nor is a new run refused
    write_checkpoint(tmp_path, 10, size=9)
    (write_checkpoint(tmp_path, 20) / "weights.pt").unlink()
    with pytest.raises(
        ValueError, match=r"every checkpoint .* 'step-00000010' \('weights.pt'\), 'step-00000020'"
    ):
        checkpoints.start_from(tmp_path)
    assert (tmp_path / "step-00000010/weights.pt").is_file()


def test_what_is_kept() -> None:
    def checkpoint(step: int, is_ephemeral: bool = False) -> checkpoints.Checkpoint:
        state = checkpoints.RunState(**{**STATE, "step": step})  # type: ignore[arg-type]
        return checkpoints.Checkpoint(Path(f"step-{step:08d}"), state, 2, 3, is_ephemeral)

    def removed(complete: list[checkpoints.Checkpoint], **settings: int | None) -> list[int]:
        keep = {"keep_last": 2, "keep_every": None, **settings}
        return [found.state.step for found in checkpoints.superseded(complete, **keep)]  # type: ignore[arg-type]

    lasting = [checkpoint(step) for step in (10, 20, 30, 40)]
    assert removed(lasting) == [10, 20]
    assert removed(lasting, keep_every=20) == [10]
    assert removed(lasting, keep_last=1, keep_every=10) == []
    # An ephemeral one stays until the next of any kind, and does not count among the last.
    mixed = [checkpoint(10), checkpoint(20), checkpoint(23, True), checkpoint(26, True)]
    assert removed(mixed) == [23]
    assert removed([*mixed, checkpoint(30)], keep_last=1) == [10, 20, 23, 26]
    assert removed([checkpoint(20, True), checkpoint(30)], keep_every=10) == [20]
