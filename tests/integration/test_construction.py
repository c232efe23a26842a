"""A model built by one rank for all is bit for bit the one that every rank builds, at a lower peak of memory."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from launch.config import TrainConfig
from tests.integration.conftest import free_port

pytestmark = pytest.mark.slow

WIDTH, LAYERS = 3072, 8  # matrices of 36 MiB: below 32, glibc keeps what is freed in pieces


class Model(nn.Module):
    """Ties weights, has buffers of both kinds, and one in fp32 that bf16 would damage."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.embedding, self.head = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("drawn", torch.randn(1000))
        self.register_buffer("kept", torch.arange(5.0) / 3, persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_rank_builds_for_all(precision: str, tmp_path: Path) -> None:
    mp.spawn(_build, (str(tmp_path), free_port(), precision), nprocs=2)  # type: ignore[no-untyped-call]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for found in ranks:
        assert found["differing"] == []
        assert found["dtypes"] == [torch.float32, torch.float32]
    whole = 4 * (LAYERS * (WIDTH + 1) * WIDTH + 50 * WIDTH)
    # Its half, one layer, and the 66 MiB that DeepSpeed takes for collectives on a CPU.
    assert ranks[1]["peak_split"] < 0.6 * whole + (66 << 20)
    assert ranks[1]["peak_whole"] > 0.95 * whole


def _build(rank: int, directory: str, port: int, precision: Literal["fp32", "bf16"]) -> None:
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    from launch.construction import build_split
    from launch.deepspeed_config import deepspeed_config
    from launch.engine import build_engine, start_process_group, stop_process_group
    from launch.optimizer import parameter_groups

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    _, _, device = start_process_group()
    train = TrainConfig(global_batch_size=2, param_persistence_threshold=0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.distributed.barrier()
    before = peak()
    torch.manual_seed(3)
    config = deepspeed_config(train, precision, 2)
    split: Any = build_split(Model, lambda model: None, config, dtype, device)
    peak_split = peak() - before
    torch.manual_seed(3)
    before = peak()
    expected = Model()
    peak_whole = peak() - before + peak_split
    build_engine(split, parameter_groups(split, (), train), train, precision)
    import deepspeed

    differing = []
    for (name, parameter), (_, whole) in zip(
        split.named_parameters(), expected.named_parameters(), strict=True
    ):
        with deepspeed.zero.GatheredParameters([parameter]):
            if not torch.equal(parameter, whole.to(dtype)):
                differing.append(name)
    for (name, buffer), (_, whole_buffer) in zip(
        split.named_buffers(), expected.named_buffers(), strict=True
    ):
        if not torch.equal(buffer, whole_buffer):
            differing.append(name)
    if split.head.weight is not split.embedding.weight:
        differing.append("tied weights")
    torch.save(
        {
            "differing": differing,
            "dtypes": [buffer.dtype for buffer in split.buffers()],
            "peak_split": peak_split,
            "peak_whole": peak_whole,
        },
        f"{directory}/{rank}.pt",
    )
    stop_process_group()
