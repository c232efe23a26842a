"""What has to fit together before anything is generated."""

from __future__ import annotations

import math
import os
import shutil

from rqvae.codec import Codec
from rqvae.flat_transformer import FlatTransformer
from rqvae.generation_options import GenerationOptions
from rqvae.latent_model import LatentModel
from rqvae.rq_transformer import RQTransformer
from rqvae.token_codec import TokenCodec


def check_pair(codec: Codec, latent_model: LatentModel) -> None:
    """Refuse a latent model that was trained on the codes of another codec.

    Raises:
        ValueError: names both hashes.
    """
    expected = latent_model.config.codec_hash
    if expected is not None and expected != (actual := codec.codec_hash()):
        raise ValueError(
            f"the latent model was trained on codes of codec {expected[:12]}, this codec is "
            f"{actual[:12]}; train it on codes from this codec (launch/precompute_codes.py)"
        )


def compile_depth_loop(latent_model: LatentModel) -> None:
    """Have the depth loop compiled.

    Raises:
        ValueError: the model has none, or on a CPU there is no compiler.
    """
    if not isinstance(latent_model, RQTransformer):
        raise ValueError("compile: a FlatTransformer has no depth loop; leave compile off")
    compiler = os.environ.get("CXX", "g++")
    if latent_model.device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"compile: torch.compile needs a C++ compiler, and there is no '{compiler}'; install g++, name one in "
            "CXX, or leave compile off"
        )
    latent_model.depth.is_compiled = True


def check_options(options: GenerationOptions, codec: Codec, latent_model: LatentModel) -> None:
    """Refuse what these models cannot do.

    Raises:
        ValueError: says what to do instead.
    """
    config = latent_model.config
    if config.reads_tokens and (options.mode == "deferred" or options.decode_block is not None):
        raise ValueError(
            f"mode deferred, decode_block: this latent model reads tokens (spatial_input: {config.spatial_input}), "
            "so every latent is decoded before the next one is drawn; use mode auto or streaming"
        )
    options.by_level(codec.config.codebook_levels)
    if options.num_levels is None:
        return
    if isinstance(codec, TokenCodec):
        raise ValueError(
            f"num_levels: the codes of the {codec.config.model} codec are tokens, and none can be left out; only "
            "residual codes have levels that refine others"
        )
    if options.num_levels > codec.config.codebook_levels:
        raise ValueError(
            f"num_levels: {options.num_levels} of a codec with {codec.config.codebook_levels} levels"
        )
    if isinstance(latent_model, FlatTransformer) and options.num_levels < codec.config.codebook_levels:
        raise ValueError("num_levels: a FlatTransformer reads the codes of all levels; use an RQTransformer")


def check_length(options: GenerationOptions, longest: int, codec: Codec, latent_model: LatentModel) -> None:
    """Refuse more positions than a backbone has.

    Args:
        longest: tokens of the longest prompt.

    Raises:
        ValueError: names the limit.
    """
    factor = codec.config.compression_factor
    num_tokens = factor * (math.ceil(longest / factor) + math.ceil(options.max_new_tokens / factor))
    limits = []
    if codec.config.model != "identity":
        limits.append(("the codec's backbone", codec.config.backbone.architecture.max_position_embeddings))
    if latent_model.config.spatial_backbone is not None:
        positions = latent_model.config.spatial_backbone.architecture.max_position_embeddings
        limits.append(("the spatial_backbone", positions * factor))
    for name, limit in limits:
        if num_tokens > limit:
            raise ValueError(
                f"a prompt of {longest} tokens and max_new_tokens={options.max_new_tokens} need more than {limit} "
                f"tokens, for which {name} has positions for (max_position_embeddings); shorten the prompt, or lower "
                "max_new_tokens"
            )
