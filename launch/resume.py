"""Going on from a checkpoint: is it of this run, and bring the engine to its state, on any number of ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor

from launch.checkpoints import Checkpoint, rank_file
from launch.config import RunConfig
from launch.shards import Piece, ShardedState, stage3_pieces, stage12_pieces

# What changes no number, or by rounding only, may differ between two starts of a run.
_FREE = {
    "log_every",
    "checkpoint_every",
    "checkpoint_every_s",
    "keep_last",
    "keep_every",
    "on_checkpoint_failure",
    "num_workers",
    "worker_kind",
    "max_time_s",
    "precision",  # compared as resolved
    "micro_batch_size",  # another number of ranks may need another
    "communication",
    "offload_pin_memory",
    "guards",  # may be what a stopped run goes on with
}


def identity(config: RunConfig, precision: str) -> dict[str, Any]:
    """Everything that changes a run's numbers."""
    sections = config.model_dump(mode="json", include={"stage", "seed", "codec", "latent_model"})
    train = config.train.model_dump(mode="json", exclude=_FREE)
    if train["streaming"] is not None:
        del train["streaming"]["url"]  # the data's place is not their content
    return {**sections, "data": config.data.run_values(), "train": train, "precision": precision}


def run_hash(config: RunConfig, precision: str) -> str:
    """Hash of `identity`."""
    return hashlib.sha256(json.dumps(identity(config, precision), sort_keys=True).encode()).hexdigest()


def stored_config(config: RunConfig, precision: str) -> dict[str, Any]:
    """What a checkpoint keeps of the configuration, for `refuse_other_run`."""
    return {"config": config.model_dump(mode="json", exclude={"stages"}), "precision": precision}


def refuse_other_run(
    run_directory: Path, checkpoint: Checkpoint | None, config: RunConfig, precision: str, fingerprint: str
) -> None:
    """A checkpoint is continued only by the configuration and on the data that it was written with.

    Raises:
        ValueError: it was written by another configuration (lists what differs), or the data changed since.
    """
    if checkpoint is None:
        return
    differences = _differences(checkpoint, config, precision)
    if differences:
        raise ValueError(
            f"'{run_directory}' holds a run with another configuration:\n  "
            + "\n  ".join(differences)
            + "\nRestore these settings, choose another name (name=...), or remove that directory to start afresh"
        )
    if checkpoint.state.loader["fingerprint"] != fingerprint:
        raise ValueError(
            f"'{run_directory}' was trained on data with fingerprint "
            f"{checkpoint.state.loader['fingerprint'][:16]}, the data now there has {fingerprint[:16]}. "
            "Restore the data, choose another name (name=...), or remove that directory to start afresh"
        )


def _differences(checkpoint: Checkpoint, config: RunConfig, precision: str) -> list[str]:
    if checkpoint.state.run_hash == run_hash(config, precision):
        return []
    if not checkpoint.state.config:
        return ["(the checkpoint does not say which; see the directory's config.yaml)"]
    stored = checkpoint.state.config
    try:
        # Settings that the program has learnt since are at their defaults.
        before = RunConfig.model_validate(stored["config"])
    except ValidationError as error:
        return [f"(the checkpoint's is not valid in this version of the program: {error})"]
    old = dict(_leaves(identity(before, stored["precision"])))
    new = dict(_leaves(identity(config, precision)))
    return [
        f"{path}: {old.get(path)} in the checkpoint, {new.get(path)} now"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    ]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def load(engine: deepspeed.DeepSpeedEngine, checkpoint: Checkpoint) -> dict[str, Any]:
    """Bring the engine to the state of a checkpoint; returns what belongs to this rank of its `rank_state`.

    Raises:
        ValueError: DeepSpeed found nothing to load, or the state cannot be cut for this number of ranks.
    """
    if checkpoint.world_size != dist.get_world_size() and checkpoint.zero_stage > 0:
        _load_recut(engine, checkpoint)
    else:
        path, _ = engine.load_checkpoint(str(checkpoint.directory.parent), tag=checkpoint.directory.name)
        if path is None:
            raise ValueError(f"DeepSpeed could not load '{checkpoint.directory}'")
    return _rank_state(checkpoint)


