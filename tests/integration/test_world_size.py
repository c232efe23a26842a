"""A run saved on 2 ranks goes on, with the same numbers, on another number of them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tests.integration.conftest import NANO, free_port, launcher, run

BATCH, LENGTH, SAVED_AT, NUM_STEPS = 12, 16, 3, 5
CASES = [
    (3, "frozen", "fp32"), (3, "full", "fp32"), (1, "full", "fp32"), (2, "frozen", "fp32"), (3, "frozen", "bf16"),
    (2, "full", "bf16"),
]  # fmt: skip


def batch_of(step: int) -> dict[str, Tensor]:
    """The same samples of a step on any number of ranks."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, 320, (BATCH, LENGTH), generator=generator)
    return {
        "input_ids": tokens,
        "document_ids": torch.ones_like(tokens),
        "sample_index": torch.arange(step * BATCH, (step + 1) * BATCH),
    }


def build(stage: int, phase_name: str, precision: Any) -> tuple[Any, Any, Any]:
    """Task, configuration and engine as `launch/train.py` makes them."""
    from launch import engine as engines
    from launch import tasks
    from launch.config import load_config
    from launch.optimizer import parameter_groups

    overrides = [f"train.zero_stage={stage}", f"train.global_batch_size={BATCH}", "train.micro_batch_size=1"]
    config = load_config(NANO, stage="rqvae", overrides=[*overrides, "train.quantizer_warmup_steps=0"])
    task = tasks.RQVAETask(config)
    torch.manual_seed(0)
    model = task.create_model()
    phase = next(phase for phase in task.phases() if phase.name == phase_name)
    task.set_phase(model, phase)
    groups = parameter_groups(model, task.backbone_parameters(model), config.train)
    return task, config, engines.build_engine(model, groups, config.train, precision)


def steps(task: Any, engine: Any, first: int, last: int) -> Iterator[float]:
    """Train; yields the loss of each step."""
    from launch.window import joined, split

    rank, world_size = dist.get_rank(), dist.get_world_size()
    for step in range(first, last):
        for group in engine.optimizer.param_groups:
            group["lr"] = 3e-3
        share = BATCH // world_size
        batch = {name: value[rank * share : (rank + 1) * share] for name, value in batch_of(step).items()}
        engine.train()
        if step == 0:
            vectors = torch.randn(200, 8, generator=torch.Generator().manual_seed(rank))
            engine.module.quantizer.initialize(vectors, 0)
        total = torch.zeros(())
        for micro_batch in split(batch, 1):
            out = task.forward(engine, micro_batch, torch.tensor(float(LENGTH)), step)
            total += out.loss.detach() / BATCH
            engine.backward(out.loss)
            engine.step()
        task.after_step(engine.module, step)
        yield float(joined(total))


