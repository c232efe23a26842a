"""The tables of `launch/benchmark.py inference` as one page that needs no network and no scripts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.figure_style import BLUE, GREEN, GREY, ORANGE, PURPLE, RULE, Figure, canvas, finish, styled
from launch.race_table import describe_point
from launch.report_formats import render_page, write_page


def write_race(result: dict[str, Any], target: Path) -> Path:
    """Write the page of a result and return where it is."""
    tables = result["tables"]
    page = render_page(
        "race.html.j2",
        result=result,
        described=[describe_point(table) for table in tables],
        drawn=[race(table) for table in tables],
    )
    return write_page(page, target)


@styled
def race(table: Mapping[str, Any]) -> Figure | None:
    """Bars of decoding time of all rows of a table of `launch/benchmark.py inference`, latent ones by part."""
    rows = table["rows"]
    if not rows:
        return None
    drawing, axes = canvas("Time per token, lower is better", width=6.2, height=0.9 + 0.34 * len(rows))
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    colors = {"encode": GREY, "spatial": ORANGE, "depth": PURPLE, "decode": GREEN}
    shown: set[str] = set()
    for place, row in enumerate(rows):
        split, left = row["split_ms_per_token"] or {}, 0.0
        for part, width in split.items():
            label = None if part in shown else part
            axes.barh(place, width, left=left, color=colors[part], height=0.62, label=label)
            shown.add(part)
            left += width
        rest = row["ms_per_token"] - left
        axes.barh(place, max(rest, 0.0), left=left, color=BLUE if not split else RULE, height=0.62)
        axes.annotate(
            f"{row['ms_per_token']:.3g}", (row["ms_per_token"], place), xytext=(4, 0),
            textcoords="offset points", va="center",
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("milliseconds per kept token of each sequence")
    if shown:
        axes.legend(loc="lower right", ncols=4, borderaxespad=0, columnspacing=1)
    return finish(
        drawing,
        "Milliseconds per kept token: "
        + ", ".join(f"{row['name']} {row['ms_per_token']:.3g}" for row in rows)
        + ". Bars of latent decoding are split into encoding the prompt, spatial and depth transformer, and decoder.",
    )
