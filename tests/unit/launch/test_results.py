"""The table of a sweep: figures, intervals, and what it says of trials that have none."""

from __future__ import annotations

import csv
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from launch.results import collect, interval, write_results
from launch.sweep import PlannedTrial, Sweep, load_sweep, plan_trials
from launch.trial_records import write_record
from tests.unit.launch.test_sweep import write


def report(bound: float, is_identity: bool = False) -> dict[str, Any]:
    bits = {"latent_bound": bound, "base_lm": 2.5, "unigram": 4.0, "uniform": 5.0}
    return {
        "bits_per_byte": bits if is_identity else {**bits, "zero_rate": 4.5},
        "bits_per_byte_intervals": {"latent_bound": [bound - 0.1, bound + 0.2]},
        "brier_lm": {"latent": 1.5, "base_lm": 2.0, "intervals": {"latent": [1.0, 2.0]}},
        "speed": {"latent_tokens_per_s": 200.0, "ar_tokens_per_s": 100.0, "speedup": 2.0},
        "compute": {"total_latent": {"train_tokens": 1000, "train_flops": 2e12, "wall_s": 60.0}},
        "codebook": {"levels": [{"used_fraction": 0.5}, {"used_fraction": 1.0}]},
    }


def prepared(tmp_path: Path, seeds: list[int]) -> tuple[Sweep, list[PlannedTrial]]:
    sweep = load_sweep(write(tmp_path, seeds=seeds))
    return sweep, plan_trials(sweep, [f"run_root={tmp_path}"])


def finish(trial: PlannedTrial, values: dict[str, Any]) -> None:
    write_record(trial, {"state": "finished", "steps": {"rq_transformer": 20}, "compute_ratio": None})
    (trial.directory / "report.json").write_text(json.dumps(values))


def test_interval_over_seeds_is_students(tmp_path: Path) -> None:
    values = [3.0, 3.2, 3.7]
    found = interval(values)
    half = 4.303 * statistics.stdev(values) / math.sqrt(3)
    assert found["interval"] == pytest.approx([3.3 - half, 3.3 + half])
    assert (found["min"], found["max"], found["n"], found["interval_over"]) == (3.0, 3.7, 3, "seeds")
    assert interval([3.0], [2.9, 3.1]) == {
        "mean": 3.0, "min": 3.0, "max": 3.0, "n": 1, "interval": [2.9, 3.1], "interval_over": "documents",
    }  # fmt: skip
    assert interval([3.0])["interval"] is None


def test_students_t_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for n in (2, 5, 31):
        low, high = interval([0.0] * (n - 1) + [1.0])["interval"]
        values = [0.0] * (n - 1) + [1.0]
        expected = stats.t.interval(0.95, n - 1, statistics.fmean(values), stats.sem(values))
        assert (low, high) == pytest.approx(expected, rel=1e-3)


def test_three_files_say_the_same(tmp_path: Path) -> None:
    sweep, trials = prepared(tmp_path, [0, 1])
    rq0, identity0, ar0, rq1, _, _ = trials
    finish(rq0, report(3.0))
    finish(rq1, report(3.4))
    finish(identity0, report(2.8, is_identity=True))
    write_record(
        ar0, {"state": "failed", "reason": "train-base_lm ended with status 1: ValueError: no | space"}
    )
    results = write_results(sweep, trials, tmp_path / "out")
    assert json.loads((tmp_path / "out/results.json").read_text()) == results

    rq, identity, ar = results["trials"]
    bound = rq["figures"]["bound"]
    assert (bound["mean"], bound["n"], bound["interval_over"]) == (pytest.approx(3.2), 2, "seeds")
    assert bound["interval"][0] == pytest.approx(3.2 - 12.706 * 0.2, abs=1e-3)
    # The identity codec's figure is its own trial's of the same seed; seed 1 has none.
    assert rq["figures"]["identity"]["n"] == 1
    assert rq["figures"]["identity"]["mean"] == 2.8
    assert results["runs"][0]["from_trials"] == {"identity": "identity"}
    assert identity["figures"]["bound"]["interval"] == [pytest.approx(2.7), 3.0]
    assert (identity["state"], identity["finished"], identity["runs"]) == ("not run", 1, 2)
    assert (ar["state"], ar["figures"]) == ("failed", {})

    rows = list(csv.DictReader((tmp_path / "out/results.csv").open()))
    assert [(row["trial"], row["seed"], row["bound"]) for row in rows[:2]] == [
        ("rq", "0", "3.0"),
        ("identity", "0", "2.8"),
    ]
    table = (tmp_path / "out/results.md").read_text()
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1  # the reason's bar has not made a column
    assert "| rq | 2 of 2 | 3.200 (0.659 to 5.741) | – | 2.500 (2.500 to 2.500) | – | – | 2.800 |" in table
    assert "ar **failed**: train-base_lm ended with status 1" in table
    assert "Student" in table and "bootstrap" in table


