"""What the report asks of a sweep's trials: their figures, intervals, runs and order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launch.report_formats import number

Trial = Mapping[str, Any]
COLLAPSED_NATS = 0.01
"""A level whose codes cost less, each, says nothing of the text: its codec does not count as one."""


def finished(results: Mapping[str, Any], *figures: str) -> list[Trial]:
    """Trials that have all these figures."""
    return [trial for trial in results["trials"] if all(figure in trial["figures"] for figure in figures)]


def mean(trial: Trial, figure: str) -> float:
    """Over the seeds."""
    return float(trial["figures"][figure]["mean"])


def kind(results: Mapping[str, Any], name: str) -> str:
    """Which codec a trial has."""
    return str(next(run["codec"] for run in results["runs"] if run["trial"] == name))


def links(results: Mapping[str, Any], names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The runs of these trials."""
    return tuple((run["trial"], run["directory"]) for run in results["runs"] if run["trial"] in names)


def ends(trial: Trial, figure: str) -> str:
    """The interval, and over what."""
    found = trial["figures"][figure]
    if found["interval"] is None:
        return "none"
    low, high = found["interval"]
    over = f"{found['n']} seeds" if found["interval_over"] == "seeds" else "documents"
    return f"{number(low)} to {number(high)} over {over}"


def certainty(first: Trial, second: Trial) -> str:
    """What may be said of a difference between bounds."""
    a, b = (trial["figures"][bound_of(trial)] for trial in (first, second))
    if min(a["n"], b["n"]) < 2:
        return "one seed: a hint, no more"
    apart = a["interval"][1] < b["interval"][0] or b["interval"][1] < a["interval"][0]
    return f"{min(a['n'], b['n'])} seeds; the intervals " + ("do not overlap" if apart else "overlap: open")


def bound_of(trial: Trial) -> str:
    """Which bound says most of a trial: that of drawn codes, where it was evaluated and is lower."""
    drawn = "stochastic_bound"
    has_drawn = drawn in trial["figures"] and mean(trial, drawn) < mean(trial, "bound")
    return drawn if has_drawn else "bound"


def bits(trial: Trial) -> float:
    """The bound, in bits per byte."""
    return mean(trial, bound_of(trial))


def has_collapsed(run: Mapping[str, Any]) -> bool:
    """Whether a level of a run's codes says nothing: such a bound is unigram's, however low beside other codecs."""
    nats = (run.get("codebook") or {}).get("nats_per_code") or []
    return any(value is not None and value < COLLAPSED_NATS for value in nats)


def collapsed(results: Mapping[str, Any], name: str) -> bool:
    """Whether any seed of a trial has collapsed."""
    return any(has_collapsed(run) for run in results["runs"] if run["trial"] == name)


def learned(results: Mapping[str, Any], names: Sequence[str] = (), codec: str | None = None) -> list[Trial]:
    """Trials with a bound, of these names and this codec where given; the identity codec left out, best first.

    Trials that have collapsed come last, whatever their bound.
    """
    trials = [
        trial
        for trial in finished(results, "bound")
        if (found := kind(results, trial["trial"])) != "identity"
        and codec in (None, found)
        and (not names or trial["trial"] in names)
    ]
    return sorted(trials, key=lambda trial: (collapsed(results, trial["trial"]), bits(trial)))
