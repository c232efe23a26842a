"""The table of a sweep: figures of every trial, over its seeds, with intervals. Free of torch.

results.json holds everything, results.csv a line per trial and seed, results.md the table for reading. An interval is
Student's t over the seeds where there are several, else the evaluation's bootstrap over documents where it has one;
each says which, and of how many.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch import flops
from launch.report_data import read_report
from launch.steps import REPOSITORY
from launch.sweep import PlannedTrial, Sweep
from launch.trial_records import read_record
from rqvae.config import ArchitectureConfig

FIGURES: dict[str, tuple[str, ...]] = {
    "bound": ("bits_per_byte", "latent_bound"),
    "bound_codes": ("bits_per_byte", "latent_codes"),
    "bound_tokens": ("bits_per_byte", "latent_reconstruction"),
    "bound_calibrated": ("bits_per_byte", "latent_bound_calibrated"),
    "stochastic_bound": ("bits_per_byte", "stochastic_bound"),
    "ar": ("bits_per_byte", "base_lm"),
    "ar_trial": ("bits_per_byte", "-"),
    "identity": ("bits_per_byte", "identity_codec"),
    "unigram": ("bits_per_byte", "unigram"),
    "uniform": ("bits_per_byte", "uniform"),
    "zero_rate": ("bits_per_byte", "zero_rate"),
    "brier_lm": ("brier_lm", "latent"),
    "brier_lm_ar": ("brier_lm", "base_lm"),
    "bound_over_ar": ("-",),
    "samples_perplexity": ("sample_quality", "latent", "base_lm_perplexity"),
    "samples_perplexity_ar": ("sample_quality", "base_lm", "base_lm_perplexity"),
    "token_accuracy": ("reconstruction", "token_accuracy"),
    "continuous_accuracy": ("reconstruction", "continuous_token_accuracy"),
    "codes_bits_per_token": ("rate", "codes_bits_per_token"),
    "tokens_per_s": ("speed", "latent_tokens_per_s"),
    "ar_tokens_per_s": ("speed", "ar_tokens_per_s"),
    "speedup": ("speed", "speedup"),
    "speedup_over_lean_loop": ("speed", "speedup_over_lean_loop"),
}
"""Figures by name, and where report.json has them; `ar_trial`, `bound_over_ar` and, mostly, `identity` take other
trials as well."""
INTERVALS = {
    name: ("bits_per_byte_intervals", path[1]) for name, path in FIGURES.items() if path[0] == "bits_per_byte"
} | {"brier_lm": ("brier_lm", "intervals", "latent"), "brier_lm_ar": ("brier_lm", "intervals", "base_lm")}
SAME_COMPUTE = 0.01
"""Share by which the training FLOPs of two trials of equal compute may differ."""
LEVELS = ("perplexity_normalized", "used_fraction", "nats_per_code", "distortion", "token_accuracy")
"""What is kept of every codebook level."""
COMPUTE = ("train_tokens", "train_flops", "wall_s")
TABLE = {
    "bound": "bound",
    "stochastic_bound": "bound, codes drawn",
    "ar": "AR",
    "ar_trial": "AR, its own trial",
    "bound_over_ar": "bound over that",
    "identity": "identity",
    "unigram": "unigram",
    "uniform": "uniform",
    "zero_rate": "zero rate",
    "brier_lm": "BrierLM",
    "brier_lm_ar": "BrierLM, AR",
    "samples_perplexity": "perplexity of samples under AR",
    "samples_perplexity_ar": "of AR's own",
    "token_accuracy": "tokens right",
    "continuous_accuracy": "not quantized",
    "tokens_per_s": "tokens/s",
    "speedup": "over `generate`",
    "speedup_over_lean_loop": "over a lean loop",
    "train_tokens": "tokens",
    "train_flops": "FLOPs",
    "wall_s": "training, s",
}
"""Columns of results.md."""
# Two-sided 95 % points of Student's t by degrees of freedom, 1 to 30.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def write_results(sweep: Sweep, trials: Sequence[PlannedTrial], directory: Path) -> dict[str, Any]:
    """Write the three files, and return what results.json holds."""
    results = collect(sweep, trials)
    path = REPOSITORY / directory
    path.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("results.json", json.dumps(results, indent=2, allow_nan=False) + "\n"),
        ("results.csv", as_csv(results)),
        ("results.md", as_markdown(results)),
    ):
        temporary = path / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path / name)
    return results


def collect(sweep: Sweep, trials: Sequence[PlannedTrial]) -> dict[str, Any]:
    """Figures of every run, and of every trial over its seeds, from what is on the disk."""
    runs = [run_figures(trial) for trial in trials]
    fill_in_others(runs)
    return {
        "sweep": sweep.name,
        "question": sweep.question,
        "seeds": list(sweep.seeds),
        "trials": [
            summary(name, trial.about, [run for run in runs if run["trial"] == name])
            for name, trial in sweep.trials.items()
        ],
        "runs": runs,
    }


def run_figures(trial: PlannedTrial) -> dict[str, Any]:
    """One trial with one seed."""
    record, codec = read_record(trial), trial.config.codec
    is_ar = trial.stages == ("base_lm",)
    run: dict[str, Any] = {
        "trial": trial.name,
        "seed": trial.seed,
        "directory": record.get("same_as", str(trial.directory)),
        "state": record["state"],
        "reason": record.get("reason", ""),
        "codec": None if is_ar else codec.model,
        "compression_factor": None if is_ar else codec.compression_factor,
        "codebook_levels": None if is_ar else codec.codebook_levels,
        "codebook_sizes": [] if is_ar else list(codec.codebook_sizes),
        "stages": list(trial.stages),
        "steps": record.get("steps", {}),
        "matched_to": trial.spec.match_compute,
        "backbone_parameters": backbone_parameters(codec.backbone.architecture),
        "compute_ratio": record.get("compute_ratio"),
        "planned_flops": record.get("planned_flops", {}),
        "figures": {},
        "from_trials": {},
        "document_intervals": {},
    }
    if record["state"] != "finished":
        return run  # a report of an earlier configuration is not this trial's
    report = read_report(REPOSITORY / run["directory"] / "report.json")
    if not is_ar:
        return run | figures_of(report)
    # The identity codec that it is evaluated with has nothing to say here.
    found = figures_of(report, "total_base_lm")
    for name in ("token_accuracy", "codes_bits_per_token", "bound_tokens"):
        found["figures"].pop(name, None)
    return run | found | {"codebook": {key: [] for key in LEVELS}}


def programs(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of the trials that have run, by the commit of the program that measured them."""
    found: dict[str, list[str]] = {}
    for run in results["runs"]:
        if run.get("commit"):
            found.setdefault(run["commit"], []).append(f"{run['trial']} (seed {run['seed']})")
    return found


