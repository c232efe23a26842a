"""What launch/plan.py predicts against what DeepSpeed's ranks take. Real engines, hence mostly slow."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from launch.config import load_config
from launch.plan import GIB, PhasePlan, plan
from rqvae import BaseLM
from tests.integration.conftest import free_port, launcher, run, write_corpus
from tests.integration.memory_of_ranks import measure

MIB = 1 << 20

CONFIGS = Path(__file__).parents[2] / "configs"
ARCHITECTURE = "codec.backbone.architecture"
SIZES = {
    "tiny": ["train.micro_batch_size=2"],
    "small": [f"{ARCHITECTURE}={CONFIGS / 'backbones/small.yaml'}", "train.micro_batch_size=4"],
    # 56 million parameters and few tokens, so that weights, gradients and optimizer are what there is.
    "wide": [
        f"{ARCHITECTURE}={{vocab_size: 8192, hidden_size: 512, intermediate_size: 1536, num_hidden_layers: 6, "
        "num_attention_heads: 8, num_key_value_heads: 4, head_dim: 64}",
        *(
            "data.sample_length=64",
            "codec.latent_dim=512",
            "codec.codebook_size=256",
            "train.micro_batch_size=1",
        ),
    ],
}
MEMORY = [
    "train.precision=fp32",
    "train.global_batch_size=16",
    # DeepSpeed's own 2 GB would hide everything else.
    "train.communication.reduce_bucket_size=1000000",
    "stages.rqvae.quantizer_warmup_steps=0",
]
OPTIONS = {
    "ZeRO-0": ["train.zero_stage=0"],
    "ZeRO-1": ["train.zero_stage=1"],
    "ZeRO-2": ["train.zero_stage=2"],
    "bf16": ["train.precision=bf16"],
    "shared": ["codec.backbone.shared=true"],
    "recomputed": ["train.activation_checkpointing=true"],
}


def check_memory(size: str, world_size: int, phase: str, *options: str) -> tuple[float, float]:
    """States and peak as predicted are within a tenth of the bytes in tensors; prints all, the process too."""
    overrides = [*MEMORY, *SIZES[size], *options]
    config = load_config(CONFIGS / "tiny_rqvae.yaml", overrides=overrides)
    needs = phase_plan(phase, plan(config, world_size)).memory
    found = measure(CONFIGS / "tiny_rqvae.yaml", overrides, world_size, phase)
    states = needs.states + needs.bucket
    print(
        f"{size}, {world_size} ranks, {phase}, {options}: predicted {states / MIB:.1f}, {needs.peak / MIB:.1f} MiB"
    )
    for rank in found:
        print("  ", {name: round(value / MIB, 1) for name, value in rank.items()})
        assert states == pytest.approx(rank["tensors"], rel=0.1)
        assert needs.peak == pytest.approx(rank["peak_tensors"], rel=0.1)
        assert rank["peak_process"] > 0.8 * rank["peak_tensors"]
    return found[0]["tensors"], found[0]["peak_process"]


def test_memory_of_tiny_within_a_tenth() -> None:
    check_memory("tiny", 2, "full")


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_memory_within_a_tenth(size: str, world_size: int) -> None:
    check_memory(size, world_size, "full")


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_memory_with_options_within_a_tenth(options: list[str]) -> None:
    check_memory("small", 2, "full", *options)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "wide"])
def test_memory_of_the_frozen_phase_within_a_tenth(size: str) -> None:
    check_memory(size, 2, "frozen")


@pytest.mark.slow
def test_more_ranks_hold_less_each() -> None:
    """56 million parameters: what ZeRO-3 splits falls with the ranks, in tensors and in the process."""
    found = {ranks: check_memory("wide", ranks, "full") for ranks in (1, 2, 4)}
    for ranks in (2, 4):
        assert found[ranks][0] == pytest.approx(found[1][0] / ranks, rel=0.05)
    assert found[1][1] > found[2][1] > found[4][1]


@pytest.mark.slow
def test_only_rank_0_holds_the_pretrained_backbone(tmp_path: Path) -> None:
    overrides = [*MEMORY, *SIZES["wide"], f"codec.backbone.pretrained={tmp_path}"]
    config = load_config(CONFIGS / "tiny_rqvae.yaml", overrides=overrides)
    BaseLM(config.codec.backbone.architecture, eos_token_id=0).save_pretrained(tmp_path)
    needs = phase_plan("frozen", plan(config, 4)).memory
    whole = 4.0 * phase_plan("frozen", plan(config, 4)).parameters.total
    first, *others = measure(CONFIGS / "tiny_rqvae.yaml", overrides, 4, "frozen")
    assert first["peak_built"] > whole
    for rank in others:
        # Its quarter, the engine's part of what is trained, and one matrix at a time.
        assert rank["peak_built"] < needs.states + needs.bucket + 0.1 * whole


def model_states(rank: int, world_size: int, port: int, phase: str, precision: str, output: str) -> None:
    """One process of a run of tiny: bytes of its partitioned tensors, after an optimizer step."""
    torch.set_num_threads(1)
    from launch.codec_tasks import RQVAETask
    from launch.engine import build_engine
    from launch.optimizer import parameter_groups

    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    config = load_config(
        CONFIGS / "tiny_rqvae.yaml", stage="rqvae", overrides=[f"train.precision={precision}"]
    )
    task = RQVAETask(config)
    model = task.create_model()
    task.set_phase(model, next(p for p in task.phases() if p.name == phase))
    groups = parameter_groups(model, task.backbone_parameters(model), config.train)
    engine = build_engine(model, groups, config.train, precision)  # type: ignore[arg-type]
    ids = torch.randint(1024, (1, 64))
    engine.train()
    for _ in range(config.train.global_batch_size // config.train.micro_batch_size // world_size):
        engine.backward(engine(ids, quantize=False).loss)
        engine.step()
    zero = engine.optimizer
    masters = zero.fp32_partitioned_groups_flat
    found = {
        "weights": sum(p.ds_tensor.nbytes for p in model.parameters()),
        "gradients": zero.grad_partitions_flat_buffer.nbytes,
        "optimizer": sum(m.nbytes for m in masters)
        + sum(s[k].nbytes for s in zero.optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")),
        "bucket": sum(bucket.buffer.nbytes for bucket in zero.ipg_buckets.values()),
    }
    Path(output, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def phase_plan(phase: str, plans: list[PhasePlan]) -> PhasePlan:
    return next(p for p in plans if p.stage == "rqvae" and p.phase.name == phase)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("phase", ["frozen", "full"])
def test_model_states_of_tiny_to_the_byte(
    phase: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LOCAL_RANK", "0"), ("LOCAL_SIZE", "2"), ("DS_ACCELERATOR", "cpu")):
        monkeypatch.setenv(name, value)
    mp.spawn(model_states, (2, free_port(), phase, precision, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    config = load_config(CONFIGS / "tiny_rqvae.yaml", overrides=[f"train.precision={precision}"])
    expected = phase_plan(phase, plan(config, 2)).memory
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == {name: getattr(expected, name) for name in found}, rank


@pytest.mark.slow
def test_a_step_with_the_shapes_of_qwen3_0_6b(tmp_path: Path) -> None:
    """Frozen warm-up with 151,936 embeddings on two ranks of ZeRO-3, fp32: minutes, and about 16 GB."""
    memory = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    available_gib = int(memory[1]) >> 20 if memory else 0
    if available_gib < 18:
        pytest.skip(f"{available_gib} GiB of memory are available, 18 are needed")
    write_corpus(tmp_path / "documents.jsonl", 60)
    data = [
        f"data.directory={tmp_path / 'shards'}",
        f"data.source={{kind: jsonl, paths: {tmp_path / 'documents.jsonl'}}}",
        "data.tokenizer={kind: bpe, vocab_size: 320}",
        "data.sample_length=128",
        "data.validation_fraction=0.1",
        "data.test_fraction=0.1",
    ]
    config = ["--config", str(CONFIGS / "qwen3_0.6b.yaml")]
    built = run([sys.executable, "-m", "data_pipeline", "build", *config, *data])
    assert built.returncode == 0, built.stderr
    settings = [
        *data,
        f"run_root={tmp_path}",
        "tracking.wandb=disabled",
        "codec.backbone.pretrained=null",
        "train.precision=fp32",
        "train.global_batch_size=2",
        "train.micro_batch_size=1",
        "train.steps=1",
        "train.frozen_steps=1",
        "train.switch_warmup_steps=0",
        "train.quantizer_warmup_steps=1",  # continuous, as the first steps are: k-means would read all samples
        "train.warmup_steps=1",
        "train.activation_checkpointing=false",
        "train.eval_samples=2",
        "train.log_every=1",
    ]
    result = run([*launcher(2), *config, "--stage", "rqvae", *settings], timeout_s=1800)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = (tmp_path / "qwen3_0.6b/rqvae/metrics.jsonl").read_text().splitlines()
    step = json.loads(lines[0])
    assert (step["phase"], step["step"]) == ("frozen", 1)
    assert step["nats_per_token"] == pytest.approx(11.93, abs=1)  # ln 151,936: it knows nothing yet
    assert step["gradient_norm"] > 0
    needs = phase_plan("frozen", plan(load_config(config[1], overrides=settings), 2)).memory
    # A CPU has no room for the bucket until it is written to, and Python with its libraries on top.
    predicted = (needs.peak - needs.bucket) / GIB
    print(json.dumps(step, indent=1), dataclasses.asdict(needs), sep="\n")
    print(f"peak memory per rank: {step['peak_memory_gib']:.2f} GiB, predicted {predicted:.2f} GiB")
    assert 0.5 * predicted < step["peak_memory_gib"] < 1.25 * predicted + 1
