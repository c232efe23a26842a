"""Check a job against the plan, take a snapshot of the code, and submit it to Slurm.

    python launch/submit.py --config configs/qwen3_8b.yaml --nodes 8 [--stage rqvae] [--dry-run] [a.b=value ...]
    python launch/submit.py --config configs/qwen3_8b.yaml --job build_data | precompute_codes | pipeline

Arrays have a task for each part of the source or shard, and only tasks with something left to do are submitted. With
data.deduplicate the duplicates are found first, in jobs of their own.
`--sbatch OPTION` passes an option on, e.g. `--sbatch=--time=8:00:00`. Free of torch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

from data_pipeline.code_manifest import Precision
from launch import array_tasks
from launch.config import STAGES, RunConfig, load_config
from launch.paths import model_directory, project_directory
from launch.snapshot import ROOT, refuse_changes, take_snapshot
from launch.submission import Job, array, submit_in_order
from launch.submission_checks import check_data, check_plan

JOBS = ("train", "build_data", "precompute_codes", "pipeline")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    args = parse_arguments(arguments)
    try:
        stage = args.stage if args.job == "train" else None
        config = load_config(args.config, stage=stage, overrides=args.overrides)
        project = project_directory(config).resolve()
        if args.job == "train":
            ranks = args.nodes * max(1, args.gpus_per_node)
            memory = args.gpu_memory_gib if args.gpus_per_node else None
            print("\n".join(check_plan(config, args.config, args.overrides, ranks, memory)))
            check_data(config)
        code = ROOT
        if args.dry_run and not args.no_snapshot:
            refuse_changes(args.allow_dirty)
        elif not args.no_snapshot:
            code = take_snapshot(project / "code", args.allow_dirty)
            if Path(args.config).resolve().is_relative_to(ROOT):  # the snapshot's, which nobody edits
                args.config = str(code / Path(args.config).resolve().relative_to(ROOT))
        if args.job == "pipeline":
            return run_pipeline(args, code)
        jobs = make_jobs(args, config)
        if not jobs:
            print(f"{args.job}: nothing is missing")
            return 0
        submit_in_order(jobs, code, project, args.dry_run)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make_jobs(args: argparse.Namespace, config: RunConfig) -> list[Job]:
    """The jobs of a command, each to run after the one before; none if nothing is missing."""
    if args.job == "build_data":
        return build_jobs(config, args)
    if args.job == "precompute_codes":
        return code_jobs(config, args)
    size = [f"--nodes={args.nodes}", f"--gpus-per-node={args.gpus_per_node}"]
    return [training_job(args.config, args.stage, args.overrides, [*size, *args.sbatch])]


def training_job(path: str, stage: str, overrides: list[str], options: list[str]) -> Job:
    """Training of a stage, with the script of the model's size where there is one."""
    size = Path(path).stem.removeprefix("qwen3_")
    script = (
        f"train_{size}.sh" if (ROOT / "slurm" / f"train_{size}.sh").is_file() else "train_rq_transformer.sh"
    )
    return Job(stage, script, ["--config", path, "--stage", stage, *overrides], options)


def build_jobs(config: RunConfig, args: argparse.Namespace) -> list[Job]:
    """An array that builds what is missing, and the merge; before them, where it is needed, `duplicate_jobs`.

    Args:
        args: `config`, `overrides`, `max_tasks`, `at_once` and `sbatch` of a command line.
    """
    num_tasks = array_tasks.num_build_tasks(config.data, args.max_tasks)
    missing = array_tasks.missing_build_tasks(config.data, num_tasks)
    of_data = [override for override in args.overrides if override.startswith("data.")]
    ours = ["--config", args.config, *of_data]
    merge = Job("merge_data", "build_data.sh", ["--merge", *ours], args.sbatch)
    if not missing:
        done = (Path(config.data.directory) / "manifest.json").is_file()
        return [] if done else [merge]
    tasks = ["--num-tasks", str(num_tasks), *ours]
    options = [array(missing, args.at_once), *args.sbatch]
    build = Job("build_data", "build_data.sh", tasks, options)
    return [*duplicate_jobs(config, args, num_tasks, ours), build, merge]


