"""Typed configuration of the models. Free of torch, so that submitting a job stays light.

Shape legend used across the package:
    B batch, T tokens, S = T / K latent positions, K compression factor, D codebook levels,
    C codebook size, H backbone hidden size, L latent width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class StrictModel(BaseModel):
    """Unknown keys are errors and values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
    """Directory in Hugging Face layout (or hub id) to initialise from; null starts from random weights.
    Used when training starts, never when a saved codec is loaded."""


class QuantizerConfig(StrictModel):
    """Residual quantization with EMA codebooks (van den Oord 2017, appendix A.1; Lee 2022, section 3.1)."""

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


class RQVAEConfig(StrictModel):
    """The codec: K tokens <-> one latent position of D residual codes."""

    backbone: BackboneConfig
    compression_factor: int = Field(default=4, gt=0)
    """K: tokens per latent position."""
    codebook_levels: int = Field(default=8, gt=0)
    """D: residual codes per latent position."""
    codebook_size: int | tuple[int, ...] = 1024
    """C: entries per codebook, one number or one per level (coarse to fine)."""
    codebook_dim: int = Field(default=16, gt=0)
    """Width of the space that is quantized. About 16: wider spaces lose accuracy fast at equal bits."""
    latent_dim: int = Field(default=256, gt=0)
    """L: width of the layers at latent resolution, on both sides of the quantizer."""
    num_latent_layers: int = Field(default=1, ge=0)
    """Causal refinement layers at latent resolution, in the encoder and again in the decoder."""
    latent_head_dim: int = Field(default=64, gt=0)
    quantizer: QuantizerConfig = QuantizerConfig()

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

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """C of every level."""
        if isinstance(self.codebook_size, int):
            return (self.codebook_size,) * self.codebook_levels
        return self.codebook_size


class RQTransformerShape(StrictModel):
    """Size of the latent model; what it predicts (D, C, K) comes from the codec."""

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

    @model_validator(mode="after")
    def _heads_fit(self) -> RQTransformerShape:
        for name in ("spatial_dim", "depth_dim"):
            if getattr(self, name) % self.head_dim:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be a multiple of head_dim ({self.head_dim})"
                )
        return self


class RQTransformerConfig(RQTransformerShape):
    """Spatial and depth transformer over the codes of one codec (Lee 2022, section 3.2)."""

    compression_factor: int = Field(gt=0)
    codebook_levels: int = Field(gt=0)
    codebook_size: int | tuple[int, ...]
    codec_hash: str | None = None
    """Hash of the codec whose codes it was trained on; generation refuses another codec."""

    @model_validator(mode="after")
    def _one_size_per_level(self) -> RQTransformerConfig:
        if not isinstance(self.codebook_size, int) and len(self.codebook_size) != self.codebook_levels:
            raise ValueError(
                f"codebook_size lists {len(self.codebook_size)} sizes for "
                f"codebook_levels={self.codebook_levels}"
            )
        return self

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """C of every level."""
        if isinstance(self.codebook_size, int):
            return (self.codebook_size,) * self.codebook_levels
        return self.codebook_size
