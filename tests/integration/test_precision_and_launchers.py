"""Other ways to run the same training script. Each is a launch of its own, hence slow."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from rqvae import RQVAE
from tests.integration.conftest import NANO, launcher, run

pytestmark = pytest.mark.slow


def losses(run_root: Path, name: str) -> list[float]:
    lines = (run_root / name / "rqvae/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def settings(run_root: Path, name: str, data: list[str], *more: str) -> list[str]:
    command = ["--config", str(NANO), "--stage", "rqvae", f"name={name}", f"run_root={run_root}"]
    return [*command, "tracking.wandb=disabled", *data, *more]


def test_launchers_and_zero_stages_give_the_same_losses(tmp_path: Path, nano_data: list[str]) -> None:
    python = [sys.executable, "launch/train.py"]
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
    starts = {
        "deepspeed": [*launcher(2), *settings(tmp_path, "deepspeed", nano_data)],
        "torchrun": [*torchrun, "launch/train.py", *settings(tmp_path, "torchrun", nano_data)],
        "alone": [*python, *settings(tmp_path, "alone", nano_data)],
        "stage1": [*launcher(2), *settings(tmp_path, "stage1", nano_data, "train.zero_stage=1")],
    }
    for name, command in starts.items():
        result = run(command)
        assert result.returncode == 0, (name, result.stdout + result.stderr)
    assert losses(tmp_path, "torchrun") == losses(tmp_path, "deepspeed")
    # Another number of ranks, or ZeRO stage, adds up in another order and that is all.
    expected = losses(tmp_path, "deepspeed")
    assert losses(tmp_path, "alone") == pytest.approx(expected, rel=1e-5)
    assert losses(tmp_path, "stage1") == pytest.approx(expected, rel=1e-5)


def test_not_a_bit_of_a_frozen_backbone_moves(tmp_path: Path, nano_data: list[str]) -> None:
    """After one step and after six, with gradients through it, under ZeRO-3 on two ranks; all else has moved."""
    states = []
    for steps in (1, 6):
        more = [
            f"train.steps={steps}", f"stages.rqvae.frozen_steps={steps}", "stages.rqvae.switch_warmup_steps=0",
            "train.warmup_steps=0", "stages.rqvae.quantizer_warmup_steps=1", "train.schedule=constant",
        ]  # fmt: skip
        name = f"frozen{steps}"
        for command in (
            [*launcher(2), *settings(tmp_path, name, nano_data, *more)],
            [sys.executable, "launch/convert_checkpoint.py", str(tmp_path / name / "rqvae"),
             str(tmp_path / name / "model"), "--to", "safetensors"],
        ):  # fmt: skip
            result = run(command)
            assert result.returncode == 0, result.stdout + result.stderr
        states.append(RQVAE.from_pretrained(tmp_path / name / "model"))
    first, last = states
    frozen = {id(parameter) for parameter in first.backbone_parameters()}
    moved = dict(last.named_parameters())
    kept = 0
    for parameter_name, parameter in first.named_parameters():
        is_same = torch.equal(parameter, moved[parameter_name])
        assert is_same == (id(parameter) in frozen), parameter_name
        kept += is_same
    assert 10 < kept < len(moved)


def test_bf16_under_zero_3(tmp_path: Path, nano_data: list[str]) -> None:
    for precision in ("fp32", "bf16"):
        more = [f"train.precision={precision}"]
        result = run([*launcher(2), *settings(tmp_path, precision, nano_data, *more)])
        assert result.returncode == 0, result.stdout + result.stderr
    assert losses(tmp_path, "bf16")[:3] == pytest.approx(losses(tmp_path, "fp32")[:3], rel=2e-2)


def test_stop_file_saves_and_the_next_start_finishes(tmp_path: Path, nano_data: list[str]) -> None:
    whole = run([*launcher(2), *settings(tmp_path, "whole", nano_data)])
    assert whole.returncode == 0, whole.stdout + whole.stderr
    directory = tmp_path / "stopped/rqvae"
    directory.mkdir(parents=True)
    (directory / "STOP").touch()
    command = [*launcher(2), *settings(tmp_path, "stopped", nano_data)]
    first = run(command)
    assert "Stopped at step 1 (" in first.stdout
    assert not (directory / "STOP").exists()
    second = run(command)
    assert second.returncode == 0, second.stdout + second.stderr
    assert losses(tmp_path, "stopped") == losses(tmp_path, "whole")


@pytest.mark.parametrize(
    "options",
    [["codec.backbone.shared=true"], ["train.activation_checkpointing=true"]],
    ids=["shared backbone", "activation checkpointing"],
)
def test_options_under_zero_3_learn_what_one_process_learns(
    tmp_path: Path, nano_data: list[str], options: list[str]
) -> None:
    alone = [sys.executable, "launch/train.py", *settings(tmp_path, "alone", nano_data, *options)]
    for command in (
        [*alone, "train.zero_stage=0"],
        [*launcher(2), *settings(tmp_path, "zero3", nano_data, *options)],
    ):
        result = run(command)
        assert result.returncode == 0, result.stdout + result.stderr
    assert losses(tmp_path, "zero3") == pytest.approx(losses(tmp_path, "alone"), rel=1e-5)


def test_a_compiled_model_learns_the_same(tmp_path: Path, nano_data: list[str]) -> None:
    for name, more in (("eager", []), ("compiled", ["train.torch_compile=true"])):
        command = settings(tmp_path, name, nano_data, "train.zero_stage=0", *more)
        result = run([sys.executable, "launch/train.py", *command], timeout_s=1800)
        assert result.returncode == 0, result.stdout + result.stderr
    assert losses(tmp_path, "compiled") == pytest.approx(losses(tmp_path, "eager"), rel=1e-4)
    # Validation looks into the compiled head, too.
    shown = [tmp_path / name / "rqvae/reconstructions/step-00000010.txt" for name in ("eager", "compiled")]
    assert shown[0].read_text() == shown[1].read_text()
