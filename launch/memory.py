"""Memory of one rank in training, in closed form.

Model states follow DeepSpeed's ZeRO (Rajbhandari 2020, section 5) as its release 0.19 lays them out; activations
are what autograd keeps of our layers, counted operation by operation and rounded to what matters. Allocator
fragmentation, the CUDA context and library workspaces come on top: leave a tenth free. Model states were found
right to the byte, and the bytes in tensors at the peak of a step within a tenth (tests/integration).
Rank 0 also builds the whole model in fp32 on the host before it is split, which is not part of these figures.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from launch.config import TrainConfig
from rqvae.config import ArchitectureConfig, RQTransformerConfig, RQVAEConfig, mlp_width
from rqvae.linear_head import LinearHead

# What DeepSpeed takes where `train.communication` says nothing, in elements.
REDUCE_BUCKET = 500_000_000
PREFETCH_BUCKET = 50_000_000
LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a model on `world_size` ranks, in elements."""

    total: int
    trainable: int
    shard: int
    """One rank's share of all, every parameter padded to a multiple of the ranks."""
    trainable_shard: int
    persistent: int
    """In parameters below `param_persistence_threshold`, which ZeRO-3 keeps whole as well."""
    largest_module: int
    """In the module with most parameters of its own: gathered at once, whatever the limits say."""
    ranks: int
    buffer_bytes: int
    """Codebooks and what belongs to them, whole on every rank."""

    @classmethod
    def of(cls, model: nn.Module, train: TrainConfig, world_size: int) -> Parameters:
        """Count a model, which may be on the meta device."""

        def shard(parameters: Iterable[nn.Parameter]) -> int:
            return sum(-(-p.numel() // world_size) for p in parameters)

        parameters = list(model.parameters())
        trainable = [p for p in parameters if p.requires_grad]
        return cls(
            total=sum(p.numel() for p in parameters),
            trainable=sum(p.numel() for p in trainable),
            shard=shard(parameters),
            trainable_shard=shard(trainable),
            persistent=sum(p.numel() for p in parameters if p.numel() <= train.param_persistence_threshold),
            largest_module=max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()),
            ranks=world_size,
            buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        )


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank's device, and on its host for what is offloaded."""

    weights: float
    buffers: float
    """Of the model, such as codebooks."""
    gradients: float
    """fp32 sums over micro-batches."""
    optimizer: float
    """Adam's two moments and fp32 master weights, of which DeepSpeed has a copy also where the weights are fp32."""
    bucket: float
    """Buffer that gradients are reduced in. On a CPU only the part that is written to takes up memory."""
    gathered: float
    """Whole weights at one time, ZeRO-3 only."""
    prefetched: float
    """Weights in the buffer that they arrive in, before each is copied out of it."""
    activations: float
    logits: float
    """Block of logits, gradients of the states before the head, and of the head's weights if trained."""
    reduction: float
    """Copy of the bucket, sorted by rank, that gradients are reduced from."""
    step: float
    """Flat copy of the gradients in the optimizer step, when all of the above but the bucket are gone."""
    host: float

    @property
    def states(self) -> float:
        """What is there all the time."""
        return self.weights + self.buffers + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        """Largest sum at one time on the device: at the end of a forward or a backward pass, or in the step."""
        forward = self.gathered + self.prefetched + self.activations + self.logits
        backward = self.gathered + self.reduction
        return self.states + self.bucket + max(forward, backward, self.step)


def memory(
    parameters: Parameters, train: TrainConfig, width: int, activations: float, logits: float
) -> Memory:
    """Memory of one rank.

    Args:
        width: bytes of a weight in the forward pass: 2 for bf16, 4 for fp32.
        activations: bytes for one micro-batch.
        logits: the same.
    """
    stage = train.zero_stage
    weights = float(width * (parameters.shard + parameters.persistent if stage == 3 else parameters.total))
    if train.zero_hpz_partition_size > 1:  # ZeRO++: the second copy, shared by the ranks of a node
        weights += width * (parameters.total - parameters.persistent) / train.zero_hpz_partition_size
    gradients = 4.0 * (parameters.trainable_shard if stage >= 2 else parameters.trainable)
    split = parameters.trainable_shard if stage >= 1 else parameters.trainable
    optimizer = (12.0 if stage >= 1 else 8.0) * split
    host = 0.0
    if train.offload_optimizer != "none":
        host += optimizer + gradients
        optimizer = gradients = 0.0
    if train.offload_param != "none":
        host += width * parameters.shard
        weights = width * parameters.persistent
    bucket = train.communication.reduce_bucket_size or REDUCE_BUCKET
    gathered, prefetched = _gathered(parameters, train) if stage == 3 else (0, 0)
    return Memory(
        weights=weights,
        buffers=parameters.buffer_bytes,
        gradients=gradients,
        optimizer=optimizer,
        bucket=width * bucket if stage >= 1 else 0.0,
        gathered=width * gathered,
        prefetched=width * prefetched,
        activations=activations,
        logits=logits,
        reduction=width * min(bucket, parameters.trainable) if stage == 3 else 0.0,
        step=4.0 * split if stage >= 1 and train.offload_optimizer == "none" else 0.0,
        host=host,
    )


def _gathered(parameters: Parameters, train: TrainConfig) -> tuple[int, int]:
    """Elements that ZeRO-3 holds whole at one time, and that it has under way."""
    if parameters.ranks == 1:
        return 0, 0  # the shard is the whole, and is used where it is
    limits, to_gather = train.communication, parameters.total - parameters.persistent
    live = LIVE_PARAMETERS if limits.max_live_parameters is None else limits.max_live_parameters
    ahead = PREFETCH_BUCKET if limits.prefetch_bucket_size is None else limits.prefetch_bucket_size
    gathered = min(to_gather, max(live, parameters.largest_module))
    return gathered, min(gathered, max(ahead, parameters.largest_module))


def backbone_layer(architecture: ArchitectureConfig, context: int, width: int, is_trained: bool) -> float:
    """Bytes that autograd keeps of one backbone layer per token, in samples of `context` tokens.

    A layer with frozen weights passes gradients on but needs no inputs of its products for its own.
    """
    hidden, mlp = architecture.hidden_size, architecture.intermediate_size
    query = architecture.num_attention_heads * architecture.head_dim
    key = architecture.num_key_value_heads * architecture.head_dim
    trained = int(is_trained)
    norms = 2 * hidden * (4 + 2 * width * trained)  # they compute in fp32
    if architecture.model_type == "qwen3":
        norms += (query + key) * (4 + width * trained)
    # queries; keys and values repeated for all heads; output; the mask, which the kernel makes a float of
    attention = width * (query * (4 + trained) + context)
    return norms + attention + width * mlp * (3 + trained)


def backbone(
    architecture: ArchitectureConfig, context: int, width: int, is_trained: bool, recompute: bool
) -> float:
    """Bytes of a whole backbone per token. `recompute`: with activation checkpointing."""
    layer = backbone_layer(architecture, context, width, is_trained)
    final_norm = architecture.hidden_size * (4 + 2 * width * is_trained)
    if recompute:
        return architecture.num_hidden_layers * width * architecture.hidden_size + layer + final_norm
    return architecture.num_hidden_layers * layer + final_norm


def block(
    dim: int, num_layers: int, mlp_ratio: float, context: float, width: int, recompute: bool = False
) -> float:
    """Bytes of a trained `TransformerBlock` per position."""
    layer = width * (11 * dim + 4 * mlp_width(dim, mlp_ratio) + context)
    if recompute:
        return num_layers * width * dim + layer
    return num_layers * layer


def codec(config: RQVAEConfig, context: int, width: int, is_trained: bool, recompute: bool) -> float:
    """Bytes of the codec per token, in samples of `context` tokens, without the head.

    Args:
        is_trained: of the pretrained backbones; the rest always is.
        recompute: with activation checkpointing.
    """
    architecture, factor = config.backbone.architecture, config.compression_factor
    decoder = config.backbone.decoder
    # Nothing below the encoder's frozen backbone learns, unless the mask token does: nothing is kept of it.
    total = 0.0
    if config.model == "anchor":  # a decoder only: embeddings of anchors, and with what stands beside them
        kept = backbone(architecture, context, width, is_trained or decoder == "random", recompute)
        return kept + 2 * width * architecture.hidden_size
    if is_trained or config.token_dropout:
        total += backbone(architecture, context, width, is_trained, recompute)
    if decoder != "none":
        total += backbone(architecture, context, width, is_trained or decoder == "random", recompute)
    refinement = block(config.latent_dim, config.num_latent_layers, 8 / 3, context / factor, width, recompute)
    # embeddings, their norm, states and embeddings side by side, the same with absent places filled; upsampled
    between = width * 7 * architecture.hidden_size
    return total + 2 * refinement / factor + between


def latent_model(kind: str, config: RQTransformerConfig, context: int, width: int, recompute: bool) -> float:
    """Bytes of a latent model per token of text, in samples of `context` tokens. `kind`: name of its class."""
    factor, levels = config.compression_factor, config.codebook_levels
    positions = context / factor

    def spatial(length: float) -> float:
        return block(config.spatial_dim, config.spatial_layers, config.mlp_ratio, length, width, recompute)

    if kind == "FlatTransformer":
        return levels * spatial(positions * levels) / factor
    if config.spatial_backbone is not None:
        over_positions = backbone(
            config.spatial_backbone.architecture, round(positions), width, True, recompute
        )
    else:
        over_positions = spatial(positions)
    depth = block(config.depth_dim, config.depth_layers, config.mlp_ratio, levels, width, recompute)
    return (over_positions + levels * depth) / factor


def soft_targets(config: RQTransformerConfig) -> float:
    """Bytes per token of text that stochastic codes add: targets and log-probabilities of all levels, in fp32."""
    return 8.0 * sum(config.codebook_sizes) / config.compression_factor


def checkpoint(parameters: Parameters, train: TrainConfig, width: int) -> float:
    """Bytes of one checkpoint, of all ranks together: fp32 weights and moments of what is trained, and the weights of
    the forward pass, of which ZeRO-3 keeps the frozen ones only."""
    frozen = parameters.total - parameters.trainable
    weights = frozen if train.zero_stage == 3 else parameters.total
    adam = 12 if train.zero_stage else 8  # without ZeRO the weights are the fp32 ones
    return float(adam * parameters.trainable + width * weights + parameters.buffer_bytes)


def logits(hidden: int, vocabulary: int, tokens: int, width: int, is_trained: bool) -> float:
    """Bytes of a `LinearHead`'s loss over `tokens` positions."""
    rows = min(tokens, max(16, LinearHead.BLOCK_ELEMENTS // vocabulary))
    block_bytes = rows * vocabulary * (4 if width == 4 else 8)
    # The gradient of 16-bit weights is summed up in fp32 before it is rounded.
    weights = hidden * vocabulary * (width if width == 4 else width + 4) * is_trained
    return block_bytes + width * hidden * tokens + weights
