"""Codec and latent model trained together, by real processes, to two models that belong together."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rqvae import load_codec, load_latent_model
from tests.integration.conftest import NANO, launcher, records, run

SETTINGS = [
    "--stage",
    "joint",
    "stages.joint.frozen_steps=4",
    "stages.joint.quantizer_warmup_steps=6",
    "stages.joint.rate_warmup_steps=6",
    "stages.joint.free_nats=0.1",
    "codec.quantizer.threshold_ema_dead_code=0",
]


@pytest.mark.slow  # two trainings; the parts are unit tests
def test_the_stage_joint_gives_a_codec_and_its_latent_model(tmp_path: Path, nano_data: list[str]) -> None:
    settings = ["--config", str(NANO), *SETTINGS, f"run_root={tmp_path}", *nano_data]
    for name, program in (("two", launcher(2)), ("one", [sys.executable, "launch/train.py"])):
        result = run([*program, *settings, f"name={name}"])
        assert result.returncode == 0, result.stdout + result.stderr
    assert f"{tmp_path}/two/model --to safetensors" in result.stdout.replace("/one/", "/two/")
    two, one = (records(tmp_path / f"{name}/joint/metrics.jsonl") for name in ("two", "one"))
    for ours, theirs in zip(two, one, strict=True):
        # Sooner or later a draw lies on the border of two codes, and falls to either when sums are in another order;
        # with three entries a code, that moves a codebook.
        close = 5e-5 if ours["step"] < 10 else 5e-2
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=close)
    # Nothing is coded at first; then codes cost what the prior makes of them, level by level.
    assert "bound" not in two[0]
    last = two[-1]
    levels = sum(last[f"codes/divergence_{level}"] for level in range(3))
    assert last["bound"] == pytest.approx(last["nats_per_token"] + last["divergence_per_token"])
    assert levels > 0
    assert last["loss"] > last["nats_per_token"]

    models = tmp_path / "two/model"
    convert = [sys.executable, "launch/convert_checkpoint.py", str(tmp_path / "two/joint"), str(models)]
    converted = run([*convert, "--to", "safetensors"])
    assert converted.returncode == 0, converted.stderr
    codec, latent_model = load_codec(models / "rqvae"), load_latent_model(models / "rq_transformer")
    assert latent_model.config.codec_hash == codec.codec_hash()
    again = run([*convert, "--to", "safetensors"])
    assert again.returncode == 2
    assert "is not empty" in again.stderr

    evaluate = [sys.executable, "launch/eval.py", "--model", str(models)]
    data = nano_data[0].removeprefix("data.directory=")
    report = tmp_path / "report.json"
    scored = run(
        [
            *[*evaluate, "--data", data, "--json", str(report), "--config", str(NANO)],
            *["evaluation.stochastic_codes=true", "evaluation.brier_documents=0", f"run_root={tmp_path}"],
            "name=two",
        ]
    )
    assert scored.returncode == 0, scored.stderr
    assert '"stochastic_bound"' in report.read_text()


def test_certain_codes_are_refused(tmp_path: Path) -> None:
    result = run(
        [
            *[sys.executable, "launch/train.py", "--config", "configs/tiny.yaml"],
            *["--stage", "joint", f"run_root={tmp_path}"],
        ]
    )
    assert result.returncode == 2
    assert "anchor has certain codes" in result.stderr
