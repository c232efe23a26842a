"""Models on disk: `config.json` beside safetensors, nothing that could run code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import save_torch_state_dict
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

FORMAT_VERSION = 2

Model = TypeVar("Model", bound=nn.Module)
Config = TypeVar("Config", bound=BaseModel)


def save_model(model: nn.Module, config: BaseModel, directory: str | Path) -> None:
    """Write a model: weights first, `config.json` last, so that a directory with a config is complete."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").unlink(missing_ok=True)
    save_torch_state_dict(model.state_dict(), directory)
    save_config(model, config, directory)


def save_config(model: nn.Module, config: BaseModel, directory: Path) -> None:
    """Write a model's `config.json`, by an atomic replacement."""
    content = {
        "model": type(model).__name__,
        "format_version": FORMAT_VERSION,
        "config": config.model_dump(mode="json"),
    }
    temporary = directory / f"config.json.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(directory / "config.json")


def load_model(
    model_class: type[Model],
    config_class: type[Config],
    directory: str | Path,
    create: Callable[[Config], Model] | None = None,
) -> Model:
    """Read a model written by `save_model`, in evaluation mode.

    Args:
        create: makes the model of a configuration; `model_class` itself by default.

    Raises:
        ValueError: the directory is missing, of another class or version, damaged, or tensors do not fit.
    """
    directory = Path(directory)
    content = read_config(directory)
    if content.get("model") != model_class.__name__:
        raise ValueError(f"'{directory}' holds a {content.get('model')}, not a {model_class.__name__}")
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"'{directory}' has format version {content.get('format_version')}, this program reads "
            f"{FORMAT_VERSION}; train or convert the model again"
        )
    try:
        config = config_class.model_validate(content.get("config"))
    except ValidationError as error:
        raise ValueError(f"'{directory}/config.json' is not valid: {error}") from error
    model = (create or model_class)(config)
    load_tensors(model, directory)
    return model.eval()


def read_config(directory: Path) -> dict[str, Any]:
    """The parsed `config.json` of a model directory.

    Raises:
        ValueError: it is missing or not a JSON object.
    """
    path = directory / "config.json"
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"'{directory}' is not a model directory: no config.json in it") from error
    except ValueError as error:  # bad JSON, or not even text
        raise ValueError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' is not JSON of a model: it holds a {type(content).__name__}")
    return content


def load_tensors(model: nn.Module, directory: Path, prefix: str = "") -> None:
    """Copy all tensors of a directory's safetensors files into `model`, one at a time.

    Args:
        prefix: put before the names in the files.

    Raises:
        ValueError: tensors are missing, unexpected or misshapen, or a file is damaged.
    """
    targets = model.state_dict()
    # Tensors with several names (tied weights) are saved under one of them.
    names_of: dict[tuple[int, torch.Size], set[str]] = {}
    for name, target in targets.items():
        names_of.setdefault((target.data_ptr(), target.shape), set()).add(name)
    missing, problems = set(targets), []
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors, torch.no_grad():
                for key in tensors.keys():  # noqa: SIM118 (not a dict)
                    name, tensor = prefix + key, tensors.get_tensor(key)
                    if name not in targets:
                        problems.append(f"{name}: unexpected")
                    elif targets[name].shape != tensor.shape:
                        problems.append(
                            f"{name}: {tuple(tensor.shape)}, expected {tuple(targets[name].shape)}"
                        )
                    else:
                        targets[name].copy_(tensor)
                        missing -= names_of[targets[name].data_ptr(), tensor.shape]
                    missing.discard(name)
        except SafetensorError as error:
            raise ValueError(f"'{file}' is damaged ({error}); copy or convert the model again") from error
    problems += [f"{name}: missing" for name in sorted(missing)]
    if problems:
        raise ValueError(f"weights in '{directory}' do not fit its config:\n  " + "\n  ".join(problems[:20]))


def content_hash(model: nn.Module, config: BaseModel) -> str:
    """sha256 over configuration and every tensor's name, dtype, shape and bytes.

    Settings at their defaults are left out, so that a new setting changes no hash.
    """
    digest = hashlib.sha256()
    settings = config.model_dump(mode="json", exclude_defaults=True)
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
