"""Codes of two datasets, encoded and trained on together by two ranks, one sample of them damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline import MixtureDataset, StepLoader, build
from data_pipeline.codes import code_shard_name
from launch import precompute_codes
from launch.config import load_config
from launch.latent_task import RQTransformerTask
from launch.paths import codes_directory, run_directory, source_directories
from launch.tasks import BaseLMTask
from tests.integration.conftest import NANO, launcher, run
from tests.integration.test_codes import identity


@pytest.fixture(scope="module")
def mixed(nano_corpus: Path, nano_data: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a project on two sources, `main` and `other`, both encoded by the identity codec."""
    root = tmp_path_factory.mktemp("mixed")
    first = nano_data[0].partition("=")[2]
    tokenizer = f"data.tokenizer={{kind: pretrained, path: {first}/tokenizer, eos_token: <|endoftext|>}}"
    other = [f"data.directory={root / 'other'}", f"data.source.paths={nano_corpus}", "data.seed=1", tokenizer]
    build(load_config(NANO, overrides=other).data, num_workers=1)
    sources = f"[{{directory: {first}, weight: 3, name: main}}, {{directory: {root / 'other'}, weight: 1}}]"
    overrides = identity([*nano_data, f"data.mixture={sources}", "data.shuffle_block=4", "name=mixed"], root)
    assert precompute_codes.main(["--config", str(NANO), *overrides]) == 0
    return overrides


def test_every_source_is_encoded_by_itself_and_read_together(mixed: list[str]) -> None:
    config = load_config(NANO, stage="rq_transformer", overrides=mixed)
    task = RQTransformerTask(config)
    dataset = task.dataset("train")
    assert isinstance(dataset, MixtureDataset)
    task.check_data(dataset)
    assert task.create_model().config.codec_hash == task.any_part().codec_hash
    directories = {name: codes for name, (_, codes) in source_directories(config).items()}
    assert directories == {name: codes_directory(config) / name for name in ("main", "other")}
    batch = dataset.read([0, len(dataset.parts["main"]) + 5])
    real = batch["document_ids"] > 0
    assert torch.equal(batch["codes"].flatten(1)[real], batch["input_ids"][real])
    tokens = BaseLMTask(config.for_stage("base_lm")).dataset("validation")
    assert isinstance(tokens, MixtureDataset)
    assert list(tokens.parts) == ["main", "other"]


@pytest.mark.slow
def test_two_ranks_train_on_a_mixture_with_a_damaged_sample(mixed: list[str]) -> None:
    config = load_config(NANO, stage="rq_transformer", overrides=mixed)
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
    command = [*launcher(2), "--config", str(NANO), "--stage", "rq_transformer", *mixed, *settings]
    stopped = run(command)
    assert stopped.returncode != 0
    assert f"{codes}: sample" in stopped.stdout + stopped.stderr

    finished = run([*command, "data.on_corrupt=replace"])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "takes its place" in finished.stdout + finished.stderr
    directory = run_directory(config, "rq_transformer")
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
