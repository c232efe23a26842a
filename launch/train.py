"""Train one stage. Start here: this page is the whole loop.

    deepspeed --num_accelerators 2 launch/train.py --config configs/tiny.yaml --stage rqvae [a.b=value ...]

`torchrun`, `srun` (one task per GPU) and plain `python` (one process) start it just as well. A run that was
stopped or killed goes on from its newest complete checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline import CodeDataset, StepLoader, TokenDataset
from launch import checkpoints, tasks
from launch.config import RunConfig, check_world_size, load_config
from launch.deepspeed_config import deepspeed_config
from launch.dry_run import dry_run
from launch.engine import (
    build_engine,
    check_deepspeed_config,
    on_all_ranks,
    resolve_precision,
    start_process_group,
    stop_process_group,
)
from launch.environment import capture_environment
from launch.optimizer import parameter_groups, set_learning_rates
from launch.paths import run_directory
from launch.progress import Progress
from launch.stop import StopRequest, agree
from launch.tracking import Tracker
from launch.window import Window, joined, num_real_tokens, split, to_device

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request with a complete checkpoint; start again to continue


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, run, close. Returns the exit status."""
    args = parse_arguments(arguments)
    try:
        config = load_config(args.config, stage=args.stage, overrides=args.overrides)
        if args.dry_run:
            return dry_run(config, args.world_size)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rank, world_size, device = start_process_group()
    try:
        status = train(config, rank, world_size, device)
    except ValueError as error:  # mistakes of the user: the message says it all
        print(f"[rank {rank}] error: {error}", file=sys.stderr, flush=True)
        return 2
    stop_process_group()
    return status


def train(config: RunConfig, rank: int, world_size: int, device: torch.device) -> int:
    """All phases of a stage, from wherever the run stands."""
    check_world_size(config, world_size)
    precision = resolve_precision(config.train.precision, rank)
    check_deepspeed_config(deepspeed_config(config.train, precision, world_size))
    assert config.stage is not None
    task = tasks.TASKS[config.stage](config)
    directory = run_directory(config, config.stage)
    run_hash = checkpoints.run_hash(config, precision)
    resumed = checkpoints.newest(directory / "checkpoints")

    def open_data() -> TokenDataset | CodeDataset:
        dataset = task.dataset("train")
        checkpoints.refuse_other_run(directory, resumed, run_hash, dataset.fingerprint)
        if resumed is None:
            task.check_data(dataset)
        return dataset

    dataset = on_all_ranks(open_data)
    environment: dict[str, Any] = {}
    if rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(config.to_yaml())
        environment = capture_environment(directory)
        for note in task.notes():
            print(note, flush=True)
    dist.barrier()
    step = resumed.state.step if resumed else 0
    tracker = Tracker(directory, config, config.stage, rank, resume_step=step, environment=environment)
    stop = StopRequest(directory, config.train.max_time_s)

    stopped: str | None = None
    for phase in task.phases():
        if step >= phase.end and phase.end < config.train.steps:
            continue  # an earlier phase, done
        # A new engine per phase: what is trainable must never change on a live ZeRO-3 engine.
        torch.manual_seed(config.seed)
        model = task.create_model()
        same_phase = resumed is not None and resumed.state.phase == phase.name
        if resumed is None:
            task.load_initial_weights(model)
        elif not same_phase:
            tasks.load_state(model, checkpoints.consolidated_state(resumed), resumed.directory)
        task.set_phase(model, phase)
        groups = parameter_groups(model, task.backbone_parameters(model), config.train)
        engine = build_engine(model, groups, config.train, precision)
        window = Window(device)
        if resumed is not None and same_phase:
            window.load_state(checkpoints.load(engine, resumed))

        loader = StepLoader(
            dataset,
            global_batch_size=config.train.global_batch_size,
            rank=rank,
            world_size=world_size,
            seed=config.seed,
            start_step=step,
            num_workers=config.train.num_workers,
        )
        progress = Progress(phase.end, f"{config.stage} ({phase.name})", initial=step, rank=rank)
        while step < phase.end and stopped is None:
            _, batch = window.timed("data_wait_s", loader.__next__)
            micro_batches = split(to_device(batch, device), config.train.micro_batch_size)
            num_tokens = joined(num_real_tokens(batch, device)) / (world_size * len(micro_batches))
            task.before_step(engine, dataset, step, rank, world_size)
            learning_rates = set_learning_rates(engine, config.train, step, phase.start)
            engine.train()
            step_loss = torch.zeros((), dtype=torch.float64, device=device)
            for index, micro_batch in enumerate(micro_batches):
                out = task.forward(engine, micro_batch, num_tokens, step)
                step_loss += out.loss.detach()
                window.add(out.sums)
                engine.backward(out.loss)
                if index + 1 == len(micro_batches):
                    stopped = agree(step_loss, stop.reason(), step, rank, batch["sample_index"])
                engine.step()
            task.after_step(model, step)
            step += 1
            progress.update()

            if step % config.train.log_every == 0 or step == phase.end:
                sums, times = window.close()
                metrics = task.metrics(sums) | {
                    **learning_rates,
                    "gradient_norm": float(engine.get_global_grad_norm() or 0.0),
                    "tokens_per_s": float(sums["tokens"]) / times["window_s"],
                }
                record(tracker, phase, "train", step, metrics | task.state_metrics(model) | times)
                progress.update(0, loss=metrics["loss"])
            if step % config.train.eval_every == 0 or step == config.train.steps:
                validation = validate(task, engine, config, rank, world_size, device, step - 1)
                record(tracker, phase, "validation", step, validation)
                window.skip_time()
            if step % config.train.checkpoint_every == 0 or step == phase.end or stopped is not None:
                tracker.sync()
                state = checkpoints.RunState(step, phase.name, loader.state(), run_hash)
                checkpoints.save(
                    engine, directory / "checkpoints", state, window.state(), config.train.keep_last
                )
                window.skip_time()
        loader.close()
        progress.close()
        resumed = checkpoints.newest(directory / "checkpoints")
        del engine, model, groups  # room for those of the next phase
        if stopped is not None:
            break
    tracker.close()
    if rank == 0:
        (directory / "STOP").unlink(missing_ok=True)
        say_what_next(config, directory, stopped, step)
    return EXIT_STOPPED if stopped is not None else 0


