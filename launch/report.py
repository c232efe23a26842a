"""Write a run's report: one self-contained HTML page from report.json and the stages' metrics.jsonl.

    python launch/report.py runs/tiny

The page needs no network and no scripts. Whatever was not run is named on it, with the command that runs it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from launch import report_figures as figures
from launch.config import STAGES
from launch.tracking import read_metrics

TEMPLATES = Path(__file__).parent / "templates"
STAGE_TITLES = {
    "base_lm": "Base LM",
    "rqvae": "RQ-VAE (codec)",
    "rq_transformer": "RQ-transformer (latent model)",
    "joint": "Codec and latent model together",
    "encoding": "Encoding the training text",
    "total_latent": "All that the latent model stands on",
    "total_base_lm": "All that the base LM stands on",
}
MODEL_TITLES = {
    "uniform": "Uniform over the vocabulary",
    "unigram": "Unigram",
    "zero_rate": "Zero rate: the decoder without codes, temperature fitted",
    "base_lm": "Base LM, autoregressive",
    "base_lm_calibrated": "Base LM, temperature fitted",
    "identity_codec": "Identity codec (codes are the tokens)",
    "latent_bound": "Latent model",
    "latent_bound_calibrated": "Latent model, temperatures fitted",
    "stochastic_bound": "Latent model, stochastic codes",
}
BOUNDS = ("latent_bound", "latent_bound_calibrated", "stochastic_bound")
GENERATING = {
    "text": "The text itself",
    "base_lm": "Base LM, autoregressive",
    "identity_codec": "Identity codec",
    "latent": "Latent model",
}
PARTS_OF_THE_BOUND = {
    "latent_codes": "of this, the codes",
    "latent_reconstruction": "of this, the tokens given the codes",
}


@dataclass(frozen=True)
class Inputs:
    """What a run directory holds; a part that is missing is empty."""

    run_dir: Path
    report: dict[str, Any]
    """report.json."""
    curves: dict[str, list[dict[str, Any]]]
    """Records of metrics.jsonl by stage."""
    config: dict[str, Any]
    """config.yaml of the codec's stage, or of another stage where the codec has none."""


