"""Learning rates and parameter groups."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from launch.config import TrainConfig
from launch.engine import (
    on_all_ranks,
    recompute_activations,
    resolve_precision,
)
from launch.optimizer import create_optimizer, learning_rate_factor, parameter_groups
from rqvae import RQVAE, RQTransformer, RQTransformerConfig, RQVAEConfig
from rqvae.linear_head import LinearHead


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_schedules(schedule: str) -> None:
    train = TrainConfig(
        steps=100, warmup_steps=10, min_learning_rate_ratio=0.1, schedule=schedule, wsd_decay_fraction=0.2
    )
    factors = [learning_rate_factor(train, step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == pytest.approx(1.0)
    assert all(0.1 <= factor <= 1.0 for factor in factors)
    if schedule == "cosine":
        assert factors[55] == pytest.approx(0.55)  # half-way: the middle of 1 and 0.1
        assert factors[-1] < 0.11
    elif schedule == "wsd":
        assert factors[79] == 1.0
        assert factors[90] == pytest.approx(0.1 + 0.9 * 0.5)
    else:
        assert factors[-1] == 1.0


def test_every_trainable_parameter_is_in_one_group() -> None:
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4),
            "backbone": nn.Linear(4, 4),
            "frozen": nn.Linear(4, 4),
            "new": nn.Linear(4, 3),
        }
    )
    model["frozen"].requires_grad_(False)
    groups = parameter_groups(model, model["backbone"].parameters(), TrainConfig(weight_decay=0.3))
    by_name = {group["name"]: group for group in groups}
    assert set(by_name) == {"backbone", "backbone_no_decay", "new", "new_no_decay"}
    assert [id(p) for p in by_name["new"]["params"]] == [id(model["new"].weight)]
    assert by_name["new"]["weight_decay"] == 0.3
    # Embeddings and biases do not decay.
    assert {id(p) for p in by_name["new_no_decay"]["params"]} == {
        id(model["embedding"].weight),
        id(model["new"].bias),
    }
    assert by_name["new_no_decay"]["weight_decay"] == 0.0
    assert sum(len(group["params"]) for group in groups) == 5


def test_muon_takes_the_matrices_of_hidden_layers_only() -> None:
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4),
            "hidden": nn.Linear(4, 4),
            "head": LinearHead(4, 5),
            "conv": nn.Conv1d(4, 4, 1),
        }
    )
    train = TrainConfig(optimizer="muon", muon_learning_rate=0.02, learning_rate=3e-4, gradient_clipping=0)
    groups = {group["name"]: group for group in parameter_groups(model, (), train)}
    assert groups["new_muon"]["params"] == [model["hidden"].weight]
    assert groups["new_muon"]["weight_decay"] == train.weight_decay
    assert {id(p) for p in groups["new"]["params"]} == {id(model["head"].weight), id(model["conv"].weight)}
    optimizer = create_optimizer(list(groups.values()), train)
    by_name = {group["name"]: group for group in optimizer.param_groups}
    assert (by_name["new_muon"]["lr"], by_name["new"]["lr"]) == (0.02, 3e-4)
    assert by_name["new_muon"]["use_muon"]
    assert model["hidden"].weight.use_muon
    assert not model["head"].weight.use_muon


ARCHITECTURE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


@pytest.mark.parametrize("spatial_backbone", [None, {"architecture": ARCHITECTURE}])
def test_recomputing_activations_keeps_fewer_and_changes_no_gradient(spatial_backbone: object) -> None:
    codec_config = RQVAEConfig.model_validate(
        {
            "backbone": {"architecture": ARCHITECTURE},
            "codebook_levels": 2,
            "codebook_size": 8,
            "codebook_dim": 4,
            "latent_dim": 32,
            "latent_head_dim": 16,
        }
    )
    latent_config = RQTransformerConfig.model_validate(
        {
            "compression_factor": 4,
            "codebook_levels": 2,
            "codebook_size": 8,
            "spatial_dim": 32,
            "spatial_layers": 3,
            "depth_dim": 32,
            "depth_layers": 2,
            "head_dim": 16,
            "spatial_backbone": spatial_backbone,
        }
    )
    ids = torch.randint(50, (2, 16))
    for model, inputs in ((RQVAE(codec_config), ids), (RQTransformer(latent_config), ids.view(2, 8, 2) % 8)):
        kept, gradients = [], []
        for _ in range(2):
            sizes: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x
            ):
                loss = model.train()(inputs).loss
            model.zero_grad()
            loss.backward()
            kept.append(sum(sizes))
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            recompute_activations(model)
        assert kept[1] < 0.6 * kept[0]
        for before, after in zip(*gradients, strict=True):
            torch.testing.assert_close(after, before)


def test_precision_without_bf16_hardware_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.engine.multiplies_bf16", lambda: False)
    with pytest.warns(UserWarning, match="fp32 here"):
        assert resolve_precision("auto") == "fp32"
    assert resolve_precision("bf16") == "bf16"
    monkeypatch.setattr("launch.engine.multiplies_bf16", lambda: True)
    assert resolve_precision("auto") == "bf16"


def test_one_rank_s_mistake_is_everybody_s(tmp_path: Path) -> None:
    mp.spawn(_try_to_agree, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    texts = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert texts == ["fine 0; on rank 1: no such shard", "fine 1; no such shard"]


def _try_to_agree(rank: int, directory: str) -> None:
    dist.init_process_group("gloo", f"file://{directory}/rendezvous", rank=rank, world_size=2)
    said = on_all_ranks(lambda: f"fine {rank}")

    def fail_on_rank_one() -> None:
        if rank == 1:
            raise ValueError("no such shard")

    try:
        on_all_ranks(fail_on_rank_one)
    except ValueError as error:
        said += f"; {error}"
    Path(directory, str(rank)).write_text(said)
    dist.destroy_process_group()


def test_a_killed_compilation_does_not_hang_the_next_start(tmp_path: Path) -> None:
    name = "deepspeed_shm_comm"
    compiled = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / name
    if compiled.is_dir():  # spares compiling it again
        shutil.copytree(compiled, tmp_path / name)
    (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / name / "lock").touch()
    result = subprocess.run(
        [sys.executable, "-c", "from launch.engine import build_shared_memory_operator as build; build()"],
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[3],
        timeout=300,
        check=False,
    )
    assert result.returncode == 0
    assert not (tmp_path / name / "lock").exists()
