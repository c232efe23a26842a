"""Figures over many runs: frontier, rate and distortion, codebooks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from launch.figure_style import BLUE, GREEN, GREY, ORANGE, PAPER, PURPLE, Figure, canvas, finish, styled

Run = Mapping[str, Any]
KINDS = {
    "rqvae": ("o", ORANGE, "RQ-VAE"),
    "anchor": ("s", PURPLE, "anchors"),
    "identity": ("D", GREEN, "identity codec"),
}
_MAX_LABELS = 24


@styled
def frontier(runs: Sequence[Run]) -> Figure | None:
    """Bits per byte over tokens per second: every latent model, AR and lossless faster decoding of it."""
    latent = [run for run in runs if {"bound", "tokens_per_s"} <= set(run["figures"])]
    if not latent:
        return None
    drawing, axes = canvas("Quality and speed: up and left is worse", width=6.4, height=3.8)
    seen: set[str] = set()
    ahead = pareto(latent)
    for run in latent:
        marker, color, label = KINDS[run["codec"]]
        figures = run["figures"]
        axes.plot(
            figures["tokens_per_s"],
            figures["bound"],
            marker,
            color=color,
            markersize=5,
            label=None if label in seen else f"{label}, upper bound",
        )
        seen.add(label)
        if len(latent) <= _MAX_LABELS or run in ahead:
            _label(axes, run["trial"], figures["tokens_per_s"], figures["bound"])
    lossless = ar_points(runs)
    for name, (speed, bits) in lossless.items():
        axes.plot(speed, bits, "^", color=BLUE, markersize=6)
        _label(axes, name, speed, bits)
    axes.plot([], [], "^", color=BLUE, label="plain AR, exact")
    unigram = [run["figures"]["unigram"] for run in runs if "unigram" in run["figures"]]
    if unigram:
        mean = sum(unigram) / len(unigram)
        axes.axhline(mean, color=GREY, linewidth=1, linestyle=(0, (4, 3)), label="unigram")
    axes.set_xscale("log")
    axes.set_xlabel("tokens per second, batch 1")
    axes.set_ylabel("bits per byte")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    beaten = [
        run["trial"] for run in latent if any(run["figures"]["bound"] <= b for _, b in lossless.values())
    ]
    told = (
        f" No worse than plain AR: {', '.join(beaten)}."
        if beaten
        else " None reaches plain AR's bits per byte."
    )
    return finish(
        drawing,
        f"Held-out bits per byte (lower is better) against decoding speed of {len(latent)} latent models, with the "
        f"plain AR model and lossless ways of decoding it as triangles.{told if lossless else ''} Speeds of "
        "different runs were measured at different times: compare speed-ups within a run first.",
    )


def pareto(runs: Sequence[Run]) -> list[Run]:
    """Runs that no other run beats in speed and bound at once."""

    def place(run: Run) -> tuple[float, float]:
        return run["figures"]["tokens_per_s"], run["figures"]["bound"]

    found, lowest = [], math.inf
    for run in sorted(runs, key=lambda run: (-place(run)[0], place(run)[1])):
        if place(run)[1] < lowest:
            found.append(run)
            lowest = place(run)[1]
    return found


def ar_points(runs: Sequence[Run]) -> dict[str, tuple[float, float]]:
    """Speed and bits of plain AR by way of decoding, of the first run that has them; speculation loses nothing."""
    for run in runs:
        figures = run["figures"]
        if not {"ar", "ar_tokens_per_s"} <= set(figures):
            continue
        points = {"AR": (figures["ar_tokens_per_s"], figures["ar"])}
        for row in run.get("speed_rows", []):
            name = str(row["name"])
            if (
                any(word in name.lower() for word in ("lean", "specul", "lookup", "draft"))
                and row["tokens_per_s"]
            ):
                points[name.removeprefix("base LM, ")] = (row["tokens_per_s"], figures["ar"])
        return points
    return {}


@styled
def rate_distortion(runs: Sequence[Run]) -> Figure | None:
    """What codes cost and what they leave, over their rate."""
    drawn = [
        run for run in runs if {"bound_codes", "bound_tokens", "codes_bits_per_token"} <= set(run["figures"])
    ]
    if not drawn:
        return None
    drawing, axes = canvas("Rate and distortion", width=6.4, height=3.4)
    for key, color, label in (
        ("bound_tokens", PURPLE, "tokens given codes (distortion)"),
        ("bound", ORANGE, "bound: codes and tokens"),
    ):
        axes.plot(
            [run["figures"]["codes_bits_per_token"] for run in drawn],
            [run["figures"][key] for run in drawn],
            "o",
            color=color,
            markersize=4.5,
            label=label,
        )
    if len(drawn) <= _MAX_LABELS:
        for run in drawn:
            _label(axes, run["trial"], run["figures"]["codes_bits_per_token"], run["figures"]["bound"])
    axes.set_xlabel("rate of the codes, bits per token")
    axes.set_ylabel("bits per byte")
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return finish(
        drawing,
        "More bits in the codes leave less to the decoder (purple), and cost the latent model more: what counts is "
        "the sum (orange).",
    )


@styled
def codebook_heat_map(runs: Sequence[Run], key: str, title: str) -> Figure | None:
    """A figure of every codebook level of every run, as shades."""
    rows = [(run["trial"], run["codebook"][key]) for run in runs]
    rows = [(name, values) for name, values in rows if any(value is not None for value in values)]
    if not rows:
        return None
    depth = max(len(values) for _, values in rows)
    drawing, axes = canvas(title, width=6.4, height=1.1 + 0.24 * len(rows))
    grid = [[_or_nan(values, level) for level in range(depth)] for _, values in rows]
    shades = axes.pcolormesh(grid, vmin=0, vmax=1, cmap="cividis", edgecolors=PAPER, linewidth=1)
    for row, (_, values) in enumerate(rows):
        for level in range(len(values)):
            share = _or_nan(values, level)
            if depth <= 8 and not math.isnan(share):
                color = "white" if share < 0.5 else "black"
                axes.text(
                    level + 0.5, row + 0.5, f"{share:.2f}", ha="center", va="center", fontsize=7, color=color
                )
    axes.set_xticks([level + 0.5 for level in range(depth)], [str(level) for level in range(depth)])
    axes.set_yticks([row + 0.5 for row in range(len(rows))], [name for name, _ in rows])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.invert_yaxis()
    axes.set_xlabel("level, coarse to fine")
    solids = drawing.colorbar(shades, ax=axes, pad=0.02).solids
    if solids is not None:
        solids.set_rasterized(False)
    return finish(
        drawing, f"{title} by trial and level, on the evaluated split. Uniform usage is no goal by itself."
    )


def _or_nan(values: Sequence[float | None], level: int) -> float:
    value = values[level] if level < len(values) else None
    return math.nan if value is None else float(value)


def _label(axes: Axes, text: str, x: float, y: float) -> None:
    axes.annotate(text, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