def duplicate_jobs(
    config: RunConfig, args: argparse.Namespace, num_tasks: int, words: list[str]
) -> list[Job]:
    """An array that hashes what is missing, and the merge; none where no duplicates have to be looked for.

    Args:
        args: as for `build_jobs`.
        words: configuration and overrides of the data.
    """
    missing = array_tasks.missing_duplicate_tasks(config.data, num_tasks)
    if missing is None:
        return []
    merge = Job("merge_duplicates", "build_data.sh", ["deduplicate", "--merge", *words], args.sbatch)
    if not missing:
        return [merge]
    tasks = ["deduplicate", "--num-tasks", str(num_tasks), *words]
    options = [array(missing, args.at_once), *args.sbatch]
    return [Job("deduplicate", "build_data.sh", tasks, options), merge]


def code_jobs(config: RunConfig, args: argparse.Namespace) -> list[Job]:
    """An array that encodes what is missing; the last of its tasks completes the codes.

    Args:
        args: `config`, `overrides`, `max_tasks`, `at_once`, `precision` and `sbatch` of a command line.
    """
    with_latents = config.for_stage("rq_transformer").train.stochastic_codes
    num_tasks = array_tasks.num_code_tasks(config, args.max_tasks)
    missing = array_tasks.missing_code_tasks(
        config, num_tasks, with_latents=with_latents, precision=args.precision
    )
    if not missing:
        return []
    codec = (
        [] if config.codec.model == "identity" else ["--checkpoint", str(model_directory(config) / "rqvae")]
    )
    latents = ["--latents"] if with_latents else []
    how = [*latents, "--precision", args.precision, "--num-tasks", str(num_tasks)]
    words = ["--config", args.config, *codec, *how, *args.overrides]
    options = [array(missing, args.at_once), *args.sbatch]
    return [Job("precompute_codes", "precompute_codes.sh", words, options)]


def run_pipeline(args: argparse.Namespace, code: Path) -> int:
    """The chain, by the script that a user could start as well."""
    words = ["--config", args.config, "--max-tasks", str(args.max_tasks), "--at-once", str(args.at_once)]
    words += ["--precision", args.precision]
    size = [f"--training=--nodes={args.nodes}", f"--training=--gpus-per-node={args.gpus_per_node}"]
    options = [f"--sbatch={option}" for option in args.sbatch]
    dry = ["--dry-run"] if args.dry_run else []
    command = [sys.executable, "-m", "slurm.pipeline", *words, *size, *options, *dry, *args.overrides]
    environment = {**os.environ, "RQVAE_CODE": str(code), "PYTHONPATH": str(code)}
    return subprocess.run(command, env=environment, check=False).returncode


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file, e.g. configs/qwen3_8b.yaml")
    parser.add_argument("--job", choices=JOBS, default="train")
    parser.add_argument("--stage", choices=STAGES, default="rqvae", help="for --job train")
    parser.add_argument("--nodes", type=int, default=1, help="of training")
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, help="of training; 0: one rank a node on its CPU"
    )
    parser.add_argument("--gpu-memory-gib", type=float, default=80.0)
    parser.add_argument("--max-tasks", type=int, default=64, help="of an array")
    parser.add_argument("--at-once", type=int, default=16, help="tasks of an array that run at a time")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="fp32",
        help="of encoding, evaluation and the race",
    )
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="passed on to sbatch")
    parser.add_argument("--dry-run", action="store_true", help="check and print, submit nothing")
    parser.add_argument("--allow-dirty", action="store_true", help="files may differ from the commit")
    parser.add_argument("--no-snapshot", action="store_true", help="run the code in place")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings over the file's")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
