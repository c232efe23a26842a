"""How reports are written: numbers, templates, files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from launch.figure_style import Figure

TEMPLATES = Path(__file__).parent / "templates"


class Page(NamedTuple):
    """A page as HTML, and its figures in order."""

    html: str
    figures: list[Figure]


def render_page(template: str, **values: Any) -> Page:
    """The template with the formats below as filters; figures are numbered in the order that they are shown."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "count": count, "duration": duration, "percent": percent}
    environment.filters |= {"fixed": fixed, "visible": visible}
    shown: list[Figure] = []

    def next_number(figure: Figure) -> int:
        shown.append(figure)
        return len(shown)

    environment.globals["next_number"] = next_number
    return Page(environment.get_template(template).render(**values), shown)


def write_page(page: Page, path: Path, pngs: Path | None = None) -> Path:
    """Write the page in one go and return where it is.

    Args:
        pngs: directory for its figures as `figure-N.png`, with the page's numbers.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page.html, encoding="utf-8")
    temporary.replace(path)
    if pngs is not None:
        pngs.mkdir(parents=True, exist_ok=True)
        for shown, figure in enumerate(page.figures, 1):
            (pngs / f"figure-{shown}.png").write_bytes(figure.png())
    return path


def number(value: Any, digits: int = 3) -> str:
    """A number with `digits` significant digits; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return "not finite"
    if isinstance(value, int) or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}"
    decimals = digits - 1 - (math.floor(math.log10(abs(value))) if value else 0)
    return f"{value:.{max(0, decimals)}f}"


def fixed(value: Any, decimals: int = 2) -> str:
    """A number with `decimals` decimals, for columns that are compared; a dash where there is none."""
    return number(value) if value is None or not math.isfinite(value) else f"{value:,.{decimals}f}"


def count(value: Any) -> str:
    """A large count with a decimal prefix: 1.96 M, 3.1 P."""
    if value is None:
        return "–"
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{number(value / size)} {prefix}"
    return number(value)


def duration(seconds: Any) -> str:
    """Seconds in the two largest units that fit."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    for size, unit, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below} {small}"
    return f"{number(float(seconds))} s"


def percent(value: Any) -> str:
    """A share as a percentage with one decimal, never rounded up to 100 %."""
    if value is None:
        return "–"
    return f"{math.floor(value * 1000 + 1e-9) / 10:.1f} %"


def visible(token: str) -> str:
    """A token's text with its line ends and tabs shown, and a mark where it is empty."""
    return token.replace("\n", "⏎\n").replace("\t", "⇥") or "∅"
