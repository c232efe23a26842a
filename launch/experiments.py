"""Run a sweep: every trial with every seed, and one table over all of them.

    python launch/experiments.py --sweep configs/sweeps/compression.yaml --dry-run
    python launch/experiments.py --sweep configs/sweeps/compression.yaml [--only TRIAL] [--ranks N] [a.b=value ...]

Every trial is a run directory, `runs/sweeps/SWEEP/TRIAL-seedN`, with its logs in it and results.json, results.csv and
results.md beside it, written anew after every trial. Killed anywhere, the same command goes on. A trial that fails is
recorded with the reason, and the rest goes on; the exit status is then 1. What some sweep has finished under another
name is not run again. On a cluster, task i of n takes every n-th trial (`--task-index i --num-tasks n`,
slurm/experiments.sh), and `--merge` afterwards makes the table.

One rank (the default) trains by plain `python` under ZeRO-1, which splits nothing there.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import NotADatasetError
from data_pipeline.yaml_config import validate
from launch.chain import Commands
from launch.matching import match_compute, planned_flops, with_steps
from launch.results import write_results
from launch.run_lock import RunLock
from launch.steps import REPOSITORY, run_steps
from launch.sweep import PlannedTrial, Sweep, load_sweep, plan_trials, short_hash
from launch.training_flops import tokens_to_encode
from launch.trial_records import content_hash, find_twin, write_record
from launch.trials import CONFIG, TrialError, TrialRun, write_config


@dataclass(frozen=True)
class Resolved:
    """A trial whose steps are known."""

    trial: PlannedTrial
    flops: dict[str, float]
    """Training FLOPs by part."""
    ratio: float | None
    """Its training FLOPs over those of the trial that it is matched to."""

    def steps(self) -> dict[str, int]:
        """Of every stage that is trained."""
        return {stage: self.trial.config.for_stage(stage).train.steps for stage in self.trial.stages}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns 0, 1 if a trial failed, 2 for a mistake in the settings."""
    args = parse_arguments(arguments)
    try:
        if not 0 <= args.task_index < args.num_tasks:
            raise ValueError(f"--task-index {args.task_index} is not below --num-tasks {args.num_tasks}")
        sweep = load_sweep(args.sweep)
        if args.seed:
            sweep = validate(Sweep, sweep.model_dump() | {"seeds": args.seed}, "--seed")
        planned = plan_trials(sweep, args.overrides)
        chosen = choose(planned, args.only, args.task_index, args.num_tasks)
        if args.dry_run:
            describe(sweep, planned, chosen)
            return 0
        is_whole = args.num_tasks == 1
        failures = 0 if args.merge else run_trials(sweep, planned, chosen, args.ranks, is_whole)
        if args.merge or is_whole:
            directory = results_directory(planned)
            results = write_results(sweep, planned, directory)
            failed = [run for run in results["runs"] if run["state"] == "failed"]
            for run in failed:
                print(f"failed: {run['trial']}, seed {run['seed']}: {run['reason']}", file=sys.stderr)
            failures += len(failed)
            print(f"Results: {directory / 'results.md'} (all figures: {directory / 'results.json'})")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(failures > 0)


def results_directory(planned: Sequence[PlannedTrial]) -> Path:
    """Where the sweep's trials and tables are."""
    return Path(planned[0].config.run_root)


def choose(
    planned: Sequence[PlannedTrial], names: Sequence[str], task_index: int, num_tasks: int
) -> list[PlannedTrial]:
    """The trials to run here.

    Raises:
        ValueError: there is no trial of such a name.
    """
    known = {trial.name for trial in planned}
    for name in names:
        if name not in known:
            raise ValueError(f"--only {name}: there is no such trial; there are {', '.join(sorted(known))}")
    wanted = [trial for trial in planned if not names or trial.name in names]
    return wanted[task_index::num_tasks]


def run_trials(
    sweep: Sweep, planned: Sequence[PlannedTrial], chosen: Sequence[PlannedTrial], ranks: int, writes: bool
) -> int:
    """Run the chosen trials one after another; returns how many failed.

    Args:
        writes: also write the tables, after every trial.
    """
    failures, failed_parts = 0, dict[str, str]()
    for number, trial in enumerate(chosen, 1):
        print(f"== trial {number} of {len(chosen)}: {trial.name}, seed {trial.seed}", flush=True)
        if trial.spec.not_run:
            write_record(trial, {"state": "not run", "reason": trial.spec.not_run})
            print(f"not run: {trial.spec.not_run}", flush=True)
        else:
            failures += run_trial(sweep, trial, ranks, failed_parts)
        if writes:
            write_results(sweep, planned, results_directory(planned))
    return failures


