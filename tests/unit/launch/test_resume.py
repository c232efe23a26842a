"""Which checkpoint a configuration may go on from, and where its tensors lie in the files."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from launch.checkpoints import Checkpoint, RunState
from launch.config import RunConfig, load_config
from launch.resume import refuse_other_run, run_hash, stored_config
from launch.shards import stage3_pieces, stage12_pieces

NANO = Path(__file__).parents[2] / "integration/nano.yaml"


def config_with(*overrides: str) -> RunConfig:
    return load_config(NANO, stage="rqvae", overrides=list(overrides))


def checkpoint_of(config: RunConfig, with_config: bool = True) -> Checkpoint:
    stored = stored_config(config, "fp32") if with_config else None
    state = RunState(10, "full", {"fingerprint": "f" * 64}, run_hash(config, "fp32"), stored)
    return Checkpoint(Path("step-00000010"), state, 2, 3)


def refuse(
    checkpoint: Checkpoint | None, config: RunConfig, precision: str = "fp32", data: str = "f"
) -> None:
    refuse_other_run(Path("run"), checkpoint, config, precision, data * 64)


def test_what_changes_no_number_may_change() -> None:
    found = checkpoint_of(config_with())
    refuse(found, config_with())
    refuse(found, config_with("train.keep_last=7", "train.micro_batch_size=1", "name=other"))
    refuse(None, config_with("seed=3"))


def test_differences_are_listed_field_by_field() -> None:
    found = checkpoint_of(config_with())
    with pytest.raises(ValueError, match="another configuration") as caught:
        refuse(found, config_with("seed=3", "train.learning_rate=1.0e-3", "codec.codebook_size=16"), "bf16")
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert "seed: 0 in the checkpoint, 3 now" in lines
    assert "train.learning_rate: 0.003 in the checkpoint, 0.001 now" in lines
    assert "precision: fp32 in the checkpoint, bf16 now" in lines
    assert sum(" now" in line for line in lines) == 4


def test_a_setting_that_older_checkpoints_do_not_know_is_at_its_default() -> None:
    config = config_with()
    found = checkpoint_of(config)
    assert found.state.config is not None
    del found.state.config["config"]["train"]["frozen_steps"]
    changed = Checkpoint(
        found.directory, RunState(10, "full", found.state.loader, "old", found.state.config), 2, 3
    )
    refuse(changed, config_with("train.frozen_steps=0", "train.switch_warmup_steps=3"))
    with pytest.raises(ValueError, match="frozen_steps: 0 in the checkpoint, 7 now"):
        refuse(changed, config)


def test_older_checkpoints_without_configuration_and_other_data_are_refused() -> None:
    found = checkpoint_of(config_with(), with_config=False)
    refuse(found, config_with())
    with pytest.raises(ValueError, match=r"config\.yaml"):
        refuse(found, config_with("seed=3"))
    with pytest.raises(ValueError, match="Restore the data"):
        refuse(found, config_with(), data="e")


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_pieces_cover_every_parameter_once(world_size: int) -> None:
    shapes = [{"a": torch.Size([7]), "b": torch.Size([2, 2])}, {"c": torch.Size([1])}]
    for rank_pieces in zip(
        *(stage3_pieces(shapes, rank, world_size) for rank in range(world_size)), strict=True
    ):
        for index in range(len(rank_pieces[0])):
            pieces = [group[index] for group in rank_pieces]
            assert pieces[0].start == 0
            assert all(before.stop == after.start for before, after in itertools.pairwise(pieces))
    assert stage3_pieces(shapes, world_size - 1, world_size)[0][0].stop == 7

    numel = {"a": 7, "b": 4}
    size = -(-11 // world_size)
    fragments = []
    for rank in range(world_size):
        group, start = {}, 0
        for name, count in numel.items():
            low, high = max(start, rank * size), min(start + count, (rank + 1) * size)
            if low < high:
                group[name] = SimpleNamespace(start=low - rank * size, numel=high - low)
            start += count
        fragments.append([group])
    found = [piece for rank in range(world_size) for piece in stage12_pieces(fragments, rank)[0]]
    for name, count in numel.items():
        assert sum(piece.stop - piece.start for piece in found if piece.name == name) == count
        assert max(piece.stop for piece in found if piece.name == name) == count
