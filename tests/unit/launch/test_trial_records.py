"""A trial that stands in two sweeps is run once, and its figures are shown only while they are its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from launch.matching import with_steps
from launch.results import collect
from launch.sweep import PlannedTrial, Sweep, load_sweep, plan_trials
from launch.trial_records import content_hash, find_twin, read_record, write_record
from tests.unit.launch.test_results import report
from tests.unit.launch.test_sweep import IDENTITY, write


def sweep_named(tmp_path: Path, name: str, rq: str = "rq") -> tuple[Sweep, list[PlannedTrial]]:
    (tmp_path / name).mkdir(exist_ok=True)
    trials = {rq: {}, "tokens": {"overrides": IDENTITY}, "ar": {"stages": ["base_lm"]}}
    sweep = load_sweep(write(tmp_path / name, name=name, trials=trials))
    return sweep, plan_trials(sweep, [f"run_root={tmp_path}"])


def content(trial: PlannedTrial) -> str:
    return content_hash(trial, ["evaluate"], 1)


def finish(trial: PlannedTrial, bound: float) -> None:
    write_record(trial, {"state": "finished", "content": content(trial), "wall_s": 3.0})
    (trial.directory / "report.json").write_text(json.dumps(report(bound)))


def test_the_same_trial_is_found_under_any_name_and_shown(tmp_path: Path) -> None:
    _, first = sweep_named(tmp_path, "first")
    sweep, second = sweep_named(tmp_path, "second", rq="other")
    assert find_twin(second[0], content(second[0])) is None
    finish(first[0], 3.0)
    directory, record = find_twin(second[0], content(second[0])) or (Path(), {})
    assert (directory, record["wall_s"]) == (first[0].directory, 3.0)
    assert find_twin(second[1], content(second[1])) is None
    # What has been run itself stays.
    assert find_twin(first[0], content(first[0])) is None

    write_record(second[0], {"state": "finished", "content": content(second[0]), "same_as": str(directory)})
    run = collect(sweep, second)["runs"][0]
    assert (run["state"], run["directory"], run["figures"]["bound"]) == ("finished", str(directory), 3.0)
    # A copy is no original.
    assert find_twin(replace(second[0], name="third"), content(second[0])) is not None
    third = sweep_named(tmp_path, "third")[1]
    assert (find_twin(third[0], content(third[0])) or [None])[0] == directory

    # The other has been run again, with other settings.
    write_record(first[0], {"state": "finished", "content": "another", "wall_s": 3.0})
    assert collect(sweep, second)["trials"][0]["reasons"] == [
        f"its figures were those of {directory}, which is another trial now"
    ]
    write_record(first[0], {"state": "running", "content": content(first[0])})
    assert read_record(second[0])["state"] == "not run"


def test_what_tells_trials_apart(tmp_path: Path) -> None:
    rq, tokens, ar = sweep_named(tmp_path, "first")[1]
    assert len({content(trial) for trial in (rq, tokens, ar)}) == 3
    longer = replace(rq, config=with_steps(rq.config, "rq_transformer", 99))
    assert content(longer) != content(rq)
    assert content_hash(rq, ["evaluate", "benchmark"], 1) != content_hash(rq, ["evaluate"], 1)
    assert content_hash(rq, ["evaluate"], 2) != content(rq)
    assert content(replace(rq, config=rq.config.model_copy(update={"seed": 5}))) != content(rq)
    from_random = replace(rq, spec=rq.spec.model_copy(update={"pretrained_backbone": False}))
    assert content(from_random) != content(rq)
    # Plain AR does not depend on what codec or latent model its sweep has.
    latent = rq.config.latent_model.model_copy(update={"spatial_layers": 7})
    assert content(replace(ar, config=ar.config.model_copy(update={"latent_model": latent}))) == content(ar)
    other_codec = replace(ar, config=ar.config.model_copy(update={"codec": tokens.config.codec}))
    assert content(other_codec) == content(ar)
