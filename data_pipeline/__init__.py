"""From text to batches: sources, tokenizer, packing, shard format, loader, and the shards of latent codes.

Names are imported on first use, so that `data_pipeline.config` and `data_pipeline.yaml_config` stay free of
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.builder import build
    from data_pipeline.codes import CodeDataset, code_shard_is_done, finish_codes, write_code_shard
    from data_pipeline.config import DataConfig
    from data_pipeline.dataset import TokenDataset
    from data_pipeline.loader import StepLoader
    from data_pipeline.mixture import MixtureDataset
    from data_pipeline.streaming import StreamLoader
    from data_pipeline.tokenizer import load_tokenizer
    from data_pipeline.verification import verify

_MODULES = {
    "CodeDataset": "codes",
    "DataConfig": "config",
    "MixtureDataset": "mixture",
    "StepLoader": "loader",
    "StreamLoader": "streaming",
    "TokenDataset": "dataset",
    "build": "builder",
    "code_shard_is_done": "codes",
    "finish_codes": "codes",
    "load_tokenizer": "tokenizer",
    "verify": "verification",
    "write_code_shard": "codes",
}

__all__ = [
    "CodeDataset",
    "DataConfig",
    "MixtureDataset",
    "StepLoader",
    "StreamLoader",
    "TokenDataset",
    "build",
    "code_shard_is_done",
    "finish_codes",
    "load_tokenizer",
    "verify",
    "write_code_shard",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