def whole_state(engine: Any) -> dict[str, Tensor]:
    """Every parameter, moment and buffer, gathered on all ranks by DeepSpeed's own functions."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() < 3:
        # DeepSpeed 0.19.8 links the moments after the first group's first step, when the others have none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    state = {f"buffer {name}": buffer.clone() for name, buffer in engine.module.named_buffers()}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            state[f"parameter {name}"] = parameter.detach().clone()
        if parameter.requires_grad:
            state[f"master {name}"] = safe_get_full_fp32_param(parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"{key} {name}"] = safe_get_full_optimizer_state(parameter, key)
    for index, group in enumerate(engine.optimizer.param_groups):
        state[f"group {index}"] = torch.tensor([group["weight_decay"], *group["betas"], group["eps"]])
    return state


def run_rank(rank: int, world_size: int, port: int, directory: str) -> None:
    """Save (2 ranks), or load and compare (other numbers); then train on and write down the losses."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    from launch import checkpoints, resume
    from launch.engine import start_process_group, stop_process_group

    torch.set_num_threads(1)
    start_process_group()
    result: dict[str, Any] = {}
    for stage, phase, precision in CASES:
        root = Path(directory) / f"{stage}-{phase}-{precision}"
        task, config, engine = build(stage, phase, precision)
        if world_size == 2:
            list(steps(task, engine, 0, SAVED_AT))
            state = checkpoints.RunState(SAVED_AT, phase, {}, resume.run_hash(config, precision))
            checkpoints.Checkpointer(root, config.train).save(engine, state, {"tokens": 10.0 + rank})
            expected = whole_state(engine)
            if rank == 0:
                torch.save(expected, root / "expected.pt")
        else:
            rank_state = resume.load(engine, checkpoints.require_newest(root))
            total = torch.tensor(rank_state["tokens"])
            dist.all_reduce(total)
            assert float(total) == 21.0
            actual, expected = whole_state(engine), torch.load(root / "expected.pt")
            assert actual.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(actual[name], tensor), (root.name, name)
        result[root.name] = list(steps(task, engine, SAVED_AT, NUM_STEPS))
    if rank == 0:
        (Path(directory) / f"losses-{world_size}.json").write_text(json.dumps(result))
    stop_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world_size")
    mp.spawn(run_rank, args=(2, free_port(), str(directory)), nprocs=2)
    return directory


@pytest.mark.parametrize(
    "world_size", [1, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_state_is_bitwise_and_the_next_losses_agree(saved: Path, world_size: int) -> None:
    mp.spawn(run_rank, args=(world_size, free_port(), str(saved)), nprocs=world_size)
    expected = json.loads((saved / "losses-2.json").read_text())
    actual = json.loads((saved / f"losses-{world_size}.json").read_text())
    assert actual.keys() == expected.keys()
    for case, losses in expected.items():
        assert len(set(losses)) == NUM_STEPS - SAVED_AT
        assert actual[case] == pytest.approx(losses, rel=1e-5 if case.endswith("fp32") else 1e-2), case


def settings(run_root: Path, name: str, data: list[str]) -> list[str]:
    """Arguments of a run that keeps all its checkpoints."""
    options = ["--config", str(NANO), "--stage", "rqvae", f"run_root={run_root}", f"name={name}"]
    return [*options, "tracking.wandb=disabled", "train.keep_last=10", "train.eval_every=100", *data]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, nano_data: list[str]) -> Path:
    """The directory of a run on 2 ranks that was never interrupted."""
    root = tmp_path_factory.mktemp("whole")
    result = run([*launcher(2), *settings(root, "whole", nano_data)])
    assert result.returncode == 0, result.stdout + result.stderr
    return root / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("kept", [5, 15], ids=["frozen", "full"])
@pytest.mark.parametrize("world_size", [1, 4])
def test_training_goes_on_by_itself(
    tmp_path: Path, whole_run: Path, nano_data: list[str], kept: int, world_size: int
) -> None:
    """The same command on another number of ranks: the metrics of the run that was never interrupted."""
    shutil.copytree(whole_run, tmp_path / "cut")
    for directory in (tmp_path / "cut/rqvae/checkpoints").glob("step-*"):
        if int(directory.name.removeprefix("step-")) > kept:
            shutil.rmtree(directory)
    command = launcher(world_size) if world_size > 1 else [sys.executable, "launch/train.py"]
    resumed = run([*command, *settings(tmp_path, "cut", nano_data), "train.micro_batch_size=1"])
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    files = (whole_run / "rqvae/metrics.jsonl", tmp_path / "cut/rqvae/metrics.jsonl")
    expected, actual = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    places = [
        [(line["step"], line["split"], line["phase"]) for line in lines] for lines in (expected, actual)
    ]
    assert places[0] == places[1]
    for before, after in zip(expected, actual, strict=True):
        for key in ("loss", "token_accuracy", "gradient_norm", "commitment_loss"):
            if key in before:
                assert after[key] == pytest.approx(before[key], rel=1e-5, abs=1e-7), (before["step"], key)
