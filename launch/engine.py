"""Processes, precision and the DeepSpeed engine."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.cpp_extension import get_default_build_root
from transformers import PreTrainedModel

# DeepSpeed picks its accelerator on import.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# It compiles its operators with the `ninja` installed beside this interpreter, activated environment or not.
os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
# Where it keeps them, one place for each environment: two in turns would compile them anew each time.
os.environ.setdefault(
    "TORCH_EXTENSIONS_DIR",
    f"{get_default_build_root()}/rqvae-{hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]}",
)

import deepspeed
from deepspeed.comm.torch import build_shm_op

from launch.config import TrainConfig
from launch.deepspeed_config import deepspeed_config
from launch.optimizer import create_optimizer
from rqvae.layers import TransformerBlock

Result = TypeVar("Result")


def start_process_group() -> tuple[int, int, torch.device]:
    """Join the other processes, however they were started: `deepspeed`, `torchrun`, `srun`, or alone.

    Returns:
        rank, world size, and this process's device.
    """
    alone = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    if "RANK" not in os.environ:
        for name, value in alone.items():
            os.environ.setdefault(name, value)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        build_shared_memory_operator()
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False
    )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if not on_gpu:
        # DeepSpeed's collectives on a CPU have a buffer of 66 MiB per rank and port, in memory for good unless it is
        # removed. Once all have opened it nobody needs its name, and even `kill -9` leaves nothing behind.
        dist.barrier()
        names = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK")]
        shared = "_".join(["deepspeed_allreduce_buffer", str(os.getuid()), *names])
        Path("/dev/shm", shared).unlink(missing_ok=True)  # noqa: S108
    return dist.get_rank(), dist.get_world_size(), device


def build_shared_memory_operator() -> None:
    """Compile DeepSpeed's collectives for a CPU, if that is to be done, one process of this machine at a time.

    A compilation that is killed leaves torch's lock file behind, and every later start would wait for it for
    ever. The kernel's own lock goes with its process, so whoever holds that knows the file to be a left-over.
    """
    builds = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    builds.mkdir(parents=True, exist_ok=True)
    with (builds / "building.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (builds / "deepspeed_shm_comm" / "lock").unlink(missing_ok=True)
        build_shm_op()


def stop_process_group() -> None:
    """Leave together, so that no rank tears the connection down under another."""
    dist.barrier()
    dist.destroy_process_group()


def on_all_ranks(action: Callable[[], Result]) -> Result:
    """What `action` returns here, or the first rank's error everywhere.

    A rank that stops alone would leave the others waiting for it.

    Raises:
        ValueError: `action` raised one on some rank.
    """
    result, problem = None, None
    try:
        result = action()
    except ValueError as error:
        problem = str(error)
        if not dist.is_initialized():
            raise
    if not dist.is_initialized():
        return result  # type: ignore[return-value]
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for rank, text in enumerate(problems):
        if text is not None:
            raise ValueError(text if rank == dist.get_rank() else f"on rank {rank}: {text}")
    return result  # type: ignore[return-value]


def multiplies_bf16() -> bool:
    """The hardware multiplies bf16 natively. Elsewhere torch emulates it (9x slower than fp32 on AVX2)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve_precision(wanted: str, rank: int = 0) -> Literal["bf16", "fp32"]:
    """`auto` as what this machine does well; the others as they are."""
    if wanted == "auto":
        if multiplies_bf16():
            return "bf16"
        if rank == 0:
            warnings.warn(
                "train.precision: auto means fp32 here, because this hardware has no bf16 arithmetic; "
                "set train.precision=bf16 to emulate it, slowly",
                stacklevel=2,
            )
        return "fp32"
    return "bf16" if wanted == "bf16" else "fp32"


def recompute_activations(model: nn.Module) -> None:
    """Keep only every layer's input in the forward pass, in backbones and in our own stacks."""
    for module in model.modules():
        if isinstance(module, TransformerBlock):
            module.gradient_checkpointing = True
        elif isinstance(module, PreTrainedModel):
            module.gradient_checkpointing_enable({"use_reentrant": False})


def build_engine(
    model: nn.Module, groups: list[dict[str, Any]], train: TrainConfig, precision: Literal["bf16", "fp32"]
) -> deepspeed.DeepSpeedEngine:
    """The model under DeepSpeed, with the optimizer of the configuration."""
    if train.activation_checkpointing:
        recompute_activations(model)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=create_optimizer(groups, train),
        config=deepspeed_config(train, precision, dist.get_world_size()),
    )
    if train.torch_compile:
        if engine.is_deepcompile_enabled() and not torch.cuda.is_available():
            raise ValueError(
                "train.deepspeed.compile.deepcompile: needs a GPU; without it compile at zero_stage 0, 1 or 2"
            )
        engine.compile()
    return engine


def check_deepspeed_config(config: dict[str, Any]) -> None:
    """Let DeepSpeed's own models judge what `train.deepspeed` passed on.

    Raises:
        ValueError: what DeepSpeed says.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(config)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"DeepSpeed refuses the configuration (train.deepspeed?): {error}") from error