def figures_of(report: Mapping[str, Any], total: str = "total_latent") -> dict[str, Any]:
    """What a run's part of results.json takes from its report.json.

    Args:
        total: key of `compute` for all that its model stands on.
    """
    figures = {name: look_up(report, path) for name, path in FIGURES.items()}
    figures |= {name: look_up(report, ("compute", total, name)) for name in COMPUTE}
    intervals = {name: look_up(report, path) for name, path in INTERVALS.items()}
    levels = (report.get("codebook") or {}).get("levels") or []
    return {
        "figures": {name: value for name, value in figures.items() if value is not None},
        "commit": commit_of(report),
        "document_intervals": {name: ends for name, ends in intervals.items() if ends is not None},
        "codebook": {key: [level.get(key) for level in levels] for key in LEVELS},
        "speed_rows": [
            {key: row.get(key) for key in ("name", "tokens_per_s", "speedup_over_generate")}
            for row in (report.get("speed") or {}).get("rows") or []
        ],
    }


def commit_of(report: Mapping[str, Any]) -> str | None:
    """Of the program that wrote a report, with `+` behind it where files had been changed."""
    environment = report.get("environment") or {}
    commit = environment.get("commit")
    return f"{commit[:9]}{'+' if environment.get('dirty') else ''}" if commit else None


def backbone_parameters(architecture: ArchitectureConfig) -> int:
    """Weights of the backbone's layers, embeddings and norms left out (as in Kaplan 2020)."""
    return round(flops.backbone(architecture, 0) / 2)


def look_up(values: Any, path: Sequence[str]) -> Any:
    """What stands at `path`, None if nothing does."""
    for name in path:
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def fill_in_others(runs: Sequence[dict[str, Any]]) -> None:
    """Figures of the sweep's baselines beside every trial of the same seed: the identity codec's of the same
    compression, and those of plain AR of the same size, trained by itself for as many FLOPs. `from_trials` says
    which; where there is none, there is no figure."""
    identity = [run for run in runs if run["codec"] == "identity" and "bound" in run["figures"]]
    plain = [run for run in runs if run["stages"] == ["base_lm"] and "ar" in run["figures"]]
    for run in runs:
        if not run["figures"]:
            continue
        for name, figure, candidates, fits in (
            ("identity", "bound", identity, _same_compression),
            ("ar_trial", "ar", plain, _same_size_and_compute),
        ):
            other = next((o for o in candidates if o["seed"] == run["seed"] and fits(o, run)), None)
            if other is not None and name not in run["figures"]:
                run["figures"][name] = other["figures"][figure]
                run["from_trials"][name] = other["trial"]
        bounds = [run["figures"][name] for name in ("bound", "stochastic_bound") if name in run["figures"]]
        if bounds and "ar_trial" in run["figures"]:
            run["figures"]["bound_over_ar"] = min(bounds) / run["figures"]["ar_trial"]


