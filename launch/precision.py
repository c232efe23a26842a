"""What finished models compute in. Training has its own: `train.precision`."""

from __future__ import annotations

import argparse
from typing import TypeVar

import torch
from torch import nn

from data_pipeline.code_manifest import Precision
from rqvae.codec import Codec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Model = TypeVar("Model", bound=nn.Module)


def add_precision(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """The option `--precision`."""
    parser.add_argument(
        "--precision",
        choices=tuple(DTYPES),
        default="fp32",
        help="weights and arithmetic of the models (default: fp32); codebooks and likelihoods stay fp32",
    )


def placed(model: Model, device: torch.device, precision: Precision) -> Model:
    """The model on the device, in the precision; codebooks stay fp32, and a codec keeps the hash that it has now."""
    if isinstance(model, Codec) and precision != "fp32":
        model.keep_hash()
    return converted(model, device, DTYPES[precision])


def converted(model: Model, device: torch.device, dtype: torch.dtype) -> Model:
    """The model on the device, in the type; frequencies of rotary embeddings stay fp32, as they were in training: in
    bf16 late positions turn elsewhere."""
    frequencies = {name: kept for name, kept in model.named_buffers() if name.endswith("inv_freq")}
    model.to(device=device, dtype=dtype)
    for name, kept in frequencies.items():
        module, _, buffer = name.rpartition(".")
        setattr(model.get_submodule(module), buffer, kept.to(device))
    return model
