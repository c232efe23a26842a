"""The plan of a run, over the configurations that ship with the project."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.config import load_config
from launch.plan import GIB, main, plan

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_can_be_planned(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpus = "1" if path.stem.startswith("smollm2") else "2"
    assert main(["--config", str(path), "--gpus", gpus]) in (0, 1)
    shown = capsys.readouterr().out
    assert "assumed: 312 TFLOP/s peak per GPU, MFU 0.35" in shown
    # Anchors have nothing that is pretrained, tokens as codes nothing to train.
    first = {"anchor": "rqvae, full", "rqvae": "rqvae, frozen", "identity": "rq_transformer, full"}
    assert f"{first[load_config(path).codec.model]}: steps 0 to" in shown
    assert ("rqvae, " in shown) == (load_config(path).codec.model != "identity")


def test_phases_of_the_largest_size() -> None:
    config = load_config(CONFIGS / "qwen3_8b.yaml", overrides=["train.zero_hpz_partition_size=1"])
    frozen, full, latent = plan(config, 64)
    assert [(p.stage, p.phase.name) for p in (frozen, full, latent)] == [
        ("rqvae", "frozen"),
        ("rqvae", "full"),
        ("rq_transformer", "full"),
    ]
    # Two models of 8.19 billion, one without its head, the other without its embeddings; all else is new.
    assert full.parameters.total - frozen.parameters.trainable == 2 * 8_190_735_360 - 2 * 622_329_856
    assert full.parameters.trainable == full.parameters.total == frozen.parameters.total
    # bf16 weights, fp32 gradients, master weights and Adam: 18 bytes a parameter over 64 ranks.
    assert full.memory.states == pytest.approx(18 * full.parameters.total / 64, rel=0.01)
    assert frozen.memory.peak < full.memory.peak
    assert frozen.tokens == 2000 * 512 * 2048
    # 6 FLOPs a parameter and token (embeddings do none), and attention.
    assert full.flops / full.tokens == pytest.approx(6 * (full.parameters.total - 0.62e9), rel=0.15)


def test_more_ranks_need_less_memory_each(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(CONFIGS / "qwen3_8b.yaml"), "--gpu-memory-gib", "80", "--gpus"]
    assert main([*arguments, "2"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert main([*arguments, "64"]) == 0
    assert main([*arguments, "3"]) == 2
    assert "cannot be split into passes" in capsys.readouterr().err
    assert main([*arguments, "0"]) == 2


def test_settings_count() -> None:
    def peak(*overrides: str) -> float:
        return plan(load_config(CONFIGS / "qwen3_0.6b.yaml", overrides=overrides), 8)[1].memory.peak / GIB

    assert peak("train.activation_checkpointing=false") > 3 * peak()
    assert peak("train.precision=fp32") > 1.3 * peak()
    assert peak("train.zero_stage=1") > peak() + 2
    assert peak("train.micro_batch_size=1") < peak()
    assert peak("train.offload_optimizer=cpu") < peak()


def test_json_holds_what_a_scheduler_asks_for(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    arguments = ["--config", str(CONFIGS / "qwen3_0.6b.yaml"), "--gpus", "8", "--json", str(file)]
    assert main(arguments) == 0
    full = json.loads(file.read_text())[1]
    assert full["phase"]["name"] == "full"
    assert sum(full["parts"].values()) == full["parameters"]["total"]
    assert full["parts"]["encoder.backbone"] > 4e8
    steps = full["phase"]["end"] - full["phase"]["start"]
    assert full["step_flops"] * steps == pytest.approx(full["flops"])
    assert full["days"] == pytest.approx(full["flops"] / (8 * 312e12 * 0.35) / 86400)
    # Adam and fp32 weights of everything.
    assert full["checkpoint_bytes"] == pytest.approx(12 * full["parameters"]["total"], rel=0.01)


def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    found = plan(load_config(CONFIGS / "tiny_rqvae.yaml"), 2)[1].largest_micro_batch

    def fits(size: int) -> bool:
        overrides = [f"train.micro_batch_size={size}", f"train.global_batch_size={2 * size}"]
        return (
            plan(load_config(CONFIGS / "tiny_rqvae.yaml", overrides=overrides), 2)[1].memory.peak <= 40 * GIB
        )

    assert 0 < found[40] < found[80] < found[141]
    assert fits(found[40])
    assert not fits(found[40] + 1)
