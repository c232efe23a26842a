"""The run configuration: each package's own section plus training, tracking, evaluation and benchmark.

    config = load_config("configs/tiny.yaml", stage="rqvae", overrides=["train.steps=200"])

Free of torch, so that submitting a job stays light.

Which value wins for a training setting of stage S: a command-line override `train.x=v`, then `stages.S.x`
(file or override), then `train.x` of the file, then the default documented here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from data_pipeline.config import DataConfig
from data_pipeline.yaml_config import ConfigError, apply_overrides, merge, read_yaml, validate
from launch.config_mistakes import mistakes_across_fields
from launch.config_sections import (
    STAGES,
    BenchmarkConfig,
    EvaluationConfig,
    Stage,
    StagesConfig,
    TrackingConfig,
    TrainConfig,
)
from rqvae.config import LatentModelConfig, RQVAEConfig, StrictModel

__all__ = [
    "STAGES",
    "BenchmarkConfig",
    "EvaluationConfig",
    "RunConfig",
    "Stage",
    "StagesConfig",
    "TrackingConfig",
    "TrainConfig",
    "check_world_size",
    "compose_config",
    "inline_architectures",
    "load_config",
    "load_measurement",
    "read_config_file",
]

# Where the path of an architecture file may stand.
_ARCHITECTURES = ("codec.backbone.architecture", "latent_model.spatial_backbone.architecture")


class MeasurementConfig(StrictModel):
    """What finished models are measured by."""

    evaluation: EvaluationConfig = EvaluationConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()


class RunConfig(StrictModel):
    """Everything that one run depends on."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run's directory under `run_root`: letters, digits, dots, hyphens and underscores."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of initialisation, sample order and everything drawn at random in training."""
    run_root: str = "runs"
    """Directory that the run directories are created in, relative to where the command is started."""
    stage: Stage | None = None
    """The stage that `train` is for. Set by `--stage`; a run directory's config.yaml carries it."""
    data: DataConfig
    codec: RQVAEConfig
    latent_model: LatentModelConfig = LatentModelConfig()
    train: TrainConfig = TrainConfig()
    """With a stage chosen: the settings of that stage."""
    stages: StagesConfig = StagesConfig()
    tracking: TrackingConfig = TrackingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()

    def for_stage(self, stage: Stage) -> RunConfig:
        """A copy with `stage` set and `train` merged for it."""
        section: TrainConfig = getattr(self.stages, stage)
        values = merge(self.train.model_dump(exclude_unset=True), section.model_dump(exclude_unset=True))
        return self.model_copy(update={"stage": stage, "train": TrainConfig.model_validate(values)})

    def to_yaml(self) -> str:
        """YAML that `load_config` reads back to an equal configuration.

        With a stage chosen the text describes that stage only, without the `stages` section.
        """
        values = self.model_dump(mode="json", exclude={"stages"})
        if self.stage is None:
            values["stages"] = {
                name: getattr(self.stages, name).model_dump(mode="json", exclude_unset=True)
                for name in STAGES
            }
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, stage: Stage | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, compose and check a run configuration.

    Args:
        path: YAML file, with `extends: parent.yaml` if it has one parent.
        stage: the stage to train; `train` of the result is merged for it.
        overrides: `a.b=value`, applied in order over the file; the value is parsed as YAML. A path of an
            architecture file given in this way is relative to the working directory.

    Raises:
        ConfigError: a ValueError that lists every mistake with its dotted path.
    """
    values = read_config_file(path)
    return compose_config(values, f"{path} with overrides" if overrides else str(path), stage, overrides)


def load_measurement(path: str | Path | None, overrides: Sequence[str] = ()) -> MeasurementConfig:
    """How to measure: as a run configuration says, or without one by defaults and overrides alone.

    Raises:
        ConfigError: as `load_config`.
    """
    if path is None:
        return validate(MeasurementConfig, apply_overrides({}, overrides), "without --config")
    config = load_config(path, overrides=overrides)
    return MeasurementConfig(evaluation=config.evaluation, benchmark=config.benchmark)


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The values of a run configuration's file and its parents, architecture files in their places; not checked.

    Raises:
        ConfigError: the file cannot be read, or is of another kind.
    """
    values = read_yaml(path, inline=_ARCHITECTURES)
    if "trials" in values:
        raise ConfigError(
            str(path),
            [
                f"trials: this is a sweep, not a run; start it with: python launch/experiments.py --sweep {path}"
            ],
        )
    return values


