"""The project's commands as steps, and the chain of them from text to report.

    steps = chain(config, "configs/tiny.yaml", overrides=[], ranks=2)
    failure = run_steps(steps, project_directory(config), records)

launch/demo.py runs one chain; launch/experiments.py puts those of its trials together. Free of torch.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.config import RunConfig, Stage
from launch.paths import codes_directory, model_directory, project_directory, run_directory
from launch.steps import Step, as_text


def only(overrides: Sequence[str], prefix: str) -> list[str]:
    """The overrides of one section."""
    return [override for override in overrides if override.startswith(prefix)]


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Commands:
    """The steps of one project.

    Attributes:
        config: with the overrides applied.
        path: of the configuration's file.
        ranks: processes that train together; one trains under ZeRO-1, whatever the configuration says:
            nothing to split, and weights in fp32 beside those in bf16.
    """

    config: RunConfig
    path: str
    overrides: list[str]
    ranks: int

    @property
    def manifest(self) -> Path:
        """Of the token shards: changes when they do."""
        return Path(self.config.data.directory) / "manifest.json"

    @property
    def models(self) -> Path:
        """Exported models."""
        return model_directory(self.config)

    @property
    def report_json(self) -> Path:
        """What evaluation and benchmark write."""
        return project_directory(self.config) / "report.json"

    def build_data(self) -> Step:
        """Token shards."""
        command = [sys.executable, "-m", "data_pipeline", "build", "--config", self.path]
        return Step(
            "build-data",
            [*command, *only(self.overrides, "data.")],
            [],
            [self.manifest],
            as_text(self.config.data.build_values()),
            goes_on=True,
        )

    def train(self, stage: Stage, inputs: Sequence[Path], *extra: str) -> list[Step]:
        """Training of a stage, and its conversion to safetensors.

        Args:
            inputs: models and codes that it starts from, beside the token shards.
            extra: overrides of this stage.
        """
        directory = run_directory(self.config, stage)
        python = sys.executable
        launcher, alone = [python], ["train.zero_stage=1"]
        if self.ranks > 1:
            # A free port, so that another job on this machine does not get in the way.
            launcher = [str(Path(python).with_name("deepspeed")), "--num_accelerators", str(self.ranks)]
            launcher += ["--master_port", str(free_port())]
            alone = []
        command = [*launcher, "launch/train.py", "--config", self.path, "--stage", stage]
        settings = self.config.for_stage(stage).model_dump(
            mode="json", include={"seed", "codec", "latent_model", "train"}
        )
        names = ("rqvae", "rq_transformer") if stage == "joint" else (stage,)
        made = self.models if stage == "joint" else self.models / stage
        convert = [python, "launch/convert_checkpoint.py", str(directory), str(made)]
        return [
            Step(
                f"train-{stage}",
                [*command, *self.overrides, *alone, *extra],
                [self.manifest, *inputs],
                [directory / "checkpoints", directory / "metrics.jsonl"],
                as_text({**settings, "data": self.config.data.run_values()}),
                threads=max(1, (os.cpu_count() or 1) // self.ranks),
                run_directory=directory,
                goes_on=True,
            ),
            Step(
                f"convert-{stage}",
                [*convert, "--to", "safetensors"],
                [directory / "checkpoints"],
                [*(self.models / name for name in names), self.models / "tokenizer"],
            ),
        ]

    def precompute_codes(self, latents: bool) -> Step:
        """Codes of the training text; with `codec.model: identity` also the codec itself.

        Args:
            latents: keep them too, for a latent model that draws codes in training.
        """
        codec, codes = self.models / "rqvae", codes_directory(self.config)
        makes_codec = self.config.codec.model == "identity"
        command = [sys.executable, "launch/precompute_codes.py", "--config", self.path]
        command += [] if makes_codec else ["--checkpoint", str(codec)]
        command += ["--latents"] if latents else []
        return Step(
            "precompute-codes",
            [*command, *self.overrides],
            [self.manifest, *([] if makes_codec else [codec])],
            [codes, *([codec] if makes_codec else [])],
            as_text(
                {"codec": self.config.codec.model_dump(mode="json"), "data": self.config.data.run_values()}
            ),
            goes_on=True,
        )

    def evaluate(self, models: Sequence[Path]) -> Step:
        """Quality on the test split, of `models`."""
        return self._measure("evaluate", ["launch/eval.py"], "--json", models)

    def benchmark(self, models: Sequence[Path]) -> Step:
        """Speed of decoding, of `models`."""
        command = ["launch/benchmark.py", "inference", "--rows", "generate,lean,lookup,deferred,streaming"]
        return self._measure("benchmark", command, "--report", models)

    def _measure(self, name: str, command: list[str], report: str, models: Sequence[Path]) -> Step:
        places = ["--model", str(self.models), "--data", self.config.data.directory]
        places += [report, str(self.report_json), "--config", self.path]
        section = self.config.evaluation if name == "evaluate" else self.config.benchmark
        return Step(
            name,
            [sys.executable, *command, *places, *self.overrides],
            [self.manifest, *models],
            [],
            as_text(section.model_dump(mode="json")),
            report_key=(self.report_json, "bits_per_byte" if name == "evaluate" else "speed"),
        )

    def generate(self, models: Sequence[Path]) -> Step:
        """A continuation, for the log."""
        prompt = self.config.evaluation.prompts[0]
        command = [sys.executable, "launch/generate.py", "--model", str(self.models), "--prompt", prompt]
        return Step("generate", command, list(models), [])

    def report(self) -> Step:
        """The page of one run."""
        project = project_directory(self.config)
        stages: tuple[Stage, ...] = ("base_lm", "rqvae", "rq_transformer", "joint")
        metrics = [run_directory(self.config, stage) / "metrics.jsonl" for stage in stages]
        command = [sys.executable, "launch/report.py", str(project)]
        return Step("report", command, [self.report_json, *metrics], [project / "report.html"])


def backbone_override(config: RunConfig, base_lm: Path) -> list[str]:
    """What starts the codec from `base_lm`, where it may."""
    return [f"codec.backbone.pretrained={base_lm}"] if may_start_from_base_lm(config) else []


def may_start_from_base_lm(config: RunConfig) -> bool:
    """The codec has a backbone to start from the base LM: no other is named, and no random one wanted."""
    backbone = config.codec.backbone
    has_backbone = config.codec.model == "rqvae" or (
        config.codec.model == "anchor" and backbone.decoder == "same"
    )
    return has_backbone and backbone.pretrained is None


def chain(config: RunConfig, path: str, overrides: list[str], ranks: int) -> list[Step]:
    """All steps from text to report in one project; the codec stage falls away with `codec.model: identity`."""
    commands = Commands(config, path, overrides, ranks)
    models, codes = commands.models, codes_directory(config)
    base_lm = models / "base_lm"
    steps = [commands.build_data(), *commands.train("base_lm", [])]
    if config.codec.model != "identity":
        steps += commands.train("rqvae", [base_lm], *backbone_override(config, base_lm))
    return [
        *steps,
        commands.precompute_codes(config.for_stage("rq_transformer").train.stochastic_codes),
        *commands.train("rq_transformer", [codes]),
        commands.evaluate([models]),
        commands.benchmark([models]),
        commands.generate([models]),
        commands.report(),
    ]
