"""The whole chain, from text to report, as jobs that depend on each other.

    python -m slurm.pipeline --config configs/qwen3_8b.yaml [--training=--nodes=8] [a.b=value ...]

Where token shards are missing, they are built first, and a job after them submits the rest: only then the manifest
says how many tasks the encoding has. A stage that fails cancels all that follow. Started again, it submits what is
not done. The ids are in `jobs.jsonl` of the project. Training in two stages (rqvae, rq_transformer), before them
base_lm where the configuration trains its own backbone.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import get_args

from data_pipeline.code_manifest import Precision
from launch import run_status
from launch.chain import backbone_override
from launch.config import RunConfig, Stage, load_config
from launch.paths import model_directory, project_directory, run_directory
from launch.submission import Job, submit_in_order
from launch.submit import build_jobs, code_jobs, training_job


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = parse_arguments(arguments)
    try:
        config = load_config(args.config, overrides=args.overrides)
        if args.part == "all":
            jobs = build_jobs(config, args)
            if jobs:
                return submit_all([*jobs, the_rest(arguments or sys.argv[1:], args)], args, config)
        return submit_all(jobs_after_data(args, config), args, config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def the_rest(words: list[str], args: argparse.Namespace) -> Job:
    """The job that submits what follows the data."""
    return Job("submit_rest", "pipeline.sh", ["--part", "rest", *words], args.sbatch)


def jobs_after_data(args: argparse.Namespace, config: RunConfig) -> list[Job]:
    """Everything that is not done yet, in order."""
    project, models = project_directory(config), model_directory(config)
    overrides = list(args.overrides)
    jobs: list[Job] = []

    def train(stage: Stage, *extra: str) -> None:
        directory, exported = run_directory(config, stage), models / stage
        if run_status.read(directory).get("state") != "finished":
            options = [*args.sbatch, *args.training]
            jobs.append(training_job(args.config, stage, [*overrides, *extra], options))
        elif (exported / "config.json").is_file():
            return
        words = ["launch/convert_checkpoint.py", str(directory), str(exported), "--to", "safetensors"]
        jobs.append(Job(f"convert_{stage}", "run.sh", words, args.sbatch))

    pretrained = config.codec.backbone.pretrained
    if pretrained is None:
        train("base_lm")
    elif not (models / "base_lm" / "config.json").is_file():  # what the latent model is compared with
        words = ["launch/convert_checkpoint.py", pretrained, str(models / "base_lm"), "--to", "huggingface"]
        jobs.append(Job("base_lm", "run.sh", words, args.sbatch))
    if config.codec.model != "identity":
        train("rqvae", *backbone_override(config, models / "base_lm"))
    jobs += code_jobs(config, args)
    train("rq_transformer")
    of_models = ["--model", str(models), "--data", config.data.directory]
    settings = ["--config", args.config, *overrides]
    report = str(project / "report.json")
    how = ["--json", report, "--precision", args.precision]
    jobs.append(Job("evaluate", "evaluate.sh", [*of_models, *how, *settings], args.sbatch))
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[args.precision]
    race = ["inference", *of_models, "--report", report, "--dtype", dtype, *settings]
    jobs.append(Job("benchmark", "benchmark.sh", race, args.sbatch))
    jobs.append(Job("report", "run.sh", ["launch/report.py", str(project)], args.sbatch))
    return jobs


def submit_all(jobs: list[Job], args: argparse.Namespace, config: RunConfig) -> int:
    """Submit each after the one before."""
    code = Path(os.environ.get("RQVAE_CODE", "")).resolve()
    submit_in_order(jobs, code, project_directory(config), args.dry_run)
    return 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--part", choices=("all", "rest"), default="all", help="rest: all but the data")
    parser.add_argument("--max-tasks", type=int, default=64, help="of an array")
    parser.add_argument("--at-once", type=int, default=16, help="tasks of an array that run at a time")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="fp32",
        help="of encoding, evaluation and the race",
    )
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="for every job")
    parser.add_argument("--training", action="append", default=[], metavar="OPTION", help="for training jobs")
    parser.add_argument("--dry-run", action="store_true", help="print, submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings over the file's")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
