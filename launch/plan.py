"""What a run needs: parameters, memory per GPU, batch arithmetic, training FLOPs and time, by stage and phase.

    python launch/plan.py --config configs/qwen3_0.6b.yaml --gpus 8 [--gpu-memory-gib 80] [--json F] [a.b=value ...]
    python launch/plan.py --config configs/benchmarks/qwen3_8b.yaml --inference [--json F] [a.b=value ...]

The second says how fast it would decode, by batch size and K, on an H100 or on a machine that is told by its
bandwidth, matmul rate and launch overhead (`launch/speed_model.py`).

Nothing is allocated or read but the configuration. Speed is an assumption, stated in the output: give the peak of
your GPU and the utilisation you have seen (`--peak-tflops`, `--mfu`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launch import flops, memory, plan_inference
from launch.config import RunConfig, Stage, check_world_size, load_config
from launch.dry_run import batch_arithmetic
from launch.joint_task import JointTask
from launch.latent_model import latent_model_config
from launch.latent_task import latent_model_class
from launch.speed_model import Machine
from launch.task import Phase
from launch.tasks import codec_task
from rqvae import BaseLM, FlatTransformer

GIB = 1 << 30
GPU_SIZES_GIB = (40, 80, 141)
"""For which the largest micro-batch is told."""


@dataclass(frozen=True)
class PhasePlan:
    """Needs of one phase of a stage."""

    stage: Stage
    phase: Phase
    parts: dict[str, int]
    """Parameters by module of the model; a shared one counts where it comes first."""
    parameters: memory.Parameters
    memory: memory.Memory
    largest_micro_batch: dict[int, int]
    """Samples that fit, by GiB of memory; 0: not even one."""
    checkpoint_bytes: float
    """Of all ranks together."""
    tokens: int
    """In all steps of the phase."""
    flops: float
    """Of all its steps, without recomputation."""

    @property
    def step_flops(self) -> float:
        """Of one step, over all ranks."""
        return self.flops / (self.phase.end - self.phase.start)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 1 if something does not fit into memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file, e.g. configs/qwen3_0.6b.yaml")
    parser.add_argument("--gpus", type=int, metavar="N", help="ranks in all")
    parser.add_argument("--gpu-memory-gib", type=float, default=80.0)
    parser.add_argument(
        "--peak-tflops", type=float, default=312.0, help="of one GPU in the run's precision (A100, bf16: 312)"
    )
    parser.add_argument("--mfu", type=float, default=0.35, help="share of the peak that training reaches")
    parser.add_argument("--inference", action="store_true", help="decoding speed instead of training")
    h100 = plan_inference.H100
    parser.add_argument(
        "--bandwidth-gb-s", type=float, default=h100.bandwidth / 1e9, help="memory (H100: 3350)"
    )
    parser.add_argument(
        "--matmul-tflops", type=float, default=h100.matmul / 1e12, help="products (H100: 989)"
    )
    parser.add_argument(
        "--launch-us", type=float, default=1e6 * h100.launch_s, help="per kernel (assumed: 2)"
    )
    parser.add_argument("--json", type=Path, metavar="F", help="file to write everything to, in bytes")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings over the file's")
    args = parser.parse_args(arguments)
    try:
        if args.inference:
            return decoding(args)
        if args.gpus is None:
            raise ValueError("give --gpus N for training, or --inference for decoding speed")
        if args.gpus < 1:
            raise ValueError(f"--gpus: {args.gpus} ranks cannot train anything; give 1 or more")
        config = load_config(args.config, overrides=args.overrides)
        plans = plan(config, args.gpus)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{config.name} on {args.gpus} x {args.gpu_memory_gib:g} GiB")
    print(f"assumed: {args.peak_tflops:g} TFLOP/s peak per GPU, MFU {args.mfu:g}\n")
    for part in plans:
        describe(part, config, args.gpus, args.gpu_memory_gib, args.peak_tflops * 1e12 * args.mfu)
    if args.json:
        speed = args.gpus * args.peak_tflops * 1e12 * args.mfu
        args.json.write_text(json.dumps([as_json(part, speed) for part in plans], indent=2) + "\n")
    return 0 if all(part.memory.peak <= args.gpu_memory_gib * GIB for part in plans) else 1


def decoding(args: argparse.Namespace) -> int:
    """`--inference`: predict, print and write."""
    rates = {"bandwidth-gb-s": args.bandwidth_gb_s, "matmul-tflops": args.matmul_tflops}
    for name, rate in rates.items():
        if rate <= 0:
            raise ValueError(f"--{name}: {rate:g} is no rate; give more than 0")
    config = load_config(args.config, overrides=args.overrides)
    machine = Machine(1e9 * args.bandwidth_gb_s, 1e12 * args.matmul_tflops, 1e-6 * args.launch_us)
    rows = plan_inference.predict(config, machine, width(config))
    plan_inference.print_prediction(config, machine, width(config), rows)
    if args.json:
        facts = {"machine": dataclasses.asdict(machine), "rows": rows}
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    return 0


def plan(config: RunConfig, gpus: int) -> list[PhasePlan]:
    """All phases of the stages that the configuration has settings for; without any, of all but `joint`.

    Raises:
        ValueError: the batch does not divide by the ranks.
    """
    makers = {"base_lm": base_lm, "rqvae": rqvae, "rq_transformer": rq_transformer, "joint": rqvae}
    named = [stage for stage in makers if stage in config.stages.model_fields_set]
    usual = [stage for stage in makers if stage != "joint"]
    plans = []
    for stage in [config.stage] if config.stage is not None else named or usual:
        plans += makers[stage](config if config.stage else config.for_stage(stage), gpus)  # type: ignore[arg-type]
    return plans


def base_lm(config: RunConfig, gpus: int) -> list[PhasePlan]:
    """The plain autoregressive model."""
    architecture, length = config.codec.backbone.architecture, config.data.sample_length
    with torch.device("meta"):
        model = BaseLM(architecture, eos_token_id=0)
    kept = memory.backbone(architecture, length, width(config), True, config.train.activation_checkpointing)
    per_token = 3 * (flops.backbone(architecture, length / 2) + flops.head(architecture))
    phase = Phase("full", 0, config.train.steps)
    head = (architecture.hidden_size, architecture.vocab_size)
    return [phase_plan(config, gpus, phase, model, kept, head, True, per_token)]


def rqvae(config: RunConfig, gpus: int) -> list[PhasePlan]:
    """The codec, frozen and full; in the stage joint with its prior, and with what the codes are drawn from."""
    if config.codec.model == "identity":
        return []
    task = JointTask(config) if config.stage == "joint" else codec_task(config)
    length, recompute = config.data.sample_length, config.train.activation_checkpointing
    architecture, costs = config.codec.backbone.architecture, flops.codec(config.codec, length)
    plans = []
    for phase in task.phases():
        is_full = phase.name == "full"
        with torch.device("meta"):
            model = task.create_model()
        task.set_phase(model, phase)
        kept = memory.codec(config.codec, length, width(config), is_full, recompute)
        per_token = costs.train_full if is_full else costs.train_frozen
        if config.stage == "joint":
            kept += latent_model_kept(config) + memory.soft_targets(latent_model_config(config))
            per_token += latent_model_flops(config)
        head = (architecture.hidden_size, architecture.vocab_size)
        trains_head = bool(task.reconstructing_head(model).weight.requires_grad)  # type: ignore[arg-type]
        plans.append(phase_plan(config, gpus, phase, model, kept, head, trains_head, per_token))
    return plans


def latent_model_kept(config: RunConfig) -> float:
    """Bytes of the latent model per token of text, without its heads."""
    recompute, length = config.train.activation_checkpointing, config.data.sample_length
    name = latent_model_class(config).__name__
    return memory.latent_model(name, latent_model_config(config), length, width(config), recompute)


def latent_model_flops(config: RunConfig) -> float:
    """Training FLOPs of the latent model per token of text."""
    shape, length = latent_model_config(config), config.data.sample_length
    factor = shape.compression_factor
    return 3 * flops.latent_model(latent_model_class(config).__name__, shape, length / factor) / factor


def rq_transformer(config: RunConfig, gpus: int) -> list[PhasePlan]:
    """The latent model."""
    shape, model_class = latent_model_config(config), latent_model_class(config)
    with torch.device("meta"):
        model = model_class(shape)
    kept = latent_model_kept(config)
    if config.train.stochastic_codes:
        kept += memory.soft_targets(shape)
    phase = Phase("full", 0, config.train.steps)
    # The gradients of all levels' heads are there at once, each formed over one row per latent.
    is_flat = model_class is FlatTransformer
    sizes = shape.codebook_sizes[:1] if shape.head == "shared" else shape.codebook_sizes
    head = (shape.spatial_dim if is_flat else shape.depth_dim, sum(sizes))
    return [phase_plan(config, gpus, phase, model, kept, head, True, latent_model_flops(config))]


def width(config: RunConfig) -> int:
    """Bytes of a weight in the forward pass; `precision: auto` is bf16 on any GPU that is worth planning for."""
    return 4 if config.train.precision == "fp32" else 2


def phase_plan(
    config: RunConfig,
    gpus: int,
    phase: Phase,
    model: nn.Module,
    activations_per_token: float,
    head: tuple[int, int],
    trains_head: bool,
    flops_per_token: float,
) -> PhasePlan:
    """Needs of a phase from those of a token."""
    assert config.stage is not None
    check_world_size(config, gpus)
    train, length = config.train, config.data.sample_length
    parameters = memory.Parameters.of(model, train, gpus)

    def needs(micro_batch_size: int) -> memory.Memory:
        per_pass = micro_batch_size * length
        logits = memory.logits(*head, per_pass, width(config), trains_head)
        return memory.memory(parameters, train, width(config), activations_per_token * per_pass, logits)

    def largest_in(gib: int) -> int:
        return largest(lambda size: needs(size).peak <= gib * GIB)

    tokens = (phase.end - phase.start) * train.global_batch_size * length
    return PhasePlan(
        stage=config.stage,
        phase=phase,
        parts=parameters_by_part(model),
        parameters=parameters,
        memory=needs(train.micro_batch_size),
        largest_micro_batch={gib: largest_in(gib) for gib in GPU_SIZES_GIB},
        checkpoint_bytes=memory.checkpoint(parameters, train, width(config)),
        tokens=tokens,
        flops=flops_per_token * tokens,
    )


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Parameters under each name of two words, such as `encoder.backbone`, without repetition."""
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = ".".join(name.split(".")[:2])
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, where all smaller ones fit too; 0 if 1 does not."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def as_json(part: PhasePlan, flops_per_second: float) -> dict[str, Any]:
    """Everything about a phase, with derived figures."""
    return dataclasses.asdict(part) | {
        "states_bytes": part.memory.states,
        "peak_bytes": part.memory.peak,
        "step_flops": part.step_flops,
        "days": part.flops / flops_per_second / 86400,
    }


