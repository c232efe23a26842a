"""The models that race in `launch/benchmark.py inference`: trained ones, or random weights of real shapes.

Random weights tell speed and nothing else. The autoregressive model and the codec share one copy of the backbone, so
that a size fits wherever the backbone alone does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from data_pipeline import load_tokenizer
from launch.config import RunConfig
from launch.latent_model import latent_model_config
from launch.parameters import parameters_without_storage
from launch.precision import converted
from rqvae import RQVAE, IdentityCodec, LatentGenerator, RQTransformer, load_codec, load_latent_model
from rqvae.backbone import huggingface_config
from rqvae.config import ArchitectureConfig, RQTransformerConfig, RQVAEConfig

# Random values that are repeated to fill a model. Its length is prime, so that no two rows of a matrix are alike.
_PERIOD = 1_048_573
NO_ASSISTANT = "no draft model; --assistant DIR names one of the same vocabulary"
NO_IDENTITY = "no model on tokens as codes; --identity DIR names one (its rqvae/ and rq_transformer/)"


@dataclass
class Racers:
    """What is raced against what."""

    lm: Any
    """The autoregressive model, of `transformers`."""
    architecture: ArchitectureConfig
    """Its own; the latent decoder's backbone may have another."""
    latent: LatentGenerator
    identity: LatentGenerator | None
    """The latent model whose codes are the tokens."""
    assistant: Any | None
    """Draft model of speculative decoding."""
    is_trained: bool
    dtype: torch.dtype
    lm_directory: Path | None
    """Where `lm` was read from; None for random weights."""
    missing: dict[str, str] = field(default_factory=dict)
    """Reasons by row."""

    @property
    def device(self) -> torch.device:
        """Where all of them are."""
        return self.latent.rq_transformer.device

    def generator(self, kind: str) -> LatentGenerator:
        """The latent generator of a kind of row, `latent` or `identity`."""
        found = self.identity if kind == "identity" else self.latent
        assert found is not None
        return found

    def kv_bytes(self, architecture: ArchitectureConfig) -> float:
        """Bytes of keys and values that a backbone keeps per token."""
        width = architecture.num_key_value_heads * architecture.head_dim
        return 2.0 * architecture.num_hidden_layers * width * self.dtype.itemsize


def trained(
    model: Path,
    data: Path,
    dtype: torch.dtype,
    device: torch.device,
    assistant: Path | None = None,
    identity: Path | None = None,
) -> Racers:
    """Models from the directories that launch/convert_checkpoint.py writes.

    Args:
        identity: by default `identity_codec` in `model`, if there is one.

    Raises:
        ValueError: a model is missing, damaged, or of another vocabulary.
    """
    if not (model / "base_lm").is_dir():
        raise ValueError(
            f"'{model}/base_lm' is missing, and without an autoregressive model there is no race; convert the "
            "base_lm stage of this project or copy that of another one on the same data"
        )
    tokenizer = load_tokenizer(data)
    if identity is None and (model / "identity_codec").is_dir():
        identity = model / "identity_codec"
    lm = _causal_lm(model / "base_lm", dtype, device)
    racers = Racers(
        lm=lm,
        architecture=_architecture(lm.config, model / "base_lm"),
        latent=_generator(model, tokenizer, dtype, device),
        identity=None if identity is None else _generator(identity, tokenizer, dtype, device),
        assistant=None if assistant is None else _causal_lm(assistant, dtype, device),
        is_trained=True,
        dtype=dtype,
        lm_directory=model / "base_lm",
    )
    if identity is None:
        racers.missing["identity"] = NO_IDENTITY
    if racers.assistant is None:
        racers.missing["assisted"] = NO_ASSISTANT
    elif racers.assistant.config.vocab_size != racers.lm.config.vocab_size:
        raise ValueError(
            f"the model in '{assistant}' has a vocabulary of {racers.assistant.config.vocab_size}, that in "
            f"'{model}/base_lm' of {racers.lm.config.vocab_size}; a draft must be of the same tokens"
        )
    return racers


def random_weights(
    config: RunConfig,
    dtype: torch.dtype,
    device: torch.device,
    with_identity: bool = True,
    assistant: ArchitectureConfig | None = None,
) -> Racers:
    """Models of a configuration's shapes, with random weights that cost no time to initialise.

    Args:
        with_identity: make the model on tokens as codes too, with the same spatial and depth transformer.
        assistant: of the draft.

    Raises:
        ValueError: the configuration is not of a learned codec with a decoder backbone, or of a draft with another
            vocabulary.
    """
    codec, shape = config.codec, latent_model_config(config)
    if (
        codec.model != "rqvae"
        or codec.backbone.decoder == "none"
        or config.latent_model.model != "rq_transformer"
    ):
        raise ValueError(
            "--random times codec.model: rqvae with a backbone in its decoder and latent_model.model: "
            "rq_transformer; train other kinds and give --model"
        )
    architecture = codec.backbone.architecture
    if assistant is not None and assistant.vocab_size != architecture.vocab_size:
        raise ValueError(
            f"--assistant has a vocabulary of {assistant.vocab_size}, the model of {architecture.vocab_size}"
        )
    shared = {"shared": True, "decoder": "same"}
    codec = codec.model_copy(update={"backbone": codec.backbone.model_copy(update=shared)})
    with parameters_without_storage(), no_init_weights():
        lm: Any = AutoModelForCausalLM.from_config(huggingface_config(architecture))
        draft: Any = assistant and AutoModelForCausalLM.from_config(huggingface_config(assistant))
        vae, latent_model = RQVAE(codec), RQTransformer(shape)
        on_tokens = _identity(codec, shape) if with_identity else None
    for language_model in (lm, draft):
        if language_model is not None:
            language_model.tie_weights()
            _never_ends(language_model)
    vae.encoder.backbone = lm.model
    vae.decoder.__dict__["backbone"] = lm.model
    vae.decoder.head.weight = lm.lm_head.weight
    made = [lm, vae, latent_model, *(on_tokens or ()), *([draft] if draft is not None else [])]
    fill_at_random(made, dtype, device)
    tokenizer = _any_tokenizer()
    racers = Racers(
        lm=lm,
        architecture=architecture,
        latent=LatentGenerator(vae, latent_model, tokenizer),
        identity=None if on_tokens is None else LatentGenerator(*on_tokens, tokenizer),
        assistant=draft,
        is_trained=False,
        dtype=dtype,
        lm_directory=None,
    )
    if draft is None:
        racers.missing["assisted"] = (
            "no draft model; --assistant FILE.yaml names an architecture of the same vocabulary"
        )
    return racers


