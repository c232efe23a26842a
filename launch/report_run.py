"""The page of one run, from its report.json and the stages' metrics.jsonl. It needs no network and no scripts.

Whatever was not run is named on it, with the command that runs it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch import report_figures as figures
from launch.config import STAGES
from launch.metrics_log import read_metrics
from launch.report_formats import Page, number, percent, render_page, write_page

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


def write_report(run_dir: Path, out: Path | None = None, pngs: Path | None = None) -> Path:
    """Write the page, and its figures to `pngs`, and return where it is.

    Raises:
        ValueError: the directory holds neither report.json nor any stage's metrics.jsonl.
    """
    return write_page(render(read_inputs(run_dir)), run_dir / "report.html" if out is None else out, pngs)


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


def render(inputs: Inputs) -> Page:
    """The page."""
    report = inputs.report
    codec = report.get("codec") or inputs.config.get("codec") or {}
    speed = report.get("speed") or {}
    samples = report.get("samples") or {}
    levels = (report.get("codebook") or {}).get("levels") or []
    return render_page(
        "report.html.j2",
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
