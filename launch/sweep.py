"""A sweep: one question, and the trials that answer it. Typed and strict; free of torch.

    sweep = load_sweep("configs/sweeps/compression.yaml")
    trials = plan_trials(sweep)        # every trial with every seed, as a run configuration

A sweep file stands beside run configurations and is told from them by its key `trials`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline.yaml_config import ConfigError, merge, read_yaml, validate
from launch.chain import may_start_from_base_lm
from launch.config import RunConfig, compose_config, inline_architectures, read_config_file
from launch.steps import as_text
from rqvae.config import StrictModel

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
TrainedStage = Literal["base_lm", "rqvae", "rq_transformer", "joint"]
Measure = Literal["evaluate", "benchmark", "report"]


class Trial(StrictModel):
    """One row of the sweep's table."""

    about: str = ""
    """What it is, for the table; empty takes the trial's name."""
    overrides: dict[str, Any] = {}  # noqa: RUF012
    """Settings over the sweep's, nested as in a run configuration."""
    stages: tuple[TrainedStage, ...] | None = None
    """Stages that are trained; null takes the sweep's. [base_lm] alone makes a row of the plain AR model. The codec's
    stage is left out by itself with `codec.model: identity`. joint stands in place of rqvae and rq_transformer."""
    pretrained_backbone: bool = True
    """The codec's backbones start from the base LM that is trained for the trial, which then counts in its compute;
    false: from random weights. No effect where `codec.backbone.pretrained` names another, or anchors have
    `codec.backbone.decoder: random`."""
    match_compute: str | None = None
    """A trial without match_compute. The steps of this trial's last stage are set so that its whole training takes as
    many FLOPs: base LM where the backbones start from it, codec, encoding, latent model."""
    not_run: str = ""
    """Why the trial cannot be run, if so; its row then says it."""


class Sweep(StrictModel):
    """One question. Paths are relative to the file."""

    name: str = Field(pattern=_NAME)
    """Names the directory of its results, `RUN_ROOT/sweeps/NAME`."""
    question: str = Field(min_length=1)
    """What the table answers."""
    base: str
    """Run configuration that the trials differ from."""
    overrides: dict[str, Any] = {}  # noqa: RUF012
    """Settings of all trials over the base's, nested as in a run configuration."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, max_length=31)
    """Every trial is run with each; `seed` of its configuration."""
    stages: tuple[TrainedStage, ...] = ("base_lm", "rqvae", "rq_transformer")
    """Stages that are trained, of every trial that does not say otherwise. base_lm is needed for the AR row."""
    measure: tuple[Measure, ...] = ("evaluate", "benchmark", "report")
    """What is done with the trained models. benchmark needs a base LM and a latent model, and is left out of trials
    without."""
    trials: dict[str, Trial] = Field(min_length=1)

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed stands twice")
        return seeds

    @field_validator("trials")
    @classmethod
    def _names_are_directories(cls, trials: dict[str, Trial]) -> dict[str, Trial]:
        for name in trials:
            if (
                not name
                or not all(letter.isalnum() or letter in "._-" for letter in name)
                or name[0] in "._-"
            ):
                raise ValueError(f"{name!r} is no name of a directory: use letters, digits, dots and hyphens")
        return trials

    @model_validator(mode="after")
    def _references_exist(self) -> Sweep:
        for name, trial in self.trials.items():
            reference = trial.match_compute
            if reference is not None and reference not in self.trials:
                raise ValueError(f"trials.{name}.match_compute: there is no trial {reference}")
            if trial.not_run and (trial.overrides or reference is not None):
                raise ValueError(
                    f"trials.{name}.not_run: the settings of a trial that is not run have no effect"
                )
            if reference is not None and self.trials[reference].match_compute is not None:
                raise ValueError(
                    f"trials.{name}.match_compute: {reference} is matched itself; name the trial it is matched to"
                )
            if trial.stages is not None and (not trial.stages or len(set(trial.stages)) < len(trial.stages)):
                raise ValueError(f"trials.{name}.stages: names no stage, or one twice")
        return self


@dataclass(frozen=True)
class PlannedTrial:
    """A trial with one seed, as a run: its directory is `RUN_ROOT/sweeps/SWEEP/TRIAL-seedN`."""

    name: str
    seed: int
    spec: Trial
    config: RunConfig
    """Its configuration, steps not matched yet."""
    stages: tuple[TrainedStage, ...]
    """In order, without those that its codec does not have."""
    shared: Path
    """Directory for what trials have in common."""
    reference: PlannedTrial | None = None
    """The trial of the same seed that its compute is matched to."""

    @property
    def directory(self) -> Path:
        """Its run directory."""
        return Path(self.config.run_root) / self.config.name

    @property
    def starts_from_base_lm(self) -> bool:
        """The codec's backbones start from the base LM that is trained here."""
        return (
            self.spec.pretrained_backbone
            and "base_lm" in self.stages
            and bool({"rqvae", "joint"} & set(self.stages))
            and may_start_from_base_lm(self.config)
        )


