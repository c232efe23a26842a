"""What decoding should cost, from bytes moved, floating-point operations and kernel launches.

A pass through a part of a model takes

    bytes / bandwidth + FLOPs / matmul rate + launches * launch overhead

Bytes are the weights, which every pass reads once whatever the batch, keys and values, and logits. The terms are
added up, not overlapped: with few rows a matrix product first waits for its weights and then computes, so the
larger of the two would be too short a time near the point where they are equal. At batch 1 the first term is all that
matters to autoregressive decoding, which is why many latents are decoded at once; their FLOPs are no fewer for it.

`launch/benchmark.py inference` prints predictions beside what it measures; `launch/plan.py --inference` makes them
for a machine that is not there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from statistics import fmean, harmonic_mean

import torch
import torch.nn.functional as F

from launch import flops
from rqvae.config import ArchitectureConfig, RQTransformerConfig, RQVAEConfig, mlp_width
from rqvae.layers import TransformerBlock

# Operations that run a kernel, by layer, at one position with a cache, as the tests count them. Views are none.
BACKBONE_LAUNCHES = 48
"""A Qwen3 layer of `transformers`."""
CONVERSION_LAUNCHES = 8
"""What it takes more in 16 bits: its norms convert to fp32 and back."""
BLOCK_LAUNCHES = 13
"""A layer of our `TransformerBlock`."""
ROTARY_LAUNCHES = 10
"""What rotary positions add to it."""
LEVEL_LAUNCHES = 6
"""The rest of a level of the depth transformer: embedding, sum, norm, head, choice."""


@dataclass(frozen=True)
class Machine:
    """What decodes."""

    bandwidth: float
    """Bytes of weights read per second."""
    matmul: float
    """FLOP/s of matrix products."""
    launch_s: float
    """Seconds that every kernel costs besides."""


@dataclass(frozen=True)
class Work:
    """What has to be done."""

    bytes: float = 0.0
    flops: float = 0.0
    launches: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops, self.launches + other.launches)

    def __mul__(self, times: float) -> Work:
        return Work(self.bytes * times, self.flops * times, self.launches * times)

    def seconds(self, machine: Machine) -> float:
        """How long it takes."""
        return self.bytes / machine.bandwidth + self.flops / machine.matmul + self.launches * machine.launch_s


@dataclass(frozen=True)
class Race:
    """What is generated.

    Attributes:
        width: bytes of a weight, 2 in bf16 and 4 in fp32.
    """

    batch: int
    prompt: int
    new: int
    width: int


def backbone_pass(architecture: ArchitectureConfig, race: Race, positions: float, context: float) -> Work:
    """One pass of `positions` positions per sequence that see `context` positions each on average."""
    heads, kv = architecture.num_attention_heads, architecture.num_key_value_heads
    hidden, head_dim, layers = (
        architecture.hidden_size,
        architecture.head_dim,
        architecture.num_hidden_layers,
    )
    weights = layers * (
        hidden * head_dim * (2 * heads + 2 * kv) + 3 * hidden * architecture.intermediate_size
    )
    cached = race.batch * context * 2 * layers * kv * head_dim
    return Work(
        race.width * (weights + cached),
        race.batch * positions * flops.backbone(architecture, context),
        layers * (BACKBONE_LAUNCHES + CONVERSION_LAUNCHES * (race.width < 4)),
    )


def head_pass(architecture: ArchitectureConfig, race: Race, positions: float) -> Work:
    """Logits of `positions` positions per sequence, and the choice among them."""
    rows = race.batch * positions
    entries = architecture.vocab_size * (architecture.hidden_size + 2 * rows)  # written, and read again
    return Work(race.width * entries, rows * flops.head(architecture), 2)


def block_pass(
    dim: int,
    layers: int,
    mlp_ratio: float,
    race: Race,
    positions: float,
    context: float,
    has_rotary: bool = True,
) -> Work:
    """One pass through our `TransformerBlock`."""
    weights = layers * (4 * dim * dim + 3 * dim * mlp_width(dim, mlp_ratio))
    cached = race.batch * context * 2 * layers * dim
    return Work(
        race.width * (weights + cached),
        race.batch * positions * flops.block(dim, layers, mlp_ratio, context),
        layers * (BLOCK_LAUNCHES + ROTARY_LAUNCHES * has_rotary),
    )


def autoregressive(architecture: ArchitectureConfig, race: Race) -> Work:
    """All of a generation: the prompt at once, then token by token."""
    prompt = backbone_pass(architecture, race, race.prompt, race.prompt / 2)
    step = backbone_pass(architecture, race, 1, race.prompt + race.new / 2)
    return prompt + step * (race.new - 1) + head_pass(architecture, race, 1) * race.new


def latent(
    codec: RQVAEConfig,
    model: RQTransformerConfig,
    race: Race,
    streaming: bool = False,
    compiled: bool = False,
) -> dict[str, Work]:
    """All of a generation by part: encode, spatial, depth, decode.

    Args:
        codec: of any kind; anchors need no encoding, tokens as codes no decoding either.
        model: of an RQTransformer.
        streaming: decode every latent as it comes, not all at the end.
        compiled: the depth transformer's step is one launch.
    """
    factor = codec.compression_factor
    num_prompt, num_new = math.ceil(race.prompt / factor), math.ceil(race.new / factor)
    spatial = _spatial_pass(model, race, num_prompt, num_prompt / 2)
    spatial += _spatial_pass(model, race, 1, num_prompt + num_new / 2) * (num_new - 1)
    levels = model.codebook_levels
    level = block_pass(model.depth_dim, model.depth_layers, model.mlp_ratio, race, 1, levels / 2, False)
    if compiled:
        level = replace(level, launches=1)
    entries = sum(model.codebook_sizes) / levels
    heads = Work(
        race.width * entries * (model.depth_dim + 2 * race.batch),
        race.batch * 2 * model.depth_dim * entries,
        LEVEL_LAUNCHES,
    )
    parts = {"spatial": spatial, "depth": (level + heads) * (levels * num_new)}
    if codec.model == "identity":
        return {"encode": Work(), **parts, "decode": Work()}
    tokens = num_prompt * factor
    if streaming:
        first = _decoder_pass(codec, race, tokens + factor, (tokens + factor) / 2, factor)
        later = _decoder_pass(codec, race, factor, tokens + num_new * factor / 2, factor)
        decode = first + later * (num_new - 1)
    else:
        length = tokens + num_new * factor
        decode = _decoder_pass(codec, race, length, length / 2, num_new * factor)
    if codec.model == "anchor":
        return {"encode": Work(), **parts, "decode": decode}
    encode = backbone_pass(codec.backbone.architecture, race, tokens, tokens / 2)
    encode += _refinement(codec, race, tokens, 2 * codec.backbone.architecture.hidden_size)
    encode += Work(0, race.batch * num_prompt * 2 * codec.codebook_dim * sum(codec.codebook_sizes))
    return {"encode": encode, **parts, "decode": decode}


def _spatial_pass(model: RQTransformerConfig, race: Race, positions: float, context: float) -> Work:
    if model.spatial_backbone is not None:
        return backbone_pass(model.spatial_backbone.architecture, race, positions, context)
    return block_pass(model.spatial_dim, model.spatial_layers, model.mlp_ratio, race, positions, context)


def _decoder_pass(codec: RQVAEConfig, race: Race, tokens: float, context: float, new: float) -> Work:
    """Of `tokens` positions per sequence, `new` of which get logits."""
    architecture = codec.backbone.architecture
    if codec.model == "anchor":  # the backbone alone
        return backbone_pass(architecture, race, tokens, context) + head_pass(architecture, race, new)
    work = _refinement(codec, race, tokens, architecture.hidden_size)
    if codec.backbone.decoder != "none":
        work += backbone_pass(architecture, race, tokens, context)
    return work + head_pass(architecture, race, new)


def _refinement(codec: RQVAEConfig, race: Race, tokens: float, hidden: int) -> Work:
    """The layers at latent resolution and the convolution between them and states of width `hidden`."""
    factor, dim = codec.compression_factor, codec.latent_dim
    latents = tokens / factor
    convolution = Work(
        race.width * factor * hidden * dim, race.batch * latents * 2 * factor * hidden * dim, 2
    )
    return convolution + block_pass(dim, codec.num_latent_layers, 8 / 3, race, latents, latents / 2)


_STREAMED_BYTES = 256 << 20
"""More weights than a cache holds."""


def measure_machine(dtype: torch.dtype, device: torch.device) -> Machine:
    """The present machine: a stack of layers with one row, with many, and layers too small to cost anything else.

    The stack has the shapes of a backbone's MLP, as a processor reads one large matrix faster than many of a few MB.
    """
    # Of Qwen3-0.6B; a GPU needs larger ones, those of the 8B, for their time to show beside that of their launch.
    hidden, wide, rows = (4096, 12288, 4096) if device.type == "cuda" else (1024, 3072, 128)
    pairs = max(2, -(-_STREAMED_BYTES // (2 * hidden * wide * dtype.itemsize)))
    up, down = (
        [torch.randn(*shape, device=device).to(dtype) for _ in range(pairs)]
        for shape in ((wide, hidden), (hidden, wide))
    )
    num_weights = 2 * pairs * hidden * wide
    with torch.inference_mode():

        def stack(count: int) -> float:
            x = torch.randn(count, hidden, device=device).to(dtype)

            def run() -> None:
                for first, second in zip(up, down, strict=True):
                    F.linear(F.linear(x, first), second)

            return _seconds(run, device)

        stream_s, product_s = stack(1), stack(rows)
        layers = 4
        block = TransformerBlock(16, layers, 16, 2, rope_theta=None).to(device, dtype)
        x = torch.zeros(1, 1, 16, device=device, dtype=dtype)

        def tiny() -> None:
            cache = block.new_cache(1, 8, x)
            for _ in range(8):
                block(x, None, None, cache)

        launch_s = _seconds(tiny, device) / (8 * layers * BLOCK_LAUNCHES)
    # The products read the weights too. Whatever the clock makes of it, arithmetic is never free.
    arithmetic_s = max(product_s - stream_s, product_s / 10)
    return Machine(num_weights * dtype.itemsize / stream_s, 2 * rows * num_weights / arithmetic_s, launch_s)


def mean_machine(machines: Sequence[Machine]) -> Machine:
    """One whose times are the means of theirs: what a machine was like that others share."""
    bandwidth, matmul, launch_s = zip(*map(astuple, machines), strict=True)
    return Machine(harmonic_mean(bandwidth), harmonic_mean(matmul), fmean(launch_s))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median of several runs."""
    taken = []
    for _ in range(7):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])[3]
