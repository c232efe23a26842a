"""An exported model ready to generate, and what is known of its quality."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from torch import nn
from transformers import AutoTokenizer

from data_pipeline.code_manifest import Precision
from launch.precision import placed
from rqvae import LatentGenerator, load_codec, load_latent_model
from rqvae.generation_checks import compile_depth_loop
from rqvae.linear_head import LinearHead


def load_generator(
    directory: Path, precision: Precision = "fp32", int8: bool = False, compile: bool = False
) -> LatentGenerator:
    """The codec, latent model and tokenizer of an exported model, on the GPU where there is one.

    Args:
        precision: of weights and arithmetic; codebooks stay fp32.
        int8: keep the weights of linear layers in 8 bits, by output channel, through torchao.
        compile: see `LatentGenerator`.

    Raises:
        ValueError: a part is missing, they do not belong together, or torchao is not installed.
    """
    for part in ("rqvae", "rq_transformer", "tokenizer"):
        if not (directory / part).is_dir():
            raise ValueError(f"'{directory}' has no '{part}' (launch/convert_checkpoint.py writes it)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codec, latent_model = load_codec(directory / "rqvae"), load_latent_model(directory / "rq_transformer")
    # It compares the codec with the codes' hash, so weights become integers afterwards.
    tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
    generator = LatentGenerator(codec, latent_model, tokenizer)
    for model in (codec, latent_model):
        placed(model, device, precision)
        if int8:
            quantize_weights(model)
    if compile:  # only now: what it needs depends on the device
        compile_depth_loop(latent_model)
    return generator


def quantize_weights(model: nn.Module) -> None:
    """Weights of all linear layers and output heads to 8 bits, in place.

    Raises:
        ValueError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError(
            f"int8 weights need torchao, which requirements.lock does not hold ({error}); pip install torchao"
        ) from error
    quantize_(
        model, Int8WeightOnlyConfig(), filter_fn=lambda module, _: isinstance(module, (nn.Linear, LinearHead))
    )


def quality_note(directory: Path) -> str:
    """What the report beside an exported model says of its quality, in one line."""
    path = directory.parent / "report.json"
    if not path.is_file():
        return f"quality: not known, there is no {path}; launch/eval.py writes it"
    bits = json.loads(path.read_text()).get("bits_per_byte", {})
    if "latent_bound" not in bits:
        return f"quality: {path} has no bits_per_byte.latent_bound; launch/eval.py measures it"
    beside = f"{bits['base_lm']:.3f} of the base LM" if "base_lm" in bits else "no base LM measured"
    return f"quality: at most {bits['latent_bound']:.3f} bits per byte (a bound), {beside}; {path}"


def trained_length(directory: Path) -> int | None:
    """Tokens of a training sample, from the configuration that a stage of the run left beside an exported model."""
    for stage in ("rq_transformer", "rqvae"):
        path = directory.parent / stage / "config.yaml"
        if path.is_file():
            length = yaml.safe_load(path.read_text()).get("data", {}).get("sample_length")
            return length if isinstance(length, int) else None
    return None