def test_the_ratio_to_plain_ar_is_that_of_the_same_seed(tmp_path: Path) -> None:
    sweep, trials = prepared(tmp_path, [0, 1])
    for trial, bound in zip(trials, (3.0, 2.8, 0.0, 3.6, 2.9, 0.0), strict=True):
        values = report(bound)
        if trial.name == "ar":
            values = {"bits_per_byte": {"base_lm": 2.0 + trial.seed}}
        finish(trial, values)
    rq, identity, ar = collect(sweep, trials)["trials"]
    assert rq["figures"]["bound_over_ar"]["mean"] == pytest.approx((3.0 / 2 + 3.6 / 3) / 2)
    assert identity["figures"]["bound_over_ar"]["n"] == 2
    assert "bound_over_ar" not in ar["figures"]


def test_plain_ar_of_another_size_or_compute_is_no_baseline(tmp_path: Path) -> None:
    sweep, trials = prepared(tmp_path, [0])
    rq, identity, ar = trials
    finish(ar, {"bits_per_byte": {"base_lm": 2.0}})
    for trial, flops in ((rq, 100.0), (identity, 110.0), (ar, 100.5)):
        values = json.loads((trial.directory / "trial.json").read_text()) if trial is ar else {}
        if trial is not ar:
            finish(trial, report(3.0))
            values = json.loads((trial.directory / "trial.json").read_text())
        write_record(trial, values | {"planned_flops": {"all": flops}})
    runs = {run["trial"]: run for run in collect(sweep, trials)["runs"]}
    assert runs["rq"]["figures"]["bound_over_ar"] == 1.5
    assert "ar_trial" not in runs["identity"]["figures"]


def test_a_table_says_that_programs_differ(tmp_path: Path) -> None:
    sweep, trials = prepared(tmp_path, [0])
    for trial, commit in zip(trials, ("a" * 40, "b" * 40, "b" * 40), strict=True):
        finish(trial, report(3.0) | {"environment": {"commit": commit, "dirty": trial.name == "ar"}})
    results = write_results(sweep, trials, tmp_path / "out")
    assert [run["commit"] for run in results["runs"]] == ["a" * 9, "b" * 9, "b" * 9 + "+"]
    told = (tmp_path / "out/results.md").read_text()
    assert "**Measured by programs of different commits**" in told and "`aaaaaaaaa`: rq (seed 0);" in told
    for trial in trials:
        finish(trial, report(3.0) | {"environment": {"commit": "a" * 40, "dirty": False}})
    write_results(sweep, trials, tmp_path / "out")
    assert "different commits" not in (tmp_path / "out/results.md").read_text()


def test_a_trial_matched_to_another_that_has_changed_was_not_run(tmp_path: Path) -> None:
    sweep, trials = prepared(tmp_path, [0])
    for trial in trials:
        finish(trial, report(3.0))
    longer = sweep.trials["rq"].model_copy(update={"overrides": {"stages": {"rqvae": {"steps": 40}}}})
    changed = sweep.model_copy(update={"trials": {**sweep.trials, "rq": longer}})
    rows = collect(changed, plan_trials(changed, [f"run_root={tmp_path}"]))["trials"]
    assert [row["state"] for row in rows] == ["not run"] * 3


def test_figures_of_an_earlier_try_are_not_shown(tmp_path: Path) -> None:
    sweep, trials = prepared(tmp_path, [0])
    finish(trials[0], report(3.0))
    write_record(trials[0], {"state": "failed", "reason": "stopped"})
    assert collect(sweep, trials)["trials"][0]["figures"] == {}


def test_a_trial_of_plain_ar_has_no_figures_of_a_codec(tmp_path: Path) -> None:
    """It is evaluated with the identity codec, whose figures are not its own."""
    sweep, trials = prepared(tmp_path, [0])
    values = report(3.0)
    values["bits_per_byte"] = {"base_lm": 2.5, "latent_reconstruction": 0.0}
    values |= {"rate": {"codes_bits_per_token": 8.3}, "compute": {"total_base_lm": {"train_flops": 1e12}}}
    finish(trials[2], {name: part for name, part in values.items() if name not in ("brier_lm", "speed")})
    run = collect(sweep, trials)["runs"][2]
    assert run["figures"] == {"ar": 2.5, "ar_trial": 2.5, "train_flops": 1e12}
    assert run["codec"] is None and not any(run["codebook"].values())


def test_figures_of_other_settings_are_not_shown(tmp_path: Path) -> None:
    sweep, trials = prepared(tmp_path, [0])
    finish(trials[0], report(3.0))
    assert collect(sweep, trials)["trials"][0]["state"] == "finished"
    changed = plan_trials(sweep, [f"run_root={tmp_path}", "codec.codebook_dim=4"])
    row = collect(sweep, changed)["trials"][0]
    assert (row["state"], row["reasons"]) == ("not run", ["its settings have changed since it was run"])
