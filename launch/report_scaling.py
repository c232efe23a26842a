"""Figures of size and of training compute: fitted laws, and how the gap to plain AR moves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.figure_style import BLUE, INK, ORANGE, PURPLE, Figure, canvas, finish, styled
from launch.report_sweep_figures import KINDS, Run


@dataclass(frozen=True)
class PowerLaw:
    """bits = scale * size ** -exponent, by least squares in logarithms (two parameters, no irreducible part)."""

    scale: float
    exponent: float

    def __call__(self, size: float) -> float:
        """Bits at a size."""
        return self.scale * size**-self.exponent


def fit_power_law(sizes: Sequence[float], values: Sequence[float]) -> PowerLaw | None:
    """The fit, or None for fewer than two different sizes."""
    if len(set(sizes)) < 2:
        return None
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    return PowerLaw(math.exp(mean_y - slope * mean_x), -slope)


@styled
def scaling(runs: Sequence[Run], targets: Mapping[str, float]) -> Figure | None:
    """Bits over the backbone's size, with fitted power laws carried on to the sizes of `targets`."""
    drawing, axes = canvas("Size and bits per byte", width=6.4, height=3.6)
    told: list[str] = []
    for name, kind, key, color in SERIES:
        points = series(runs, kind, key)
        law = fit_power_law(*zip(*points, strict=True)) if points else None
        if law is None:
            continue
        sizes = [size for size, _ in points]
        axes.plot(sizes, [bits for _, bits in points], "o", color=color, markersize=4.5, label=name)
        within = [min(sizes), max(sizes)]
        axes.plot(within, [law(size) for size in within], color=color)
        beyond = [max(sizes), max([*targets.values(), max(sizes)])]
        axes.plot(beyond, [law(size) for size in beyond], color=color, linestyle=(0, (4, 3)), linewidth=1)
        ends = ", ".join(f"{law(size):.2g} at {target}" for target, size in targets.items())
        told.append(f"{name}: size^-{law.exponent:.3g}; extrapolated, {ends}")
    if not told:
        return None
    for target, size in targets.items():
        axes.axvline(size, color=INK, linewidth=0.6, linestyle=(0, (1, 2)))
        axes.annotate(
            target,
            (size, 1),
            xycoords=("data", "axes fraction"),
            rotation=90,
            va="top",
            ha="right",
            fontsize=7,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("weights of the backbone's layers")
    axes.set_ylabel("bits per byte")
    axes.legend(loc="lower left")
    return finish(
        drawing,
        "Fitted power laws without an irreducible part (solid within the data). Dashed: EXTRAPOLATION over several "
        f"orders of magnitude, at these models' few training tokens; not a prediction. {'. '.join(told)}.",
    )


SERIES = (
    ("latent model on RQ codes, bound", "rqvae", "bound", ORANGE),
    ("latent model on anchors, bound", "anchor", "bound", PURPLE),
    ("plain AR", None, "ar", BLUE),
)
"""Lines of the scaling figure: label, kind of codec, figure, colour."""


def series(runs: Sequence[Run], kind: str | None, key: str) -> list[tuple[float, float]]:
    """Size and bits of the runs of a kind of codec (None: any), each size and value once, of every size those that
    were trained longest; trials of plain AR alone are left out: the others' base LMs are the same models."""
    chosen = [
        run
        for run in runs
        if key in run["figures"]
        and run.get("backbone_parameters")
        and run["codec"] in ((kind,) if kind else KINDS)
    ]
    longest: dict[int, float] = {}
    for run in chosen:
        size = run["backbone_parameters"]
        longest[size] = max(longest.get(size, 0.0), training_flops(run))
    return sorted(
        {
            (float(run["backbone_parameters"]), float(run["figures"][key]))
            for run in chosen
            if training_flops(run) >= 0.99 * longest[run["backbone_parameters"]]
        }
    )


def training_flops(run: Run) -> float:
    """Planned, of all that the run's last model stands on; 0 where nobody planned it."""
    return float(sum((run.get("planned_flops") or {}).values()))


def gaps(runs: Sequence[Run]) -> dict[int, list[tuple[float, float]]]:
    """Training FLOPs and bound over plain AR's bits, by size, of latent models whose base LM took as much compute.

    Only sizes that were trained for several lengths; tokens as codes are left out.
    """
    found: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        figures = run["figures"]
        if (
            run["codec"] in (None, "identity")
            or not {"bound", "ar"} <= set(figures)
            or not training_flops(run)
        ):
            continue
        place = (training_flops(run), figures["bound"] / figures["ar"])
        found.setdefault(run["backbone_parameters"], []).append(place)
    return {
        size: sorted(places)
        for size, places in sorted(found.items())
        if max(places)[0] > 1.1 * min(places)[0]  # by design, not by a few steps
    }


@styled
def gap_trend(runs: Sequence[Run]) -> Figure | None:
    """How the gap between the bound and plain AR's bits moves with training compute, a line for every size."""
    by_size = gaps(runs)
    if not by_size:
        return None
    drawing, axes = canvas("Bound over plain AR's bits, by training compute", width=6.4, height=3.2)
    for (size, places), marker in zip(by_size.items(), itertools.cycle("os^Dv")):
        flops, ratios = zip(*places, strict=True)
        axes.plot(flops, ratios, marker + "-", markersize=4.5, label=f"{size / 1e6:.2g} million weights")
    axes.axhline(1, color=INK, linewidth=0.6, linestyle=(0, (1, 2)))
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs, of the latent model with its codec, and of its base LM")
    axes.set_ylabel("bound over AR, bits per byte")
    axes.legend(loc="best")
    return finish(drawing, "1 is plain AR of the same compute. The bound is one from above.")
