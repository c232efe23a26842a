"""Checkpoints of the public reference implementation (charleslow/rq_vae), as our codec in its layout.

Its `.pt` holds `config` (model_name, latent_dim, compression_factor, codebook_size, codebook_levels) and
`model_state_dict`. Ours differs in places where no renaming helps; what has no place is listed and refused, so that
a converted codec always computes what the original does.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rqvae.config import RQVAEConfig

_RENAMED = [
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


def check_config(path: Path, reference: Mapping[str, Any], config: RQVAEConfig) -> None:
    """The codec that the tensors are to go into has the reference's shape.

    Raises:
        ValueError: lists every setting that must be another.
    """
    wanted = {
        name: reference.get(name)
        for name in ("compression_factor", "codebook_size", "codebook_levels", "latent_dim")
    }
    wanted |= {
        "resample": "reference", "codebook_dim": reference.get("latent_dim"), "num_latent_layers": 0,
        "token_dropout": 0.0, "encoder_context": "document",
    }  # fmt: skip
    values = config.model_dump()
    problems = [
        f"codec.{name}: {values[name]}, must be {wanted[name]}"
        for name in wanted
        if values[name] != wanted[name]
    ]
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
    num_steps = sum(
        name.startswith("encoder.downsample.") and tensor.dim() == 3 for name, tensor in state.items()
    )
    for name, tensor in state.items():
        if re.fullmatch(_UNUSED, name):
            continue
        ours = _our_name(name)
        if ours is None:
            problems.append(f"{name}: {_why(name)}")
        elif name.startswith("encoder.downsample.") and num_steps > 1:
            problems.append(
                f"{name}: its norms run over the backbone's width, ours also over the embeddings beside it; "
                "exact with compression_factor 2 only"
            )
        else:
            converted[ours] = _beside_nothing(tensor) if _reads_hidden(ours, tensor) else tensor.float()
    # Ours has a projection in and out of the codebook space, and reads embeddings beside the backbone's states.
    width = like["encoder.to_codebook.weight"].shape[0]
    for name in ("encoder.to_codebook", "decoder.from_codebook"):
        converted |= {f"{name}.weight": torch.eye(width), f"{name}.bias": torch.zeros(width)}
    for name in like.keys() - converted.keys():
        if name in ("encoder.embedding_norm.weight", "quantizer.ema_distortion"):
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


def _why(name: str) -> str:
    if ".latent_refinement." in name:
        return "refinement of another kind (LayerNorm, biases, no positions)"
    return "has no place in our codec"


def _reads_hidden(ours: str, tensor: Tensor) -> bool:
    return ours == "encoder.downsample.convolutions.0.weight" and tensor.dim() == 3


def _beside_nothing(weight: Tensor) -> Tensor:
    """A convolution [out, H, 3] over the backbone's states as one over these and the embeddings [out, 2H, 3]."""
    return torch.cat([weight.float(), torch.zeros_like(weight, dtype=torch.float32)], dim=1)
