"""The part of `train:` that the DeepSpeed engine is built from: optimizer, precision, parallelism. Free of torch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from pydantic import Field

from rqvae.config import StrictModel

# Sections and settings of DeepSpeed that `train.deepspeed` passes on. DeepSpeed accepts a misspelt name at the top
# level silently, so these are checked here; what stands below them is checked by DeepSpeed's own models, but for
# `aio`, which it reads by hand.
PASSED_ON = (
    "aio",
    "comms_logger",
    "communication_data_type",
    "compile",
    "disable_python_gc",
    "dump_state",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "timers",
    "zero_optimization",
)
AIO_KEYS = (
    "block_size",
    "intra_op_parallelism",
    "overlap_events",
    "queue_depth",
    "single_submit",
    "use_gds",
)
# What this program says to DeepSpeed itself, and the setting that it comes from.
OURS = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "gradient_clipping": "gradient_clipping",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "precision",
    "fp16": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "activation_checkpointing": "activation_checkpointing",
    "zero_allow_untested_optimizer": "optimizer",
    "zero_force_ds_cpu_optimizer": "offload_optimizer",
    "steps_per_print": "log_every",
    "wall_clock_breakdown": "log_every",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer": "offload_optimizer",
    "zero_optimization.offload_param": "offload_param",
    "zero_optimization.stage3_param_persistence_threshold": "param_persistence_threshold",
    "zero_optimization.param_persistence_threshold": "param_persistence_threshold",
    "zero_optimization.zero_hpz_partition_size": "zero_hpz_partition_size",
    "zero_optimization.zero_quantized_weights": "zero_quantized_weights",
    "zero_optimization.zero_quantized_gradients": "zero_quantized_gradients",
    "zero_optimization.reduce_scatter": "optimizer",
    "zero_optimization.overlap_comm": "communication.overlap_comm",
    "zero_optimization.reduce_bucket_size": "communication.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size": "communication.allgather_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size": "communication.prefetch_bucket_size",
    "zero_optimization.prefetch_bucket_size": "communication.prefetch_bucket_size",
    "zero_optimization.stage3_max_live_parameters": "communication.max_live_parameters",
    "zero_optimization.max_live_parameters": "communication.max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance": "communication.max_reuse_distance",
    "zero_optimization.max_reuse_distance": "communication.max_reuse_distance",
}


class CommunicationConfig(StrictModel):
    """When DeepSpeed sends what. Sizes are in elements; null leaves the choice to DeepSpeed."""

    overlap_comm: bool | None = None
    """Reduce gradients while the backward pass goes on. DeepSpeed's choice: with zero_stage 3 only."""
    reduce_bucket_size: int | None = Field(default=None, gt=0)
    """Gradients reduced at a time (5e8). Smaller takes less memory and more messages."""
    allgather_bucket_size: int | None = Field(default=None, gt=0)
    """Weights gathered at a time after a step (5e8). Needs zero_stage 1 or 2."""
    prefetch_bucket_size: int | None = Field(default=None, ge=0)
    """Weights gathered ahead of their use (5e7). Needs zero_stage 3."""
    max_live_parameters: int | None = Field(default=None, ge=0)
    """Gathered weights that a rank holds at most (1e9). Needs zero_stage 3."""
    max_reuse_distance: int | None = Field(default=None, ge=0)
    """Weights that are used again within so many elements are not released (1e9). Needs zero_stage 3."""


