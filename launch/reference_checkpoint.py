"""Checkpoints of the public reference implementation (charleslow/rq_vae), as our codec in its layout.

Its `.pt` holds `config` (model_name, latent_dim, compression_factor, codebook_size, codebook_levels) and
`model_state_dict`; the number of refinement layers shows in the latter only. `codec.resample: original` computes what
it does on text without padding. What has no place is listed and refused.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rqvae.config import RQVAEConfig

HEADS = 8
"""Of its refinement layers."""
_LAYER = r"(encoder|decoder)\.latent_refinement\.(\d+)\."
_RENAMED = [
    (_LAYER + r"norm1\.(weight|bias)", r"\1.refinement.layers.\2.attention_norm.\3"),
    (_LAYER + r"norm2\.(weight|bias)", r"\1.refinement.layers.\2.mlp_norm.\3"),
    (_LAYER + r"self_attn\.in_proj_(weight|bias)", r"\1.refinement.layers.\2.attention.qkv_proj.\3"),
    (_LAYER + r"self_attn\.out_proj\.(weight|bias)", r"\1.refinement.layers.\2.attention.out_proj.\3"),
    (r"encoder\.backbone\.(.+)", r"encoder.backbone.\1"),
    (r"decoder\.backbone\.(?!embed_tokens)(.+)", r"decoder.backbone.\1"),
    (r"decoder\.output_head\.weight", r"decoder.head.weight"),
    (r"decoder\.input_proj\.(.+)", r"decoder.upsample.proj.\1"),
    (r"quantizer\.quantizers\.(\d+)\.(codebook|ema_cluster_size|ema_embed_sum)", r"quantizer.levels.\1.\2"),
]
# Read by no forward pass of it: vectors go into its decoder's backbone, and the flag only says that k-means is done.
_UNUSED = r"decoder\.backbone\.embed_tokens\.weight|quantizer\.quantizers\.\d+\.initialized"


def read_reference(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a `.pt` file, mapped into memory; no code in it is run.

    Raises:
        ValueError: it holds more than tensors and plain values, or other keys.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(
            f"'{path}' is refused: not a file of tensors and plain values in torch's zip format ({first_line})"
        ) from error
    if not isinstance(content, dict) or set(content) != {"config", "model_state_dict"}:
        raise ValueError(
            f"'{path}' is no checkpoint of the reference implementation: needs config, model_state_dict"
        )
    return content["config"], content["model_state_dict"]


def check_config(
    path: Path, reference: Mapping[str, Any], state: Mapping[str, Tensor], config: RQVAEConfig
) -> None:
    """The codec that the tensors are to go into has the reference's shape.

    Raises:
        ValueError: lists every setting that must be another.
    """
    shape = ("compression_factor", "codebook_size", "codebook_levels", "latent_dim")
    wanted = {name: reference.get(name) for name in shape}
    latent_dim = reference.get("latent_dim")
    layers = {match[2] for name in state if (match := re.match(_LAYER, name))}
    wanted |= {
        "resample": "original", "codebook_dim": latent_dim, "num_latent_layers": len(layers),
        "token_dropout": 0.0, "encoder_context": "document",
    }  # fmt: skip
    if layers and isinstance(latent_dim, int):
        wanted["latent_head_dim"] = latent_dim // HEADS
    values = config.model_dump()
    problems = [
        f"codec.{name}: {values[name]}, must be {wanted[name]}"
        for name in wanted
        if values[name] != wanted[name]
    ]
    if reference.get("compression_factor") == 1:
        problems.append("compression_factor 1: the original has no downsampling then, ours does")
    if config.backbone.shared or config.backbone.decoder != "same":
        problems.append("codec.backbone: must be shared: false, decoder: same")
    if problems:
        raise ValueError(f"the configuration does not fit '{path}':\n  " + "\n  ".join(problems))


def convert_reference(
    path: Path, state: Mapping[str, Tensor], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The reference's tensors under our names, and what ours has beside them so that it does nothing.

    Args:
        like: our codec's state dictionary; may be on the meta device.

    Raises:
        ValueError: lists what has no exact place, and what is missing.
    """
    converted: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, tensor in state.items():
        if re.fullmatch(_UNUSED, name) or re.fullmatch(_LAYER + r"ffn\.w[123]\.weight", name):
            continue
        ours = _our_name(name)
        if ours is None:
            problems.append(f"{name}: has no place in our codec")
        else:
            converted[ours] = tensor.float()
    converted |= _feed_forward(state, like)
    # Ours has a projection in and out of the codebook space, and something for places without a token.
    width = like["encoder.to_codebook.weight"].shape[0]
    for name in ("encoder.to_codebook", "decoder.from_codebook"):
        converted |= {f"{name}.weight": torch.eye(width), f"{name}.bias": torch.zeros(width)}
    for name in like.keys() - converted.keys():
        if name == "quantizer.ema_distortion":
            converted[name] = torch.ones(like[name].shape)
        elif name == "encoder.absent_token" or name.endswith(".dead_replaced"):
            converted[name] = torch.zeros(like[name].shape, dtype=like[name].dtype)
    problems += [f"{name}: missing" for name in sorted(like.keys() - converted.keys())]
    problems += [f"{name}: unexpected" for name in sorted(converted.keys() - like.keys())]
    problems += [
        f"{name}: {tuple(converted[name].shape)}, expected {tuple(like[name].shape)}"
        for name in sorted(like.keys() & converted.keys())
        if converted[name].shape != like[name].shape
    ]
    if problems:
        raise ValueError(f"'{path}' cannot be converted exactly:\n  " + "\n  ".join(problems))
    return converted


def _feed_forward(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Its SwiGLU layers under our names, widened by zeros, since our widths are multiples of 64."""
    found: dict[str, Tensor] = {}
    for name in state:
        match = re.fullmatch(_LAYER + r"ffn\.w1\.weight", name)
        if match is None:
            continue
        layer = name.removesuffix("w1.weight")
        gate, up, down = (state.get(f"{layer}w{place}.weight") for place in (1, 3, 2))
        ours = f"{match[1]}.refinement.layers.{match[2]}.mlp"
        if up is None or down is None or f"{ours}.down_proj.weight" not in like:
            continue  # reported as missing, or as a layer too many
        more = like[f"{ours}.down_proj.weight"].shape[1] - gate.shape[0]  # type: ignore[union-attr]
        gate, up = (F.pad(weight.float(), (0, 0, 0, more)) for weight in (gate, up))  # type: ignore[union-attr]
        found[f"{ours}.gate_up_proj.weight"] = torch.cat([gate, up])
        found[f"{ours}.down_proj.weight"] = F.pad(down.float(), (0, more))
    return found


def _our_name(name: str) -> str | None:
    for pattern, replacement in _RENAMED:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    # nn.Sequential of convolution, GELU, norm.
    match = re.fullmatch(r"(encoder\.downsample|decoder\.upsample_layers)\.(\d+)\.(weight|bias)", name)
    if match is None or int(match[2]) % 3 == 1:
        return None
    step, place = divmod(int(match[2]), 3)
    stack = "encoder.downsample" if match[1] == "encoder.downsample" else "decoder.upsample.stack"
    return f"{stack}.{'norms' if place else 'convolutions'}.{step}.{match[3]}"