def compose_config(
    values: Mapping[str, Any], source: str, stage: Stage | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """`load_config` of values that have been read.

    Args:
        source: where they come from; begins the error message.
    """
    values = inline_architectures(apply_overrides(_without_overridden(values, overrides), overrides))
    written_for = values.get("stage")
    if stage is not None and written_for is not None and stage != written_for:
        raise ConfigError(
            source,
            [
                f"stage: this file holds the settings of {written_for} only; "
                f"for {stage} use the file it was made from"
            ],
        )
    mistakes: list[str] = []
    config: RunConfig | None = None
    try:
        config = validate(RunConfig, values, source)
    except ConfigError as error:
        mistakes += error.mistakes
    mistakes += mistakes_across_fields(values, stage)
    if config is None or mistakes:
        raise ConfigError(source, mistakes)
    return config if stage is None or written_for is not None else config.for_stage(stage)


def check_world_size(config: RunConfig, world_size: int) -> int:
    """Gradient accumulation steps of `config.train` on `world_size` ranks.

    Raises:
        ConfigError: the global batch is not a whole number of micro-batches on every rank.
    """
    train = config.train
    per_pass = train.micro_batch_size * world_size
    if train.global_batch_size % per_pass:
        raise ConfigError(
            f"{config.name} on {world_size} ranks",
            [
                f"train.global_batch_size: {train.global_batch_size} samples cannot be split into passes of "
                f"{per_pass} (micro_batch_size {train.micro_batch_size} x {world_size} ranks); "
                f"use a multiple of {per_pass}, or another micro_batch_size or number of ranks"
            ],
        )
    if train.streaming is not None and train.streaming.streams % world_size:
        raise ConfigError(
            f"{config.name} on {world_size} ranks",
            [
                f"train.streaming.streams: {train.streaming.streams} streams cannot be shared out equally; use a "
                f"multiple of {world_size}, or another number of ranks"
            ],
        )
    return train.global_batch_size // per_pass


def _without_overridden(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`values` without the stages' own settings of what a `train.x=v` override sets for all stages."""
    paths = [override.partition("=")[0].strip().split(".") for override in overrides]
    sections = values.get("stages")
    if not isinstance(sections, Mapping):
        return dict(values)
    kept = dict(sections)
    for stage, section in sections.items():
        for path in paths:
            if path[0] == "train" and len(path) > 1:
                kept[stage] = section = _without(section, path[1:])
    return {**values, "stages": kept}


def _without(values: Any, path: Sequence[str]) -> Any:
    """`values` without what stands at `path`."""
    if not isinstance(values, Mapping) or path[0] not in values:
        return values
    if len(path) == 1:
        return {key: value for key, value in values.items() if key != path[0]}
    return {**values, path[0]: _without(values[path[0]], path[1:])}


def inline_architectures(values: dict[str, Any], directory: Path = Path()) -> dict[str, Any]:
    """`values` with the paths of architecture files, relative to `directory`, replaced by the files' content."""
    for dotted in _ARCHITECTURES:
        names = dotted.split(".")
        node: Any = values
        for name in names:
            node = node.get(name) if isinstance(node, Mapping) else None
        if isinstance(node, str):
            content = read_yaml(directory / node)
            for name in reversed(names):
                content = {name: content}
            values = merge(values, content)
    return values
