"""Figures of the page of one run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from launch.figure_style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PAPER,
    PURPLE,
    Figure,
    canvas,
    finish,
    ramp,
    styled,
)

Records = Sequence[Mapping[str, Any]]
_MAX_POINTS = 400


def codebook_sizes(codec: Mapping[str, Any]) -> list[int]:
    """C of every level from a codec's configuration, empty where it is not known."""
    size, levels = codec.get("codebook_size"), codec.get("codebook_levels")
    if isinstance(size, int) and isinstance(levels, int):
        return [size] * levels
    return list(size) if isinstance(size, (list, tuple)) else []


def level_bits(codec: Mapping[str, Any]) -> list[float]:
    """Bits per token of the codes up to each level, empty where they are not known."""
    factor = codec.get("compression_factor")
    if not factor:
        return []
    return list(itertools.accumulate(math.log2(size) / factor for size in codebook_sizes(codec)))


@styled
def training(curves: Mapping[str, Records], titles: Mapping[str, str]) -> list[Figure]:
    """Loss of every stage, and token accuracy where a stage has one."""
    drawn = []
    for stage, records in curves.items():
        for key, label in (("loss", "loss"), ("token_accuracy", "token accuracy")):
            train, validation = (_series(records, key, split) for split in ("train", "validation"))
            if not train[0] and not validation[0]:
                continue
            drawing, axes = canvas(f"{titles[stage]}: {label}")
            axes.plot(*_thinned(*train), color=GREY, linewidth=1.1, label="training")
            axes.plot(*validation, color=BLUE, marker="o", markersize=3, label="validation")
            axes.set_xlabel("optimizer step")
            axes.set_ylabel("loss" if key == "loss" else "share of tokens")
            switches = _mark_switches(axes, records)
            axes.legend(loc="best")
            last = f" Last validation: {validation[1][-1]:.4g}." if validation[1] else " Not validated yet."
            noun = "Loss" if key == "loss" else "Token accuracy"
            drawn.append(finish(drawing, f"{noun} of the {titles[stage]} over training.{last}{switches}"))
    return drawn


@styled
def codebooks_over_training(curves: Mapping[str, Records], codec: Mapping[str, Any]) -> list[Figure]:
    """Perplexity and usage of every codebook level over training."""
    records = curves.get("rqvae") or curves.get("joint") or []
    sizes = codebook_sizes(codec)
    drawn = []
    for key, title, label, caption in (
        (
            "perplexity",
            "Codebook perplexity",
            "share of C" if sizes else "codes",
            "Perplexity of each level's usage",
        ),
        ("used_fraction", "Codes in use", "share of C", "Share of each level's codes in use"),
        ("dead_replaced", "Dead codes re-seeded", "codes", "Codes re-seeded so far at each level"),
    ):
        levels = _levels(records, f"codebook/{key}_")
        if not levels:
            continue
        drawing, axes = canvas(title)
        for level in levels:
            steps, values = _series(records, f"codebook/{key}_{level}", "train")
            if key == "perplexity" and level < len(sizes):
                values = [value / sizes[level] for value in values]
            axes.plot(
                *_thinned(steps, values), color=ramp(level, len(levels)), label=str(level), linewidth=1.2
            )
        axes.set_ylim(bottom=0)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label)
        _level_legend(axes, len(levels))
        of_size = ", divided by its number of codes" if key == "perplexity" and sizes else ""
        drawn.append(finish(drawing, f"{caption}{of_size}, over training; 0 is the coarsest level."))
    return drawn


@styled
def codebooks(report: Mapping[str, Any], codec: Mapping[str, Any]) -> list[Figure]:
    """Rate against distortion and accuracy by level, and the usage histogram, on the evaluated split."""
    codebook = report.get("codebook") or {}
    levels = codebook.get("levels") or []
    bits = level_bits(codec)
    drawn = []
    for key, title, label, caption in (
        ("distortion", "Rate and distortion", "squared error", "What is left of the latent"),
        ("token_accuracy", "Rate and accuracy", "share of tokens", "Token accuracy"),
    ):
        values = [level.get(key) for level in levels]
        if not values or any(value is None for value in values) or len(bits) != len(values):
            continue
        if not any(values):  # tokens as codes: there is no latent to lose anything of
            continue
        drawing, axes = canvas(title)
        axes.plot(bits, values, color=BLUE, marker="o", markersize=4)
        for level, (x, y) in enumerate(zip(bits, values, strict=True)):
            axes.annotate(str(level), (x, y), xytext=(4, 5), textcoords="offset points", fontsize=8)
        axes.set_xlabel("bits per token of the codes used")
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.12 * max(values))
        drawn.append(
            finish(
                drawing,
                f"{caption} when decoding with the levels up to and including the numbered one. "
                f"With all levels: {values[-1]:.4g} at {bits[-1]:.3g} bits per token.",
            )
        )
    histograms = [counts for counts in codebook.get("histograms") or [] if sum(counts) > 0]
    if histograms:
        drawing, axes = canvas("Codebook usage")
        for level, counts in enumerate(histograms):
            mean = sum(counts) / len(counts)
            shares = [(index + 0.5) / len(counts) for index in range(len(counts))]
            used = [(x, c / mean) for x, c in zip(shares, counts, strict=True) if c > 0]
            axes.plot(
                *zip(*used, strict=True), color=ramp(level, len(histograms)), label=str(level), linewidth=1.2
            )
        axes.axhline(1, color=INK, linewidth=0.7, linestyle=(0, (4, 3)))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlim(0, 1)
        axes.set_xlabel("codes, most used first (share of C)")
        axes.set_ylabel("uses over uniform")
        _level_legend(axes, len(histograms))
        drawn.append(
            finish(
                drawing,
                "How often each code is used, relative to uniform usage (dashed), most used first; a line "
                "that ends early has unused codes. Uniform usage is no goal: predictable codes are.",
            )
        )
    return drawn


