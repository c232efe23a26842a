"""The tensors of a training checkpoint, read one at a time from the files of however many ranks wrote it.

DeepSpeed cuts what it trains into flat tensors, one per rank and parameter group (ZeRO-3: per sub-group). Here
they are found by parameter name again, whatever the ZeRO stage. The files are mapped into memory, so that only
what is read is ever resident, and none of it as this process's own memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from launch.checkpoints import Checkpoint


class Piece(NamedTuple):
    """Elements [start, stop) of a parameter, at `offset` of a rank's flat tensor of its group."""

    name: str
    start: int
    stop: int
    offset: int


def stage3_pieces(
    shapes: Sequence[Mapping[str, torch.Size]], rank: int, world_size: int
) -> list[list[Piece]]:
    """What a rank holds under ZeRO-3, by sub-group: an equal part of every parameter, padded at the end.

    Args:
        shapes: names and shapes of each sub-group's parameters, in DeepSpeed's order.
    """
    groups = []
    for names in shapes:
        pieces, offset = [], 0
        for name, shape in names.items():
            numel, part = shape.numel(), -(-shape.numel() // world_size)
            start = min(numel, rank * part)
            pieces.append(Piece(name, start, min(numel, start + part), offset))
            offset += part
        groups.append(pieces)
    return groups


def stage12_pieces(fragments: Sequence[Sequence[Mapping[str, Any]]], rank: int) -> list[list[Piece]]:
    """What a rank holds under ZeRO-1 and 2, by group: a stretch of all the group's parameters laid end to end.

    Args:
        fragments: each rank's `param_slice_mappings`: by group and name, where in the rank's flat tensor a
            parameter's elements are. The ranks' stretches follow one another.
    """
    return [
        [
            Piece(name, start, start + fragment.numel, fragment.start)
            for name, fragment in group.items()
            for start in [sum(other[index][name].numel for other in fragments[:rank] if name in other[index])]
        ]
        for index, group in enumerate(fragments[rank])
    ]


class _Place(NamedTuple):
    start: int
    stop: int
    rank: int
    group: int
    offset: int


class ShardedState:
    """Parameters, buffers and optimizer state of a checkpoint, by name.

    Attributes:
        header: what rank 0 wrote beside the tensors (step counts, `module` with buffers and placeholders).
        shapes: of all trained parameters.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._zero_stage, world_size = checkpoint.zero_stage, checkpoint.world_size
        directory = checkpoint.directory
        if self._zero_stage == 3:
            names = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(world_size)]
        else:
            names = ["mp_rank_00_model_states.pt"]
        self._models = [_open(directory / name) for name in names]
        self.header: dict[str, Any] = self._models[0]
        self._optimizers: list[dict[str, Any]] = []
        self.shapes: dict[str, torch.Size] = {}
        self._places: dict[str, list[_Place]] = {}
        if self._zero_stage > 0:
            self._optimizers = [_open(_optimizer_file(directory, rank)) for rank in range(world_size)]
            self._optimizers = [content["optimizer_state_dict"] for content in self._optimizers]
            self.shapes = {
                name: shape for group in self.header["param_shapes"] for name, shape in group.items()
            }
            self._find_places(world_size)

    def _find_places(self, world_size: int) -> None:
        for rank in range(world_size):
            if self._zero_stage == 3:
                groups = stage3_pieces(self.header["param_shapes"], rank, world_size)
            else:
                groups = stage12_pieces([o["param_slice_mappings"] for o in self._optimizers], rank)
            for group, pieces in enumerate(groups):
                for piece in pieces:
                    place = _Place(piece.start, piece.stop, rank, group, piece.offset)
                    self._places.setdefault(piece.name, []).append(place)

    def names(self) -> list[str]:
        """Names of the model's state dictionary: parameters, trained and frozen, and buffers."""
        return list(self.header["module"])

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer as the optimizer knows it: fp32 for floats, whole, on the CPU."""
        name = (self.header.get("shared_params") or {}).get(name, name)
        if name in self.shapes:
            return self.read(name).view(self.shapes[name])
        frozen = self.header.get("frozen_param_fragments") or {}
        if self._zero_stage == 3 and name in frozen:
            shape = self.header["frozen_param_shapes"][name]
            return self.read_frozen(name, 0, shape.numel()).view(shape).float()
        tensor = self.header["module"][name]
        return tensor.float() if tensor.is_floating_point() else tensor

    def read(self, name: str, key: str | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of a trained parameter (`key` None) or of its optimizer state: 1-D."""
        stop = self.shapes[name].numel() if stop is None else stop
        parts = []
        for place in self._places[name]:
            low, high = max(start, place.start), min(stop, place.stop)
            if low < high:
                flat = self._flat(place.rank, place.group, key)
                parts.append(flat.narrow(0, place.offset + low - place.start, high - low))
        return _joined(parts)

    def read_frozen(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a parameter that ZeRO-3 held without training it: 1-D."""
        fragments = [model["frozen_param_fragments"][name] for model in self._models]
        part = fragments[0].numel()
        pieces = []
        for rank in range(start // part, min(len(fragments), math.ceil(stop / part))):
            low, high = max(start, rank * part), min(stop, (rank + 1) * part)
            pieces.append(fragments[rank].view(-1).narrow(0, low - rank * part, high - low))
        return _joined(pieces)

    def optimizer_keys(self, name: str) -> tuple[list[str], dict[str, Any]]:
        """Keys of the optimizer state with an element for each of the parameter's, and the values of the others.

        Raises:
            ValueError: a state has neither one element nor one per element of the parameter.
        """
        place = self._places[name][0]
        state, flat = self._state(place.rank, place.group), self._flat(place.rank, place.group, None)
        split, common = [], {}
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.numel() == 1:
                common[key] = value
            elif value.dim() == 1 and value.numel() >= flat.numel():
                split.append(key)
            else:
                raise ValueError(
                    f"optimizer state '{key}' of shape {tuple(value.shape)} cannot be split by parameters; "
                    "resume on the number of ranks that wrote the checkpoint"
                )
        return split, common

    def _state(self, rank: int, group: int) -> dict[str, Any]:
        saved = self._optimizers[rank]
        base = saved["optimizer_state_dict" if self._zero_stage == 3 else "base_optimizer_state"]
        return base["state"][group]

    def _flat(self, rank: int, group: int, key: str | None) -> Tensor:
        if key is not None:
            return self._state(rank, group)[key]
        saved = self._optimizers[rank]
        groups = saved["fp32_flat_groups" if self._zero_stage == 3 else "single_partition_of_fp32_groups"]
        return groups[group].detach()

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """All names with their tensors, each read when its turn comes."""
        return ((name, self.tensor(name)) for name in self.names())


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)


def _open(file: Path) -> dict[str, Any]:
    # Our own file; DeepSpeed keeps more than tensors in it.
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


def _optimizer_file(directory: Path, rank: int) -> Path:
    name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    return next(file for file in (directory / name, directory / f"bf16_{name}") if file.exists())
