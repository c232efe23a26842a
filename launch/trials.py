"""Running one trial of a sweep: what it shares with others, its own training, its figures. Free of torch.

Base LMs and codecs (with their codes) are trained once for all trials that train the same, in
`RUN_ROOT/sweeps/shared/KIND-HASH`, where HASH is of every setting that they depend on. A trial's run directory links
them, so that it looks like any other: base_lm/, rqvae/, rq_transformer/, codes/, model/, report.json. A codec that is
trained together with its latent model is the trial's own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from launch.chain import Commands
from launch.config import BenchmarkConfig, EvaluationConfig, RunConfig, StagesConfig, load_config
from launch.paths import codes_directory, model_directory, project_directory, run_directory
from launch.run_lock import RunLock
from launch.steps import REPOSITORY, Failure, Step, run_steps, seconds_of
from launch.sweep import PlannedTrial, short_hash
from rqvae.config import LatentModelConfig, RQVAEConfig

CONFIG = "trial.yaml"


@dataclass(frozen=True)
class Shared:
    """A base LM, or a codec with its codes, that several trials may use."""

    config: RunConfig
    """Of its project: settings that it does not depend on are at their defaults."""
    stage: Literal["base_lm", "rqvae"] | None
    """What is trained; None for the identity codec."""
    with_codes: bool = False
    with_latents: bool = False

    @property
    def model(self) -> Path:
        """Its exported model."""
        return model_directory(self.config) / (self.stage or "rqvae")

    def steps(self, commands: Commands, inputs: Sequence[Path]) -> list[Step]:
        """What makes it."""
        steps = [] if self.stage is None else commands.train(self.stage, inputs)
        return [*steps, commands.precompute_codes(self.with_latents)] if self.with_codes else steps


class TrialError(Exception):
    """A trial that ended early; the message says which step, and why."""


@dataclass
class TrialRun:
    """A trial about to be run.

    Attributes:
        trial: its configuration has its final number of steps.
        failed: shared parts that have failed in this process, with the reason, so that no trial tries again.
    """

    trial: PlannedTrial
    ranks: int
    measure: Sequence[str]
    failed: dict[str, str] = field(default_factory=dict)
    wall_s: float = 0.0

    def __call__(self) -> None:
        """Run everything that is not done. The caller holds the trial's directory.

        Raises:
            TrialError: a step failed.
            ValueError: the configuration is no good after all.
        """
        trial, project = self.trial, self.trial.directory
        base = self.shared_base() if "base_lm" in trial.stages else None
        backbone = [base.model] if base is not None and trial.starts_from_base_lm else []
        is_joint = "joint" in trial.stages
        config = with_backbone(trial.config, backbone) if is_joint else trial.config
        write_config(config)
        load_config(REPOSITORY / project / CONFIG)
        codec = None if is_joint else self.shared_codec(backbone)
        self.make(base, [])
        self.make(codec, backbone)
        models = self.link(base, codec)
        commands = Commands(config, str(project / CONFIG), [], self.ranks)
        steps: list[Step] = []
        if is_joint:
            steps += commands.train("joint", backbone)
            models += [commands.models / "rqvae", commands.models / "rq_transformer"]
        if "rq_transformer" in trial.stages and codec is not None:
            steps += commands.train("rq_transformer", [codes_directory(codec.config)])
            models.append(commands.models / "rq_transformer")
        if "evaluate" in self.measure:
            steps.append(commands.evaluate(models))
        if "benchmark" in self.measure and base is not None and trial.stages != ("base_lm",):
            steps.append(commands.benchmark(models))
        if "report" in self.measure and "evaluate" in self.measure:
            steps.append(commands.report())
        self.run(steps, config)

    def make(self, shared: Shared | None, inputs: Sequence[Path]) -> None:
        """Train what is shared, unless it is there; another process that is at it is waited for."""
        if shared is None:
            return
        name, project = shared.config.name, project_directory(shared.config)
        if name in self.failed:
            raise TrialError(self.failed[name])
        with RunLock(REPOSITORY / project, patience_s=math.inf):
            write_config(shared.config)
            commands = Commands(shared.config, str(project / CONFIG), [], self.ranks)
            try:
                self.run(shared.steps(commands, inputs), shared.config)
            except TrialError as error:
                self.failed[name] = f"{error} (of {name}, which other trials share)"
                raise

    def run(self, steps: Sequence[Step], config: RunConfig) -> None:
        """Run steps in the project of `config`."""
        project = project_directory(config)
        records = project / "steps"
        failure: Failure | None = run_steps(steps, project, records, project / "logs")
        if failure is not None:
            log = project / "logs" / f"{failure.step}.log"
            raise TrialError(f"{failure.step} ended with status {failure.status} ({log}): {failure.reason}")
        self.wall_s += seconds_of(REPOSITORY / records, steps)

    def shared_base(self) -> Shared:
        """The base LM that this trial needs."""
        config = self.trial.config
        codec, stages = tokens_as_they_are(config), StagesConfig(base_lm=config.stages.base_lm)
        config = config.model_copy(update={"codec": codec, "stages": stages})
        return Shared(named(config, "base_lm", self.trial.shared, self.ranks), "base_lm")

    def shared_codec(self, backbone: Sequence[Path]) -> Shared:
        """The codec that this trial needs; of a trial without one, tokens as they are, for the evaluation.

        Args:
            backbone: the model that it starts from, if there is one.
        """
        trial, config = self.trial, with_backbone(self.trial.config, backbone)
        codec, with_latents = config.codec, config.for_stage("rq_transformer").train.stochastic_codes
        if trial.stages == ("base_lm",):
            codec, with_latents = tokens_as_they_are(config), False
        config = config.model_copy(update={"codec": codec, "stages": StagesConfig(rqvae=config.stages.rqvae)})
        return Shared(
            named(config, "codec-latents" if with_latents else "codec", trial.shared, self.ranks),
            None if codec.model == "identity" else "rqvae",
            codec.model == "identity" or "rq_transformer" in trial.stages,
            with_latents,
        )

    def link(self, base: Shared | None, codec: Shared | None) -> list[Path]:
        """Let the trial's directory show what is shared; returns the linked models."""
        config, models = self.trial.config, model_directory(self.trial.config)
        links: dict[Path, Path] = {}
        if codec is not None:
            links[models / "rqvae"] = codec.model
            if codec.stage is not None:
                links[run_directory(config, "rqvae")] = run_directory(codec.config, "rqvae")
            if "rq_transformer" in self.trial.stages:
                links[codes_directory(config)] = codes_directory(codec.config)
        if base is not None:
            links[run_directory(config, "base_lm")] = run_directory(base.config, "base_lm")
            links[models / "base_lm"] = base.model
        for place, target in links.items():
            link(REPOSITORY / place, REPOSITORY / target)
        return [place for place in links if place.parent == models]


