"""The look of the reports' figures: SVG that is inlined into a page and takes its text colour and font from it."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

# Stand-ins for colours of the page, replaced in the SVG.
INK, RULE, PAPER = "#010203", "#040506", "#070809"
# Readable on a white and on a near-black page (contrast above 3:1 on both).
BLUE, ORANGE, GREEN, PURPLE, GREY = "#3a78c9", "#c96a12", "#2b8f5a", "#9a5fd0", "#808790"
# Coarse to fine levels, from blue to orange.
_RAMP = ("#3a78c9", "#2f86b5", "#2b8f93", "#2b8f5a", "#6f8a1f", "#a07c12", "#c96a12", "#d0533c")
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.linewidth": 0.7,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.transparent": True,
}
_NUMBER = "@number@"


styled = matplotlib.rc_context(_STYLE)


@dataclass(frozen=True)
class Figure:
    """One figure: the drawing and its caption, which says in words what it shows."""

    drawing: str
    caption: str
    canvas: Canvas | None = None

    def png(self) -> bytes:
        """The drawing for what cannot show SVG: on white, 150 dots per inch; empty if there is nothing to draw."""
        buffer = io.BytesIO()
        if self.canvas is not None:
            self.canvas.savefig(buffer, format="png", dpi=150, transparent=False, facecolor="white")
        return buffer.getvalue()

    def svg(self, number: int) -> str:
        """The drawing as the page's figure `number`: an element whose ids are unique in the page."""
        return self.drawing.replace(_NUMBER, str(number))


def canvas(title: str, width: float = 4.5, height: float = 2.7) -> tuple[Canvas, Axes]:
    """An empty drawing with one pair of axes."""
    drawing = Canvas(figsize=(width, height), layout="constrained")
    axes = drawing.add_subplot()
    axes.set_title(title)
    return drawing, axes


def finish(drawing: Canvas, caption: str) -> Figure:
    """The drawing as an SVG element that can stand beside others in one page."""
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    label = f"figure-{_NUMBER}-caption"
    svg = svg.replace("xlink:href", "href")
    # Element ids are unique within a drawing only.
    prefix = f"figure-{_NUMBER}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r"<svg[^>]*>", f'<svg {view[0]} role="img" aria-labelledby="{label}">', svg, count=1)
    svg = svg.replace('href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
    svg = re.sub(r"font: ([^\"';]*?)([\d.]+px)[^;\"]*", r"font: \1\2 var(--sans)", svg)
    for stand_in, color in ((INK, "currentColor"), (RULE, "var(--rule)"), (PAPER, "var(--paper)")):
        svg = svg.replace(stand_in, color)
    return Figure(svg.strip(), caption, drawing)


def ramp(level: int, count: int) -> str:
    """Colour of one of `count` steps, from blue to orange."""
    return _RAMP[0 if count < 2 else round(level * (len(_RAMP) - 1) / (count - 1))]
