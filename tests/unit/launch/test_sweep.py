"""Sweep files, equal compute, and what a trial shares with others; nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.yaml_config import ConfigError
from launch.config import load_config
from launch.experiments import choose, resolve
from launch.matching import match_compute, planned_flops, with_steps
from launch.sweep import PlannedTrial, load_sweep, plan_trials
from launch.trials import TrialRun, link, write_config

ROOT = Path(__file__).parents[3]
NANO = ROOT / "tests" / "integration" / "nano.yaml"
SWEEPS = sorted(
    path
    for path in (ROOT / "configs" / "sweeps").glob("*.yaml")
    if "trials" in yaml.safe_load(path.read_text())
)
IDENTITY = {
    "codec": {"model": "identity", "codebook_levels": None, "codebook_size": None},
    "latent_model": {"depth_input": "code"},
}


def write(directory: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "name": "nano",
        "question": "Which?",
        "base": str(NANO),
        "trials": {
            "rq": {},
            "identity": {"overrides": IDENTITY, "match_compute": "rq"},
            "ar": {"stages": ["base_lm"], "match_compute": "rq"},
        },
    }
    path = directory / "sweep.yaml"
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return path


def planned(directory: Path, *overrides: str, **changes: Any) -> list[PlannedTrial]:
    return plan_trials(load_sweep(write(directory, **changes)), overrides)


def test_there_is_a_sweep_for_every_question() -> None:
    questions = {
        *("headline", "compression", "codebook", "architecture", "backbone", "freezing"),
        *("quantizer", "latent_input", "unsloth", "model_size", "recipes"),
        *("small", "usage", "convolutions", "joint"),
    }
    assert {path.stem for path in SWEEPS} == questions
    assert all(load_sweep(path).name == path.stem for path in SWEEPS)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_trial_is_a_valid_run_of_about_equal_compute(path: Path, tmp_path: Path) -> None:
    """Also as its directory will hold it, stage by stage; the encoding pass is left out, since no data are built."""
    trials = plan_trials(load_sweep(path), [f"run_root={tmp_path}"])
    for trial in trials:
        resolved = resolve(trial, data_is_there=False)
        config = resolved.trial.config
        write_config(config)
        for stage in trial.stages:
            assert load_config(trial.directory / "trial.yaml", stage=stage) == config.for_stage(stage)
        if trial.spec.match_compute is not None:
            assert resolved.ratio == pytest.approx(1, abs=0.005)


def test_the_files_say_how_they_are_run() -> None:
    for path in SWEEPS:
        assert f"python launch/experiments.py --sweep configs/sweeps/{path.name}" in path.read_text()


def test_a_run_configuration_is_no_sweep_and_the_other_way_round(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trials: missing; this looks like the configuration of one run"):
        load_sweep(ROOT / "configs" / "sweeps" / "identity.yaml")
    with pytest.raises(ConfigError, match=r"this is a sweep, not a run; start it with: python launch/exp"):
        load_config(write(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trails": {}}, "trails: unknown key; did you mean trials?"),
        ({"trials": {}}, "trials: dictionary should have at least 1 item"),
        ({"trials": {"a/b": {}}}, "'a/b' is no name of a directory"),
        ({"trials": {"a": {"match_compute": "b"}}}, "trials.a.match_compute: there is no trial b"),
        (
            {"trials": {"a": {}, "b": {"match_compute": "a"}, "c": {"match_compute": "b"}}},
            "trials.c.match_compute: b is matched itself",
        ),
        ({"seeds": [1, 1]}, "seeds: a seed stands twice"),
        ({"trials": {"a": {"overrides": {"codec": {"K": 4}}}}}, "trials.a: codec.K: unknown key"),
        (
            {"trials": {"a": {"stages": ["rq_transformer"]}}},
            "trials.a.stages: rq_transformer needs the codec",
        ),
        (
            {"trials": {"a": {"stages": ["rqvae", "joint"]}}},
            "trials.a.stages: joint trains both models; leave out rqvae and rq_transformer",
        ),
        (
            {"trials": {"a": {"stages": ["joint"], "overrides": IDENTITY}}},
            "trials.a.stages: joint needs codec.model: rqvae",
        ),
        (
            {"trials": {"a": {}, "b": {"overrides": {"data": {"seed": 5}}}}},
            "trials.b.data.directory: the trials a and b build different data in 'overridden'",
        ),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(tmp_path, **changes)
    assert message in str(caught.value)


def test_architecture_files_are_relative_to_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "wide.yaml").write_text("hidden_size: 96\nnum_attention_heads: 3\n")
    overrides = {"codec": {"backbone": {"architecture": "wide.yaml"}}}
    (trial,) = planned(tmp_path, trials={"wide": {"overrides": overrides}})
    assert trial.config.codec.backbone.architecture.hidden_size == 96
    assert trial.config.codec.backbone.architecture.vocab_size == 320  # the base's


def test_seeds_names_and_stages(tmp_path: Path) -> None:
    trials = planned(tmp_path, "run_root=elsewhere", seeds=[3, 5])
    assert [(trial.name, trial.seed) for trial in trials] == [
        (name, seed) for seed in (3, 5) for name in ("rq", "identity", "ar")
    ]
    assert str(trials[4].directory) == "elsewhere/sweeps/nano/identity-seed5"
    assert trials[4].config.seed == 5
    assert [trial.stages for trial in trials[:3]] == [
        ("base_lm", "rqvae", "rq_transformer"),
        ("base_lm", "rq_transformer"),
        ("base_lm",),
    ]
    assert [trial.starts_from_base_lm for trial in trials[:3]] == [True, False, False]
    parts = [choose(trials, [], index, 4) for index in range(4)]
    assert sorted((t.seed, t.name) for part in parts for t in part) == sorted(
        (t.seed, t.name) for t in trials
    )
    with pytest.raises(ValueError, match="--only rqq: there is no such trial"):
        choose(trials, ["rqq"], 0, 1)


def test_compute_is_matched_with_the_base_lm_and_the_encoding_in_it(tmp_path: Path) -> None:
    rq, identity, ar = planned(tmp_path)
    costs = planned_flops(rq, encoded_tokens=40_000)
    assert set(costs) == {"base_lm", "rqvae", "rq_transformer", "encoding"}
    assert costs["encoding"] == pytest.approx(2 * planned_flops(rq, 20_000)["encoding"])
    assert set(planned_flops(identity, 40_000)) == {"rq_transformer", "encoding"}
    assert set(planned_flops(ar, 40_000)) == {"base_lm"}
    # Of the codec's backbones, random ones leave the base LM out of the bill.
    (random,) = planned(tmp_path, trials={"random": {"pretrained_backbone": False}})
    assert set(planned_flops(random, 40_000)) == {"rqvae", "rq_transformer", "encoding"}

    for trial in (identity, ar):
        steps = match_compute(trial, costs, 40_000)
        matched = PlannedTrial(
            trial.name,
            0,
            trial.spec,
            with_steps(trial.config, trial.stages[-1], steps),
            trial.stages,
            trial.shared,
        )
        one_step = sum(planned_flops(trial, 0).values()) / 20
        assert sum(planned_flops(matched, 40_000).values()) == pytest.approx(
            sum(costs.values()), abs=one_step
        )
        assert steps > 20
        # Twice the reference, twice the steps.
        twice = match_compute(trial, {name: 2 * cost for name, cost in costs.items()}, 40_000)
        assert twice == pytest.approx(2 * steps, abs=1)
    # Both models at once, from the base LM: no encoding pass.
    stages = ["base_lm", "joint"]
    (joint,) = planned(tmp_path, "stages.joint.frozen_steps=0", trials={"joint": {"stages": stages}})
    own = planned_flops(joint, 40_000)
    assert set(own) == {"base_lm", "joint"}
    doubled = match_compute(joint, own | {"joint": 2 * own["joint"]}, 40_000)
    assert doubled == 2 * joint.config.for_stage("joint").train.steps
    (phased,) = planned(tmp_path, "stages.joint.frozen_steps=5", trials={"joint": {"stages": stages}})
    with pytest.raises(ValueError, match="the stage joint is not matched, since its phases are steps too"):
        match_compute(phased, costs, 40_000)
    with pytest.raises(ValueError, match=r"leave .* for rq_transformer, or -?\d+ steps"):
        match_compute(rq, {"base_lm": costs["base_lm"]}, 40_000)


def test_what_does_not_matter_to_a_part_does_not_part_it(tmp_path: Path) -> None:
    """Base LMs and codecs are shared between trials exactly where they are the same."""

    def names(changes: dict[str, Any], **more: Any) -> tuple[str, str]:
        (trial,) = planned(tmp_path, trials={"trial": {"overrides": changes, **more}})
        run = TrialRun(trial, 1, ())
        base = run.shared_base()
        backbone = [base.model] if trial.starts_from_base_lm else []
        return base.config.name, run.shared_codec(backbone).config.name

    base, codec = names({})
    assert names({"evaluation": {"max_samples": 3}}) == (base, codec)
    assert names({"stages": {"rq_transformer": {"steps": 9}}, "latent_model": {"depth_layers": 2}}) == (
        base,
        codec,
    )
    other_codec = names({"codec": {"codebook_size": 16}})
    assert other_codec[0] == base and other_codec[1] != codec
    other_base = names({"stages": {"base_lm": {"steps": 30}}})
    assert other_base[0] != base and other_base[1] != codec
    # Without the base LM under it, the codec does not depend on it.
    random = names({}, pretrained_backbone=False)[1]
    assert random == names({"stages": {"base_lm": {"steps": 30}}}, pretrained_backbone=False)[1] != codec
    assert names({"stages": {"rq_transformer": {"stochastic_codes": True}}})[1] != codec


def test_links_are_relative_and_never_take_the_place_of_anything(tmp_path: Path) -> None:
    from launch.trials import TrialError

    (tmp_path / "common" / "model").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    place = tmp_path / "trial" / "model" / "rqvae"
    link(place, tmp_path / "common" / "model")
    assert str(place.readlink()) == "../../common/model"
    link(place, tmp_path / "other")
    assert place.resolve() == tmp_path / "other"
    place.unlink()
    place.mkdir()
    with pytest.raises(TrialError, match="in the way"):
        link(place, tmp_path / "other")
