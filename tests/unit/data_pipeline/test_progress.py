from __future__ import annotations

import pytest

from data_pipeline.progress import Progress


def test_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, "rqvae", initial=4, every_s=0.0) as progress:
        progress.update(loss=1.23456, phase="full")
        progress.update(2)
        progress.write("checkpoint saved")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("rqvae: 5/10 steps")
    assert lines[0].endswith("loss=1.235 phase=full")
    assert lines[1].startswith("rqvae: 7/10 steps")
    assert lines[2] == "checkpoint saved"
    assert lines[3].startswith("rqvae: 7/10 steps")
    assert len(lines) == 4


def test_lines_are_rare_and_the_last_state_is_always_shown(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(1000, "eval", every_s=3600, unit="batches")
    for _ in range(1000):
        progress.update()
    progress.close()
    progress.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("eval: 1000/1000 batches")


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, "x", shown=False, every_s=0.0) as progress:
        progress.update(loss=1.0)
        progress.write("text")
    assert progress.done == 1
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress(3, "rqvae") as progress:
        for _ in range(3):
            progress.update(loss=0.5)
    shown = capsys.readouterr().err
    assert "rqvae: 100%" in shown
    assert "3/3" in shown


def test_an_unknown_total_promises_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(None, "tokenizing", unit="documents", every_s=0.0) as progress:
        progress.update(5)
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("tokenizing: 5 documents  ")
        assert line.endswith("/s")