@styled
def bits_per_byte(report: Mapping[str, Any], titles: Mapping[str, str]) -> Figure | None:
    """Bars of bits per byte, the latent model's split into codes and tokens given codes."""
    bits = report.get("bits_per_byte") or {}
    rows = [key for key in titles if bits.get(key) is not None]
    if not rows:
        return None
    drawing, axes = canvas("Bits per UTF-8 byte, lower is better", width=5.4, height=0.7 + 0.42 * len(rows))
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    for row, key in enumerate(rows):
        parts = [(bits[key], BLUE if key == "base_lm" else GREY)]
        codes, tokens = bits.get("latent_codes"), bits.get("latent_reconstruction")
        if key == "latent_bound":
            parts = (
                [(codes, ORANGE), (tokens, PURPLE)] if None not in (codes, tokens) else [(bits[key], ORANGE)]
            )
        left = 0.0
        for width, color in parts:
            axes.barh(row, width, left=left, color=color, height=0.62, edgecolor=PAPER, linewidth=0.8)
            left += width
        sign = "≤ " if key == "latent_bound" else ""
        axes.annotate(
            f"{sign}{bits[key]:.3g}", (left, row), xytext=(4, 0), textcoords="offset points", va="center"
        )
    axes.set_yticks(range(len(rows)), [titles[key] for key in rows])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    caption = "Bits per byte on the same held-out text"
    if "latent_bound" in rows:
        caption += "; the latent model's figure is an upper bound"
        if bits.get("latent_codes") is not None and bits.get("latent_reconstruction") is not None:
            caption += (
                f": {bits['latent_codes']:.3g} for the codes (orange) plus "
                f"{bits['latent_reconstruction']:.3g} for the tokens given the codes (purple)"
            )
    return finish(drawing, caption + ".")


@styled
def speed_split(speed: Mapping[str, Any]) -> Figure | None:
    """Bars of decoding time: autoregressive, and the latent model's by part."""
    ar = speed.get("ar_ms")
    parts: list[tuple[str, float, str]] = [
        (name, speed[key], color)
        for name, key, color in (
            ("prompt", "encode_ms", GREY),
            ("spatial", "spatial_ms", ORANGE),
            ("depth", "depth_ms", PURPLE),
            ("decoder", "decode_ms", GREEN),
        )
        if speed.get(key) is not None
    ]
    if ar is None and not parts:
        return None
    drawing, axes = canvas("Time per token", width=5.4, height=1.75)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    labels = []
    if ar is not None:
        axes.barh(0, ar, color=BLUE, height=0.6)
        axes.annotate(f"{ar:.3g}", (ar, 0), xytext=(4, 0), textcoords="offset points", va="center")
        labels.append("base LM")
    if parts:
        row, left = len(labels), 0.0
        for name, width, color in parts:
            axes.barh(
                row, width, left=left, color=color, height=0.6, label=name, edgecolor=PAPER, linewidth=0.8
            )
            left += width
        axes.annotate(f"{left:.3g}", (left, row), xytext=(4, 0), textcoords="offset points", va="center")
        labels.append("latent")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, borderaxespad=0, columnspacing=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("milliseconds per kept token")
    split = ", ".join(f"{name} {width:.3g} ms" for name, width, _ in parts)
    caption = "Time per kept token of each sequence"
    if speed.get("batch_size"):
        caption += f", batch size {speed['batch_size']}"
    return finish(drawing, caption + (f"; latent decoding is {split}." if split else "."))


def _series(records: Records, key: str, split: str) -> tuple[list[int], list[float]]:
    points = [
        (record["step"], record[key])
        for record in records
        if record.get("split") == split
        and isinstance(record.get(key), (int, float))
        and math.isfinite(record[key])
    ]
    return [step for step, _ in points], [value for _, value in points]


def _thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most `_MAX_POINTS` points, each the mean of its neighbours."""
    stride = max(1, math.ceil(len(steps) / _MAX_POINTS))
    groups = [slice(start, start + stride) for start in range(0, len(steps), stride)]
    return [_mean(steps[group]) for group in groups], [_mean(values[group]) for group in groups]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _levels(records: Records, prefix: str) -> list[int]:
    names: Iterable[str] = {key for record in records for key in record if key.startswith(prefix)}
    return sorted(int(name.removeprefix(prefix)) for name in names if name.removeprefix(prefix).isdigit())


def _level_legend(axes: Axes, count: int) -> None:
    if count <= 12:
        axes.legend(
            title="level",
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            handlelength=1.2,
            labelspacing=0.25,
            title_fontsize=8.5,
        )


def _mark_switches(axes: Axes, records: Records) -> str:
    """Dotted lines where the phase changes and where quantization begins; returns what they mean."""
    marks: list[tuple[int, str]] = []
    previous: Mapping[str, Any] | None = None
    for record in (record for record in records if record.get("split") == "train"):
        if previous is not None:
            if record.get("phase") != previous.get("phase"):
                marks.append((previous["step"], f"phase {record.get('phase')}"))
            if _quantizes(record) and not _quantizes(previous):
                marks.append((previous["step"], "quantization"))
        previous = record
    for step, _ in marks:
        axes.axvline(step, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    return f" Dotted: {', '.join(f'{what} from step {step}' for step, what in marks)}." if marks else ""


def _quantizes(record: Mapping[str, Any]) -> bool:
    return any(key.startswith("codebook/distortion_") for key in record)