def fill_at_random(models: list[nn.Module], dtype: torch.dtype, device: torch.device) -> None:
    """Give parameters without storage random values, in place; a shared parameter stays shared.

    Vectors become ones. Tables of code embeddings stay zeros, which take no memory until they are read: with tokens
    as codes they are larger than everything else.
    """
    values = (0.02 * torch.randn(_PERIOD, generator=torch.Generator().manual_seed(0))).to(device, dtype)
    for model in models:
        for name, parameter in model.named_parameters():
            if not parameter.is_meta:
                continue
            if name.endswith("embedding.table.weight"):
                # torch.zeros would write them; the system's fresh pages are zero as they are.
                untouched = np.zeros(parameter.numel() * dtype.itemsize, dtype=np.uint8)
                tensor = torch.from_numpy(untouched).view(dtype).view(parameter.shape).to(device)
            elif parameter.ndim == 1:
                tensor = torch.ones(parameter.shape, dtype=dtype, device=device)
            else:
                tensor = torch.empty(parameter.shape, dtype=dtype, device=device)
                for part in tensor.view(-1).split(_PERIOD):
                    part.copy_(values[: len(part)])
            torch.utils.swap_tensors(parameter, nn.Parameter(tensor, requires_grad=False))
        for module in model.modules():
            for key, buffer in module.named_buffers(recurse=False):
                module.register_buffer(key, buffer.to(device), key not in module._non_persistent_buffers_set)
        model.eval()


def parameter_bytes(*models: nn.Module) -> int:
    """Bytes of all parameters, shared ones counted once."""
    unique = {id(parameter): parameter for model in models for parameter in model.parameters()}
    return sum(parameter.nbytes for parameter in unique.values())


def _identity(codec: RQVAEConfig, shape: RQTransformerConfig) -> tuple[IdentityCodec, RQTransformer]:
    """The codec of tokens as codes, and a latent model of `shape` apart from codes and heads."""
    tokens = RQVAEConfig(
        model="identity", backbone=codec.backbone, compression_factor=codec.compression_factor
    )
    sizes = {"codebook_levels": tokens.codebook_levels, "codebook_size": tokens.codebook_size}
    # One head for all levels: each step reads one head in either case, and K of them need not fit into memory.
    own = {"head": "shared", "depth_input": "code", "codec_hash": None}
    return IdentityCodec(tokens), RQTransformer(shape.model_copy(update={**sizes, **own}))


def _causal_lm(directory: Path, dtype: torch.dtype, device: torch.device) -> Any:
    try:
        lm: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"'{directory}' holds no causal language model of transformers ({type(error).__name__}: {error})"
        ) from error
    _never_ends(lm)
    return lm.to(device).eval()


def _architecture(config: Any, directory: Path) -> ArchitectureConfig:
    supported = get_args(ArchitectureConfig.model_fields["model_type"].annotation)
    if config.model_type not in supported:
        raise ValueError(
            f"'{directory}' holds a model of type {config.model_type}; use one of {', '.join(supported)}"
        )
    names = set(ArchitectureConfig.model_fields) - {"rope_theta"}
    facts = {name: getattr(config, name) for name in names}
    return ArchitectureConfig(**facts, rope_theta=config.rope_parameters["rope_theta"])


def _never_ends(lm: Any) -> None:
    """Every row keeps as many tokens, past any end of text."""
    lm.generation_config.eos_token_id = None
    lm.generation_config.pad_token_id = 0


def _generator(directory: Path, tokenizer: Any, dtype: torch.dtype, device: torch.device) -> LatentGenerator:
    # Checked as they were saved: the hash is over the weights in the precision that they were trained in.
    generator = LatentGenerator(
        load_codec(directory / "rqvae"), load_latent_model(directory / "rq_transformer"), tokenizer
    )
    for model in (generator.vae, generator.rq_transformer):
        converted(model, device, dtype)
    return generator


def _any_tokenizer() -> PreTrainedTokenizerFast:
    """Random weights write no text; a generator wants a tokenizer all the same."""
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({end: 0}, end)), eos_token=end, pad_token=end
    )
