"""Typed configuration of the models. Free of torch, so that submitting a job stays light.

Shape legend used across the package:
    B batch, T tokens, S = T / K latent positions, K compression factor, D codebook levels,
    C codebook size, H backbone hidden size, L latent width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class StrictModel(BaseModel):
    """Unknown keys are errors and values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def mlp_width(dim: int, ratio: float) -> int:
    """Hidden width of a SwiGLU: `ratio * dim` rounded up to a multiple of 64, which matrix units like."""
    return -(-int(dim * ratio) // 64) * 64


class ArchitectureConfig(StrictModel):
    """Architecture facts of a causal decoder backbone, named as in its Hugging Face `config.json`."""

    model_type: Literal["qwen3", "llama"] = "qwen3"
    vocab_size: int = Field(gt=0)
    """Rows of the embedding matrix; may exceed the tokenizer's vocabulary (151,936 against 151,669 for Qwen3)."""
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    max_position_embeddings: int = Field(default=40960, gt=0)
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    rope_theta: float = Field(default=1e6, gt=0)
    tie_word_embeddings: bool = True

    @model_validator(mode="after")
    def _heads_divide(self) -> ArchitectureConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        return self

    def to_huggingface(self) -> dict[str, Any]:
        """Keyword arguments of the matching `transformers` config class."""
        values = self.model_dump(exclude={"model_type", "rope_theta"})
        return values | {"rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta}}


class BackboneConfig(StrictModel):
    """The causal decoder that the encoder and the decoder are built on."""

    architecture: ArchitectureConfig
    """In a run config also the path of a YAML file with these facts, relative to the file that names it."""
    pretrained: str | None = None
    """What to initialise from: a directory in Hugging Face layout, a GGUF file (`*.gguf`), or a hub id; null
    starts from random weights. It must have the architecture above, and its tokenizer must be the data's.
    Used when training starts, never when a saved codec is loaded."""


class CodecBackboneConfig(BackboneConfig):
    """The two backbones of a codec: one under the encoder, one in the decoder."""

    shared: bool = False
    """Encoder and decoder run on one set of weights (with tied embeddings the output head too)."""
    decoder: Literal["same", "random", "none"] = "same"
    """Backbone of the decoder. same: as the encoder's, `pretrained` included, and the output head with it;
    random: the architecture, from random weights; none: straight from the latents to the output head."""

    @model_validator(mode="after")
    def _can_share(self) -> CodecBackboneConfig:
        if self.shared and self.decoder != "same":
            raise ValueError(f"shared: true needs decoder: same, not {self.decoder}")
        return self


class QuantizerConfig(StrictModel):
    """Residual quantization with EMA codebooks (van den Oord 2017, appendix A.1; Lee 2022, section 3.1)."""

    method: Literal["ema", "fsq"] = "ema"
    """ema: codebooks that follow the data; fsq: fixed grids, finer from level to level (residual FSQ,
    Mentzer 2023), which learn nothing and cannot die. The EMA settings below then have no effect."""
    fsq_levels: tuple[int, ...] | None = None
    """With method fsq: values per dimension. There are `codebook_dim` of them and their product is
    `codebook_size`, for example [4, 4, 4, 4, 4] for 1024."""
    shared_codebook: bool = False
    """All levels use one codebook (Lee 2022, section 3.1), updated once per step from all of them."""
    gradient: Literal["straight_through", "rotation"] = "straight_through"
    """How the gradient passes the quantizer: copied, or turned and scaled with the vector (rotation trick,
    Fifty 2024)."""
    beam_width: int = Field(default=1, gt=0)
    """Partial sums kept from level to level in the search for a vector's codes (multi-path encoding, Liu 2015); 1 is
    greedy. Wider finds nearer sums at as many times the cost of quantizing, and leaves decoding as it is."""
    rate_weight: float = Field(default=0.0, ge=0)
    """What a nat of a code's length costs in the choice of codes, relative to the mean squared distance that the
    nearest codes of the first level leave (entropy-constrained vector quantization: Chou, Lookabaugh and Gray 1989);
    the length is -log of the code's moving-average share. 0 takes the nearest code. Usage grows uneven with it, so it
    goes with `threshold_ema_dead_code: 0`."""
    level_dropout: float = Field(default=0.0, ge=0, le=1)
    """Probability that a training sample is decoded from a random number of its first levels only
    (Zeghidour 2021, section III.C: quantizer dropout)."""
    code_temperature: float = Field(default=0.5, gt=0)
    """Temperature of stochastic codes, p(code) ~ exp(-distance^2 / (temperature * mean distortion of the
    level)) (Lee 2022, section 3.2.3; there on the absolute scale of its latents)."""
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    """Decay of `ema_cluster_size` and `ema_embed_sum` per optimizer step."""
    commitment_weight: float = Field(default=0.25, ge=0)
    """Weight of the commitment loss in the total (beta of van den Oord 2017, equation 3)."""
    threshold_ema_dead_code: float = Field(default=0.1, ge=0, lt=1)
    """A code is dead when its EMA count is below this share of uniform usage. 0 never re-seeds."""
    dead_code_interval: int = Field(default=10, gt=0)
    """Optimizer steps between two searches for dead codes."""
    kmeans_iterations: int = Field(default=10, ge=0)
    """Lloyd iterations of the level-by-level initialisation on residuals."""

    @model_validator(mode="after")
    def _grid_is_given(self) -> QuantizerConfig:
        if (self.method == "fsq") != (self.fsq_levels is not None):
            raise ValueError("fsq_levels: needed with method fsq, and only there")
        if self.fsq_levels is not None and any(size < 2 for size in self.fsq_levels):
            raise ValueError("fsq_levels: every dimension needs at least 2 values")
        if self.method == "fsq" and self.beam_width > 1:
            raise ValueError(
                "beam_width: the cells of method fsq's grids are nested, there is nothing to search"
            )
        if self.rate_weight and (self.method == "fsq" or self.beam_width > 1):
            raise ValueError("rate_weight: needs method ema and beam_width 1")
        if self.method == "fsq" and self.shared_codebook:
            raise ValueError("shared_codebook: the grids of method fsq differ in scale by level")
        return self


class RQVAEConfig(StrictModel):
    """The codec: K tokens <-> one latent position of D residual codes."""

    model: Literal["rqvae", "anchor", "identity"] = "rqvae"
    """identity: the codes are the tokens themselves (D = K, C = vocabulary and one for "no token"), nothing
    is learnt or lost (as in MEGABYTE, Yu 2023). The baseline that every codec must beat. Levels and sizes
    follow from the rest, and the settings of the networks have no effect.
    anchor: the codes are D < K of the tokens, evenly spaced (C = vocabulary and one), and the decoder fills in the
    others in parallel. It has no encoder and no codebooks, and its decoder is the backbone alone: the settings of
    latents and their layers have no effect."""
    backbone: CodecBackboneConfig
    compression_factor: int = Field(default=4, gt=0)
    """K: tokens per latent position."""
    codebook_levels: int = Field(default=8, gt=0)
    """D: residual codes per latent position."""
    codebook_size: int | tuple[int, ...] = 1024
    """C: entries per codebook, one number or one per level (coarse to fine)."""
    codebook_dim: int = Field(default=16, gt=0)
    """Width of the space that is quantized. Too wide a space is hard to quantize (at K=4 and 80 bits 128 dimensions
    lose half of the tokens), too narrow a one hard to learn: 32 serve K=4 well, K=16 learns nothing in them."""
    latent_dim: int = Field(default=256, gt=0)
    """L: width of the layers at latent resolution, on both sides of the quantizer."""
    num_latent_layers: int = Field(default=1, ge=0)
    """Refinement layers at latent resolution, in the encoder and again in the decoder; causal with
    `resample: chunked` only."""
    latent_head_dim: int = Field(default=64, gt=0)
    resample: Literal["chunked", "reference", "original"] = "chunked"
    """chunked: chunks do not reach into each other and everything is causal. reference: overlapping
    convolutions (kernel 3 and 4, stride 2) and unmasked refinement as in charleslow/rq_vae, for the
    ablation; such codes see the future, so generation refuses them. original: that codec to the letter, for
    its converted checkpoints: its refinement layers (biases, no positions) and the backbone's states alone as
    input, without the embeddings beside them."""
    encoder_context: Literal["document", "chunk"] = "document"
    """What a latent may depend on: all of its document up to its chunk's end, or its chunk alone."""
    token_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of tokens that the encoder sees as a learned mask vector in training (CALM, Shao 2025)."""
    latent_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the quantized latent's entries set to 0 in training (CALM, Shao 2025)."""
    latent_noise: float = Field(default=0.0, ge=0)
    """Gaussian noise on the quantized latents in training, relative to their root mean square in the sample."""
    quantizer: QuantizerConfig = QuantizerConfig()

    @model_validator(mode="before")
    @classmethod
    def _identity_follows(cls, values: Any) -> Any:
        """Fill in what the identity codec's shape must be where it is left out, or null over an inherited value; a
        contradiction is found below."""
        if not isinstance(values, dict) or values.get("model") not in ("identity", "anchor"):
            return values
        vocabulary: Any = values
        for name in ("backbone", "architecture", "vocab_size"):
            vocabulary = (
                vocabulary.get(name) if isinstance(vocabulary, dict) else getattr(vocabulary, name, None)
            )
        if not isinstance(vocabulary, int):
            return values  # reported by the fields' own checks
        shape = {"codebook_size": vocabulary + 1}
        if values["model"] == "identity":
            default = cls.model_fields["compression_factor"].default
            shape["codebook_levels"] = values.get("compression_factor", default)
        return {**values, **{name: size for name, size in shape.items() if values.get(name) is None}}

    @field_validator("codebook_size")
    @classmethod
    def _sizes_are_usable(cls, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if any(size < 2 for size in ((value,) if isinstance(value, int) else value)):
            raise ValueError("every codebook needs at least 2 entries")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> RQVAEConfig:
        if not isinstance(self.codebook_size, int) and len(self.codebook_size) != self.codebook_levels:
            raise ValueError(
                f"codebook_size lists {len(self.codebook_size)} sizes for codebook_levels={self.codebook_levels}"
            )
        if self.latent_dim % self.latent_head_dim:
            raise ValueError(
                f"latent_dim ({self.latent_dim}) must be a multiple of latent_head_dim ({self.latent_head_dim})"
            )
        return self

    @model_validator(mode="after")
    def _options_fit(self) -> RQVAEConfig:
        sizes, quantizer = set(self.codebook_sizes), self.quantizer
        if self.model == "identity":
            shape = (self.compression_factor, self.backbone.architecture.vocab_size + 1)
            if (self.codebook_levels, *sizes) != shape:
                raise ValueError(
                    f"model: identity means codebook_levels {shape[0]} and codebook_size {shape[1]}; "
                    "leave them out, or set them to null"
                )
            return self  # the networks' settings have no effect
        if self.model == "anchor":
            self._anchors_fit()
            return self
        if quantizer.shared_codebook and len(sizes) > 1:
            raise ValueError(f"quantizer.shared_codebook: one codebook has one size, not {sorted(sizes)}")
        if quantizer.shared_codebook and min(sizes) < self.codebook_levels:
            raise ValueError(
                f"quantizer.shared_codebook: {min(sizes)} entries do not go round {self.codebook_levels} levels"
            )
        if quantizer.fsq_levels is not None:
            if len(quantizer.fsq_levels) != self.codebook_dim:
                raise ValueError(
                    f"quantizer.fsq_levels: lists {len(quantizer.fsq_levels)} dimensions, codebook_dim is "
                    f"{self.codebook_dim}"
                )
            if sizes != {math.prod(quantizer.fsq_levels)}:
                raise ValueError(
                    f"quantizer.fsq_levels: their product is {math.prod(quantizer.fsq_levels)}, codebook_size "
                    f"is {self.codebook_size}"
                )
        if self.resample != "chunked" and self.compression_factor & (self.compression_factor - 1):
            raise ValueError(
                f"resample: {self.resample} halves step by step, so compression_factor={self.compression_factor} "
                "must be a power of 2"
            )
        if self.resample != "chunked" and self.encoder_context == "chunk":
            raise ValueError(
                f"encoder_context: chunk is not alone with resample: {self.resample}, which overlaps"
            )
        return self

    def _anchors_fit(self) -> None:
        tokens = self.backbone.architecture.vocab_size + 1
        if set(self.codebook_sizes) != {tokens}:
            raise ValueError(
                f"model: anchor means codebook_size {tokens} (the vocabulary and one); leave it out, "
                "or set it to null"
            )
        if self.codebook_levels >= self.compression_factor:
            raise ValueError(
                f"model: anchor keeps codebook_levels={self.codebook_levels} of compression_factor="
                f"{self.compression_factor} tokens and fills in the others: it needs fewer levels; for all tokens "
                "use model: identity"
            )
        if self.backbone.shared:
            raise ValueError("backbone.shared: model: anchor has no encoder to share with; set it to false")
        if self.backbone.decoder == "none":
            raise ValueError(
                "backbone.decoder: none leaves model: anchor nothing to decode with; use same or random"
            )
        # A decoder that reads tokens has no use for what disturbs latents or chooses codes.
        unused = (
            "resample",
            "encoder_context",
            "token_dropout",
            "latent_dropout",
            "latent_noise",
            "quantizer",
        )
        for name in unused:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: has no effect with model: anchor; leave it at its default")

    @property
    def sees_future(self) -> bool:
        """Codes depend on the text after them: nothing can be generated or scored conditionally with them."""
        return self.model == "rqvae" and self.resample != "chunked"

    @property
    def reads_embeddings(self) -> bool:
        """The encoder's downsampling gets the tokens' embeddings beside the backbone's states."""
        return self.resample != "original"

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """C of every level."""
        if isinstance(self.codebook_size, int):
            return (self.codebook_size,) * self.codebook_levels
        return self.codebook_size


class ResidualQuantizerConfig(StrictModel):
    """A residual quantizer by itself, as it is kept beside the codes it made."""

    codebook_sizes: tuple[int, ...]
    codebook_dim: int = Field(gt=0)
    quantizer: QuantizerConfig
    codec_hash: str | None = None
    """Hash of the codec that it is a part of."""


class RQTransformerShape(StrictModel):
    """The latent model as far as it can be chosen; what it predicts (D, C, K) comes from the codec."""

    spatial_dim: int = Field(default=256, gt=0)
    """Width of the spatial transformer, which runs over latent positions."""
    spatial_layers: int = Field(default=4, gt=0)
    depth_dim: int = Field(default=256, gt=0)
    """Width of the depth transformer, which runs over the D codes of one position."""
    depth_layers: int = Field(default=2, gt=0)
    head_dim: int = Field(default=64, gt=0)
    """Width of one attention head, in both transformers."""
    mlp_ratio: float = Field(default=8 / 3, gt=0)
    """Hidden width of the SwiGLU over the model width (8/3 costs as much as a plain MLP of ratio 4)."""
    rope_theta: float = Field(default=1e4, gt=0)
    head: Literal["per_level", "shared"] = "per_level"
    """Output heads of the D levels: one for each, or one for all, which needs codebooks of equal size."""
    embedding: Literal["per_level", "shared"] = "per_level"
    """A code's embedding: of its level, or the same at all levels, which needs codebooks of equal size. Residual
    codes mean another thing at every level; tokens as codes do not, and are learnt from all levels together."""
    depth_input: Literal["sum", "code"] = "sum"
    """What the depth transformer reads of the levels before: at every level the sum of all codes so far (Lee 2022,
    equation 11), or the one code before, as attention finds the others. The sum suits residual codes, which add up; a
    single code suits tokens (MEGABYTE, Yu 2023)."""
    spatial_input: Literal["codes", "tokens", "both"] = "codes"
    """What the spatial transformer reads of the latent before: the sum of its codes' embeddings, its K tokens
    (CALM, arXiv 2510.27688), or the sum of both. With tokens every latent is decoded as soon as it is
    generated, which takes the time of streaming."""
    spatial_backbone: BackboneConfig | None = None
    """A Hugging Face backbone in place of the spatial transformer's own layers. `spatial_dim` and
    `spatial_layers` must be its hidden_size and num_hidden_layers."""

    @property
    def reads_tokens(self) -> bool:
        """Text is part of the input."""
        return self.spatial_input != "codes"

    @model_validator(mode="after")
    def _widths_fit(self) -> RQTransformerShape:
        own_stacks = ("depth_dim",) if self.spatial_backbone is not None else ("spatial_dim", "depth_dim")
        for name in own_stacks:
            if getattr(self, name) % self.head_dim:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be a multiple of head_dim ({self.head_dim})"
                )
        if self.spatial_backbone is not None:
            architecture = self.spatial_backbone.architecture
            for name, wanted in (
                ("spatial_dim", "hidden_size"),
                ("spatial_layers", "num_hidden_layers"),
            ):
                if getattr(self, name) != getattr(architecture, wanted):
                    raise ValueError(
                        f"{name} ({getattr(self, name)}) must be the spatial_backbone's {wanted} "
                        f"({getattr(architecture, wanted)})"
                    )
        return self


class LatentModelConfig(RQTransformerShape):
    """The latent model of a run."""

    model: Literal["rq_transformer", "flat_transformer"] = "rq_transformer"
    """flat_transformer is the baseline: one transformer over the flattened codes, of `spatial_dim` and
    `spatial_layers`."""
    match: Literal["parameters", "compute"] | None = None
    """Give a flat_transformer as many layers as bring it nearest to the rq_transformer of the same settings,
    in parameters, or in forward FLOPs per sample. Null: `spatial_layers`."""

    @model_validator(mode="after")
    def _the_baseline_has_fewer_options(self) -> LatentModelConfig:
        if self.model == "rq_transformer" and self.match is not None:
            raise ValueError("match: only a flat_transformer is matched; set it to null, or change model")
        if self.model == "flat_transformer" and self.reads_tokens:
            raise ValueError("spatial_input: a flat_transformer reads codes only")
        if self.model == "flat_transformer" and self.depth_input != "sum":
            raise ValueError("depth_input: a flat_transformer has no depth transformer")
        if self.model == "flat_transformer" and self.spatial_backbone is not None:
            raise ValueError("spatial_backbone: a flat_transformer has layers of its own only")
        return self


class RQTransformerConfig(RQTransformerShape):
    """Spatial and depth transformer over the codes of one codec (Lee 2022, section 3.2)."""

    compression_factor: int = Field(gt=0)
    codebook_levels: int = Field(gt=0)
    codebook_size: int | tuple[int, ...]
    vocab_size: int | None = Field(default=None, gt=0)
    """V: needed by a model that reads tokens."""
    codec_hash: str | None = None
    """Hash of the codec whose codes it was trained on; generation refuses another codec."""

    @classmethod
    def for_codec(
        cls, codec: RQVAEConfig, latent_model: LatentModelConfig, codec_hash: str | None = None
    ) -> RQTransformerConfig:
        """The latent model of `codec`; `latent_model.match` is left to the caller."""
        return cls(
            **latent_model.model_dump(exclude={"model", "match"}),
            compression_factor=codec.compression_factor,
            codebook_levels=codec.codebook_levels,
            codebook_size=codec.codebook_size,
            vocab_size=codec.backbone.architecture.vocab_size if latent_model.reads_tokens else None,
            codec_hash=codec_hash,
        )

    @model_validator(mode="after")
    def _fits_the_codec(self) -> RQTransformerConfig:
        if not isinstance(self.codebook_size, int) and len(self.codebook_size) != self.codebook_levels:
            raise ValueError(
                f"codebook_size lists {len(self.codebook_size)} sizes for "
                f"codebook_levels={self.codebook_levels}"
            )
        if self.head == "shared" and len(set(self.codebook_sizes)) > 1:
            raise ValueError(
                f"head: shared needs codebooks of one size, not {list(self.codebook_sizes)}; use per_level"
            )
        if self.embedding == "shared" and len(set(self.codebook_sizes)) > 1:
            raise ValueError(
                f"embedding: shared needs codebooks of one size, not {list(self.codebook_sizes)}; use per_level"
            )
        if self.reads_tokens and self.vocab_size is None:
            raise ValueError(f"spatial_input: {self.spatial_input} needs vocab_size")
        if self.reads_tokens and self.spatial_backbone is not None:
            known = self.spatial_backbone.architecture.vocab_size
            if known != self.vocab_size:
                raise ValueError(
                    f"spatial_backbone: its vocab_size ({known}) must be the codec's ({self.vocab_size}), "
                    "because the tokens are read with its embeddings"
                )
        return self

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """C of every level."""
        if isinstance(self.codebook_size, int):
            return (self.codebook_size,) * self.codebook_levels
        return self.codebook_size
