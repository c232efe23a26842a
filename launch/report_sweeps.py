"""The page over many runs: answers, frontier, rate and distortion, codebooks, scaling, samples, receptive fields."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from launch import report_scaling
from launch import report_sweep_figures as figures
from launch.report_answers import answers
from launch.report_data import read_report
from launch.report_formats import Page, render_page, write_page
from launch.results import TABLE, backbone_parameters, cell, figures_of, summary
from launch.steps import REPOSITORY
from rqvae.config import ArchitectureConfig

QWEN3 = {"0.6B": "qwen3_0.6b", "1.7B": "qwen3_1.7b", "4B": "qwen3_4b", "8B": "qwen3_8b"}
MAX_SAMPLES = 6
EXPLORER_TOKENS = 64


def write_overview(sources: Sequence[Path], out: Path | None = None, pngs: Path | None = None) -> Path:
    """Write the page, and its figures to `pngs`, and return where it is: by default `report.html` in the first
    source's directory.

    Raises:
        ValueError: a source is neither a sweep nor a run, or two sweeps have one name.
    """
    first = sources[0].parent if sources[0].is_file() else sources[0]
    target = first / "report.html" if out is None else out
    return write_page(render(read_sources(sources), target.parent), target, pngs)


def read_sources(sources: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Results by name of sweep; a single run is a sweep of one trial.

    Raises:
        ValueError: see `write_overview`.
    """
    sweeps: dict[str, dict[str, Any]] = {}
    for source in sources:
        path = source if source.is_file() else source / "results.json"
        if path.is_file():
            results = read_report(path)
            if not {"sweep", "trials", "runs"} <= set(results):
                raise ValueError(f"'{path}' is no results.json of launch/experiments.py")
        elif (source / "report.json").is_file():
            results = of_one_run(source)
        else:
            raise ValueError(f"'{source}' holds neither results.json (a sweep) nor report.json (a run)")
        name = results["sweep"]
        if name in sweeps:
            raise ValueError(f"'{source}': there is another source named {name}; leave one out")
        sweeps[name] = results
    return sweeps


def of_one_run(directory: Path) -> dict[str, Any]:
    """A run in the form of a sweep's results."""
    report = read_report(directory / "report.json")
    codec = report.get("codec") or {}
    architecture = _architecture(directory)
    run: dict[str, Any] = {
        "trial": directory.name,
        "seed": 0,
        "directory": str(directory),
        "state": "finished",
        "reason": "",
        "codec": codec.get("model", "rqvae"),
        "compression_factor": codec.get("compression_factor"),
        "codebook_levels": codec.get("codebook_levels"),
        "backbone_parameters": None if architecture is None else backbone_parameters(architecture),
        **figures_of(report),
    }
    trial = summary(directory.name, "", [run])
    return {"sweep": directory.name, "question": "", "seeds": [0], "trials": [trial], "runs": [run]}


def _architecture(directory: Path) -> ArchitectureConfig | None:
    for stage in ("rqvae", "base_lm", "rq_transformer"):
        path = directory / stage / "config.yaml"
        if path.is_file():
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            return ArchitectureConfig.model_validate(values["codec"]["backbone"]["architecture"])
    return None


def qwen3_sizes() -> dict[str, float]:
    """Weights of the layers of the Qwen3 backbones that there are configurations for."""
    found = {}
    for name, stem in QWEN3.items():
        values = yaml.safe_load((REPOSITORY / f"configs/backbones/{stem}.yaml").read_text(encoding="utf-8"))
        found[f"Qwen3-{name}"] = float(backbone_parameters(ArchitectureConfig.model_validate(values)))
    return found


def render(sweeps: Mapping[str, Mapping[str, Any]], beside: Path) -> Page:
    """The page; links to runs are relative to the directory `beside`."""
    # A trial of several sweeps is one run.
    by_directory = {
        run["directory"]: run
        for results in sweeps.values()
        for run in results["runs"]
        if run["state"] == "finished"
    }
    runs = list(by_directory.values())
    sizes = qwen3_sizes()
    maps = [
        figures.codebook_heat_map(with_levels, key, title)
        for key, title in (
            ("perplexity_normalized", "Codebook perplexity over its maximum"),
            ("used_fraction", "Share of codes used"),
        )
        if (
            with_levels := [
                run for run in runs if run["codec"] == "rqvae" and run.get("codebook", {}).get(key)
            ]
        )
    ]
    # Nowhere else are trials of other sizes and lengths the same model.
    sized = [run for run in sweeps.get("model_size", {"runs": []})["runs"] if run["state"] == "finished"]

    def href(directory: str) -> str:
        page = REPOSITORY / directory / "report.html"
        target = page if page.is_file() else page.parent
        return os.path.relpath(target, (REPOSITORY / beside).resolve())

    return render_page(
        "sweeps.html.j2",
        sweeps=sweeps,
        answers=answers(sweeps, sizes),
        columns=TABLE,
        cell=cell,
        href=href,
        num_runs=len(runs),
        frontier=figures.frontier(runs),
        rate=figures.rate_distortion(runs),
        heat_maps=[drawn for drawn in maps if drawn is not None],
        scaling=report_scaling.scaling(sized, sizes),
        gap_trend=report_scaling.gap_trend(sized),
        samples=samples(runs),
        explorer=json.dumps({"tokens": EXPLORER_TOKENS}),
    )


def samples(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A reconstruction and continuations of the first runs that have some, best bound first."""
    shown: list[dict[str, Any]] = []
    ordered = sorted(runs, key=lambda run: run["figures"].get("bound", float("inf")))
    for run in ordered:
        found = read_report(REPOSITORY / run["directory"] / "report.json").get("samples") or {}
        if not found.get("reconstructions") and not found.get("generations"):
            continue
        shown.append(
            {
                "title": "/".join(Path(run["directory"]).parts[-2:]),
                "directory": run["directory"],
                "bound": run["figures"].get("bound"),
                "reconstruction": (found.get("reconstructions") or [None])[0],
                "generation": (found.get("generations") or [None])[0],
            }
        )
        if len(shown) == MAX_SAMPLES:
            break
    return shown
