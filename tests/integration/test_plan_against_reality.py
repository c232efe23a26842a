"""What launch/plan.py predicts against what DeepSpeed's ranks take. Real engines, hence slow."""

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
from tests.integration.conftest import free_port, launcher, run, write_corpus

pytestmark = pytest.mark.slow
CONFIGS = Path(__file__).parents[2] / "configs"


def model_states(rank: int, world_size: int, port: int, phase: str, precision: str, output: str) -> None:
    """One process of a run of tiny: bytes of its partitioned tensors, after an optimizer step."""
    torch.set_num_threads(1)
    from launch.engine import build_engine
    from launch.optimizer import parameter_groups
    from launch.tasks import RQVAETask

    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    config = load_config(CONFIGS / "tiny.yaml", stage="rqvae", overrides=[f"train.precision={precision}"])
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
        # The same storage as the weights' in fp32.
        "optimizer": sum(m.nbytes for m in masters if precision == "bf16")
        + sum(s[k].nbytes for s in zero.optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")),
        "bucket": sum(bucket.buffer.nbytes for bucket in zero.ipg_buckets.values()),
    }
    Path(output, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def phase_plan(phase: str, plans: list[PhasePlan]) -> PhasePlan:
    return next(p for p in plans if p.stage == "rqvae" and p.phase.name == phase)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("phase", ["frozen", "full"])
def test_model_states_of_tiny_to_the_byte(
    phase: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LOCAL_RANK", "0"), ("LOCAL_SIZE", "2"), ("DS_ACCELERATOR", "cpu")):
        monkeypatch.setenv(name, value)
    mp.spawn(model_states, (2, free_port(), phase, precision, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    config = load_config(CONFIGS / "tiny.yaml", overrides=[f"train.precision={precision}"])
    expected = phase_plan(phase, plan(config, 2)).memory
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == {name: getattr(expected, name) for name in found}, rank


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