def _same_compression(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return bool(one["compression_factor"] == other["compression_factor"])


def _same_size_and_compute(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    flops_of = [sum(run["planned_flops"].values()) for run in (one, other)]
    same_size = one["backbone_parameters"] == other["backbone_parameters"]
    return same_size and math.isclose(*flops_of, rel_tol=SAME_COMPUTE)


def summary(name: str, about: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A trial over its seeds."""
    finished = [run for run in runs if run["state"] == "finished"]
    names = [figure for figure in (*FIGURES, *COMPUTE) if any(figure in run["figures"] for run in finished)]
    figures = {}
    for figure in names:
        having = [run for run in finished if figure in run["figures"]]
        ends = having[0]["document_intervals"].get(figure) if len(having) == 1 else None
        figures[figure] = interval([run["figures"][figure] for run in having], ends)
    states = [run["state"] for run in runs]
    return {
        "trial": name,
        "about": about or name,
        "state": "finished" if len(finished) == len(runs) else next(s for s in states if s != "finished"),
        "finished": len(finished),
        "runs": len(runs),
        "reasons": sorted({str(run["reason"]) for run in runs if run["reason"]}),
        "figures": figures,
    }


def interval(values: Sequence[float], documents: Sequence[float] | None = None) -> dict[str, Any]:
    """Mean, range and 95 % interval of a figure over seeds.

    Args:
        values: by seed, at least one and at most 31.
        documents: of a single seed, its interval over documents.

    Returns:
        `mean`, `min`, `max`, `n` (seeds), `interval` [low, high] or None, and `interval_over`: "seeds", "documents"
        or None.
    """
    mean, n = statistics.fmean(values), len(values)
    found: dict[str, Any] = {"mean": mean, "min": min(values), "max": max(values), "n": n}
    if n > 1:
        half = _T95[n - 2] * statistics.stdev(values) / math.sqrt(n)
        return found | {"interval": [mean - half, mean + half], "interval_over": "seeds"}
    return found | {
        "interval": None if documents is None else list(documents),
        "interval_over": None if documents is None else "documents",
    }


def as_csv(results: Mapping[str, Any]) -> str:
    """A line per trial and seed."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = [*FIGURES, *COMPUTE]
    about = (
        "trial",
        "seed",
        "state",
        "compression_factor",
        "codebook_levels",
        "compute_ratio",
        "commit",
        "directory",
    )
    writer.writerow([*about, *names])
    for run in results["runs"]:
        writer.writerow(
            [*(run.get(key, "") for key in about), *(run["figures"].get(name, "") for name in names)]
        )
    return buffer.getvalue()


def as_markdown(results: Mapping[str, Any]) -> str:
    """The table: means with their intervals in parentheses; a trial that has no figures says why."""
    rows = [["trial", "n", *TABLE.values()], ["---", "---", *("---:" for _ in TABLE)]]
    for trial in results["trials"]:
        row = [trial["about"].replace("|", "/"), f"{trial['finished']} of {trial['runs']}"]
        row += [cell(name, trial["figures"].get(name)) for name in TABLE]
        if trial["state"] != "finished":
            reason = trial["reasons"][0].splitlines()[0].replace("|", "/") if trial["reasons"] else ""
            row[0] += f" **{trial['state']}**" + (f": {reason}" if reason else "")
        rows.append(row)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    over = sorted({f["interval_over"] for t in results["trials"] for f in t["figures"].values()} - {None})
    notes = {
        "seeds": "95 % intervals (Student's t) over n seeds in parentheses.",
        "documents": "One seed: 95 % intervals over the test documents in parentheses (bootstrap).",
    }
    told = " ".join(notes[kind] for kind in over)
    note = f"Bits per byte, lower is better; `bound` is an upper bound. {told}".rstrip()
    by_program = programs(results)
    if len(by_program) > 1:
        each = "; ".join(f"`{commit}`: {', '.join(trials)}" for commit, trials in by_program.items())
        note += f"\n\n**Measured by programs of different commits**, which may not do the same: {each}."
    return "\n\n".join([f"# {results['sweep']}", results["question"], note, "\n".join(lines)]) + "\n"


def cell(name: str, figure: Mapping[str, Any] | None) -> str:
    """A figure with its interval."""
    if figure is None:
        return "–"
    digits = {"train_tokens": "{:.3g}", "train_flops": "{:.3g}", "wall_s": "{:.0f}", "tokens_per_s": "{:.0f}"}
    digits |= dict.fromkeys(("samples_perplexity", "samples_perplexity_ar"), "{:.0f}")
    digits |= dict.fromkeys(("speedup", "speedup_over_lean_loop", "brier_lm", "brier_lm_ar"), "{:.2f}")
    form = digits.get(name, "{:.3f}")
    text = form.format(figure["mean"])
    if figure["interval"] is not None and name not in COMPUTE:
        text += f" ({form.format(figure['interval'][0])} to {form.format(figure['interval'][1])})"
    return text
