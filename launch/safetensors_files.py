"""Writing safetensors tensor by tensor: at no time is more than one of them in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
_ELEMENTS_AT_ONCE = 1 << 22

Read = Callable[[str], Tensor]


def write_tensors(
    directory: Path, like: Mapping[str, Tensor], read: Read, max_file_bytes: int = 5_000_000_000
) -> None:
    """Write `model.safetensors`, or several files of at most `max_file_bytes` with an index, as Hugging Face does.

    Args:
        like: shape and dtype of every tensor by name; may be on the meta device.
        read: gives a tensor when its turn comes.
    """
    files: list[list[str]] = [[]]
    size = 0
    for name, tensor in like.items():
        if files[-1] and size + tensor.nbytes > max_file_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += tensor.nbytes
    count = len(files)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        _write_file(directory / file, {name: like[name] for name in names}, read)
        weight_map |= dict.fromkeys(names, file)
    if count > 1:
        total = sum(tensor.nbytes for tensor in like.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: Path, like: Mapping[str, Tensor], read: Read) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in like.items():
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)  # the data are aligned
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for name, expected in like.items():
            tensor = read(name)
            if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
                raise ValueError(
                    f"'{name}' is {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(expected.shape)} "
                    f"{expected.dtype}"
                )
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def verify_tensors(directory: Path, like: Mapping[str, Tensor], read: Read) -> None:
    """Read everything back and compare, a few rows at a time.

    Raises:
        RuntimeError: a tensor is missing, is more than was asked for, or differs.
    """
    found = set()
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                found.add(name)
                if not _equal(tensors, name, read(name)):
                    raise RuntimeError(
                        f"'{name}' reads back with other values than were written; is the disk sound?"
                    )
    if found != set(like):
        raise RuntimeError(
            f"'{directory}' holds other tensors than were written: {sorted(found ^ set(like))}"
        )


def _equal(tensors: Any, name: str, expected: Tensor) -> bool:
    if expected.dim() == 0:
        return torch.equal(tensors.get_tensor(name), expected)
    written = tensors.get_slice(name)
    if list(written.get_shape()) != list(expected.shape):
        return False
    rows = max(1, _ELEMENTS_AT_ONCE // max(1, expected[0].numel()))
    starts = range(0, len(expected), rows)
    return all(torch.equal(written[start : start + rows], expected[start : start + rows]) for start in starts)