def load_sweep(path: str | Path) -> Sweep:
    """Read and check a sweep file; `base` of the result is relative to the working directory.

    Raises:
        ConfigError: it lists every mistake, in the trials' overrides too.
    """
    values = read_yaml(path)
    if "trials" not in values:
        raise ConfigError(
            str(path),
            [
                "trials: missing; this looks like the configuration of one run, which launch/train.py and "
                "launch/demo.py take with --config"
                if "codec" in values or "data" in values
                else "trials: missing; a sweep names its trials"
            ],
        )
    sweep = validate(Sweep, values, str(path))
    here = Path(path).parent
    trials = {
        name: trial.model_copy(update={"overrides": inline_architectures(trial.overrides, here)})
        for name, trial in sweep.trials.items()
    }
    return sweep.model_copy(
        update={
            "base": str(here / sweep.base),
            "overrides": inline_architectures(sweep.overrides, here),
            "trials": trials,
        }
    )


def sweep_directory(config: RunConfig, sweep: Sweep) -> Path:
    """Where results and trials of a sweep are; `config` is any configuration with its `run_root`."""
    return Path(config.run_root) / "sweeps" / sweep.name


def plan_trials(sweep: Sweep, overrides: Sequence[str] = ()) -> list[PlannedTrial]:
    """Every trial with every seed, seed by seed, so that one seed of everything comes first.

    Args:
        overrides: `a.b=value` over all of it.

    Raises:
        ConfigError: lists the mistakes of all trials.
    """
    base = merge(read_config_file(sweep.base), sweep.overrides)
    mistakes: list[str] = []
    configs: dict[str, RunConfig] = {}
    for name, trial in sweep.trials.items():
        try:
            configs[name] = compose_config(merge(base, trial.overrides), f"trial {name}", None, overrides)
        except ConfigError as error:
            mistakes += [f"trials.{name}: {mistake}" for mistake in error.mistakes]
        else:
            stages = stages_of(sweep, trial, configs[name])
            if (
                "rq_transformer" in stages
                and "rqvae" not in stages
                and configs[name].codec.model != "identity"
            ):
                mistakes.append(f"trials.{name}.stages: rq_transformer needs the codec, so rqvae too")
            if "joint" in stages and {"rqvae", "rq_transformer"} & set(stages):
                mistakes.append(
                    f"trials.{name}.stages: joint trains both models; leave out rqvae and rq_transformer"
                )
            if "joint" in stages and configs[name].codec.model != "rqvae":
                mistakes.append(
                    f"trials.{name}.stages: joint needs codec.model: rqvae, whose codes can be drawn"
                )
            if not stages:
                mistakes.append(f"trials.{name}.stages: the identity codec leaves nothing to train")
    if mistakes:
        raise ConfigError(f"sweep {sweep.name}", mistakes)
    refuse_shared_directories(sweep, configs)
    return [_planned(sweep, name, seed, configs) for seed in sweep.seeds for name in configs]


def _planned(sweep: Sweep, name: str, seed: int, configs: Mapping[str, RunConfig]) -> PlannedTrial:
    config = configs[name]
    root, trial = sweep_directory(config, sweep), sweep.trials[name]
    config = config.model_copy(update={"name": f"{name}-seed{seed}", "run_root": str(root), "seed": seed})
    reference = None if trial.match_compute is None else _planned(sweep, trial.match_compute, seed, configs)
    stages = stages_of(sweep, trial, config)
    return PlannedTrial(name, seed, trial, config, stages, root.parent / "shared", reference)


def stages_of(sweep: Sweep, trial: Trial, config: RunConfig) -> tuple[TrainedStage, ...]:
    """What is trained of a trial, in order; the identity codec has no stage."""
    wanted = sweep.stages if trial.stages is None else trial.stages
    order: tuple[TrainedStage, ...] = ("base_lm", "rqvae", "rq_transformer", "joint")
    is_identity = config.codec.model == "identity"
    return tuple(stage for stage in order if stage in wanted and not (stage == "rqvae" and is_identity))


def refuse_shared_directories(sweep: Sweep, configs: Mapping[str, RunConfig]) -> None:
    """Data of different content need directories of their own.

    Raises:
        ConfigError: two trials would build different token shards in the same place.
    """
    seen: dict[str, tuple[str, str]] = {}
    for name, config in configs.items():
        content = as_text(config.data.build_values())
        known, other = seen.setdefault(config.data.directory, (content, name))
        if known != content:
            raise ConfigError(
                f"sweep {sweep.name}",
                [
                    f"trials.{name}.data.directory: the trials {other} and {name} build different data in "
                    f"'{config.data.directory}'; give one of them a directory of its own"
                ],
            )


def short_hash(values: Mapping[str, Any]) -> str:
    """Twelve digits that name settings."""
    return hashlib.sha256(as_text(values).encode()).hexdigest()[:12]
