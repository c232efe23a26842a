"""The tables of `launch/benchmark.py inference` as one page that needs no network and no scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch import report_figures as figures
from launch.race_table import describe_point
from launch.report import page_environment, write_page


def write_race(result: dict[str, Any], target: Path) -> Path:
    """Write the page of a result and return where it is."""
    tables = result["tables"]
    page = (
        page_environment()
        .get_template("race.html.j2")
        .render(
            result=result,
            described=[describe_point(table) for table in tables],
            drawn=[figures.race(table) for table in tables],
        )
    )
    return write_page(page, target)
