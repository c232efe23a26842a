"""What a sweep's results.json says of a question, a finder for every kind of question; None where it says nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.report_formats import number, percent
from launch.report_scaling import SERIES, fit_power_law, gaps, series
from launch.report_trials import (
    Trial,
    bits,
    bound_of,
    certainty,
    collapsed,
    ends,
    finished,
    has_collapsed,
    learned,
    links,
    mean,
)

QWEN3_8B = "8B"


@dataclass(frozen=True)
class Answer:
    """A row of the table."""

    question: str
    sweep: str | None
    """Of which the numbers are; None where there are none."""
    answer: str
    number: str = ""
    interval: str = ""
    certainty: str = ""
    links: tuple[tuple[str, str], ...] = ()
    """Trial and its run directory."""
    command: str = ""
    """What would answer it, where nothing does."""


def best_trial(
    text: str, results: Mapping[str, Any], names: Sequence[str], codec: str | None
) -> Answer | None:
    """The trial with the lowest bound, beside the others."""
    trials = learned(results, names, codec)
    if len(trials) < 2:
        return None
    first, second = trials[:2]
    others = "; ".join(
        f"{trial['about']}: {number(bits(trial))}"
        + (" (collapsed: its codes say nothing)" if collapsed(results, trial["trial"]) else "")
        for trial in trials[1:]
    )
    worse = _baselines(first)
    return Answer(
        text,
        results["sweep"],
        f"{first['about']} has the lowest bound. {others}.{worse}",
        f"{number(bits(first))} bits per byte",
        ends(first, bound_of(first)),
        certainty(first, second),
        links(results, [trial["trial"] for trial in trials]),
    )


def _baselines(trial: Trial) -> str:
    told = [
        f"{label} {number(mean(trial, figure))}"
        for figure, label in (
            ("ar_trial", "plain AR of a trial of its own"),
            ("ar", "its base LM"),
            ("identity", "identity codec"),
            ("unigram", "unigram"),
        )
        if figure in trial["figures"]
    ]
    return f" Beside it: {', '.join(told)}." if told else ""


def against_ar(text: str, results: Mapping[str, Any]) -> Answer | None:
    """The best bound over plain AR's bits."""
    trials = [trial for trial in learned(results) if {"ar_trial", "ar"} & set(trial["figures"])]
    if not trials:
        return None
    best = trials[0]
    reference = "ar_trial" if "ar_trial" in best["figures"] else "ar"
    ratio = bits(best) / mean(best, reference)
    return Answer(
        text,
        results["sweep"],
        f"{best['about']}: a bound of {number(bits(best))} bits per byte, {number(ratio)} times plain AR's "
        f"{number(mean(best, reference))}.{_baselines(best)}",
        f"{number(ratio)} x",
        ends(best, "bound_over_ar") if "bound_over_ar" in best["figures"] else "none",
        f"{best['figures'][bound_of(best)]['n']} seed(s); the bound is one from above",
        links(results, [best["trial"]]),
    )


def race(text: str, results: Mapping[str, Any]) -> Answer | None:
    """Bits over plain AR's and speed over its lean loop, of every trial; of those that are faster the best first."""
    trials = finished(results, "bound_over_ar", "speedup_over_lean_loop")
    if not trials:
        return None

    def told(trial: Trial) -> str:
        ratio, speed = trial["figures"]["bound_over_ar"], trial["figures"]["speedup_over_lean_loop"]
        return f"{number(ratio['mean'])} times plain AR's bits at {number(speed['mean'])} times its speed"

    trials.sort(key=lambda t: (mean(t, "speedup_over_lean_loop") <= 1, mean(t, "bound_over_ar")))
    first = trials[0]
    return Answer(
        text,
        results["sweep"],
        "; ".join(f"{trial['about']}: {told(trial)}" for trial in trials) + ".",
        f"{number(mean(first, 'bound_over_ar'))} x bits, {number(mean(first, 'speedup_over_lean_loop'))} x speed",
        ends(first, "bound_over_ar"),
        f"{first['figures']['bound_over_ar']['n']} seed(s); speeds over a lean loop, of the machine at the time",
        links(results, [trial["trial"] for trial in trials]),
    )


def by_compression(text: str, results: Mapping[str, Any]) -> Answer | None:
    """Bound and speed-up, trial by trial: over the lean loop, the fastest plain decoding, where that was measured."""
    figure, over = "speedup_over_lean_loop", "a lean loop of the base LM"
    trials = finished(results, "bound", figure)
    if not trials:
        figure, over = "speedup", "transformers' generate"
        trials = finished(results, "bound", figure)
    if not trials:
        return None
    rows = "; ".join(
        f"{trial['about']}: {number(bits(trial))} at {number(mean(trial, figure))}x" for trial in trials
    )
    fastest = max(trials, key=lambda trial: mean(trial, figure))
    return Answer(
        text,
        results["sweep"],
        f"Bound in bits per byte, and speed-up over {over}: {rows}.",
        f"{number(mean(fastest, figure))} x at most",
        ends(fastest, figure),
        "speeds are those of the machine that the trials ran on, at the time",
        links(results, [trial["trial"] for trial in trials]),
    )


