"""Tiny models with lively weights, and packed documents to feed them.

Models as they are initialised barely react to their input, so a test of "nothing changes" would pass on a
broken model too. `randomize` gives every weight unit gain, and codebooks come from k-means on the model's own
latents, so that nearly every change of the input changes codes and logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from rqvae import RQVAE, BaseLM, FlatTransformer, RQTransformer, RQTransformerConfig, RQVAEConfig
from rqvae.config import ArchitectureConfig

VOCAB_SIZE = 97
PAD, EOS = 0, 1

Document = tuple[Sequence[int], int]
"""Token ids, and the phase: places left empty in the first chunk."""


class Pack(NamedTuple):
    input_ids: Tensor
    document_ids: Tensor


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            continue
        scale = 1 / math.sqrt(parameter.shape[1]) if parameter.dim() == 2 else 0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.fixture(scope="session")
def make_architecture() -> Callable[..., ArchitectureConfig]:
    def make(**changes: Any) -> ArchitectureConfig:
        values: dict[str, Any] = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 256,
        }
        return ArchitectureConfig(**values | changes)

    return make


@pytest.fixture(scope="session")
def make_codec_config(make_architecture: Callable[..., ArchitectureConfig]) -> Callable[..., RQVAEConfig]:
    def make(architecture: ArchitectureConfig | None = None, **changes: Any) -> RQVAEConfig:
        """`backbone` holds settings beside the architecture."""
        backbone = {"architecture": architecture or make_architecture(), **changes.pop("backbone", {})}
        values: dict[str, Any] = {
            "backbone": backbone,
            "compression_factor": 4,
            "codebook_levels": 3,
            "codebook_size": 16,
            "codebook_dim": 8,
            "latent_dim": 32,
            "latent_head_dim": 16,
        }
        return RQVAEConfig.model_validate(values | changes)

    return make


@pytest.fixture(scope="session")
def make_codec(make_codec_config: Callable[..., RQVAEConfig]) -> Callable[..., RQVAE]:
    """A codec in evaluation mode, fp64 unless told otherwise."""

    def make(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> RQVAE:
        codec = RQVAE(make_codec_config(**changes))
        randomize(codec, seed)
        codec = codec.to(dtype)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, VOCAB_SIZE, (16, 16 * codec.config.compression_factor), generator=generator)
        with torch.no_grad():
            latents = codec.encoder(ids, torch.ones_like(ids))
        codec.quantizer.initialize(latents.flatten(0, 1), seed)
        return codec.eval()

    return make


@pytest.fixture(scope="session")
def make_latent_model() -> Callable[..., RQTransformer | FlatTransformer]:
    """A latent model for the codec of `make_codec`, in evaluation mode, fp64 unless told otherwise."""

    def make(
        model_class: type[RQTransformer] | type[FlatTransformer] = RQTransformer,
        dtype: torch.dtype = torch.float64,
        seed: int = 1,
        **changes: Any,
    ) -> RQTransformer | FlatTransformer:
        values: dict[str, Any] = {
            "spatial_dim": 32,
            "spatial_layers": 2,
            "depth_dim": 32,
            "depth_layers": 2,
            "head_dim": 16,
            "compression_factor": 4,
            "codebook_levels": 3,
            "codebook_size": 16,
        }
        model = model_class(RQTransformerConfig.model_validate(values | changes))
        randomize(model, seed)
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def make_base_lm(make_architecture: Callable[..., ArchitectureConfig]) -> Callable[..., BaseLM]:
    """A base LM in evaluation mode, fp64 unless told otherwise."""

    def make(dtype: torch.dtype = torch.float64, seed: int = 2, **changes: Any) -> BaseLM:
        model = BaseLM(make_architecture(**changes), EOS)
        randomize(model, seed)
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def tokens() -> Callable[..., Tensor]:
    """Random token ids that are neither padding nor end-of-text."""

    def make(*shape: int, seed: int = 0) -> Tensor:
        return torch.randint(2, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def pack() -> Callable[..., Pack]:
    """Rows of packed documents, laid out on the chunk grid as the data pipeline does it."""

    def make(rows: Sequence[Sequence[Document]], length: int, compression_factor: int = 4) -> Pack:
        input_ids = torch.full((len(rows), length), PAD)
        document_ids = torch.zeros(len(rows), length, dtype=torch.long)
        for row, documents in enumerate(rows):
            start = 0
            for number, (ids, phase) in enumerate(documents, 1):
                place = slice(start + phase, start + phase + len(ids))
                assert place.stop <= length
                input_ids[row, place] = torch.as_tensor(ids)
                document_ids[row, place] = number
                start = -(-place.stop // compression_factor) * compression_factor
        return Pack(input_ids, document_ids)

    return make


@pytest.fixture(scope="session")
def packed(pack: Callable[..., Pack], tokens: Callable[..., Tensor]) -> Pack:
    """Three rows of 32: several documents with phases, one long document, one row of padding only."""
    several = [
        (tokens(9, seed=1).tolist(), 3),
        (tokens(4, seed=2).tolist(), 0),
        (tokens(6, seed=3).tolist(), 1),
    ]
    return pack([several, [(tokens(30, seed=4).tolist(), 2)], []], length=32)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: `w2 w3 ...`."""
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, VOCAB_SIZE))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