def describe(
    part: PhasePlan, config: RunConfig, gpus: int, gpu_memory_gib: float, flops_per_second: float
) -> None:
    """Print one phase."""
    staged = config if config.stage else config.for_stage(part.stage)
    counts, needs, phase = part.parameters, part.memory, part.phase
    hours = part.flops / (gpus * flops_per_second) / 3600
    rows = {name: getattr(needs, name) / GIB for name in needs.__dataclass_fields__ if name != "host"}
    verdict = "fits" if needs.peak <= gpu_memory_gib * GIB else "DOES NOT FIT"
    host = f"; {needs.host / GIB:.2f} on the host" if needs.host else ""
    offload = "".join(
        f", {kind} on {place}"
        for kind in ("optimizer", "param")
        if (place := getattr(staged.train, f"offload_{kind}")) != "none"
    )
    parts = ", ".join(f"{name} {count:,}" for name, count in part.parts.items())
    fitting = ", ".join(f"{size} in {gib} GiB" for gib, size in part.largest_micro_batch.items())
    print(
        f"{part.stage}, {phase.name}: steps {phase.start:,} to {phase.end:,}\n"
        f"  parameters  {counts.total:,}, trained {counts.trainable:,}\n"
        f"              {parts}\n"
        f"  batch       {batch_arithmetic(staged, gpus)}\n"
        f"  memory, GiB per rank, ZeRO-{staged.train.zero_stage}, {'bf16' if width(staged) == 2 else 'fp32'}"
        f"{offload}"
    )
    for name, gib in rows.items():
        print(f"    {name:12}{gib:10.2f}")
    print(
        f"    {'peak':12}{needs.peak / GIB:10.2f}  {verdict}{host}\n"
        f"  micro-batch at most {fitting} per rank\n"
        f"  checkpoint  {part.checkpoint_bytes / GIB:.2f} GiB\n"
        f"  compute     {part.tokens:,} tokens, {part.flops:.3g} FLOP ({part.step_flops:.3g} a step), "
        f"about {hours:,.1f} h ({hours / 24:,.1f} days)\n"
    )


if __name__ == "__main__":
    sys.exit(main())