class GuardsConfig(StrictModel):
    """When a step must not be taken. Every rank decides alike, before the weights change."""

    non_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop with a message that names the samples, or leave the step out."""
    loss_spike: float | None = Field(default=None, gt=1)
    """Largest loss over the mean of the last `spike_window` ones, once there are so many. Null: no limit."""
    spike_window: int = Field(default=50, gt=0)
    """Steps that say what loss is usual. They start anew when quantization begins."""
    on_loss_spike: Literal["stop", "skip"] = "stop"
    """What to do about a step beyond `loss_spike`."""
    max_skipped: int = Field(default=10, ge=0)
    """Steps that may be left out in the whole run; the next one stops it."""
    min_codebook_usage: float | None = Field(default=None, gt=0, lt=1)
    """Smallest share of a codebook's entries in use (`codebook/used_fraction_LEVEL` of the log) with which training
    goes on, looked at whenever a line is logged. Null: no limit."""


class EngineConfig(StrictModel):
    """Optimizer, precision and parallelism of a stage."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: momentum orthogonalised by Newton-Schulz (Jordan 2024) for the matrices of hidden linear layers, AdamW
    for embeddings, heads, norms, convolutions and vectors. Needs zero_stage 1 or more and gradient_clipping 0:
    DeepSpeed would clip the orthogonalised updates, whose norm is of the order of the matrices' rank."""
    learning_rate: float = Field(default=3e-4, gt=0, lt=1)
    """Peak learning rate of AdamW for new layers."""
    muon_learning_rate: float = Field(default=0.02, gt=0, lt=1)
    """Peak learning rate of Muon, in units of the update's spectral norm. Used by `optimizer: muon` only."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of Muon's momentum per step. Used by `optimizer: muon` only."""
    weight_decay: float = Field(default=0.1, ge=0, lt=1)
    """Decoupled weight decay per step, times the learning rate; matrices only, not norms or embeddings."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of Adam's first moment per step."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of Adam's second moment per step."""
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Largest global L2 norm of the gradient. 0 does not clip."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the forward and backward pass. auto: bf16 where the hardware multiplies it natively,
    otherwise fp32 with a warning. Master weights, optimizer and codebooks are fp32 in every case."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """What DeepSpeed splits over the ranks: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights."""
    param_persistence_threshold: int = Field(default=100_000, ge=0)
    """ZeRO-3 keeps parameters with fewer elements whole on every rank. 0 splits everything."""
    zero_hpz_partition_size: int = Field(default=1, gt=0)
    """ZeRO++: ranks that hold a second copy of the weights between them, for gathering in the backward pass without
    leaving the node: the GPUs of a node. 1: no copy. Needs zero_stage 3."""
    zero_quantized_weights: bool = False
    """ZeRO++: gather weights in int8. Needs zero_stage 3 and a GPU."""
    zero_quantized_gradients: bool = False
    """ZeRO++: reduce gradients in int4 by all-to-all. Needs zero_stage 3, `optimizer: adamw` and a GPU."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer state lives if not on the accelerator; AdamW then runs on the CPU (DeepSpeedCPUAdam).
    Needs zero_stage 1 or more, nvme needs 3."""
    offload_param: Literal["none", "cpu", "nvme"] = "none"
    """Where the weights' shards live when not on the accelerator. Needs zero_stage 3."""
    offload_pin_memory: bool = True
    """Page-locked host memory for what is offloaded: faster copies, but it cannot be swapped out."""
    nvme_path: str | None = None
    """Directory on a local NVMe disk for anything offloaded to nvme."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory for about a third more compute."""
    torch_compile: bool = False
    """Compile the model with torch.compile (inductor). Not with zero_stage 3, whose gathering of weights breaks the
    graph at every layer, but for DeepSpeed's own compiler, `deepspeed: {compile: {deepcompile: true}}`, on a GPU."""
    communication: CommunicationConfig = CommunicationConfig()
    """Buckets and overlap."""
    guards: GuardsConfig = GuardsConfig()
    """What must not reach the weights."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Anything else for DeepSpeed, in its own words, e.g. {zero_optimization: {sub_group_size: 100000000}}. What
    this program sets by itself is refused here."""


