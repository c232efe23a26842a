"""Skipping by content."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launch import chain, run_status
from launch.report_data import read_report, update_report


@pytest.fixture
def step(tmp_path: Path) -> chain.Step:
    (tmp_path / "input").write_text("text")
    (tmp_path / "output").mkdir()
    (tmp_path / "output/result").write_text("result")
    return chain.Step("step", ["command", "--master_port", "1"], [tmp_path / "input"], [tmp_path / "output"])


def test_a_step_is_done_only_as_long_as_nothing_changed(step: chain.Step, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    assert not chain.is_done(step, record)
    chain.mark(step, record, finished=False)
    assert chain.was_interrupted(step, record)
    assert not chain.is_done(step, record)
    chain.mark(step, record, finished=True, seconds=1.0)
    assert chain.is_done(step, record)
    # The port is no content.
    assert chain.is_done(
        chain.Step("step", ["command", "--master_port", "2"], step.inputs, step.outputs), record
    )
    assert not chain.is_done(chain.Step("step", ["other"], step.inputs, step.outputs), record)
    (tmp_path / "output/result").write_text("damaged")
    assert not chain.is_done(step, record)
    (tmp_path / "output/result").write_text("result")
    assert chain.is_done(step, record)
    (tmp_path / "input").write_text("other text")
    assert not chain.is_done(step, record)
    assert not chain.was_interrupted(step, record)


def test_outputs_outside_the_project_are_kept(tmp_path: Path) -> None:
    inside, outside = tmp_path / "project/model", tmp_path / "data"
    for directory in (inside, outside):
        directory.mkdir(parents=True)
    chain.remove_outputs(chain.Step("step", [], [], [inside, outside]), tmp_path / "project")
    assert not inside.exists()
    assert outside.exists()


def test_report_keeps_the_keys_of_others(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    update_report(path, {"speed": {"speedup": 2.0}})
    update_report(path, {"rate": {"codes_bits_per_token": 20.0}})
    assert read_report(path) == {"speed": {"speedup": 2.0}, "rate": {"codes_bits_per_token": 20.0}}
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_report(path)


def test_training_is_done_when_it_says_so_itself(tmp_path: Path) -> None:
    """`deepspeed` exits with 0 when `kill -9` ended its lower process."""
    says = "from pathlib import Path; from launch import run_status; run_status"

    def run(code: str) -> int:
        return chain.run(chain.Step("train", [sys.executable, "-c", code], [], [], run_directory=tmp_path))

    assert run(f"{says}.finished(Path('{tmp_path}'), 9)") == 0
    assert run(f"{says}.running(Path('{tmp_path}'))") == 1
    run_status.finished(tmp_path, 9)  # an earlier start
    assert run("") == 1
    assert run("raise SystemExit(3)") == 3