def usage(text: str, results: Mapping[str, Any]) -> Answer | None:
    """Share of codes used by level, of the first trial with codebooks of its own."""
    run = next((r for r in results["runs"] if r["codec"] == "rqvae" and _shares(r)), None)
    if run is None:
        return None
    shares = _shares(run)
    return Answer(
        text,
        results["sweep"],
        f"{run['trial']}, by level: {', '.join(percent(share) for share in shares)} of the codes.",
        percent(min(shares)),
        "none",
        "counted on the evaluated split, one seed",
        ((run["trial"], run["directory"]),),
    )


def _shares(run: Mapping[str, Any]) -> list[float]:
    return [share for share in (run.get("codebook") or {}).get("used_fraction") or [] if share is not None]


def uniformity(text: str, results: Mapping[str, Any]) -> Answer | None:
    """Usage beside bound, of the trials that have not collapsed."""
    rows = []
    for run in results["runs"]:
        if has_collapsed(run):
            continue
        shares = [v for v in (run.get("codebook") or {}).get("perplexity_normalized") or [] if v is not None]
        if run["codec"] == "rqvae" and shares and "bound" in run["figures"]:
            rows.append((sum(shares) / len(shares), float(run["figures"]["bound"]), run))
    if len(rows) < 2:
        return None
    rows.sort(key=lambda row: row[0])
    told = "; ".join(f"{row[2]['trial']} {percent(row[0])}: {number(row[1])}" for row in rows)
    is_best = max(rows, key=lambda row: row[0])[1] == min(row[1] for row in rows)
    return Answer(
        text,
        results["sweep"],
        f"Codebook perplexity over its maximum, and the bound: {told}. The most uniform is "
        f"{'also' if is_best else 'not'} the most predictable.",
        "",
        "none",
        f"{len(rows)} trials, one codec family",
        tuple((row[2]["trial"], row[2]["directory"]) for row in rows),
    )


def unquantized(text: str, results: Mapping[str, Any]) -> Answer | None:
    """Tokens right given latents that are not quantized, beside what is right given their codes."""
    trials = finished(results, "continuous_accuracy", "token_accuracy")
    if not trials:
        return None
    told = "; ".join(
        f"{trial['about']}: {percent(mean(trial, 'continuous_accuracy'))} of the tokens right, "
        f"{percent(mean(trial, 'token_accuracy'))} at {number(mean(trial, 'codes_bits_per_token'))} bits per token"
        for trial in trials
    )
    lost = [1 - mean(trial, "continuous_accuracy") for trial in trials]
    return Answer(
        text,
        results["sweep"],
        f"Not quantized, and by their codes: {told}.",
        f"{percent(min(lost))} to {percent(max(lost))} lost",
        "none",
        f"{trials[0]['figures']['continuous_accuracy']['n']} seed(s); of one length of training",
        links(results, [trial["trial"] for trial in trials]),
    )


def unsloth(text: str, results: Mapping[str, Any]) -> Answer | None:
    """Open where there is no GPU."""
    trial = next((trial for trial in results["trials"] if trial["trial"] == "with"), None)
    if trial is None or not trial["reasons"]:
        return None
    return Answer(text, results["sweep"], trial["reasons"][0].splitlines()[0], certainty="open")


def closing(text: str, results: Mapping[str, Any]) -> Answer | None:
    """Bound over AR along training, by size."""
    by_size = gaps(results["runs"])
    if not by_size:
        return None
    rows = "; ".join(
        f"{size / 1e6:.2g} million weights: {', '.join(number(ratio) for _, ratio in places)}"
        for size, places in by_size.items()
    )
    last = {size: places[-1][1] for size, places in by_size.items()}
    return Answer(
        text,
        results["sweep"],
        f"Bound over plain AR's bits at equal compute, from the shortest training to the longest: {rows}.",
        f"{number(last[min(last)])} to {number(last[max(last)])}",
        "none",
        "one seed; smallest to largest size, trained longest",
        links(results, [trial["trial"] for trial in learned(results)]),
    )


def extrapolated(text: str, results: Mapping[str, Any], sizes: Mapping[str, float]) -> Answer | None:
    """Power laws at the largest size."""
    target = next((name for name in sizes if QWEN3_8B in name), None)
    told, first = [], ""
    for name, codec, figure, _ in SERIES:
        points = series(results["runs"], codec, figure)
        law = fit_power_law(*zip(*points, strict=True)) if len(points) > 2 else None
        if law is None or target is None:
            continue
        value = number(law(sizes[target]))
        first = first or value
        told.append(f"{name} {value} (fitted to {len(points)} sizes, exponent {number(law.exponent)})")
    if not told:
        return None
    return Answer(
        text,
        results["sweep"],
        f"Extrapolated in bits per byte, at the training length of these trials: {'; '.join(told)}.",
        f"{first} (extrapolation)",
        "none",
        "very uncertain: orders of magnitude beyond the data",
        links(results, [trial["trial"] for trial in results["trials"]]),
    )