def main() -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Write report.html from a run directory's report.json and metrics.",
        epilog="example: python launch/report.py runs/tiny",
    )
    parser.add_argument(
        "run_dir", type=Path, help="runs/NAME, the directory with the stages' directories in it"
    )
    parser.add_argument("--out", type=Path, help="file to write (default: RUN_DIR/report.html)")
    arguments = parser.parse_args()
    try:
        written = write_report(arguments.run_dir, arguments.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {written}")
    return 0


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page and return where it is.

    Raises:
        ValueError: the directory holds neither report.json nor any stage's metrics.jsonl.
    """
    return write_page(render(read_inputs(run_dir)), run_dir / "report.html" if out is None else out)


def write_page(page: str, target: Path) -> Path:
    """Write a page whole or not at all, and return where it is."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(target)
    return target


def read_inputs(run_dir: Path) -> Inputs:
    """Everything the report is made from.

    Raises:
        ValueError: there is nothing to report on, or report.json is not a JSON object.
    """
    curves: dict[str, list[dict[str, Any]]] = {
        stage: read_metrics(path) for stage in STAGES if (path := run_dir / stage / "metrics.jsonl").is_file()
    }
    path = run_dir / "report.json"
    if not path.is_file() and not any(curves.values()):
        hint = "; give the directory above it" if (run_dir / "metrics.jsonl").is_file() else ""
        raise ValueError(f"{run_dir} holds neither report.json nor the metrics of a stage{hint}")
    report: Any = {}
    if path.is_file():
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(report, dict):
            raise ValueError(f"{path} is not a JSON object")
    written = [run_dir / stage / "config.yaml" for stage in ("rqvae", *STAGES)]
    config: dict[str, Any] = next(
        (yaml.safe_load(file.read_text(encoding="utf-8")) for file in written if file.is_file()), {}
    )
    return Inputs(run_dir, report, curves, config)


def page_environment() -> Environment:
    """What the pages are made with: the templates and how they write numbers."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "count": count, "duration": duration, "percent": percent}
    environment.filters |= {"fixed": fixed, "visible": visible}
    numbers = itertools.count(1)
    environment.globals["next_number"] = lambda: next(numbers)
    return environment


def render(inputs: Inputs) -> str:
    """The page as HTML."""
    environment = page_environment()
    report = inputs.report
    codec = report.get("codec") or inputs.config.get("codec") or {}
    speed = report.get("speed") or {}
    samples = report.get("samples") or {}
    levels = (report.get("codebook") or {}).get("levels") or []
    return environment.get_template("report.html.j2").render(
        name=inputs.config.get("name") or inputs.run_dir.name,
        codec=codec_facts(codec),
        findings=findings(report),
        headline=headline_rows(report),
        reconstruction=report.get("reconstruction") or {},
        generation=generation_rows(report),
        mauve_note=(report.get("sample_quality") or {}).get("mauve_note"),
        rate=report.get("rate") or {},
        levels=levels,
        level_bits=figures.level_bits(codec),
        speed=speed,
        compute=report.get("compute") or {},
        evaluation=report.get("evaluation") or {},
        environment=report.get("environment") or {},
        reconstructions=samples.get("reconstructions") or [],
        generations=samples.get("generations") or [],
        stage_titles=STAGE_TITLES,
        training=figures.training(inputs.curves, STAGE_TITLES),
        codebook_curves=figures.codebooks_over_training(inputs.curves, codec),
        codebook_figures=figures.codebooks(report, codec),
        quality_figure=figures.bits_per_byte(report, MODEL_TITLES),
        speed_figure=figures.speed_split(speed),
        missing_stages=[
            stage for stage in ("base_lm", "rqvae", "rq_transformer") if not inputs.curves.get(stage)
        ],
        commands=commands(inputs),
    )


def codec_facts(codec: Mapping[str, Any]) -> dict[str, Any]:
    """K, D, C and the rate, as far as they are known."""
    sizes = figures.codebook_sizes(codec)
    return {
        "compression_factor": codec.get("compression_factor"),
        "codebook_levels": codec.get("codebook_levels"),
        "codebook_size": ", ".join(str(size) for size in sorted(set(sizes), reverse=True)) or None,
        "bits_per_token": bits[-1] if (bits := figures.level_bits(codec)) else None,
    }


def headline_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the headline table: a model's quality and its speed side by side."""
    bits = report.get("bits_per_byte") or {}
    perplexity = report.get("perplexity") or {}
    speed = report.get("speed") or {}
    speeds = {"base_lm": (speed.get("ar_tokens_per_s"), 1.0 if speed.get("ar_tokens_per_s") else None)}
    speeds["latent_bound"] = (speed.get("latent_tokens_per_s"), speed.get("speedup"))
    rows = []
    missing = report.get("missing") or {}
    for key, title in MODEL_TITLES.items():
        if key in missing:
            title += " (not trained)"
        elif key not in bits and not any(speeds.get(key, ())):
            continue
        tokens_per_s, speedup = speeds.get(key, (None, None))
        rows.append(
            {
                "title": title,
                "is_bound": key in BOUNDS,
                "is_part": False,
                "bits_per_byte": bits.get(key),
                "perplexity": perplexity.get(key),
                "tokens_per_s": tokens_per_s,
                "speedup": speedup,
                "has_speed": key in speeds,
            }
        )
    empty = {"is_bound": False, "perplexity": None, "tokens_per_s": None, "speedup": None, "has_speed": False}
    rows += [
        {"title": title, "is_part": True, "bits_per_byte": bits[key], **empty}
        for key, title in PARTS_OF_THE_BOUND.items()
        if key in bits
    ]
    return rows


def generation_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of generated text: BrierLM with its interval, and the figures of sample quality."""
    brier, quality = report.get("brier_lm") or {}, report.get("sample_quality") or {}
    return [
        {
            "title": title,
            "brier": brier.get(key),
            "interval": (brier.get("intervals") or {}).get(key),
            **{
                name: (quality.get(key) or {}).get(name)
                for name in ("distinct_2", "repetition", "base_lm_perplexity", "mauve", "mean_tokens")
            },
        }
        for key, title in GENERATING.items()
        if key in brier or key in quality
    ]


def findings(report: Mapping[str, Any]) -> list[str]:
    """What the figures say, in sentences: speed and its price together, whatever they are."""
    speed, bits = report.get("speed") or {}, report.get("bits_per_byte") or {}
    found = []
    speedup, bound, base, unigram = (
        speed.get("speedup"),
        bits.get("latent_bound"),
        bits.get("base_lm"),
        bits.get("unigram"),
    )
    if speedup is not None:
        found.append(
            f"Latent decoding is {number(speedup)} times as fast as the base LM's decoding with a KV cache."
            if speedup >= 1
            else f"Latent decoding is slower than the base LM's: {number(speedup)} times its speed."
        )
    lean = speed.get("speedup_over_lean_loop")
    if lean is not None:
        found.append(
            f"Against the leanest autoregressive loop measured here it is {number(lean)} times as fast."
        )
    if bound is not None and base is not None:
        found.append(
            f"Its bits per byte are at most {number(bound)} (a bound); the base LM's are {number(base)}."
        )
        if unigram is not None and bound >= unigram:
            found.append(
                f"The bound is no better than a unigram model's {number(unigram)}: the codes reconstruct the "
                "text, but the latent model cannot predict them yet, so the speed is not a gain yet."
            )
    accuracy = (report.get("reconstruction") or {}).get("token_accuracy")
    if accuracy is not None:
        found.append(f"The codec alone gives back {percent(accuracy)} of held-out tokens.")
    return found


def commands(inputs: Inputs) -> dict[str, str]:
    """The command that produces each part that may be missing."""
    run = inputs.run_dir
    data = (inputs.config.get("data") or {}).get("directory") or "DATA_DIRECTORY"
    train = "deepspeed launch/train.py --config CONFIG --stage"
    return {
        **{stage: f"{train} {stage}" for stage in STAGES},
        "evaluation": f"python launch/eval.py --model {run / 'model'} --data {data}",
        "speed": f"python launch/benchmark.py inference --model {run / 'model'} --data {data} "
        f"--report {run / 'report.json'}",
    }


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


if __name__ == "__main__":
    sys.exit(main())