def run_trial(sweep: Sweep, trial: PlannedTrial, ranks: int, failed_parts: dict[str, str]) -> bool:
    """Run one trial and record what became of it; returns whether it failed."""
    try:
        lock = RunLock(REPOSITORY / trial.directory)
    except ValueError as error:  # whoever holds it keeps the record
        print(f"failed: {error}", file=sys.stderr, flush=True)
        return True
    record: dict[str, Any] = {"state": "running"}
    with lock:
        try:
            for needed in filter(None, (trial, trial.reference)):
                build_data(needed, failed_parts)
            resolved = resolve(trial)
            record |= {
                "steps": resolved.steps(),
                "planned_flops": resolved.flops,
                "compute_ratio": resolved.ratio,
            }
            record["content"] = content = content_hash(resolved.trial, sweep.measure, ranks)
            twin = find_twin(trial, content)
            if twin is not None:
                directory, its_record = twin
                print(f"the same as {directory}, which has been run", flush=True)
                taken = {"state": "finished", "reason": "", "same_as": str(directory)}
                write_record(trial, record | taken | {"wall_s": its_record["wall_s"]})
                return False
            write_record(trial, record)
            run = TrialRun(resolved.trial, ranks, sweep.measure, failed_parts)
            run()
        except (TrialError, ValueError) as error:
            print(f"failed: {error}", file=sys.stderr, flush=True)
            write_record(trial, record | {"state": "failed", "reason": str(error)})
            return True
        write_record(trial, record | {"state": "finished", "reason": "", "wall_s": run.wall_s})
    return False


def build_data(trial: PlannedTrial, failed_parts: dict[str, str]) -> None:
    """Token shards of a trial, unless they are there.

    Raises:
        TrialError: the build failed, now or for a trial before.
    """
    data = trial.config.data
    name = f"data-{short_hash({'directory': data.directory, **data.build_values()})}"
    if name in failed_parts:
        raise TrialError(failed_parts[name])
    config = trial.config.model_copy(update={"name": name, "run_root": str(trial.shared), "seed": 0})
    project = trial.shared / name
    with RunLock(REPOSITORY / project, patience_s=float("inf")):
        write_config(config)
        steps = [Commands(config, str(project / CONFIG), [], 1).build_data()]
        failure = run_steps(steps, project, project / "steps", project / "logs")
    if failure is not None:
        failed_parts[name] = f"{failure.step} ended with status {failure.status}: {failure.reason}"
        raise TrialError(failed_parts[name])


def resolve(trial: PlannedTrial, data_is_there: bool = True) -> Resolved:
    """The trial with its final number of steps.

    Args:
        data_is_there: false counts encoding as free, for a first look.

    Raises:
        ValueError: its compute cannot be matched, or its data are not built.
    """
    tokens = tokens_to_encode(trial.config) if data_is_there else 0
    reference = trial.reference
    if reference is None:
        return Resolved(trial, planned_flops(trial, tokens), None)
    wanted = planned_flops(reference, tokens_to_encode(reference.config) if data_is_there else 0)
    steps = match_compute(trial, wanted, tokens)
    trial = replace(trial, config=with_steps(trial.config, trial.stages[-1], steps))
    costs = planned_flops(trial, tokens)
    return Resolved(trial, costs, sum(costs.values()) / sum(wanted.values()))


def describe(sweep: Sweep, planned: Sequence[PlannedTrial], chosen: Sequence[PlannedTrial]) -> None:
    """Print what would be run."""
    print(f"{sweep.name}: {sweep.question}\n{len(chosen)} runs in {results_directory(planned)}\n")
    print(f"{'trial':28}{'seed':>5}{'K':>4}{'D':>4}{'bits/token':>12}{'TFLOP':>9}  steps")
    without_data = False
    for trial in chosen:
        try:
            resolved = resolve(trial)
        except NotADatasetError:
            without_data = True
            resolved = resolve(trial, data_is_there=False)
        codec = trial.config.codec
        rate = "" if trial.stages == ("base_lm",) else f"{codec_rate(trial):.1f}"
        steps = ", ".join(f"{stage} {count}" for stage, count in resolved.steps().items())
        matched = "" if resolved.ratio is None else f" = {resolved.ratio:.3f} x {trial.spec.match_compute}"
        if trial.spec.not_run:
            print(f"{trial.name:28}{trial.seed:5}  not run: {trial.spec.not_run}")
            continue
        print(
            f"{trial.name:28}{trial.seed:5}{codec.compression_factor:4}{codec.codebook_levels:4}{rate:>12}"
            f"{sum(resolved.flops.values()) / 1e12:9.2f}  {steps}{matched}"
        )
    if without_data:
        print("\nThe data are not built yet: without the encoding pass; matched steps will change a little.")


def codec_rate(trial: PlannedTrial) -> float:
    """Bits per token of the codes."""
    codec = trial.config.codec
    return sum(math.log2(size) for size in codec.codebook_sizes) / codec.compression_factor


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", required=True, help="sweep file, e.g. configs/sweeps/compression.yaml")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the trials, their steps and their compute"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="TRIAL", help="may stand several times"
    )
    parser.add_argument(
        "--seed",
        action="append",
        default=[],
        type=int,
        metavar="N",
        help="in place of the file's; several times",
    )
    parser.add_argument("--ranks", type=int, default=1, help="processes that train together")
    parser.add_argument(
        "--task-index", type=int, default=0, metavar="i", help="run every n-th trial from the i-th"
    )
    parser.add_argument("--num-tasks", type=int, default=1, metavar="n")
    parser.add_argument("--merge", action="store_true", help="run nothing, make the table of what there is")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings over all trials'")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    os.chdir(REPOSITORY)
    sys.exit(main())
