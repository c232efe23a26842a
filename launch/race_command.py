"""`launch/benchmark.py inference`: which models race at which points, as its arguments say."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from launch import speed_model
from launch.benchmark_inference import about, progress, race, report_speed
from launch.config import RunConfig, load_config, load_measurement
from launch.race_models import Racers, random_weights, trained
from launch.race_prompts import prompts_from, random_prompts
from launch.report_data import read_report
from rqvae.config import ArchitectureConfig

BACKBONES = Path(__file__).resolve().parents[1] / "configs" / "backbones"


@dataclass(frozen=True)
class Axis:
    """Values of one quantity, all else as at the centre."""

    setting: str
    values: tuple[Any, ...]

    def overrides(self, value: Any) -> list[str]:
        """What makes the centre's configuration that of a point."""
        if self.setting != "codec.backbone.architecture":
            return [f"{self.setting}={value}"]
        file = BACKBONES / f"{value}.yaml"
        width = architecture_of(file).hidden_size
        return [f"{self.setting}={file}", f"codec.latent_dim={width}"]


AXES = {
    "backbone": Axis("codec.backbone.architecture", ("qwen3_0.6b", "qwen3_1.7b", "qwen3_4b", "qwen3_8b")),
    "compression_factor": Axis("codec.compression_factor", (4, 8, 16)),
    "depth": Axis("codec.codebook_levels", (2, 4, 8, 16)),
    "batch": Axis("benchmark.batch_size", (1, 4, 16, 64)),
    "prompt": Axis("benchmark.prompt_tokens", (32, 128, 512, 1024)),
    "output": Axis("benchmark.new_tokens", (64, 128, 256, 512)),
}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the arguments ask for.

    Returns:
        What `about` says, `tables` (the centre first), and with `--report` `speed`, which is for report.json.

    Raises:
        ValueError: arguments contradict each other, or a model cannot be loaded.
    """
    _check(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.random else "float32"))
    measure = partial(speed_model.measure_machine, dtype, device)
    bits = None if args.random else read_report(_report_of(args)).get("bits_per_byte")
    tables: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    racers: Racers | None = None
    previous: RunConfig | None = None
    for axis, value, overrides in points(args):
        config = _config(args, overrides)
        settings = load_measurement(None, overrides).benchmark if config is None else config.benchmark
        if racers is None or (args.random and _models(config) != _models(previous)):
            racers = None  # two of them may not fit
            progress("loading the models")
            racers = _racers(args, config, dtype, device)
            previous = config
        if args.random:
            vocabulary = racers.architecture.vocab_size
            prompts = random_prompts(vocabulary, settings.batch_size, settings.prompt_tokens)
        else:
            prompts = prompts_from(args.data, settings.batch_size, settings.prompt_tokens)
        progress("the centre" if axis is None else f"{axis} = {value}")
        table = race(racers, prompts, settings, measure, set(args.rows), bits)
        tables.append({"axis": axis, "value": value, **table})
        facts = facts or about(racers)
    result = {**facts, "tables": tables}
    if args.report:
        result["speed"] = report_speed(tables[0], facts)
    return result


def next_steps(args: argparse.Namespace) -> str:
    """What to run next, for the last line."""
    steps = []
    if not args.html:
        steps.append("the same with --html FILE for a page")
    if not args.axis:
        axes = AXES if args.random else [name for name in AXES if AXES[name].setting.startswith("benchmark.")]
        steps.append(f"--axis {','.join(axes)} (or one of them) for tables along them")
    if args.random:
        steps.append(f"python launch/plan.py --config {args.random} --inference for other machines")
    elif args.report:
        steps.append(f"python launch/report.py {args.report.parent}")
    return "Next: " + ("; ".join(steps) or "--random CONFIG for the shapes of larger models")


def points(args: argparse.Namespace) -> Iterator[tuple[str | None, Any, list[str]]]:
    """The centre, then every value of every axis: name, value, overrides."""
    yield None, None, list(args.overrides)
    for name in args.axis:
        for value in AXES[name].values:
            yield name, value, [*args.overrides, *AXES[name].overrides(value)]


def architecture_of(file: Path) -> ArchitectureConfig:
    """The architecture in a YAML file of configs/backbones.

    Raises:
        ValueError: there is none.
    """
    from data_pipeline.yaml_config import read_yaml

    try:
        return ArchitectureConfig.model_validate(read_yaml(file))
    except ValidationError as error:
        raise ValueError(f"'{file}' holds no architecture as in configs/backbones: {error}") from error


def names_of(known: Mapping[str, Any]) -> Callable[[str], list[str]]:
    """Parser of an argument: a list of names with commas between them."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if wrong := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"no {', '.join(wrong)}; choose from {', '.join(known)}")
        return names

    return parse


def _check(args: argparse.Namespace) -> None:
    if args.random:
        for name in ("data", "config", "report", "identity"):
            if getattr(args, name):
                raise ValueError(f"--{name} is for trained models (--model), not for --random")
        return
    if args.data is None:
        raise ValueError("--model needs --data DIR, token shards to take the prompts from")
    if fixed := [name for name in args.axis if not AXES[name].setting.startswith("benchmark.")]:
        raise ValueError(f"--axis {','.join(fixed)}: trained models are as they are; give --random CONFIG")


def _report_of(args: argparse.Namespace) -> Path:
    """Where the models' quality is told: by default beside them, as launch/demo.py leaves it."""
    return args.report or args.model.parent / "report.json"


def _config(args: argparse.Namespace, overrides: Sequence[str]) -> RunConfig | None:
    source = args.random or args.config
    return load_config(source, overrides=overrides) if source else None


def _models(config: RunConfig | None) -> Any:
    """What the models follow from."""
    return config and (config.codec, config.latent_model)


def _racers(
    args: argparse.Namespace, config: RunConfig | None, dtype: torch.dtype, device: torch.device
) -> Racers:
    if not args.random:
        return trained(args.model, args.data, dtype, device, args.assistant, args.identity)
    assert config is not None
    draft = None if args.assistant is None else architecture_of(args.assistant)
    return random_weights(config, dtype, device, "identity" in args.rows, draft)