def validate(
    task: tasks.Task,
    engine: Any,
    config: RunConfig,
    rank: int,
    world_size: int,
    device: torch.device,
    step: int,
) -> dict[str, float]:
    """Metrics over the first samples of the validation split, the same number of passes on every rank."""
    dataset = task.dataset("validation")
    total = min(config.train.eval_samples, len(dataset))
    window = Window(device)
    engine.eval()
    size = config.train.micro_batch_size
    with torch.no_grad():
        for start in range(0, total, size * world_size):
            first = start + rank * size
            indices = [min(index, total - 1) for index in range(first, first + size)]
            batch = to_device(dataset.read(indices), device)
            # A rank beyond the end takes part with padding, which counts for nothing.
            beyond = torch.arange(first, first + size, device=device) >= total
            batch["document_ids"] = batch["document_ids"].masked_fill(beyond[:, None], 0)
            window.add(task.forward(engine, batch, torch.ones((), device=device), step).sums)
    sums, _ = window.close()
    return task.metrics(sums)


def record(
    tracker: Tracker, phase: tasks.Phase, split_name: str, step: int, metrics: Mapping[str, float]
) -> None:
    """One line of metrics.jsonl."""
    tracker.log({"phase": phase.name, "split": split_name, "step": step, **metrics})


def say_what_next(config: RunConfig, directory: Path, stopped: str | None, step: int) -> None:
    """Where the result is and which command follows."""
    if stopped is not None:
        print(f"Stopped at step {step} ({stopped}). Give the same command again to continue.", flush=True)
    else:
        print(
            f"Finished {step} steps: {directory}\n"
            f"Next: python launch/convert_checkpoint.py {directory} "
            f"{directory.parent / 'model' / str(config.stage)} --to safetensors",
            flush=True,
        )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file, e.g. configs/tiny.yaml")
    parser.add_argument("--stage", required=True, choices=sorted(tasks.TASKS))
    parser.add_argument("--dry-run", action="store_true", help="check and print everything, train nothing")
    parser.add_argument("--world-size", type=int, default=1, help="number of ranks assumed by --dry-run")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings over the file's")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
