"""Codes of two datasets, encoded and trained on together by two ranks, one sample of them damaged."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import StepLoader
from data_pipeline.codes import code_shard_name
from launch import precompute_codes
from launch.config import load_config
from launch.paths import source_directories
from launch.tasks import RQTransformerTask
from tests.integration.conftest import NANO, launcher, run
from tests.integration.test_codes import identity


@pytest.mark.slow
def test_a_mixture_of_codes_is_encoded_and_trained_on(
    nano_corpus: Path, nano_data: list[str], tmp_path: Path
) -> None:
    first = nano_data[0].partition("=")[2]
    tokenizer = f"data.tokenizer={{kind: pretrained, path: {first}/tokenizer, eos_token: <|endoftext|>}}"
    other = [
        f"data.directory={tmp_path / 'other'}",
        f"data.source.paths={nano_corpus}",
        "data.seed=1",
        tokenizer,
    ]
    built = run([sys.executable, "-m", "data_pipeline", "build", "--config", str(NANO), *other])
    assert built.returncode == 0, built.stderr

    sources = (
        f"[{{directory: {first}, weight: 3, name: main}}, {{directory: {tmp_path / 'other'}, weight: 1}}]"
    )
    overrides = identity(
        [*nano_data, f"data.mixture={sources}", "data.shuffle_block=4", "name=mixed"], tmp_path
    )
    assert precompute_codes.main(["--config", str(NANO), *overrides]) == 0
    config = load_config(NANO, stage="rq_transformer", overrides=overrides)
    dataset = RQTransformerTask(config).dataset("train")
    options = {"shuffle_block": config.data.shuffle_block, "shuffle_window": config.data.shuffle_window}
    plan = StepLoader(dataset, global_batch_size=8, seed=config.seed, **options)
    damaged = int(plan.indices(2)[0])
    codes = source_directories(config)["main"][1] / "train" / f"{code_shard_name(0)}.tar"
    content = bytearray(codes.read_bytes())
    row = dataset.read([damaged])["codes"].numpy().astype("<u2").tobytes()
    content[content.index(row)] ^= 1
    codes.write_bytes(content)

    settings = ["train.steps=6", "train.warmup_steps=2", "train.num_workers=1", "train.worker_kind=process"]
    command = [*launcher(2), "--config", str(NANO), "--stage", "rq_transformer", *overrides, *settings]
    stopped = run(command)
    assert stopped.returncode != 0
    assert f"{codes}: sample" in stopped.stdout + stopped.stderr

    finished = run([*command, "data.on_corrupt=replace"])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "takes its place" in finished.stdout + finished.stderr
    directory = tmp_path / "mixed/rq_transformer"
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["split"] == "train"]
    assert [line["data/source_main_samples"] for line in trained] == [18, 36]
    assert [line["data/source_other_samples"] for line in trained] == [6, 12]
    assert [line["data/replaced_samples"] for line in trained] == [1, 1]
    assert any(line["split"] == "validation" for line in lines)
    state = json.loads((directory / "checkpoints/step-00000006/COMPLETE.json").read_text())["state"]["loader"]
    assert state["source_samples"] == {"main": 36, "other": 12}
    assert (state["replaced_samples"], state["shuffle_block"]) == (1, [4, 1024])
    assert np.isfinite([line["loss"] for line in lines]).all()