def _rank_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """What this rank saved, or, on another number of ranks, what all saved in sum on rank 0 and zeros elsewhere."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ranks = [rank] if checkpoint.world_size == world_size else range(checkpoint.world_size)
    states = [json.loads((checkpoint.directory / rank_file(number)).read_text()) for number in ranks]
    if checkpoint.world_size == world_size:
        return states[0]
    share = 1.0 if rank == 0 else 0.0
    return {
        name: (torch.tensor([state[name] for state in states], dtype=torch.float64).sum(0) * share).tolist()
        for name in states[0]
    }


def _load_recut(engine: deepspeed.DeepSpeedEngine, checkpoint: Checkpoint) -> None:
    """What `engine.load_checkpoint` does, from the files of another number of ranks.

    DeepSpeed's universal checkpoints would do it by way of a second copy on disk, but leave out buffers and
    frozen parameters and give every parameter group the first one's settings (0.19.8). Here the engine's own
    empty state is filled, each rank reading its part of each tensor, and handed to DeepSpeed's own loading.
    """
    if engine.zero_nvme_offload_optimizer():
        raise ValueError(
            f"'{checkpoint.directory}' was written by {checkpoint.world_size} ranks; with offload_optimizer: nvme a "
            "run goes on with the same number of ranks only"
        )
    saved = ShardedState(checkpoint)
    optimizer, rank, world_size = engine.optimizer, dist.get_rank(), dist.get_world_size()
    is_stage3 = checkpoint.zero_stage == 3
    if is_stage3:
        optimizer.checkpoint_event_prologue()
    engine.load_module_state_dict({"module": saved.header["module"], **_frozen(engine, saved, is_stage3)})
    state = optimizer.state_dict()
    if is_stage3:
        groups = stage3_pieces(engine._get_zero_param_shapes(), rank, world_size)
        masters, base = state["fp32_flat_groups"], "optimizer_state_dict"
    else:
        fragments: list[Any] = [None] * world_size
        dist.all_gather_object(fragments, state["param_slice_mappings"])
        groups = stage12_pieces(fragments, rank)
        masters, base = optimizer.single_partition_of_fp32_groups, "base_optimizer_state"
        state["single_partition_of_fp32_groups"] = masters
    state[base]["state"] = {
        index: _fill(saved, pieces, master)
        for index, (pieces, master) in enumerate(zip(groups, masters, strict=True))
    }
    # Every rank's place in the list is its own; DeepSpeed looks at nothing else.
    optimizer.load_state_dict(
        state_dict_list=[state if index == rank else None for index in range(world_size)],
        load_optimizer_states=True,
        load_from_fp32_weights=True,
    )
    if is_stage3:
        optimizer.checkpoint_event_epilogue()
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, saved.header[counter])


def _fill(saved: ShardedState, pieces: list[Piece], master: Tensor) -> dict[str, Any]:
    """Fill a flat tensor of fp32 weights in place; returns the optimizer state that belongs to it."""
    split, common = saved.optimizer_keys(pieces[0].name) if pieces else ([], {})
    state: dict[str, Any] = {key: torch.zeros_like(master) for key in split}
    with torch.no_grad():
        for piece in pieces:
            if saved.optimizer_keys(piece.name)[1] != common:
                raise ValueError(
                    f"the optimizer has taken other steps on '{piece.name}' than on '{pieces[0].name}'"
                )
            for key, target in [(None, master), *state.items()]:
                values = saved.read(piece.name, key, piece.start, piece.stop)
                target.narrow(0, piece.offset, piece.stop - piece.start).copy_(values)
    # Not the file's own tensors: the optimizer counts in place, and groups may have come from one.
    return state | {
        key: value.clone() if isinstance(value, Tensor) else value for key, value in common.items()
    }


def _frozen(engine: deepspeed.DeepSpeedEngine, saved: ShardedState, is_stage3: bool) -> dict[str, Any]:
    """Parameters that are not trained, in the form that DeepSpeed's loading knows: this rank's parts of them."""
    fragments = saved.header.get("frozen_param_fragments")
    if not fragments:
        return {}
    if is_stage3:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        shapes = {name: saved.header["frozen_param_shapes"][name] for name in fragments}
        [pieces] = stage3_pieces([shapes], rank, world_size)
        fragments = {}
        for piece in pieces:
            part = torch.zeros(-(-shapes[piece.name].numel() // world_size))
            part[: piece.stop - piece.start] = saved.read_frozen(piece.name, piece.start, piece.stop)
            fragments[piece.name] = part
    return {"frozen_param_fragments": fragments}