def with_backbone(config: RunConfig, backbone: Sequence[Path]) -> RunConfig:
    """The configuration whose codec starts from this model; as it is where there is none."""
    if not backbone:
        return config
    started = config.codec.backbone.model_copy(update={"pretrained": str(backbone[0])})
    return config.model_copy(update={"codec": config.codec.model_copy(update={"backbone": started})})


def tokens_as_they_are(config: RunConfig) -> RQVAEConfig:
    """The identity codec at K=1: what a base LM is trained and evaluated with."""
    backbone = {"architecture": config.codec.backbone.architecture.model_dump()}
    return RQVAEConfig.model_validate(
        {"model": "identity", "compression_factor": 1, "backbone": backbone, "codebook_levels": None}
        | {"codebook_size": None}
    )


def named(config: RunConfig, kind: str, root: Path, ranks: int) -> RunConfig:
    """The configuration of something shared, named after its content; what it does not depend on is left out."""
    plain = config.model_copy(
        update={
            "latent_model": LatentModelConfig(),
            "evaluation": EvaluationConfig(),
            "benchmark": BenchmarkConfig(),
        }
    )
    values = plain.model_dump(mode="json", include={"seed", "codec", "train"}) | {
        "data": plain.data.run_values(),
        "ranks": ranks,
    }
    stages = plain.stages.model_dump(mode="json", exclude_unset=True)
    name = f"{kind}-{short_hash({**values, 'stages': stages})}"
    return plain.model_copy(update={"name": name, "run_root": str(root)})


def write_config(config: RunConfig) -> None:
    """The configuration, in its project; left alone where it is what is there."""
    path = REPOSITORY / project_directory(config) / CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)
    text = config.to_yaml()
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


def link(place: Path, target: Path) -> None:
    """A relative symbolic link.

    Raises:
        TrialError: something else is in its place.
    """
    wanted = os.path.relpath(target, place.parent)
    if place.is_symlink():
        if str(place.readlink()) == wanted:
            return
        place.unlink()
    elif place.exists():
        raise TrialError(f"'{place}' is in the way of a link to '{target}'; remove it")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(wanted)
