"""A few kills of `tests/soak.py`; `make soak` is the long version."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak import Soak


@pytest.mark.slow
def test_killed_runs_end_as_if_nobody_had_killed_them(tmp_path: Path, nano_data: list[str]) -> None:
    soak = Soak(tmp_path, nano_data, seed=1)
    while soak.kills.total() < 4:
        soak.run_until(f"run{soak.starts}", 4)
