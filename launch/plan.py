"""What a run needs: parameters, memory per GPU, batch arithmetic, training FLOPs and time, by stage and phase.

    python launch/plan.py --config configs/qwen3_0.6b.yaml --gpus 8 [--gpu-memory-gib 80] [a.b=value ...]

Nothing is allocated or read but the configuration. Speed is an assumption, stated in the output: give the peak of
your GPU and the utilisation you have seen (`--peak-tflops`, `--mfu`).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import torch
from torch import nn

from launch import flops, memory
from launch.config import RunConfig, Stage, check_world_size, load_config
from launch.dry_run import batch_arithmetic
from launch.latent_model import latent_model_config
from launch.tasks import Phase, RQVAETask
from rqvae import BaseLM, FlatTransformer, RQTransformer

GIB = 1 << 30


@dataclass(frozen=True)
class PhasePlan:
    """Needs of one phase of a stage."""

    stage: Stage
    phase: Phase
    parameters: memory.Parameters
    memory: memory.Memory
    tokens: int
    """In all steps of the phase."""
    flops: float
    """Of all its steps, without recomputation."""


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 1 if something does not fit into memory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file, e.g. configs/qwen3_0.6b.yaml")
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="ranks in all")
    parser.add_argument("--gpu-memory-gib", type=float, default=80.0)
    parser.add_argument(
        "--peak-tflops", type=float, default=312.0, help="of one GPU in the run's precision (A100, bf16: 312)"
    )
    parser.add_argument("--mfu", type=float, default=0.35, help="share of the peak that training reaches")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings over the file's")
    args = parser.parse_args(arguments)
    try:
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
    return 0 if all(part.memory.peak <= args.gpu_memory_gib * GIB for part in plans) else 1


def plan(config: RunConfig, gpus: int) -> list[PhasePlan]:
    """All phases of the stages that the configuration has settings for (of the three without `joint`).

    The targets of `stochastic_codes` are not counted.

    Raises:
        ValueError: the batch does not divide by the ranks.
    """
    makers = {"base_lm": base_lm, "rqvae": rqvae, "rq_transformer": rq_transformer}
    named = [stage for stage in makers if stage in config.stages.model_fields_set]
    plans = []
    for stage in [config.stage] if config.stage is not None else named or list(makers):
        if stage in makers:
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
    """The codec, frozen and full."""
    if config.codec.model == "identity":
        return []
    task, length = RQVAETask(config), config.data.sample_length
    architecture, costs = config.codec.backbone.architecture, flops.codec(config.codec, length)
    plans = []
    for phase in task.phases():
        is_full = phase.name == "full"
        with torch.device("meta"):
            model = task.create_model()
        task.set_phase(model, phase)
        recompute = config.train.activation_checkpointing
        kept = memory.codec(config.codec, length, width(config), is_full, recompute)
        per_token = costs.train_full if is_full else costs.train_frozen
        head = (architecture.hidden_size, architecture.vocab_size)
        trains_head = model.decoder.head.weight.requires_grad
        plans.append(phase_plan(config, gpus, phase, model, kept, head, trains_head, per_token))
    return plans


def rq_transformer(config: RunConfig, gpus: int) -> list[PhasePlan]:
    """The latent model."""
    shape, length = latent_model_config(config), config.data.sample_length
    model_class = FlatTransformer if config.latent_model.model == "flat_transformer" else RQTransformer
    with torch.device("meta"):
        model = model_class(shape)
    kept = memory.latent_model(
        model_class.__name__, shape, length, width(config), config.train.activation_checkpointing
    )
    factor = shape.compression_factor
    per_token = 3 * flops.latent_model(model_class.__name__, shape, length / factor) / factor
    phase = Phase("full", 0, config.train.steps)
    # The gradients of all levels' heads are there at once, each formed over one row per latent.
    is_flat = model_class is FlatTransformer
    sizes = shape.codebook_sizes[:1] if shape.head == "shared" else shape.codebook_sizes
    head = (shape.spatial_dim if is_flat else shape.depth_dim, sum(sizes))
    return [phase_plan(config, gpus, phase, model, kept, head, True, per_token)]


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
    train = config.train
    parameters = memory.Parameters.of(model, train, gpus)
    per_pass = train.micro_batch_size * config.data.sample_length
    logits = memory.logits(*head, per_pass, width(config), trains_head)
    needs = memory.memory(parameters, train, width(config), activations_per_token * per_pass, logits)
    tokens = (phase.end - phase.start) * train.global_batch_size * config.data.sample_length
    return PhasePlan(config.stage, phase, parameters, needs, tokens, flops_per_token * tokens)


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
    print(
        f"{part.stage}, {phase.name}: steps {phase.start:,} to {phase.end:,}\n"
        f"  parameters  {counts.total:,}, trained {counts.trainable:,}\n"
        f"  batch       {batch_arithmetic(staged, gpus)}\n"
        f"  memory, GiB per rank, ZeRO-{staged.train.zero_stage}, {'bf16' if width(staged) == 2 else 'fp32'}"
        f"{offload}"
    )
    for name, gib in rows.items():
        print(f"    {name:12}{gib:10.2f}")
    print(
        f"    {'peak':12}{needs.peak / GIB:10.2f}  {verdict}{host}\n"
        f"  compute     {part.tokens:,} tokens, {part.flops:.3g} FLOP, about {hours:,.1f} h\n"
    )


if __name__ == "__main__":
    sys.exit(main())