def mistakes_of_engine(train: EngineConfig, where: Callable[[str], str]) -> Iterator[str]:
    """Settings that do not go together, each with its path as `where` spells it."""
    stage = train.zero_stage
    if train.precision == "bf16" and stage == 0:
        yield (
            f"{where('zero_stage')}: 0 keeps no fp32 master weights with precision bf16; "
            "use zero_stage 1 or more, or precision fp32"
        )
    if train.optimizer == "muon":
        if stage == 0:
            yield f"{where('optimizer')}: muon needs zero_stage 1, 2 or 3, not 0"
        if train.gradient_clipping:
            yield (
                f"{where('gradient_clipping')}: muon's updates would be clipped instead of the gradients; set it to 0"
            )
        if train.zero_quantized_gradients:
            yield f"{where('zero_quantized_gradients')}: cannot be used with optimizer: muon"
    needs_3 = {
        "zero_hpz_partition_size": train.zero_hpz_partition_size > 1,
        "zero_quantized_weights": train.zero_quantized_weights,
        "zero_quantized_gradients": train.zero_quantized_gradients,
    }
    for name in ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance"):
        needs_3[f"communication.{name}"] = getattr(train.communication, name) is not None
    for name, is_set in needs_3.items():
        if is_set and stage != 3:
            yield f"{where(name)}: needs zero_stage 3, not {stage}"
    if train.communication.allgather_bucket_size is not None and stage not in (1, 2):
        yield f"{where('communication.allgather_bucket_size')}: needs zero_stage 1 or 2, not {stage}"
    compiler = train.deepspeed.get("compile")
    is_deep = isinstance(compiler, Mapping) and bool(compiler.get("deepcompile"))
    if train.torch_compile and stage == 3 and not is_deep:
        yield (
            f"{where('torch_compile')}: not with zero_stage 3; use zero_stage 0, 1 or 2, or add DeepSpeed's own "
            "compiler, deepspeed: {compile: {deepcompile: true}}"
        )
    if is_deep and not train.torch_compile:
        yield f"{where('deepspeed')}.compile.deepcompile: has no effect without torch_compile: true"
    yield from _mistakes_of_offloading(train, where)
    skips = "skip" in (train.guards.non_finite, train.guards.on_loss_spike)
    if skips and train.offload_optimizer == "nvme":
        yield f"{where('guards')}: skip needs the gradients at hand; not with offload_optimizer nvme"
    yield from _mistakes_of_passing_on(train.deepspeed, where("deepspeed"), where)


def _mistakes_of_offloading(train: EngineConfig, where: Callable[[str], str]) -> Iterator[str]:
    if train.offload_param != "none" and train.zero_stage != 3:
        yield f"{where('offload_param')}: {train.offload_param} needs zero_stage 3, not {train.zero_stage}"
    if train.offload_optimizer == "cpu" and train.zero_stage == 0:
        yield f"{where('offload_optimizer')}: cpu needs zero_stage 1, 2 or 3, not 0"
    if train.offload_optimizer == "nvme" and train.zero_stage != 3:
        yield f"{where('offload_optimizer')}: nvme needs zero_stage 3, not {train.zero_stage}"
    if "nvme" in (train.offload_param, train.offload_optimizer) and train.nvme_path is None:
        yield f"{where('nvme_path')}: missing; name a directory on a local NVMe disk to offload to"


def _mistakes_of_passing_on(
    given: Mapping[str, Any], path: str, where: Callable[[str], str]
) -> Iterator[str]:
    for name, value in given.items():
        if name in OURS:
            yield f"{path}.{name}: set by {where(OURS[name])}; use that instead"
        elif name not in PASSED_ON:
            near = difflib.get_close_matches(name, PASSED_ON, n=1)
            hint = f"; did you mean {path}.{near[0]}?" if near else f"; known are {', '.join(PASSED_ON)}"
            yield f"{path}.{name}: not a setting of DeepSpeed that is passed on{hint}"
        elif name in ("zero_optimization", "aio"):
            if not isinstance(value, Mapping):
                yield f"{path}.{name}: must be a mapping"
                continue
            for below in value:
                if (ours := OURS.get(f"{name}.{below}")) is not None:
                    yield f"{path}.{name}.{below}: set by {where(ours)}; use that instead"
                elif name == "aio" and below not in AIO_KEYS:
                    yield f"{path}.aio.{below}: unknown; known are {', '.join(AIO_KEYS)}"
