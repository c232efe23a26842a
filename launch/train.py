"""Train one stage. Start here: this page is the whole loop.

    deepspeed --num_accelerators 2 launch/train.py --config configs/tiny.yaml --stage rqvae [a.b=value ...]

`torchrun`, `srun` (one task per GPU) and plain `python` (one process) start it just as well. A run that was
stopped or killed goes on from its newest complete checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.progress import Progress
from launch import checkpoints, resume, run_status, tasks
from launch.checkpoints import Checkpointer
from launch.config import RunConfig, check_world_size, load_config
from launch.deepspeed_config import deepspeed_config
from launch.dry_run import dry_run
from launch.engine import (
    check_deepspeed_config,
    on_all_ranks,
    resolve_precision,
    start_process_group,
    stop_process_group,
)
from launch.environment import capture_environment
from launch.gradients import norm_metrics, squared_norms, step_without_update
from launch.guards import Guards, UnhealthyError
from launch.launcher import die_with_launcher
from launch.loading import open_loader
from launch.optimizer import set_learning_rates
from launch.paths import run_directory
from launch.phases import Phases
from launch.run_lock import RunLock
from launch.speed import Speedometer
from launch.stop import StopRequest
from launch.task import Batch, Dataset, Phase, Task
from launch.tracking import Tracker
from launch.validation import validate
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
    die_with_launcher()
    rank, world_size, device = start_process_group()
    assert config.stage is not None
    directory = run_directory(config, config.stage)
    try:
        lock = on_all_ranks(lambda: RunLock(directory) if rank == 0 else None)
        with lock or nullcontext():
            try:
                status = train(config, directory, rank, world_size, device)
            except BaseException as error:
                run_status.failed(directory, rank, error)
                raise
            stop_process_group()
            return status
    except ValueError as error:  # mistakes of the user: the message says it all
        print(f"[rank {rank}] error: {error}", file=sys.stderr, flush=True)
        return 2
    except (checkpoints.CheckpointError, UnhealthyError) as error:  # all ranks raise the same
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


def train(config: RunConfig, directory: Path, rank: int, world_size: int, device: torch.device) -> int:
    """All phases of a stage, from wherever the run stands."""
    if rank == 0:
        run_status.running(directory)
    check_world_size(config, world_size)
    precision = resolve_precision(config.train.precision, rank)
    check_deepspeed_config(deepspeed_config(config.train, precision, world_size))
    assert config.stage is not None
    task = tasks.create_task(config)
    checkpointer = Checkpointer(directory / "checkpoints", config.train)
    resumed = checkpoints.start_from(checkpointer.root)

    def open_data() -> Dataset:
        dataset = task.dataset("train")
        resume.refuse_other_run(directory, resumed, config, precision, dataset.fingerprint)
        if resumed is None:
            task.check_data(dataset)
            task.dataset("validation")  # which may be empty or missing: not only after `eval_every` steps
        return dataset

    dataset = on_all_ranks(open_data)
    speed = Speedometer(config, precision, device, world_size)
    environment: dict[str, Any] = {}
    if rank == 0:
        (directory / "config.yaml").write_text(config.to_yaml())
        environment = capture_environment(directory)
        for note in (*task.notes(), speed.note):
            if note is not None:
                print(note, flush=True)
        print(f"Going on from step {resumed.state.step}" if resumed else "Starting afresh", flush=True)
    dist.barrier()
    step = resumed.state.step if resumed else 0
    tracker = Tracker(directory, config, config.stage, rank, resume_step=step, environment=environment)
    stop = StopRequest(directory, config.train.max_time_s)
    guards = Guards(config.train.guards, rank, resumed.state.guards if resumed else None)
    phases = Phases(task, precision, device)

    stopped: str | None = None
    for phase in task.phases():
        if step >= phase.end and phase.end < config.train.steps:
            continue  # an earlier phase, done
        engine, rank_state = phases.enter(phase, resumed)
        window = Window(device)
        if rank_state is not None:
            window.load_state(rank_state)

        loader = open_loader(
            config, dataset, rank, world_size, None if resumed is None else resumed.state.loader, device
        )
        progress = Progress(phase.end, f"{config.stage} ({phase.name})", initial=step, shown=rank == 0)
        while step < phase.end and stopped is None:
            _, batch = window.timed("data_wait_s", loader.__next__)
            micro_batches = split(to_device(batch, device), config.train.micro_batch_size)
            num_tokens = joined(num_real_tokens(batch, device)) / (world_size * len(micro_batches))
            task.before_step(engine, dataset, step, rank, world_size)
            if task.begins_new_loss(step):
                guards.forget_losses()
            learning_rates = set_learning_rates(engine, config.train, step, phase)
            engine.train()
            step_loss = torch.zeros((), dtype=torch.float64, device=device)
            for micro_batch in micro_batches[:-1]:
                step_loss += forward_backward(task, engine, micro_batch, num_tokens, step, window)
                engine.step()
            step_loss += forward_backward(task, engine, micro_batches[-1], num_tokens, step, window)
            mean_loss, squares = step_loss / len(micro_batches), squared_norms(engine)
            decision = guards.judge(step, mean_loss, squares, stop.reason(), batch["sample_index"])
            stopped = decision.stop
            if decision.skip:
                step_without_update(engine)
                task.after_skipped_step(engine.module)
            else:
                engine.step()
                task.after_step(engine.module, step)
            step += 1
            progress.update()

            if step % config.train.log_every == 0 or step == phase.end:
                sums, times = window.close()
                metrics = task.metrics(sums) | learning_rates | norm_metrics(engine, decision.squared_norms)
                metrics |= speed.metrics(phase, sums, times) | loader.metrics() | guards.metrics()
                codebooks = task.state_metrics(engine.module, step)
                record(tracker, phase, "train", step, metrics | codebooks | times)
                progress.update(0, loss=metrics["loss"])
                guards.check_codebooks(step, codebooks)
            if step % config.train.eval_every == 0 or step == config.train.steps:
                with window.outside():
                    found = validate(task, engine, config, rank, world_size, device, step - 1)
                    record(tracker, phase, "validation", step, found.metrics)
                    if found.code_counts is not None:
                        tracker.log_code_counts(step, found.code_counts.long().tolist())
                    tracker.log_reconstructions(step, found.reconstructions)
            is_needed = step == phase.end or stopped is not None
            if is_needed or checkpointer.due(step):
                tracker.sync()
                state = checkpoints.RunState(
                    step,
                    phase.name,
                    loader.state(),
                    resume.run_hash(config, precision),
                    resume.stored_config(config, precision),
                    guards.state(),
                )
                with window.outside("checkpoint_s"):
                    checkpointer.save(engine, state, window.state(), is_needed)
        loader.close()
        progress.close()
        resumed = checkpoints.start_from(checkpointer.root)
        phases.leave()
        del engine  # room for that of the next phase
        if stopped is not None:
            break
    tracker.close()
    if rank == 0:
        (directory / "STOP").unlink(missing_ok=True)
        if stopped is not None:
            run_status.stopped(directory, step, stopped)
        else:
            run_status.finished(directory, step)
        say_what_next(config, directory, stopped, step)
    return EXIT_STOPPED if stopped is not None else 0


def forward_backward(
    task: Task,
    engine: Any,
    micro_batch: Batch,
    num_tokens: torch.Tensor,
    step: int,
    window: Window,
) -> torch.Tensor:
    """Gradients of one micro-batch; returns its loss."""
    out = task.forward(engine, micro_batch, num_tokens, step)
    window.add(out.sums)
    engine.backward(out.loss)
    return out.loss.detach()


def record(tracker: Tracker, phase: Phase, split_name: str, step: int, metrics: Mapping[str, float]) -> None:
    """One line of metrics.jsonl."""
    tracker.log({"phase": phase.name, "split": split_name, "step": step, **metrics})


def say_what_next(config: RunConfig, directory: Path, stopped: str | None, step: int) -> None:
    """Where the result is and which command follows."""
    if stopped is not None:
        print(f"Stopped at step {step} ({stopped}). Give the same command again to continue.", flush=True)
    else:
        models = directory.parent / "model"
        destination = models if config.stage == "joint" else models / str(config.stage)
        print(
            f"Finished {step} steps: {directory}\n"
            f"Next: python launch/convert_checkpoint.py {directory} {destination} --to safetensors",
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
