from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from launch.config import load_config
from launch.gpu_check import NO_GPU, ROWS, Row, check, main


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_every_row_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", str(tmp_path / "table.json")]) == 0
    assert json.loads((tmp_path / "table.json").read_text()) == {row.name: NO_GPU for row in ROWS}
    assert len(capsys.readouterr().out.splitlines()) == len(ROWS)


def test_outcomes_of_a_row(tmp_path: Path) -> None:
    def runs(code: str) -> Row:
        return Row("row", lambda _: [sys.executable, "-c", code], needs_gpus=2)

    assert check(runs("pass"), tmp_path, 2).startswith("passed in")
    assert (
        check(runs("raise ValueError('no such thing')"), tmp_path, 2) == "failed: ValueError: no such thing"
    )
    assert check(runs("pass"), tmp_path, 1) == "needs 2 GPUs, 1 here"
    assert check(Row("row", None), tmp_path, 1) == "no check yet"


@pytest.mark.parametrize("row", [row for row in ROWS if row.command is not None], ids=lambda row: row.name)
def test_the_settings_of_every_row_are_valid(row: Row, tmp_path: Path) -> None:
    assert row.command is not None
    command = row.command(tmp_path)
    if "pytest" in command:
        file = Path(command[-1])
        assert file.is_file() and "pytest.mark.gpu" in file.read_text()
        return
    overrides = [word for word in command[command.index("--stage") + 2 :] if "=" in word]
    load_config("configs/tiny_rqvae.yaml", stage="rqvae", overrides=overrides)
